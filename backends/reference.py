"""The reference backend: every op by its eager meaning in PyTorch. It runs any program, and is always last."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompiler.errors import BackendError, No
from qcompiler.program import Program
from qcompiler.target import NO_CACHE, Answer, Backend, GrowingDecoder, Runner


@dataclass(frozen=True)
class Reference(Backend):
    """Run the program in PyTorch, node by node; quantized weights are decoded once, when the program is lowered.

    `inductor` names a mode of torch.compile ("default"): then Inductor compiles the program instead.
    """

    name: ClassVar[str] = "reference"
    inductor: str = ""

    def accepts(self, program: Program, node: fx.Node) -> Answer:
        return True

    def lower(self, program: Program, folder: Path | None = None) -> "ReferenceRunner":
        return ReferenceRunner(program.decoded(), self.inductor)


class ReferenceRunner(Runner):
    """A program run by PyTorch."""

    def __init__(self, program: Program, inductor: str = "") -> None:
        self.program = program
        self.module = torch.compile(program.module(), dynamic=True, mode=inductor) if inductor else None

    @property
    def padding(self) -> Answer:
        masked = any(spec.name == "attention_mask" for spec in self.program.inputs)
        return masked or No("the program has no attention mask")

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.module is None:
            return self.program(**inputs)
        with torch.no_grad():
            values = self.module(*self.program.bind(inputs).values())
        return dict(zip(self.program.outputs, values, strict=True))

    def decoder(self, batch: int, capacity: int) -> GrowingDecoder:
        if not self.program.caches:
            raise BackendError(NO_CACHE)
        return GrowingDecoder(self.program, lambda inputs: self.program(**inputs))
