"""distill: what rounding left free is tuned end to end, until the model answers as the float model does.

After EfficientQAT's second phase (Chen et al., arXiv 2407.11062, section 3.3), where the codes stay and the scales are
trained through the whole model, with the float model's predictions as the target (LLM-QAT, Liu et al., arXiv
2305.17888, section 2.2): no text is needed but what calibrates. Layers that were quantized one by one learn what the
others do.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompiler.calibration import Sample
from qcompiler.errors import No, PassError, RecipeError
from qcompiler.execution import execute
from qcompiler.passes.block_tune import differentiable, pieces
from qcompiler.passes.reference import over_tokens, relative_error, unrounded
from qcompiler.passes.selection import NORMS
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.rewrite import named_arguments
from qcompiler.scheme import QTensor, by_group

WARM_UP = 8  # steps in which the rate rises
JUDGES = 4  # batches on which the end is compared with the beginning


@dataclass(frozen=True)
class Distill(Pass):
    """Tune the scales of quantized tensors, and with `norms` the weights and biases of norms and layers too.

    `steps` times `batch` calibration sequences run through the float and the quantized program. What is minimized is
    the KL divergence of the predictions in nats a token, for models without logits each row's squared error relative
    to its size. Each number moves by about `rate` of itself a step (Adam; the rate rises over the first steps and
    falls to zero along a cosine). The codes stay as they are. If the end is no better than the beginning, everything
    does. In memory are the float weights, those decoded, and one batch's activations of all layers.
    """

    name: ClassVar[str] = "distill"
    contract: ClassVar[Contract] = Contract.LOSSY
    wants_floats: ClassVar[bool] = True

    steps: int = 128
    batch: int = 2
    rate: float = 0.002
    norms: bool = True

    @property
    def uses_data(self) -> bool:
        return self.steps > 0

    def plan(self) -> Pass:
        return Distill(steps=0)

    def run(self, program: Program, ctx: Context) -> None:
        if self.steps < 0 or self.batch < 1 or not 0 < self.rate < 1:
            raise RecipeError(
                f"steps={self.steps} batch={self.batch} rate={self.rate}: at least one sequence, a rate in (0, 1)"
            )
        if not self.steps:
            return
        if not ctx.samples:
            raise PassError("it needs calibration data; give calibration=...")
        if not program.quantized or ctx.floats is None:
            ctx.refuse(No("nothing was quantized from floats before it; put it after gptq, rtn or the like"))
            return
        student = Student(program, self.norms, ctx)
        teacher = differentiable(unrounded(ctx.floats))
        samples = list(pieces(ctx.samples, self.batch))
        judges = samples[:: max(1, len(samples) // JUDGES)][:JUDGES]
        before = sum(divergence(teacher, student, sample) for sample in judges) / len(judges)
        self._descend(teacher, student, samples, ctx)
        after = sum(divergence(teacher, student, sample) for sample in judges) / len(judges)
        ctx.note(f"divergence from the float model: {before:.3g} -> {after:.3g}")
        if after < before:
            student.write(program)
        else:
            ctx.refuse(No("tuning made it no better: everything stays as it was; a smaller rate may help"))

    def _descend(self, teacher: Program, student: "Student", samples: Sequence[Sample], ctx: Context) -> None:
        """Adam, each step on one batch."""
        optimizer = torch.optim.Adam(student.moves.values(), lr=self.rate, betas=(0.9, 0.95))
        order = torch.randperm(self.steps, generator=ctx.generator()) % len(samples)
        for step, i in enumerate(order.tolist()):
            ctx.progress("distilling", step, self.steps)
            rising, falling = min(1.0, (step + 1) / WARM_UP), (1 + math.cos(math.pi * step / self.steps)) / 2
            optimizer.param_groups[0]["lr"] = self.rate * rising * falling
            wanted = outputs(teacher, samples[i], teacher.tensors)
            with torch.enable_grad():
                found = outputs(student.program, samples[i], student.tensors())
                distance(found, wanted, samples[i]).backward()
            optimizer.step()
            optimizer.zero_grad()
        ctx.progress("distilling", self.steps, self.steps)


class Student:
    """A program with its quantized tensors decoded, each of their groups times 1 + a number with a gradient."""

    def __init__(self, program: Program, norms: bool, ctx: Context) -> None:
        self.program = differentiable(program)
        self.records = dict(_records(program, ctx))
        self.vectors = list(_vectors(self.program)) if norms else []
        moved = {name: q.scale for name, q in self.records.items()}
        moved |= {name: self.program.tensors[name] for name in self.vectors}
        self.moves = {
            name: torch.zeros(tensor.shape, dtype=torch.float32, requires_grad=True)
            for name, tensor in moved.items()
            if isinstance(tensor, Tensor)
        }

    def tensors(self) -> dict[str, Tensor]:
        """All that the program stores, as it is moved by now."""
        stored = dict(self.program.tensors)
        for name, move in self.moves.items():
            if name in self.records:
                q = self.records[name]
                size = q.scheme.group_of(q.columns)
                stored[name] = _Scaled.apply(stored[name], move, q.columns, size)  # type: ignore[no-untyped-call]
            else:
                stored[name] = (stored[name].float() * (1 + move)).to(stored[name].dtype)
        return stored

    def write(self, program: Program) -> None:
        """Store the moved numbers in `program`."""
        for name, q in self.records.items():
            assert isinstance(q.scale, Tensor)
            scale = (q.scale.float() * (1 + self.moves[name].detach())).to(q.scale.dtype)
            program.replace_qtensor(name, q.with_parts(scale=scale))
        tensors = self.tensors()
        for name in self.vectors:
            program.tensors[name] = tensors[name].detach()


class _Scaled(torch.autograd.Function):
    """A weight, seen as rows of k, with each group of `size` times 1 + move [rows, groups]; only the weight is kept."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, move: Tensor, columns: int, size: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.columns, ctx.size = columns, size
        moved = by_group(weight.reshape(-1, columns), size) * (1 + move)[..., None]
        return moved.flatten(1)[:, :columns].reshape(weight.shape).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        product = gradients[0].float() * weight.float()
        return None, by_group(product.reshape(-1, ctx.columns), ctx.size).sum(-1), None, None


