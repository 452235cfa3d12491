"""A compiled model as an ordinary transformers model whose linear layers stay packed: to train adapters on, for one."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcompiler.errors import InputError
from qcompiler.export import checkpoint_of
from qcompiler.formats.checkpoint import Checkpoint, Rounding
from qcompiler.rounding import fake_quantize
from qcompiler.scheme import QTensor
from qcompiler.session import Session
from qcompiler.skeleton import Skeleton


class _ReadOnly(Tensor):
    """A decoded weight. What is written into `data`, as merging an adapter does, would be lost without a word."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        raise InputError(
            "the weight of a packed layer can be read, not changed; to merge an adapter, load it onto "
            "to_torch(session, dequantize=True)"
        )

    @data.setter
    def data(self, value: Tensor) -> None:
        raise InputError("the weight of a packed layer can be read, not changed")


class QuantizedLinear(nn.Linear):
    """A linear layer over a quantized weight, differentiable with respect to its input; the codes never change.

    The parts of the record are buffers (`packed_codes`, `packed_scale`, ...). The weight is decoded when it is needed
    and again for the gradient: between the two no float weight is kept. `weight` gives the decoded values to read;
    writing to them is an error, for it would be lost.
    """

    def __init__(self, record: QTensor, bias: Tensor | None = None, rounding: Rounding | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = record.shape
        self.spec, self.names = record.spec(), []
        for name, part in record.parts().items():
            self.names.append(f"packed_{name.replace('.', '_')}")
            self.register_buffer(self.names[-1], part)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.scheme = str(rounding.scheme) if rounding else ""
        for name, part in zip(("scale", "zero"), rounding.grid if rounding else (), strict=False):
            self.register_buffer(f"input_{name}", part)

    @property
    def record(self) -> QTensor:
        """The quantized weight."""
        return QTensor.from_parts([getattr(self, name) for name in self.names], self.spec)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The decoded weight [n, k], to read."""
        return self.record.dequantize().as_subclass(_ReadOnly)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., k] times the weight transposed, plus bias; returns [..., n]."""
        if self.scheme:
            grid = [getattr(self, name) for name in ("input_scale", "input_zero") if hasattr(self, name)]
            x = fake_quantize(x, grid, scheme=self.scheme)
        found = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        assert isinstance(found, Tensor)
        return found if self.bias is None else found + self.bias.to(found.dtype)

    def extra_repr(self) -> str:
        """Sizes and scheme, as print shows them."""
        kind = self.record.scheme
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kind}"


class _Product(torch.autograd.Function):
    """x W': the backward pass decodes W again rather than keep it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.record.dequantize().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.record.dequantize().to(gradient.dtype), None


def to_torch(session: Session, dequantize: bool = False) -> nn.Module:
    """The transformers model of a compiled one, in float32, with `QuantizedLinear` in the place of quantized layers.

    PEFT attaches LoRA to it as to any other model. `dequantize` gives plain linear layers with the same values, into
    which PEFT can merge an adapter. Raises InputError for a program that no transformers model stands for.
    """
    checkpoint = checkpoint_of(session.program)
    skeleton = Skeleton.of(checkpoint.config, len(checkpoint.tensors))
    model = skeleton.model
    for name in checkpoint.tensors:
        value = checkpoint.tensors[name]
        if isinstance(value, QTensor) and name in skeleton.linears and not dequantize:
            _place_layer(model, name, value, checkpoint)
        else:
            _place(model, name, value.dequantize() if isinstance(value, QTensor) else value)
    model.tie_weights()  # type: ignore[operator]
    _make_buffers(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if left := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise InputError(f'the compiled model has no values for "{left[0]}"')
    return model.eval()


def _place_layer(model: nn.Module, name: str, record: QTensor, checkpoint: Checkpoint) -> None:
    """Put a quantized layer in the place of a linear one."""
    path, _, last = name.removesuffix(".weight").rpartition(".")
    bias = checkpoint.tensors.get(f"{name.removesuffix('.weight')}.bias")
    assert not isinstance(bias, QTensor)
    layer = QuantizedLinear(record.with_parts(dtype=torch.float32), bias, checkpoint.inputs.get(name))
    setattr(model.get_submodule(path), last, layer)


def _place(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a float tensor in its place: a parameter, or a buffer that is saved."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    value = value.float() if value.is_floating_point() else value
    if last in module._buffers:
        module._buffers[last] = value
    elif not (last == "bias" and isinstance(module, QuantizedLinear)):
        setattr(module, last, nn.Parameter(value.clone(), requires_grad=False))


def _make_buffers(model: nn.Module) -> None:
    """Compute the buffers that are not saved, such as rotary frequencies, as transformers does when it loads."""
    for module in model.modules():
        if any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
            module.to_empty(device="cpu", recurse=False)
            model._init_weights(module)  # type: ignore[operator]
