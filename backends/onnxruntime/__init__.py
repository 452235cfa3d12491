"""The backend `onnxruntime`."""

from qcompiler.backends.onnxruntime.backend import OnnxRuntime

__all__ = ["OnnxRuntime"]
