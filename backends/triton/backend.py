"""Triton: what it needs, what it takes, and the programs it makes."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import fx

from qcompiler.errors import BackendError, No
from qcompiler.ops import qc
from qcompiler.program import Program
from qcompiler.target import Answer, Backend, Runner

OLDEST = (8, 0)  # compute capability: Ampere, the first with bfloat16 and copies that run ahead


@dataclass(frozen=True)
class Triton(Backend):
    """Run programs on a GPU: quantized layers in kernels, all else in PyTorch.

    Floats become `dtype` ("bfloat16" or "float16"; "" keeps the program's own). `device` is where the program runs.
    A decoding step over caches of fixed size is captured in a CUDA graph unless `graphs` is off; `inductor` names a
    mode of torch.compile for what is left to PyTorch. With TRITON_INTERPRET=1 the device "cpu" works too, very slowly,
    for tests.
    """

    name: ClassVar[str] = "triton"
    dtype: str = "bfloat16"
    device: str = "cuda"
    graphs: bool = True
    inductor: str = ""

    def available(self) -> Answer:
        """True, or what is missing: the package, or a GPU that is new enough."""
        if importlib.util.find_spec("triton") is None:
            return No('needs the Python package "triton"; install it with: pip install "qcompiler[triton]"')
        if torch.device(self.device).type == "cpu":
            interpreted = os.environ.get("TRITON_INTERPRET") == "1"
            return interpreted or No("runs on the CPU only where Triton interprets; set TRITON_INTERPRET=1")
        if not torch.cuda.is_available():
            return No("needs an NVIDIA GPU, and PyTorch finds none; the backend onnxruntime runs on CPUs")
        found = torch.cuda.get_device_capability(self.device)
        return found >= OLDEST or No(
            f"needs a GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or later, and finds {found[0]}.{found[1]}"
        )

    def accepts(self, program: Program, node: fx.Node) -> Answer:
        """True for all that PyTorch runs on a GPU; which layers no kernel takes, the runner says."""
        return node.target is not qc.onnx or No(
            f"the ONNX operator {node.kwargs['op']} runs in ONNX Runtime on the CPU", node.name
        )

    def lower(self, program: Program, folder: Path | None = None) -> Runner:
        """Pack the weights, move them to the device, and make the program callable; nothing is written."""
        from qcompiler.backends.triton.lowering import lowered
        from qcompiler.backends.triton.runner import TritonRunner

        self._check()
        return TritonRunner(lowered(program, self.dtype, torch.device(self.device)), self)

    def tune(self, program: Program, progress: Callable[[str, int, int], None]) -> Path:
        """Try configurations of linear_wq for the program's layers; later launches on this GPU take the fastest."""
        from qcompiler.backends.triton.tuning import tune

        self._check()
        dtype = getattr(torch, self.dtype or "float16")
        return tune(program, torch.device(self.device), dtype, progress)

    def _check(self) -> None:
        answer = self.available()
        if isinstance(answer, No):
            raise BackendError(f"backend {self.name} {answer}")
