"""Names that writing and running the files agree on; apart, so that running needs nothing of what writing does."""

MODEL, DATA = "model.onnx", "model.onnx.data"
METADATA = "qcompiler"
MASK = "attention_mask"
