"""Running the ONNX files: whole calls, and decoding over cache buffers that are bound once."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from qcompiler.backends.onnxruntime.decoder import LENGTHS
from qcompiler.backends.onnxruntime.graph import METADATA, MODEL
from qcompiler.errors import BackendError
from qcompiler.program import Program, Type
from qcompiler.target import NO_CACHE, Decoder, Runner

DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
    "tensor(bool)": torch.bool,
}


def open_session(path: Path, threads: int | None) -> ort.InferenceSession:
    """An ONNX Runtime session on the CPU; BackendError if ONNX Runtime refuses the file."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises classes of its own, without a common parent
        raise BackendError(f"ONNX Runtime does not open {path.name}: {error}") from error


class OnnxRunner(Runner):
    """A program in an ONNX Runtime session."""

    def __init__(
        self,
        program: Program,
        folder: Path,
        threads: int | None,
        temporary: "tempfile.TemporaryDirectory[str] | None" = None,
    ) -> None:
        self.program = program
        self.session = open_session(folder / MODEL, threads)
        self.inputs = [i.name for i in self.session.get_inputs()]
        held = {i.name: DTYPES[i.type] for i in self.session.get_inputs()}
        widths = {i.name: i.shape[-1] for i in self.session.get_inputs() if i.shape}
        self.caches = {  # in the types in which the graph holds them: a cache of codes is no float tensor
            spec.name: Type((*spec.type.shape[:-1], widths[spec.name]), held[spec.name])
            for spec in program.caches
            if spec.name in held
        }
        self.about: dict[str, Any] = json.loads(self.session.get_modelmeta().custom_metadata_map.get(METADATA, "{}"))
        self._temporary = temporary  # removed with the runner

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs for the given inputs; BackendError for padding or positions that the graph cannot take."""
        values = {str(n.target): v for n, v in self.program.bind(inputs).items()}
        batch = values[self.program.inputs[0].name].shape[0]
        values |= {name: empty(kind, batch, 0) for name, kind in self.caches.items() if name not in inputs}
        self._check(values, inputs)
        past, ids = self.program.past_length(inputs), values[self.program.inputs[0].name]
        feeds = {name: as_numpy(values[name]) for name in self.inputs if name in values}
        if LENGTHS[0] in self.inputs:
            new = ids.shape[1]
            self.check_positions(past + new)
            if past and new > 1 and batch > 1:
                return self._in_steps(inputs, new)
            feeds |= lengths(batch, past + new)
        found = self.session.run(list(self.program.outputs), feeds)
        return {name: torch.from_numpy(value) for name, value in zip(self.program.outputs, found, strict=True)}

    def _check(self, values: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> None:
        """GroupQueryAttention counts positions itself: what it is not told must be what it assumes."""
        if LENGTHS[0] not in self.inputs:
            return
        mask = values.get("attention_mask")
        if mask is not None and not bool((mask != 0).all()):
            raise BackendError(
                "this program was lowered without padding: its attention mask must be all ones; "
                "give sequences of equal length, or lower with OnnxRuntime(padding=True)"
            )
        if "position_ids" in inputs and "position_ids" not in self.inputs:
            past, ids = self.program.past_length(inputs), values["position_ids"]
            if not bool((ids == torch.arange(past, past + ids.shape[1])).all()):
                raise BackendError(
                    "this program was lowered for positions counted from the past; "
                    "leave position_ids out, or lower with OnnxRuntime(padding=True)"
                )

    def check_positions(self, count: int) -> None:
        """BackendError if there may be more positions than the rotary tables hold."""
        limit = self.about.get("max_positions", count)
        if count > limit:
            raise BackendError(
                f"{count} positions are more than the {limit} this program was lowered for; "
                f"lower it with OnnxRuntime(max_positions={count})"
            )

    def _in_steps(self, inputs: Mapping[str, Tensor], new: int) -> dict[str, Tensor]:
        """New positions over a past, one by one: GroupQueryAttention takes several for one sequence only."""
        first, state = self.program.inputs[0].name, dict(inputs)
        wanted = state.pop("logits_positions", None)
        state.pop("attention_mask", None)
        state.pop("position_ids", None)
        found = []
        for step in range(new):
            outputs = self(state | {first: inputs[first][:, step : step + 1]})
            state |= self.program.cache_updates(outputs)
            found.append(outputs["logits"])
        logits = torch.cat(found, dim=1)
        return outputs | {"logits": logits if wanted is None else logits[:, wanted]}

    def decoder(self, batch: int, capacity: int) -> Decoder:
        """A fresh generation; BackendError if the program has no cache."""
        if not self.program.caches:
            raise BackendError(NO_CACHE)
        if LENGTHS[0] in self.inputs and "attention_mask" not in self.inputs:
            self.check_positions(capacity)
            return SharedDecoder(self, batch, capacity)
        return GrowingDecoder(self, batch, capacity)

    def details(self) -> dict[str, Any]:
        """Threads, version, operators by count, kernels and refusals."""
        threads = self.session.get_session_options().intra_op_num_threads
        return {"onnxruntime": ort.__version__, "threads": threads, **self.about}


class SharedDecoder(Decoder):
    """Decoding in place: each cache is one buffer of full capacity, past and present at once."""

    def __init__(self, runner: OnnxRunner, batch: int, capacity: int) -> None:
        self.runner, self.batch, self.capacity, self.past = runner, batch, capacity, 0
        program = runner.program
        self.caches = {name: empty(kind, batch, capacity) for name, kind in runner.caches.items()}
        self.lengths = {name: torch.from_numpy(value) for name, value in lengths(batch, 1).items()}
        self.kept = torch.zeros(1, dtype=torch.int64)
        self.logits = empty(output_type(program, "logits"), batch, capacity)
        self.ids, self.positions = (torch.zeros((batch, 1), dtype=torch.int64) for _ in range(2))
        self.single = self._bind(self.ids, self.positions)  # made once: binding costs a tenth of a small step

    def _bind(self, ids: Tensor, positions: Tensor) -> ort.IOBinding:
        """A binding of all buffers."""
        program, binding = self.runner.program, self.runner.session.io_binding()
        buffers = {program.inputs[0].name: ids, "position_ids": positions, "logits_positions": self.kept}
        buffers |= self.lengths | self.caches
        for name in self.runner.inputs:
            bind(binding.bind_input, name, buffers[name])
        bind(binding.bind_output, "logits", self.logits)
        for past, present in program.info["caches"].items():
            bind(binding.bind_output, present, self.caches[past])
        return binding

    def step(self, ids: Tensor) -> Tensor:
        """Append ids [batch, new]; returns the logits [batch, vocabulary] of the last position."""
        new = ids.shape[1]
        check_capacity(self.past, new, self.capacity)
        if self.past and new > 1 and self.batch > 1:
            # GroupQueryAttention takes several new positions over a past for one sequence only.
            return [self.step(column) for column in ids.split(1, dim=1)][-1]
        self.kept.fill_(new - 1)
        self.lengths[LENGTHS[0]].fill_(self.past + new - 1)
        self.lengths[LENGTHS[1]].fill_(self.past + new)
        if new == 1:
            self.ids.copy_(ids)
            self.positions.fill_(self.past)
            self.runner.session.run_with_iobinding(self.single)
        else:
            positions = torch.arange(self.past, self.past + new).repeat(self.batch, 1)
            ids = ids.contiguous()
            self.runner.session.run_with_iobinding(self._bind(ids, positions))
        self.past += new
        return torch.from_numpy(self.logits.numpy()[:, 0].copy())  # numpy: see qcompiler/sampling.py


class GrowingDecoder(Decoder):
    """Decoding with caches that are written anew in each step, for attention that is not GroupQueryAttention's."""

    def __init__(self, runner: OnnxRunner, batch: int, capacity: int) -> None:
        self.runner, self.batch, self.capacity, self.past = runner, batch, capacity, 0
        self.caches: dict[str, Tensor] = {}

    def step(self, ids: Tensor) -> Tensor:
        """Append ids [batch, new]; returns the logits [batch, vocabulary] of the last position."""
        new, program = ids.shape[1], self.runner.program
        check_capacity(self.past, new, self.capacity)
        last = torch.tensor([new - 1])
        outputs = self.runner({program.inputs[0].name: ids, "logits_positions": last, **self.caches})
        self.caches = program.cache_updates(outputs)
        self.past += new
        return outputs["logits"][:, -1]


