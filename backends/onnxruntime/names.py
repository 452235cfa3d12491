"""Names that writing and running the files agree on; apart, so that running needs nothing of what writing does."""

MODEL, PROMPT = "model.onnx", "prompt.{}.onnx"  # the weights of each are in a file beside it
DATA = ".data"
METADATA = "qcompiler"
MASK = "attention_mask"
SCALE = ".scale"  # behind the name of a cache of codes: the output of a prompt's piece with their scales
AT_ONCE = 256  # tokens of a prompt; more take larger buffers, and attention computes more that its mask then removes
