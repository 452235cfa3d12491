"""GPTQ with your own text instead of text that the model writes itself.

    python examples/own_calibration.py [MODEL_FOLDER TEXT_FILE]

Calibration data is a text or JSONL file, a list of texts, a list of token tensors, or "self". Without arguments, a
tiny random model over bytes is quantized with this file's own text.
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qcompiler


def tiny() -> LlamaForCausalLM:
    """A random model over bytes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, **sizes)).eval()


if len(sys.argv) > 2:
    model, calibration = sys.argv[1], sys.argv[2]
else:
    text = torch.tensor(list(Path(__file__).read_bytes()))
    model, calibration = tiny(), list(text[: 16 * 64].view(16, 64))

session = qcompiler.compile(model, "gptq-w3a16", calibration=calibration, samples=16, length=64, backend="reference")
for layer in session.report.layers:
    error = "" if layer.output_error is None else f", outputs changed by {layer.output_error:.1%} on this text"
    print(f"{layer.name}: {layer.scheme} by {layer.method}{error}")