def _records(program: Program, ctx: Context) -> Iterator[tuple[str, QTensor]]:
    """The quantized tensors that are a scale times something, group by group of neighbouring columns."""
    for name in program.quantized:
        q = program.qtensor(name)
        plain = q.minimum is None and q.permutation is None and q.boundaries is None
        if isinstance(q.scale, Tensor) and plain and q.axis in (None, -1, len(q.shape) - 1):
            yield name, q
        else:
            ctx.refuse(No("its groups are not one stored scale times their codes: it stays as it is", name))


def _vectors(program: Program) -> Iterator[str]:
    """The names of the weights and biases of norms, and of the biases of linear layers."""
    for node in program.calls(torch.ops.aten.linear.default, *NORMS):
        given = named_arguments(node)
        for part in ("weight", "bias"):
            source = given.get(part)
            if isinstance(source, fx.Node) and source.op == "get_attr":
                tensor = program.tensors[str(source.target)]
                if tensor.dim() == 1 and tensor.is_floating_point():
                    yield str(source.target)


def outputs(program: Program, sample: Sample, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float outputs of a program on a sample, with these stored tensors."""
    env = program.bind(sample)
    execute(program.graph.nodes, env, tensors)
    found = dict(zip(program.outputs, env[program.output_node], strict=True))
    return {name: value for name, value in found.items() if value.is_floating_point()}


def distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], sample: Sample) -> Tensor:
    """KL divergence of the logits in nats a token; of other outputs the squared error relative to each row's size."""
    if "logits" in wanted:
        p, q = wanted["logits"].float().log_softmax(-1), found["logits"].float().log_softmax(-1)
        return over_tokens((p.exp() * (p - q)).sum(-1), sample)
    total = torch.zeros(())
    for name, value in wanted.items():
        total = total + relative_error(found[name], value, sample)
    return total / max(1, len(wanted))


def divergence(teacher: Program, student: Student, sample: Sample) -> float:
    """How far the student is from the teacher on a sample."""
    wanted = outputs(teacher, sample, teacher.tensors)
    return float(distance(outputs(student.program, sample, student.tensors()), wanted, sample))
