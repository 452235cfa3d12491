"""Artifacts: what is saved comes back bit for bit, and what is not whole or not ours is refused in one sentence."""

import errno
import json
import math
import operator
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from qcompiler import artifact, atomic, graph_json, manifest
from qcompiler.errors import InputError
from qcompiler.formats import safetensors
from qcompiler.program import Program
from qcompiler.report import LayerRecord, PassRecord, Report
from qcompiler.scheme import QTensor, Scheme
from tests.programs import Sketch, tiny_llama

aten = torch.ops.aten
REPORT = Report("tiny", "rtn", passes=[PassRecord("rtn", "rtn", "lossy", layers=[LayerRecord("w", "int4", 20.0)])])


@pytest.fixture(scope="module")
def program() -> Program:
    """A small decoder, partly quantized."""
    found = tiny_llama()
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        found.quantize_tensor(name, QTensor.quantize(found.tensors[name], Scheme.parse("int4:g48:asym")))
    found.clean()
    found.info = {"model": "tiny", "eos_token_ids": [0], "nested": {"a": [1.5, None, True]}}
    return found


@pytest.fixture
def saved(program: Program, tmp_path: Path) -> Path:
    """The folder of that program's artifact."""
    save(tmp_path / "model", program)
    return tmp_path / "model"


