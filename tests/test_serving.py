"""Our folders against the fields that vLLM and Text Generation Inference read before they load a tensor.

Written down from their quantization configurations: `GPTQConfig`, `AWQConfig`, `CompressedTensorsConfig` and
`BitsAndBytesConfig` of vLLM, `_get_quantizer_config` of TGI. Neither engine installs without a GPU.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.checkpoints import session, written

# Format, recipe, the fields that must be there with their values (None: any of that type), what layers must hold.
LAYERS = {
    "gptq": ({"qweight", "qzeros", "scales", "g_idx"}, "int4:g32:sym"),
    "gptq-v2": ({"qweight", "qzeros", "scales", "g_idx"}, "int4:g32:asym"),
    "awq": ({"qweight", "qzeros", "scales"}, "int4:g32:asym"),
    "compressed-tensors": ({"weight_packed", "weight_scale", "weight_shape"}, "int4:g32:sym"),
}
FIELDS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False},
    "gptq-v2": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "kv_cache_scheme": None},
}


@pytest.fixture(scope="module", params=sorted(LAYERS))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    name = request.param
    compiled = session(f"canonicalize, rtn{{scheme={LAYERS[name][1]}}}, fuse, kv_cache, pack", tied=False)
    return name, written(compiled, name, tmp_path_factory.mktemp("served") / name, shard_bytes=40_000)


def test_the_configuration_says_what_engines_ask(served: tuple[str, Path]) -> None:
    name, folder = served
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    found = config["quantization_config"]
    assert {key: found[key] for key in FIELDS[name]} == FIELDS[name]
    if name.startswith("gptq"):  # TGI falls back on this file
        assert json.loads((folder / "quantize_config.json").read_text()) == found
    if name == "awq":
        assert found["modules_to_not_convert"] == ["lm_head"]
    if name == "compressed-tensors":
        assert found["ignore"] == ["lm_head"]
        (group,) = found["config_groups"].values()
        assert group["targets"] == ["Linear"]
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
        assert group["weights"] | weights == group["weights"]
        assert group["input_activations"] is None


def test_the_index_leads_to_every_tensor_of_every_layer(served: tuple[str, Path]) -> None:
    name, folder = served
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    held: dict[str, set[str]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            held[path.name] = set(file.keys())
    assert places == {tensor: file for file, tensors in held.items() for tensor in tensors}
    for i in range(2):
        for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            prefix = f"model.layers.{i}.{module}."
            parts = {tensor.removeprefix(prefix) for tensor in places if tensor.startswith(prefix)}
            assert parts == LAYERS[name][0]
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= places.keys()