def check_capacity(past: int, new: int, capacity: int) -> None:
    """BackendError if `new` positions after `past` do not fit."""
    if past + new > capacity:
        raise BackendError(f"{past} + {new} positions are more than this decoder's {capacity}; ask for more capacity")


def lengths(batch: int, total: int) -> dict[str, Any]:
    """What GroupQueryAttention wants to know: each sequence's last position, and the longest length."""
    return {LENGTHS[0]: np.full((batch,), total - 1, np.int32), LENGTHS[1]: np.array(total, np.int32)}


def empty(kind: Type, batch: int, capacity: int) -> Tensor:
    """Zeros of a type, with one kept position and room for `capacity` past ones."""
    sizes = {"batch": batch, "past": capacity, "kept": 1}
    shape = [sizes[size] if isinstance(size, str) else size for size in kind.shape]
    return torch.zeros(shape, dtype=kind.dtype)


def output_type(program: Program, name: str) -> Type:
    """The type of an output."""
    values: Any = program.output_node.args[0]
    kind = values[program.outputs.index(name)].meta["type"]
    assert isinstance(kind, Type)
    return kind


def as_numpy(tensor: Tensor) -> Any:
    """A tensor's memory as a contiguous numpy array."""
    return np.ascontiguousarray(tensor.detach().numpy())


def bind(how: Any, name: str, tensor: Tensor) -> None:
    """Bind a tensor's memory as an input or an output; the tensor must outlive the binding."""
    how(name, "cpu", 0, tensor.numpy().dtype, tuple(tensor.shape), tensor.data_ptr())
