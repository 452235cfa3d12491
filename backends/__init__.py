"""The built-in backends."""

if __name__ != "qcompiler.backends":
    raise ImportError("import qcompiler.backends, not backends")

from qcompiler.backends.onnxruntime import OnnxRuntime
from qcompiler.backends.reference import Reference
from qcompiler.backends.triton import Triton
from qcompiler.plugins import Plugin

PLUGIN = Plugin(backends=(Reference, OnnxRuntime, Triton))