def save(folder: Path, program: Program, **options: Any) -> None:
    artifact.save(folder, program, REPORT, recipe="rtn{scheme=int4:g48}", backend="reference", **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file of an artifact, and its entry in the manifest."""
    content = json.loads(path.read_text())
    content = change(content) or content
    path.write_text(json.dumps(content))
    if path.name != "manifest.json":
        reseal(path)


def reseal(path: Path) -> None:
    found = json.loads((path.parent / "manifest.json").read_text())
    manifest.write(path.parent, {key: found[key] for key in found if key not in ("format", "version", "files")})


# -- round trip ----------------------------------------------------------------------------------------------


def test_round_trip(program: Program, saved: Path) -> None:
    loaded = artifact.load(saved, verify=True)
    assert loaded.program.text() == program.text()
    assert loaded.program.fingerprint() == program.fingerprint()
    assert loaded.program.info == program.info
    assert loaded.report == REPORT
    assert loaded.manifest["schemes"] == {"int4:g48:asym": 2}
    assert loaded.manifest["recipe"] == "rtn{scheme=int4:g48}"
    ids = torch.arange(12).view(2, 6)
    expected, found = program(input_ids=ids), loaded.program(input_ids=ids)
    assert torch.equal(found["logits"], expected["logits"])
    again = [(n.name, n.target, n.meta) for n in loaded.program.graph.nodes if n.op != "output"]
    assert again == [(n.name, n.target, n.meta) for n in program.graph.nodes if n.op != "output"]
    for tensor in loaded.program.tensors.values():
        assert tensor.data_ptr() % safetensors.ALIGNMENT == 0
    assert names(saved) == ["graph.json", "manifest.json", "model.safetensors", "report.html", "report.json"]


def test_an_element_that_was_expanded_is_saved(tmp_path: Path) -> None:
    """One element is contiguous whatever its strides say, and those of an expanded one are 0."""
    scale = torch.tensor(3.0).expand(1, 1)
    files = safetensors.write(tmp_path, {"scale": scale, "rows": torch.tensor([1.0, 2.0])[:, None].expand(2, 3)})
    found = safetensors.read([tmp_path / name for name in files])
    assert found["scale"].tolist() == [[3.0]]
    assert found["rows"].tolist() == [[1.0] * 3, [2.0] * 3]


def test_round_trip_of_an_exported_module(tmp_path: Path) -> None:
    """A capture with arithmetic on sizes, and arguments of other kinds than numbers."""

    class Module(torch.nn.Module):
        def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
            rows, columns = input.shape
            mask = torch.full((rows // 2 + 1, torch.sym_max(rows, columns)), float("-inf"), dtype=torch.float16)
            wide = input.to(torch.float64, memory_format=torch.contiguous_format)
            return wide.exp().clamp(max=float("inf")), mask.triu(1)

    sizes = {"input": {0: torch.export.Dim("rows", min=4), 1: torch.export.Dim("columns", min=2)}}
    exported = torch.export.export(Module(), (torch.randn(6, 5),), dynamic_shapes=sizes)
    sk = Sketch()
    nodes = {n.name: n for n in exported.graph.nodes}
    source = sk.input("input", ("rows", "columns"), torch.float32)
    mapped = {nodes["input_1" if "input_1" in nodes else "input"]: source}
    for node in exported.graph.nodes:
        if node.op == "call_function" and "assert" not in str(node.target):
            mapped[node] = sk.graph.node_copy(node, mapped.__getitem__)
            mapped[node].meta = {"type": None}
    outputs = [mapped[node] for node in exported.graph.output_node().args[0]]
    program = sk.done(wide=outputs[0], mask=outputs[1])
    save(tmp_path / "out", program)
    loaded = artifact.load(tmp_path / "out").program
    assert loaded.text() == program.text()
    x = torch.randn(8, 3)
    assert "-inf" in program.text()
    assert "sym_max" in program.text()
    for name, value in program(input=x).items():
        assert torch.equal(loaded(input=x)[name], value)


VALUES = [
    *(None, True, 0, -3, 2**70, 0.1, -0.0, math.inf, -math.inf, 1 + 2j, "text", ..., slice(1, None, 2)),
    *([1, [2.5, None]], (1, (2, "x")), {"a": (1,)}),
    *(torch.float8_e4m3fn, torch.device("cuda:1"), torch.channels_last, torch.strided),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back(value: Any) -> None:
    text = json.dumps(graph_json._encode(value), allow_nan=False)
    found = graph_json._decode(json.loads(text), {})
    assert type(found) is type(value)
    assert found == value
    assert str(found) == str(value)  # tells -0.0 from 0.0


def test_every_allowed_function_has_one_name() -> None:
    for name, function in graph_json.FUNCTIONS.items():
        assert graph_json.target_text(function) == name
        assert graph_json.resolve(name) is function
    assert graph_json.resolve("aten.sym_size.int") is aten.sym_size.int
    assert graph_json.FUNCTIONS["torch.sym_max"] is torch.sym_max


def test_shared_and_odd_tensors(tmp_path: Path) -> None:
    """Tied tensors stay tied; views, transposed, empty, scalar and small-float tensors come back equal."""
    sk = Sketch()
    base = torch.randn(6, 4)
    tensors = {
        "base": base, "tied": base.view(6, 4), "half": base[:3], "transposed": base.T, "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4), "odd": torch.arange(7, dtype=torch.uint8), "bool": torch.tensor([True, False]),
        "bf16": torch.randn(5).bfloat16(), "f8": torch.randn(3).to(torch.float8_e4m3fn),
        "conj": base.to(torch.complex64).conj(), "spread": torch.ones(1).expand(9),
    }  # fmt: skip
    outputs = {name: sk.constant(name, tensor) for name, tensor in tensors.items()}
    program = sk.done(**outputs)
    save(tmp_path / "out", program)
    loaded = artifact.load(tmp_path / "out")
    found = loaded.program.tensors
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(
            found[name].float() if name == "f8" else found[name], tensor.float() if name == "f8" else tensor
        )
    assert loaded.manifest["tied"] == {"tied": "base"}
    assert found["tied"].data_ptr() == found["base"].data_ptr()


def test_shards(program: Program, tmp_path: Path) -> None:
    save(tmp_path / "out", program, shard_bytes=20_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    largest = max(tensor.nbytes for tensor in program.tensors.values())
    assert all(path.stat().st_size < max(20_000, largest) + 10_000 for path in shards)
    assert artifact.load(tmp_path / "out").program.fingerprint() == program.fingerprint()
    # what the format's own package reads is the same
    from safetensors.torch import load_file

    for path in shards:
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, program.tensors[name])


def test_tensors_are_memory_mapped(tmp_path: Path) -> None:
    sk = Sketch()
    sk.done(big=sk.constant("big", torch.zeros(16_000_000)))
    program = Program(sk.graph, sk.tensors, (), ("big",))
    save(tmp_path / "out", program)
    before = psutil.Process().memory_info().rss
    loaded = artifact.load(tmp_path / "out").program
    assert loaded.tensors["big"][123] == 0
    assert psutil.Process().memory_info().rss - before < 70_000_000 * 0.9


def test_tokenizer_and_backend_files(program: Program, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "u": 2}, "u")))
    files = tmp_path / "made"
    (files / "deep").mkdir(parents=True)
    (files / "model.onnx").write_text("graph")
    (files / "deep" / "data.bin").write_text("weights")
    save(tmp_path / "one", program, files=files, tokenizer=made)
    loaded = artifact.load(tmp_path / "one", verify=True)
    assert loaded.manifest["backend_files"] == ["deep/data.bin", "model.onnx"]
    assert artifact.tokenizer(tmp_path / "one")("a b")["input_ids"] == made("a b")["input_ids"]
    # an artifact that was loaded can be saved elsewhere, and over itself
    for target in ("two", "one"):
        save(tmp_path / target, loaded.program, files=tmp_path / "one")
        again = artifact.load(tmp_path / target, verify=True)
        assert again.manifest["backend_files"] == ["deep/data.bin", "model.onnx"]
        assert (tmp_path / target / "deep" / "data.bin").read_text() == "weights"
        assert artifact.tokenizer(tmp_path / target) is None
    assert names(files) == ["deep", "model.onnx"]


def test_a_backend_file_may_not_hide_ours(program: Program, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "graph.json").write_text("{}")
    with pytest.raises(InputError, match=r'a file "graph\.json", a name the artifact needs'):
        save(tmp_path / "out", program, files=tmp_path / "made")
    assert names(tmp_path) == ["made"]


# -- writing in one step -------------------------------------------------------------------------------------


def test_an_artifact_is_replaced_whole(program: Program, saved: Path) -> None:
    (saved / "stray").write_text("")
    mapped = artifact.load(saved).program
    before = mapped.fingerprint()
    save(saved, tiny_llama(layers=1))
    assert names(saved) == ["graph.json", "manifest.json", "model.safetensors", "report.html", "report.json"]
    assert names(saved.parent) == ["model"]
    mapped._digests.clear()
    assert mapped.fingerprint() == before  # what was mapped before stays readable


@pytest.mark.parametrize("content", [{"notes.txt": "mine"}, {"manifest.json": '{"manifest_version": 3}'}])
def test_other_folders_are_not_touched(program: Program, tmp_path: Path, content: dict[str, str]) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    for name, text in content.items():
        (target / name).write_text(text)
    with pytest.raises(InputError, match="exists and is not a qcompiler artifact; give the name of a new folder"):
        save(target, program)
    assert names(target) == list(content)
    with pytest.raises(InputError, match="is a file; an artifact is a folder"):
        save(target / next(iter(content)), program)


def test_an_empty_folder_and_missing_parents_are_fine(program: Program, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        save(target, program)
        assert artifact.is_artifact(target)
    assert names(tmp_path) == ["a", "empty"]


def test_no_space_left(program: Program, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = artifact.load(saved).manifest
    monkeypatch.setattr(os, "fsync", full)
    for target in (saved, saved.parent / "new"):
        with pytest.raises(InputError, match=r'^no space left to write "[^"]+", whose tensors alone take \d+ MB; free'):
            save(target, program)
    assert names(saved.parent) == ["model"]
    assert artifact.load(saved, verify=True).manifest == before


def test_no_space_left_on_a_real_disk(program: Program, tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: the write itself fails half-way."""
    script = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
from tests.programs import tiny_llama
from qcompiler import artifact
from qcompiler.errors import InputError
from qcompiler.report import Report
program = tiny_llama()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
try:
    artifact.save(Path("out"), program, Report(), recipe="", backend="")
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "cannot be written: File too large; choose another folder" in done.stdout, done.stderr
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(program: Program, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written: Permission denied"):
        save(tmp_path / "out", program)
    tmp_path.chmod(0o700)


def test_any_failure_leaves_the_old_one(program: Program, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            Path(folder, "tokenizer.json").write_text("{")
            raise Exception("No space left on device (os error 28)")

    with pytest.raises(InputError, match="the tokenizer could not be saved: No space left on device"):
        save(saved, program, tokenizer=Tokenizer())
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(saved, program)
    assert names(saved.parent) == ["model"]
    artifact.load(saved, verify=True)


@pytest.mark.parametrize("step", ["before", "between", "after"])
@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_crash_leaves_the_old_or_the_new_one(tmp_path: Path, step: str, can_exchange: bool) -> None:
    """The process is killed around the rename; the next reader finds one of the two, the next writer cleans up."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    script = f"""
import os
from pathlib import Path
from qcompiler import atomic
die = lambda *ignored, **also: os._exit(9)
if not {can_exchange}:
    atomic._exchange = lambda one, other: False
if {step!r} == "before":
    atomic._move = die
if {step!r} == "between" and not {can_exchange}:
    rename = Path.rename
    Path.rename = lambda self, to: rename(self, to) if self.name == "out" else die()
if {step!r} == "after" or {can_exchange}:
    atomic.shutil.rmtree = die
with atomic.replacing(Path("out")) as fresh:
    (fresh / "new").touch()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 9
    assert len(names(tmp_path)) == 2  # something was left behind
    atomic.recover(target)
    assert names(target) in (["old"], ["new"])
    assert names(tmp_path) == ["out"]


def test_a_running_writer_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / f".out.{os.getpid()}-0abc.new"
    other = tmp_path / ".other.1-0abc.new"
    for folder in (mine, other):
        folder.mkdir()
    atomic.recover(tmp_path / "out")
    assert names(tmp_path) == sorted([mine.name, other.name])


def test_without_the_system_call(program: Program, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    save(saved, tiny_llama(layers=1))
    assert names(saved.parent) == ["model"]
    assert artifact.load(saved).program.text() == tiny_llama(layers=1).text()


# -- what cannot be saved ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"a": {"b": [0, torch.zeros(1)]}}, r"program\.info\['a'\]\['b'\]\[1\] is a Tensor"),
        ({"a": {1: "x"}}, r"program\.info\['a'\] has the key 1"),
        ({"a": math.nan}, r"program\.info\['a'\] is nan, which JSON cannot hold"),
    ],
)
def test_info_must_be_json(tmp_path: Path, info: dict[str, Any], message: str) -> None:
    program = tiny_llama(layers=1)
    program.info = info
    with pytest.raises(InputError, match=message):
        save(tmp_path / "out", program)
    assert names(tmp_path) == []


def test_a_call_outside_the_list_is_not_saved(tmp_path: Path) -> None:
    sk = Sketch()
    x = sk.input("x", (2,), torch.float32)
    program = sk.done(y=sk.call(os.path.join, x, to=(2,)))
    with pytest.raises(
        InputError, match=r'node "join" cannot be saved: it calls "<function join.*>", which is no operator'
    ):
        save(tmp_path / "out", program)
    sk = Sketch()
    x = sk.input("x", (2,), torch.float32)
    program = sk.done(y=sk.call(aten.add.Tensor, x, 1, to=(2,), alpha={1, 2}))
    with pytest.raises(InputError, match='node "add_tensor" cannot be saved: it holds a set'):
        save(tmp_path / "out", program)


def test_a_sparse_tensor_is_refused_by_name(tmp_path: Path) -> None:
    sk = Sketch()
    program = sk.done(y=sk.constant("weird", torch.eye(3).to_sparse()))
    with pytest.raises(InputError, match=r'tensor "weird" \(torch.float32, torch.sparse_coo, on cpu\) cannot be saved'):
        save(tmp_path / "out", program)


# -- what is not whole ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["graph.json", "model.safetensors", "report.json"])
def test_damaged_files_are_named(saved: Path, name: str) -> None:
    path = saved / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=rf'{name}" is damaged: it has \d+ bytes, not as many as when it was written'):
        artifact.load(saved)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=f'{name}" is damaged: its content is not what was written'):
        artifact.load(saved)
    path.unlink()
    with pytest.raises(InputError, match=f'{name}" is damaged: it is missing; copy or write the artifact again'):
        artifact.load(saved)


