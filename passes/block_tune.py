"""block_tune: rounding and scales of a block's weights are tuned together, against what the float block gives.

After SignRound (Cheng et al., arXiv 2309.05516) and OmniQuant (Shao et al., arXiv 2308.13137): a whole block is run
with its weights and activations rounded, and signed gradient descent moves the weights' codes and scales so that its
output comes closer to the float model's. It makes up for what layer-wise methods cannot see: errors of one layer that
another one can undo, and rounded activations in between.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompiler import calibration, ops
from qcompiler.bits import pack_bits
from qcompiler.calibration import Needs, Sample, Segment
from qcompiler.errors import PassError, RecipeError
from qcompiler.execution import execute
from qcompiler.passes.gptq import Gptq
from qcompiler.passes.reference import outputs, relative_error, unrounded
from qcompiler.passes.rtn import Rtn, layer_record
from qcompiler.passes.selection import BODY, check_coverage, select, weight_name
from qcompiler.passes.statistics import Hessian
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.rounding import straight_through
from qcompiler.scheme import QTensor, Scheme, by_group
from qcompiler.spill import Spill

STARTS = ("gptq", "rtn")


@dataclass(frozen=True)
class BlockTune(Pass):
    """Quantize linear layers block by block, then tune their codes and scales on the block's output.

    Each block starts from gptq's codes (or rtn's: SignRound as published), on inputs that went through the tuned
    blocks before it. `steps` times `batch` calibration sequences run through it; each weight's place between its codes
    moves by at most `rate` a step (falling to 0; 0 stands for 1 / steps, as in the paper), each scale by `scale_rate`
    of itself. The error is that of each token relative to the token's own size, where the papers take the plain mean
    square: a massive first token (arXiv 2402.17762) would be all that counts. A block that ends no better than it
    began keeps what it began with.
    """

    name: ClassVar[str] = "block_tune"
    contract: ClassVar[Contract] = Contract.LOSSY

    scheme: Scheme = Scheme.parse("int4:g128")
    include: tuple[str, ...] = (BODY,)
    exclude: tuple[str, ...] = ()
    start: str = "gptq"
    steps: int = 200
    batch: int = 2
    rate: float = 0.0
    scale_rate: float = 0.001
    min_coverage: float = 1.0

    @property
    def uses_data(self) -> bool:
        return True

    def plan(self) -> Pass:
        return Rtn(self.scheme, self.include, self.exclude, self.min_coverage)

    def run(self, program: Program, ctx: Context) -> None:
        """Two sweeps side by side: the program as it becomes, and as it was without any rounded activation."""
        if self.start not in STARTS:
            raise RecipeError(f'start "{self.start}" is none of {", ".join(STARTS)}')
        if self.steps < 1 or self.batch < 1:
            raise RecipeError(
                f"steps={self.steps} batch={self.batch}: at least 1 of each; for the start alone use gptq"
            )
        if not ctx.samples:
            raise PassError("it needs calibration data; give calibration=..., or use rtn, which needs none")
        samples = list(pieces(ctx.samples, self.batch))
        chosen = dict.fromkeys(weight_name(node) for node in select(program, self.include, self.exclude, ctx))
        journal = ctx.journal.of(str(self), program, ctx.samples, ctx.seed)
        floats, tuned = unrounded(program), differentiable(program)

        def needs(nodes: Sequence[fx.Node]) -> Needs:
            layers = [] if self.start == "rtn" else _layers(nodes, chosen)
            return {node.name: Hessian() for node in layers if not journal.has(node)}

        done = 0
        reference = calibration.sweep(floats, samples, lambda nodes: {})
        for segment, target in zip(calibration.sweep(tuned, samples, needs, ctx.progress), reference, strict=True):
            found = journal.get(segment.index)
            if found is None:
                found = self._segment(Block(segment, target, tuned, floats, samples), chosen, ctx)
                journal.put(segment.index, found)
            for name, q in found.items():
                ctx.layer(layer_record(name, program.tensors[name], q, self.name))
                tuned.tensors[name] = q.dequantize()
                program.quantize_tensor(name, q)
            done += len(found)
        check_coverage(len(chosen), done, self.min_coverage)

    def _segment(self, block: "Block", chosen: Mapping[str, None], ctx: Context) -> dict[str, QTensor]:
        """The quantized weights of one block."""
        if self.start == "gptq":
            begin = Gptq(self.scheme).segment(block.program, block.segment, ctx)[0]
        else:
            names = map(weight_name, _layers(block.segment.nodes, chosen))
            begin = {name: QTensor.quantize(block.program.tensors[name], self.scheme) for name in names}
        if not begin or not block.outputs:
            return begin
        weights = {name: Soft(q, block.program.tensors[name]) for name, q in begin.items()}
        before = block.loss({name: q.dequantize() for name, q in begin.items()})
        self._descend(block, weights, ctx)
        end = {name: soft.hard() for name, soft in weights.items()}
        after = block.loss({name: q.dequantize() for name, q in end.items()})
        ctx.note(f"block {block.segment.index}: relative error {before**0.5:.4f} -> {min(before, after) ** 0.5:.4f}")
        return end if after < before else begin

    def _descend(self, block: "Block", weights: Mapping[str, "Soft"], ctx: Context) -> None:
        """Signed gradient descent, the rate falling linearly to zero."""
        order = torch.randperm(self.steps, generator=ctx.generator()) % len(block.samples)
        for step, i in enumerate(order.tolist()):
            left = 1 - step / self.steps
            with torch.enable_grad():
                block.error(i, {name: weight() for name, weight in weights.items()}).backward()
            for weight in weights.values():
                weight.step((self.rate or 1 / self.steps) * left, self.scale_rate * left)


class Soft:
    """A quantized weight whose places between codes, and whose scales, have gradients."""

    def __init__(self, q: QTensor, weight: Tensor) -> None:
        assert isinstance(q.scale, Tensor)
        self.q, self.size, self.top = q, q.scheme.group_of(q.columns), q.scheme.levels - 1
        self.scale = q.scale.float().clone().requires_grad_()
        self.zero = q.zero.float()[..., None] if q.zero is not None else float(q.scheme.levels >> 1)
        codes = by_group(q.unpacked().float(), self.size)
        exact = by_group(weight.float(), self.size) / q.scale.float()[..., None] + self.zero
        # Where the weight really lies between the codes, or just inside the cell of the code that gptq gave it.
        self.place = exact.clamp(codes - 0.49, codes + 0.49).requires_grad_()

    def __call__(self) -> Tensor:
        """The weight [n, k] that the codes stand for, with gradients, in its own dtype."""
        codes = straight_through(self.place, self._codes())
        return ((codes - self.zero) * self.scale[..., None]).flatten(1)[:, : self.q.columns].to(self.q.dtype)

    def _codes(self) -> Tensor:
        return self.place.detach().round().clamp_(0, self.top)

    @torch.no_grad()
    def step(self, rate: float, scale_rate: float) -> None:
        """Move against the sign of the gradients, and forget these."""
        assert self.place.grad is not None
        assert self.scale.grad is not None
        self.place -= rate * self.place.grad.sign()
        self.scale *= 1 - scale_rate * (self.scale.grad * self.scale).sign()  # a scale may be negative
        self.place.grad = self.scale.grad = None

    def hard(self) -> QTensor:
        """The record to store."""
        codes = self._codes().flatten(1)[:, : self.q.columns].to(torch.uint8)
        assert isinstance(self.q.scale, Tensor)
        return self.q.with_parts(
            codes=pack_bits(codes.contiguous(), self.q.scheme.bits), scale=self.scale.detach().to(self.q.scale.dtype)
        )


class Block:
    """A segment with its inputs, and what the float program makes of its own: how far from it are some weights?"""

    def __init__(
        self, segment: Segment, target: Segment, program: Program, floats: Program, samples: Sequence[Sample]
    ) -> None:
        self.segment, self.program, self.samples = segment, program, samples
        self.outputs = list(outputs(segment.nodes))
        wanted = list(outputs(target.nodes))
        if len(wanted) != len(self.outputs):
            raise PassError(f"block {segment.index} has other outputs with rounded activations than without")
        self.wanted, self.targets = wanted, Spill()
        for env in target.inputs:
            execute(target.nodes, env, floats.tensors)
            self.targets.append({node: env[node] for node in wanted})

    def error(self, i: int, weights: Mapping[str, Tensor]) -> Tensor:
        """The mean squared error on sample i relative to each token's energy, for these weights."""
        env, targets = self.segment.inputs[i], self.targets[i]
        execute(self.segment.nodes, env, {**self.program.tensors, **weights})
        total = torch.zeros(())
        for node, target in zip(self.outputs, self.wanted, strict=True):
            total = total + relative_error(env[node], targets[target], self.samples[i])
        return total / len(self.outputs)

    def loss(self, weights: Mapping[str, Tensor]) -> float:
        """The same over all samples."""
        return sum(float(self.error(i, weights)) for i in range(len(self.samples))) / len(self.samples)


def pieces(samples: Sequence[Sample], batch: int) -> Iterator[Sample]:
    """The same sequences in smaller batches.

    >>> [piece["ids"].shape[0] for piece in pieces([{"ids": torch.zeros(5, 8)}], 2)]
    [2, 2, 1]
    """
    for sample in samples:
        rows = max(value.shape[0] for value in sample.values())
        for start in range(0, rows, batch):
            yield {k: v[start : start + batch] if v.shape[0] == rows else v for k, v in sample.items()}


def _layers(nodes: Sequence[fx.Node], chosen: Mapping[str, None]) -> list[fx.Node]:
    return [n for n in nodes if n.target is torch.ops.aten.linear.default and weight_name(n) in chosen]


def differentiable(program: Program) -> Program:
    """A copy, its quantized tensors decoded, that calls qc operators by their meanings: PyTorch sees inside."""
    copy = program.decoded()
    for node in copy.calls():
        node.target = ops.meaning(node.target)
    return copy
