"""A compiled folder, run by onnxruntime and tokenizers alone: no qcompiler, no PyTorch.

python examples/plain_onnxruntime.py FOLDER "Once upon a time" [NEW_TOKENS]
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

KINDS = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}  # floats, 8 bits, 4 bits
ort.set_default_logger_severity(3)
folder, prompt = Path(sys.argv[1]), sys.argv[2]
limit = int(sys.argv[3]) if len(sys.argv) > 3 else 32
config = json.loads((folder / "genai_config.json").read_text())["model"]
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
session = ort.InferenceSession(folder / "model.onnx")
binding = session.io_binding()

tokens = tokenizer.encode(prompt).ids
start, capacity = len(tokens), len(tokens) + limit
for spec in session.get_inputs():
    if spec.name.startswith("past_"):  # past and present are one buffer: nothing is copied
        sizes = (1, spec.shape[1], capacity, spec.shape[3])
        cache = ort.OrtValue.ortvalue_from_numpy(np.zeros(sizes, KINDS[spec.type]))
        binding.bind_ortvalue_input(spec.name, cache)
        binding.bind_ortvalue_output(spec.name.replace("past", "present"), cache)
new = tokens
while len(tokens) < capacity and tokens[-1] not in config["eos_token_id"]:
    binding.bind_cpu_input("input_ids", np.array([new]))
    binding.bind_cpu_input("attention_mask", np.ones((1, len(tokens)), np.int64))
    binding.bind_output("logits")
    session.run_with_iobinding(binding)
    new = [int(binding.get_outputs()[-1].numpy()[0, -1].argmax())]
    tokens += new
print(tokenizer.decode(tokens[start:]))