def test_large_files_are_hashed_on_request(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "SMALL", 0)
    shard = saved / "model.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    artifact.load(saved)
    with pytest.raises(InputError, match="is damaged: its content"):
        artifact.load(saved, verify=True)
    shard.write_bytes(b"\xff" * 8 + whole[8:])  # the header is always read
    with pytest.raises(InputError, match="is not a complete safetensors file"):
        artifact.load(saved)


def test_folders_that_are_no_artifact(saved: Path) -> None:
    with pytest.raises(InputError, match="does not exist or is no folder"):
        artifact.load(saved / "nothing")
    with pytest.raises(InputError, match=r"it has no manifest\.json"):
        artifact.load(saved.parent)
    assert not artifact.is_artifact(saved.parent)
    assert artifact.is_artifact(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m | {"version": 99},
            "has format version 99, this qcompiler reads 1; use the qcompiler that wrote it",
        ),
        (lambda m: m | {"format": "x"}, "is that of something else"),
        (lambda m: [m], "is that of something else"),
        (lambda m: m | {"info": []}, 'its "info" is missing or wrong'),
        (lambda m: m | {"shards": ["../../secret"]}, 'it does not list "../../secret"'),
        (lambda m: m | {"shards": [[]]}, r"it does not list "),
        (lambda m: m | {"files": m["files"] | {"../x": {}}}, 'it names "../x", which is outside the folder'),
        (lambda m: m | {"files": m["files"] | {"/x": {}}}, 'it names "/x", which is outside the folder'),
        (lambda m: m | {"files": m["files"] | {"graph.json": 3}}, 'graph.json" is damaged: it has'),
        (lambda m: m | {"tied": {"a": "b"}}, '"a" is tied to "b", which does not exist'),
    ],
)
def test_bad_manifests(saved: Path, change: Callable[[Any], Any], message: str) -> None:
    edit(saved / "manifest.json", change)
    with pytest.raises(InputError, match=message):
        artifact.load(saved)


