"""compressed-tensors: what we write loads in transformers with the same logits, what its library writes loads here."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from qcompiler.codebooks import float8_map
from qcompiler.compiler import compile
from qcompiler.errors import InputError, No
from qcompiler.export import checkpoint_of
from qcompiler.formats import compressed_layers
from qcompiler.formats import compressed_tensors as form
from qcompiler.formats.checkpoint import Rounding
from qcompiler.frontends.checkpoint import capture_checkpoint
from qcompiler.scheme import QTensor, Scheme
from tests.checkpoints import ids, logits_of, session, written

library = pytest.importorskip("compressed_tensors", reason="the extra [dev] is not installed")

REST = "fuse, kv_cache, pack"


@settings(max_examples=15, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group=st.sampled_from((0, 16, 32)),
    shape=st.sampled_from(((8, 32), (12, 64), (5, 96))),
    seed=st.integers(0, 99),
)
def test_their_library_decompresses_what_we_pack(
    bits: int, symmetric: bool, group: int, shape: tuple[int, int], seed: int
) -> None:
    kind = f"int{bits}:{f'g{group}' if group else 'channel'}:{'sym' if symmetric else 'asym'}"
    record = QTensor.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), Scheme.parse(kind))
    parts = {name.removeprefix("x."): part for name, part in compressed_layers.pack("x", record, None).items()}
    found = theirs("pack-quantized").decompress(parts, scheme_of(record.scheme))["weight"]
    assert torch.equal(found, record.dequantize())


def theirs(name: str) -> type:
    """The library's compressor of a format."""
    from compressed_tensors.compressors.base import BaseCompressor

    found: type = BaseCompressor.get_value_from_registry(name)
    return found


