"""Checkpoint formats: serialisations of QTensor, read and written without ever quantizing again."""

from qcompiler.formats import gptq

FORMATS = (*gptq.FORMATS,)
