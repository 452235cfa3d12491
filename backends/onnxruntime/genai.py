"""genai_config.json: what lets onnxruntime-genai generate text from the same folder.

It tells names, sizes and end tokens; the tokenizer's files stand beside it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcompiler.backends.onnxruntime.names import AT_ONCE, MASK, MODEL
from qcompiler.errors import No
from qcompiler.ops import qc
from qcompiler.program import Program, Type
from qcompiler.rewrite import named_arguments
from qcompiler.target import Answer

CONFIG = "genai_config.json"
KNOWN = ("input_ids", MASK, "position_ids")


def write_config(program: Program, folder: Path, about: Mapping[str, Any], inputs: list[str]) -> Answer:
    """Write it, or say why such a program is none that onnxruntime-genai could run.

    `inputs` are the names of the graph's inputs, `about` what is kept in its metadata.
    """
    (folder / CONFIG).unlink(missing_ok=True)
    if not about.get("shared_cache"):
        return No("onnxruntime-genai: past and present are not one buffer in every layer")
    attentions = list(program.calls(qc.cached_attention))
    names = [(f"past_key_{i}", f"past_value_{i}") for i in range(len(attentions))]
    caches = {name for pair in names for name in pair}
    if caches != {spec.name for spec in program.caches}:
        return No("onnxruntime-genai: its caches are not one pair of keys and values a layer")
    optional = {"logits_positions"}
    if foreign := [name for name in inputs if name not in caches and name not in KNOWN and name not in optional]:
        return No(f'onnxruntime-genai: it has an input "{foreign[0]}" of its own')
    kinds = [_sizes(named_arguments(node)) for node in attentions]
    if len(set(kinds)) != 1:
        return No("onnxruntime-genai: its layers have heads of different number or size")
    found = _config(program, int(about["max_positions"]), inputs, kinds[0], len(attentions))
    (folder / CONFIG).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return True


def _sizes(given: Mapping[str, Any]) -> tuple[int, int, int]:
    """Heads of queries and of keys, and their size."""
    q, k = (given[name].meta["type"].shape for name in ("q", "k"))
    return q[1], k[1], q[3]


def _config(
    program: Program, length: int, inputs: list[str], sizes: tuple[int, int, int], layers: int
) -> dict[str, Any]:
    heads, kv_heads, width = sizes
    ends = program.info.get("eos") or []
    special = next((i for i in (program.info.get("pad"), *ends) if isinstance(i, int)), 0)
    start = program.info.get("bos")
    values: Any = program.output_node.args[0]
    logits: Type = values[program.outputs.index("logits")].meta["type"]
    return {
        "model": {
            "type": "decoder",
            "vocab_size": logits.shape[-1],
            "context_length": length,
            "bos_token_id": start if isinstance(start, int) else special,
            "eos_token_id": ends,
            "pad_token_id": special,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "log_severity_level": 3, "provider_options": []},
                "filename": MODEL,
                "hidden_size": heads * width,
                "head_size": width,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "num_hidden_layers": layers,
                "inputs": {name: name for name in KNOWN if name in inputs}
                | {"past_key_names": "past_key_%d", "past_value_names": "past_value_%d"},
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present_key_%d",
                    "present_value_names": "present_value_%d",
                },
            },
        },
        "search": {
            "max_length": length,
            "do_sample": False,
            "num_beams": 1,
            "past_present_share_buffer": True,
            "chunk_size": AT_ONCE,
        },
    }
