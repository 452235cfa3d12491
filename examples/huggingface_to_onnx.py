"""A Hugging Face model to a folder with a 4-bit ONNX model, and text from it.

    python examples/huggingface_to_onnx.py [MODEL_FOLDER [OUT]]

Without a model folder, a tiny random Llama shows that it works.
"""

import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qcompiler


def tiny() -> LlamaForCausalLM:
    """A random model over bytes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, **sizes)).eval()


model = sys.argv[1] if len(sys.argv) > 1 else tiny()
folder = sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp()

session = qcompiler.compile(model, "rtn-w4a16", backend="onnxruntime")
session.save(folder)
sizes, coverage = session.report.sizes_mb, session.report.coverage
print(f"{coverage['quantized']} of {coverage['linears']} linear layers quantized,", end=" ")
print(f"{sizes['float']:.2f} MB became {sizes['compiled']:.2f} MB")

again = qcompiler.load(folder)
prompt = "Once upon a time" if again.tokenizer else torch.tensor([list(b"Once upon a time")])
print("continued:", again.generate(prompt, max_new_tokens=16))
print("saved in:", folder)