@pytest.mark.parametrize("text", ["", "{", "\x00", "[" * 100_000, '"\udcff"'])
def test_texts_that_are_no_json(saved: Path, text: str) -> None:
    for name in ("graph.json", "report.json", "manifest.json"):
        before = (saved / name).read_bytes()
        (saved / name).write_text(text, encoding="utf-8", errors="surrogateescape")
        if name != "manifest.json":
            reseal(saved / name)
        with pytest.raises(InputError, match=f'{name}" is damaged'):
            artifact.load(saved)
        (saved / name).write_bytes(before)
        if name != "manifest.json":
            reseal(saved / name)


HOSTILE = [
    *("os.system", "builtins.eval", "operator.methodcaller", "operator.attrgetter", "math.__loader__", "torch.load"),
    *("torch.ops", "_operator.call", "prims.add.default", "aten.from_file.default", "aten._print.default"),
    *("aten.save.default", "aten.__class__.mro", "aten.add.op", "aten..", "aten.linear", "aten.no_such.default"),
    *("qc.linear.__init__", ""),
]


@pytest.mark.parametrize("target", HOSTILE)
def test_hostile_targets_are_refused(saved: Path, target: str) -> None:
    def change(graph: Any) -> None:
        call = next(node for node in graph["nodes"] if node["op"] == "call_function")
        call |= {"target": target, "args": ["echo hacked"]}

    edit(saved / "graph.json", change)
    with pytest.raises(
        InputError, match=r'graph.json" is damaged: node "\w+" \(call_function\) cannot be loaded: '
    ) as info:
        artifact.load(saved)
    assert target in str(info.value)
    assert "\n" not in str(info.value)


