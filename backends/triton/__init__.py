"""The backend `triton`: a program on a GPU, its quantized layers run by the kernels of qcompiler.kernels."""

from qcompiler.backends.triton.backend import Triton

__all__ = ["Triton"]
