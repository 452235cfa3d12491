"""Checkpoint formats: serialisations of QTensor, read and written without ever quantizing again."""

from qcompiler.formats import awq, bitsandbytes, compressed_tensors, gguf_write, gptq, onnx

FORMATS = (
    *gptq.FORMATS,
    *awq.FORMATS,
    *compressed_tensors.FORMATS,
    *bitsandbytes.FORMATS,
    *gguf_write.FORMATS,
    *onnx.FORMATS,
)
