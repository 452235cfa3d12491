"""TritonRunner and TritonDecoder: a lowered program called at any sizes, and step by step over caches of fixed size."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qcompiler.backends.triton.caches import Caches
from qcompiler.backends.triton.lowering import Lowered
from qcompiler.backends.triton.step import fixed_step
from qcompiler.errors import BackendError, No
from qcompiler.program import Program
from qcompiler.target import NO_CACHE, Decoder, GrowingDecoder, Runner

if TYPE_CHECKING:
    from qcompiler.backends.triton.backend import Triton


class TritonRunner(Runner):
    """A program on a device; inputs may lie anywhere, outputs lie where the first input does."""

    def __init__(self, lowered: Lowered, options: "Triton") -> None:
        self.program, self.device, self.kernels = lowered.program, lowered.device, lowered.kernels
        self.refusals = tuple(lowered.refusals)
        self.options = options
        self.call = compiled(self.program, options)
        self.step = fixed_step(self.program) if self.program.caches else No(NO_CACHE)
        if isinstance(self.step, No) and self.program.caches:
            self.refusals += (self.step.at("triton: decoding without a CUDA graph"),)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        home = next(iter(inputs.values())).device
        return {name: value.to(home) for name, value in self.run(inputs).items()}

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs, where they are made."""
        here = {name: value.to(self.device) for name, value in inputs.items()}
        values = self.program.bind(here)
        with torch.no_grad():
            return dict(zip(self.program.outputs, self.call(*values.values()), strict=True))

    def decoder(self, batch: int, capacity: int) -> Decoder:
        if not self.program.caches:
            raise BackendError(NO_CACHE)
        if isinstance(self.step, No):
            return GrowingDecoder(self.program, self.run)
        return TritonDecoder(self, self.step, Caches.empty(self.program, batch, capacity, self.device))

    def details(self) -> dict[str, Any]:
        return {"device": str(self.device), "dtype": self.options.dtype, "kernels": self.kernels}


def compiled(program: Program, options: "Triton") -> Any:
    """What runs a program: its module, or what Inductor makes of that."""
    module = program.module()
    return torch.compile(module, dynamic=True, mode=options.inductor) if options.inductor else module


class TritonDecoder(Decoder):
    """The prompt at once, through caches of its own length; then token by token over caches of fixed size.

    On a GPU the second token's step is captured in a CUDA graph, and later ones are replays of it.
    """

    def __init__(self, runner: TritonRunner, step: Program, caches: Caches) -> None:
        self.runner, self.caches = runner, caches
        self.call, self.tensors = compiled(step, runner.options), caches.tensors
        self.ids = torch.zeros(caches.batch, 1, dtype=torch.int64, device=runner.device)
        self.positions = torch.zeros_like(self.ids)
        self.places = torch.zeros(caches.batch, dtype=torch.int32, device=runner.device)
        self.length = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None

    def step(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None and not bool(mask.all()):
            raise BackendError(f"backend triton: {self.runner.padding}; give prompts one at a time")
        if self.length + ids.shape[1] > self.caches.capacity:
            raise BackendError(f"{self.length + ids.shape[1]} tokens do not fit in caches of {self.caches.capacity}")
        if not self.length:
            program = self.runner.program
            outputs = self.runner.run({"input_ids": ids, **program.newest_logits(ids)})
            self.caches.fill(program.cache_updates(outputs))
            self.length = ids.shape[1]
            return outputs["logits"][:, -1].to(ids.device)
        for place in range(ids.shape[1]):
            logits = self._one(ids[:, place : place + 1])
        return logits.to(ids.device)

    def _one(self, ids: Tensor) -> Tensor:
        self.ids.copy_(ids)
        self.positions.fill_(self.length)
        self.places.fill_(self.length)
        self.length += 1
        with torch.no_grad():
            if self.graph is not None and self.logits is not None:
                self.graph.replay()
                return self.logits
            if self.runner.options.graphs and self.ids.is_cuda:
                self._capture()
                assert self.logits is not None
                return self.logits
            return self._run()

    def _run(self) -> Tensor:
        logits: Tensor = self.call(self.ids, self.positions, self.places, *self.tensors)[0][:, -1]
        return logits

    def _capture(self) -> None:
        """Run once, so that all kernels are compiled, then once more for the graph: a step done twice is done once."""
        side = torch.cuda.Stream(self.ids.device)
        side.wait_stream(torch.cuda.current_stream(self.ids.device))
        with torch.cuda.stream(side):
            self._run()
        torch.cuda.current_stream(self.ids.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._run()
        self.graph.replay()