def call(**changes: Any) -> Callable[[Any], Any]:
    """A change to the first call of a saved graph."""

    def change(graph: Any) -> None:
        next(node for node in graph["nodes"] if node["op"] == "call_function").update(changes)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (call(op="call_method"), '"call_method" is none of placeholder, get_attr, call_function, output'),
        (call(args=[{"node": "later"}]), 'it uses "later", which does not come before it'),
        (call(args=[{"python": "1"}]), 'it holds a value of the unknown kind "python"'),
        (call(args=[{"dtype": "load"}]), 'torch has no dtype "load"'),
        (call(args=[{"a": 1, "b": 2}]), "cannot be loaded"),
        (call(args=[{"device": "moon"}]), "cannot be loaded: Expected one of cpu"),
        (call(args=3), "is damaged"),
        (call(name="input_ids"), "there are two of that name"),
        (call(name="x=1;import os"), '"x=1;import os" is no name'),
        (call(kwargs={"x=1, y": 1}), '"x=1, y" is no name'),
        (lambda g: g["nodes"].pop(), "the graph is damaged"),
        (lambda g: g | {"nodes": {}}, "the graph is damaged"),
        (lambda g: g | {"inputs": []}, r"placeholders .* are not the inputs"),
        (lambda g: g | {"quantized": {"a": "{}"}}, "the graph is damaged"),
        (
            lambda g: g | {"quantized": {"a": '{"scheme": "int4", "shape": [1], "parts": ["codes"]}'}},
            'has no part "codes"',
        ),
        (lambda g: 3, "the graph is damaged"),
    ],
)
def test_bad_graphs(saved: Path, change: Callable[[Any], Any], message: str) -> None:
    edit(saved / "graph.json", change)
    with pytest.raises(InputError, match=message) as info:
        artifact.load(saved)
    assert "graph.json" in str(info.value)