def scheme_of(scheme: Scheme) -> object:
    """A scheme as the library's record."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**form._described(scheme)))


# Every way to round, and whether transformers then computes our logits to the bit.
WAYS = [
    ("rtn{scheme=int4:g32:sym}", {}),
    ("rtn{scheme=int4:g32:asym}", {"dequantize": True}),  # left packed, its reader expects zero points unpacked
    ("rtn{scheme=int4:g32:sym}, activations{scheme=int8:tensor:asym}", {}),
    ("rtn{scheme=int8:channel:sym}, activations{scheme=int8:token:asym:dynamic}", {}),
]
FAST = [WAYS[2], *(pytest.param(*way, marks=pytest.mark.slow) for way in (WAYS[0], WAYS[1], WAYS[3]))]


@pytest.mark.parametrize(("steps", "options"), FAST)
def test_transformers_computes_our_logits(steps: str, options: dict, tmp_path: Path) -> None:
    from transformers import CompressedTensorsConfig

    compiled = session(f"canonicalize, {steps}, {REST}")
    folder = written(compiled, "compressed-tensors", tmp_path / "out")
    given = {"quantization_config": CompressedTensorsConfig(**options)} if options else {}
    assert torch.equal(logits_of(folder, **given), compiled(ids()))


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    compiled = session(f"canonicalize, {WAYS[2][0]}, {REST}")
    folder = written(compiled, "compressed-tensors", tmp_path / "out")
    again = compile(folder, "stored", backend="reference")
    assert torch.equal(again(ids()), compiled(ids()))
    options = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert options["ignore"] == ["lm_head"]
    assert options["config_groups"]["group_0"]["input_activations"]["num_bits"] == 8


def test_layers_may_differ(tmp_path: Path) -> None:
    steps = "rtn{scheme=int4:g32 include=*.mlp.*}, rtn{scheme=int8:channel include=*attn*}"
    compiled = session(f"canonicalize, {steps}, {REST}")
    folder = written(compiled, "compressed-tensors", tmp_path / "out")
    assert torch.equal(logits_of(folder), compiled(ids()))
    checkpoint = form.read(folder)
    schemes = {str(v.scheme) for v in checkpoint.tensors.values() if isinstance(v, QTensor)}
    assert schemes == {"int4:g32:sym", "int8:channel:sym"}


def test_scales_of_caches_are_kept_and_used(tmp_path: Path) -> None:
    compiled = session(f"canonicalize, {WAYS[0][0]}, {REST}")
    checkpoint = checkpoint_of(compiled.program)
    scheme = Scheme.parse("int8:tensor:sym")
    names = [f"model.layers.{i}.self_attn.{x}" for i in range(2) for x in "kv"]
    caches = {name: Rounding(scheme, (torch.tensor([0.01 * (i + 1)]),)) for i, name in enumerate(names)}
    form.write(replace(checkpoint, caches=caches), tmp_path / "1")
    again = compile(tmp_path / "1", "stored", backend="reference")
    changed = float((again(ids()) - compiled(ids())).abs().max())
    assert 0 < changed < 0.1
    form.write(checkpoint_of(again.program), tmp_path / "2")
    first, second = (json.loads((tmp_path / place / "config.json").read_text()) for place in "12")
    assert first["quantization_config"] == second["quantization_config"]
    assert first["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
    back = form.read(tmp_path / "2").caches
    assert {name: back[name].grid[0].item() for name in names} == {n: caches[n].grid[0].item() for n in names}
    with pytest.raises(InputError, match="which is no attention of the model"):
        capture_checkpoint(replace(checkpoint, caches={"model.x.k": caches[names[0]]}))
    eight = {names[0]: Rounding(Scheme.parse("fp8:tensor"), (torch.ones(1),))}
    with pytest.raises(InputError, match="rounded to fp8:tensor:sym, which qcompiler does not compute"):
        capture_checkpoint(replace(checkpoint, caches=eight))


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("pack-quantized", "int4:g32:asym"),
        ("int-quantized", "int8:channel:sym"),
        ("naive-quantized", "int4:g32:asym"),
        ("float-quantized", "fp8:channel:sym"),
    ],
)
def test_what_their_library_writes_is_read(name: str, scheme: str, tmp_path: Path) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    kind = Scheme.parse(scheme)
    parts = {"weight": weight}
    if kind.code == "fp":
        parts["weight_scale"] = weight.abs().amax(1, keepdim=True) / 448
    else:
        grid = QTensor.quantize(weight, kind)
        parts["weight_scale"] = grid.scale.float()
        if grid.zero is not None:
            parts["weight_zero_point"] = (grid.zero.to(torch.int16) - (kind.levels >> 1)).to(torch.int8)
    compressed = theirs(name).compress(parts, scheme_of(kind))
    expected = theirs(name).decompress(dict(compressed), scheme_of(kind))["weight"]
    group = {"targets": ["Linear"], "weights": scheme_of(kind).weights.model_dump()}
    record = one_layer(tmp_path, compressed, name, group)
    assert torch.equal(record.dequantize(), expected)
    assert record.scheme.bits == kind.bits


def one_layer(folder: Path, parts: dict[str, Tensor], name: str, group: object) -> QTensor:
    """The weight of a checkpoint of one layer, read."""
    options = {"quant_method": "compressed-tensors", "format": name, "config_groups": {"group_0": group}}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": options}))
    save_file({f"m.x.{key}": part.contiguous() for key, part in parts.items()}, folder / "model.safetensors")
    found = form.read(folder).tensors["m.x.weight"]
    assert isinstance(found, QTensor)
    return found


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}


@pytest.mark.parametrize(
    ("change", "group", "message"),
    [
        ({"weight_scale": torch.full((8, 2), torch.nan)}, GROUP, "scales that are not finite"),
        ({"weight_shape": torch.tensor([8, 640])}, GROUP, "does not hold"),
        ({"weight_shape": torch.tensor([-8, 64])}, GROUP, "does not hold"),
        ({"weight_scale": torch.ones(8, 3)}, GROUP, r"weight_scale\" is \[8, 3\], not \[8, 2\]"),
        ({}, GROUP | {"targets": ["re:(a+)+$"]}, "could take forever"),
        ({}, GROUP | {"targets": ["Conv2d"]}, 'no group of config_groups is for the quantized layer "m.x"'),
        ({}, {"targets": ["Linear"]}, "no targets or no weights"),
        ({}, GROUP | {"weights": {"num_bits": 4, "type": "float"}}, "of this kind are not read"),
        ({}, GROUP | {"weights": GROUP["weights"] | {"actorder": "group"}}, "of this kind are not read"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Tensor], group: dict, message: str, tmp_path: Path) -> None:
    record = QTensor.quantize(torch.randn(8, 64), Scheme.parse("int4:g32"))
    parts = {name.removeprefix("x."): part for name, part in compressed_layers.pack("x", record, None).items()}
    with pytest.raises(InputError, match=message):
        one_layer(tmp_path, parts | change, "pack-quantized", group)


def test_what_it_cannot_hold_is_refused() -> None:
    record = QTensor.quantize(torch.randn(8, 80), Scheme.parse("int4:g32"))
    assert isinstance(form.why_not(record), No)
    with pytest.raises(InputError, match="groups of 32 do not divide its 80 columns"):
        compressed_layers.pack("x", record, None)


def test_float8_codes_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    codes = torch.zeros(4, 8, dtype=torch.uint8)
    codes[2, 3] = 0x7F
    parts = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": torch.ones(4, 1)}
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    with pytest.raises(InputError, match="values that are no 8-bit codes"):
        one_layer(tmp_path, parts, "float-quantized", group)
    assert float8_map()[0x7F] == 0
