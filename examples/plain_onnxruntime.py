"""A compiled folder, run by onnxruntime and tokenizers alone: no qcompiler, no PyTorch.

python examples/plain_onnxruntime.py FOLDER "Once upon a time" [NEW_TOKENS]
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

folder, prompt = Path(sys.argv[1]), sys.argv[2]
limit = int(sys.argv[3]) if len(sys.argv) > 3 else 32
config = json.loads((folder / "genai_config.json").read_text())["model"]
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
session = ort.InferenceSession(folder / "model.onnx")
binding = session.io_binding()

tokens = tokenizer.encode(prompt).ids
start, capacity = len(tokens), len(tokens) + limit
decoder = config["decoder"]
for i in range(decoder["num_hidden_layers"]):  # past and present are one buffer: nothing is copied
    for kind in ("key", "value"):
        sizes = (1, decoder["num_key_value_heads"], capacity, decoder["head_size"])
        cache = ort.OrtValue.ortvalue_from_numpy(np.zeros(sizes, np.float32))
        binding.bind_ortvalue_input(f"past_{kind}_{i}", cache)
        binding.bind_ortvalue_output(f"present_{kind}_{i}", cache)
new = tokens
while len(tokens) < capacity and tokens[-1] not in config["eos_token_id"]:
    binding.bind_cpu_input("input_ids", np.array([new]))
    binding.bind_cpu_input("attention_mask", np.ones((1, len(tokens)), np.int64))
    binding.bind_output("logits")
    session.run_with_iobinding(binding)
    new = [int(binding.get_outputs()[-1].numpy()[0, -1].argmax())]
    tokens += new
print(tokenizer.decode(tokens[start:]))