def test_bad_reports_and_tokenizers(program: Program, saved: Path) -> None:
    edit(saved / "report.json", lambda r: r | {"surprise": 1})
    with pytest.raises(InputError, match=r'report\.json" is damaged: TypeError'):
        artifact.load(saved)
    assert artifact.tokenizer(saved) is None
    edit(saved / "manifest.json", lambda m: m | {"tokenizer_files": ["tokenizer.json"]})
    with pytest.raises(InputError, match=r"the tokenizer in .* cannot be read"):
        artifact.tokenizer(saved)


def test_no_pickle_anywhere(saved: Path) -> None:
    """No file of an artifact holds a pickle or zip header."""
    for path in saved.iterdir():
        assert not path.read_bytes()[:4].startswith((b"\x80", b"PK"))


def test_moved_artifacts_load(program: Program, saved: Path, tmp_path: Path) -> None:
    shutil.move(saved, tmp_path / "elsewhere")
    assert artifact.load(tmp_path / "elsewhere").program.fingerprint() == program.fingerprint()


def test_getitem_of_a_split_survives(tmp_path: Path) -> None:
    sk = Sketch()
    x = sk.input("x", ("batch", 6), torch.float32)
    parts = sk.call(aten.split_with_sizes.default, x, [2, 4], -1, to=("batch", 2))
    second = sk.call(operator.getitem, parts, 1, to=("batch", 4))
    program = sk.done(y=second)
    save(tmp_path / "out", program)
    value = torch.randn(3, 6)
    assert torch.equal(artifact.load(tmp_path / "out").program(x=value)["y"], value[:, 2:])
