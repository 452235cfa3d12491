"""What `fuzz_formats` damages: a sound file or folder of every kind that qcompiler reads, and how it is read."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from qcompiler import artifact
from qcompiler.codebooks import float8_map, quantize_blocks
from qcompiler.compiler import compile
from qcompiler.convert import convert
from qcompiler.formats import gguf_types
from qcompiler.formats.checkpoint import Checkpoint, Format, Rounding
from qcompiler.formats.gguf import GgufFile
from qcompiler.formats.imatrix import Imatrix
from qcompiler.frontends import gguf as gguf_frontend
from qcompiler.plugins import registry
from qcompiler.scheme import QTensor, Scheme

OUT = "out"  # beside the damaged folder: what is written goes there, and nowhere else


@dataclass(frozen=True)
class Seed:
    """A sound folder's files by name, how it is read to the last value, and in how many rounds it is tried once."""

    files: Mapping[str, bytes]
    read: Callable[[Path], None]
    every: int = 1

    @classmethod
    def of(cls, folder: Path, read: Callable[[Path], None], every: int = 1) -> "Seed":
        """The files of a folder."""
        return cls({path.name: path.read_bytes() for path in folder.iterdir()}, read, every)


def seeds(folder: Path) -> dict[str, Seed]:
    """All of them by name; `folder` is where they are made."""
    return {**_checkpoints(folder), **_gguf(folder), **_imatrices(folder), **_onnx(folder), **_programs(folder)}


def records(name: str) -> dict[str, QTensor]:
    """Small weights that a format holds."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    if name == "bitsandbytes":
        return {"a": quantize_blocks(weight, "nf4", 32, double=True), "b": quantize_blocks(weight, "nf4", 32)}
    found = {"a": QTensor.quantize(weight, Scheme.parse("int4:g32:asym"))}
    found["b"] = found["a"].with_parts(zero=None, scheme=Scheme.parse("int4:g32:sym"))
    if name.startswith("gptq"):
        order = torch.argsort(torch.arange(64) % 2, stable=True).to(torch.int32)
        zero = found["a"].zero
        assert zero is not None
        found["a"] = found["a"].with_parts(permutation=order, zero=zero.clamp(min=1))
    if name == "compressed-tensors":
        codes = weight.to(torch.float8_e4m3fn).view(torch.uint8)
        found["c"] = QTensor(Scheme.parse("fp8:channel"), (32, 64), codes, torch.ones(32, 1), codebook=float8_map())
        found["d"] = QTensor.quantize(weight, Scheme.parse("int8:channel:asym"))
    return found


def _checkpoints(folder: Path) -> dict[str, Seed]:
    """For each format two small weights or more, in one file and in several."""
    from tests.checkpoints import llama

    config = {**llama().config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    found = {}
    for form in registry().formats.values():
        if form.write is None or form.read is None:
            continue
        tensors = {f"model.{name}.weight": record for name, record in records(form.name).items()}
        inputs = {}
        if form.name == "compressed-tensors":
            inputs = {"model.d.weight": Rounding(Scheme.parse("int8:tensor:sym"), (torch.ones(1),))}
        whole, sharded = folder / form.name, folder / f"{form.name}-sharded"
        form.write(Checkpoint(config, {**tensors, "model.norm.weight": torch.ones(64)}, None, inputs), whole)
        form.write(Checkpoint(config, tensors, None, inputs), sharded, shard_bytes=1500)
        found |= {place.name: Seed.of(place, _reader(form)) for place in (whole, sharded)}
    return found


def _reader(form: Format) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        assert form.read is not None
        form.detect(folder)
        checkpoint = form.read(folder)
        for name in checkpoint.tensors:
            value = checkpoint.tensors[name]
            if isinstance(value, QTensor):
                value.dequantize()

    return read


def _gguf(folder: Path) -> dict[str, Seed]:
    """A file with a tensor of every type, and a whole model."""
    import gguf

    from tests.test_gguf import write_model
    from tests.test_gguf_types import blocks_of

    types, model = folder / "types", folder / "model"
    for place in (types, model):
        place.mkdir(parents=True)
    writer = gguf.GGUFWriter(types / "x.gguf", "llama")
    writer.add_array("tokens", ["a", "b"])
    for kind in gguf_types.KINDS:
        blocks = blocks_of(kind, 2, 256 // gguf_types.KINDS[kind].block, 0)
        writer.add_tensor(kind, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_tensor("F32", torch.ones(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_model(model / "x.gguf")
    return {"gguf": Seed.of(types, _read_gguf), "gguf-model": Seed.of(model, _load_gguf, every=8)}


def _read_gguf(folder: Path) -> None:
    file = GgufFile.read(folder / "x.gguf")
    for name in file.tensors:
        record = file.qtensor(name)
        if isinstance(record, QTensor):
            record.dequantize()
        else:
            file.floats(name)


def _load_gguf(folder: Path) -> None:
    gguf_frontend.load(GgufFile.read(folder / "x.gguf"))


def _imatrices(folder: Path) -> dict[str, Seed]:
    """Importance matrices, in both of llama.cpp's formats."""
    sums = {"blk.0.attn_q.weight": torch.rand(64), "output.weight": torch.rand(32)}
    matrix = Imatrix(sums, dict.fromkeys(sums, 8.0), ("text",), 2, 16)
    found = {}
    for name in ("imatrix.gguf", "imatrix.dat"):
        place = folder / name
        place.mkdir(parents=True)
        matrix.write(place / name)
        found[name] = Seed.of(place, lambda broken, name=name: _read_imatrix(broken / name))  # type: ignore[misc]
    return found


def _read_imatrix(path: Path) -> None:
    for mean in Imatrix.read(path).means.values():
        mean.sum()


def _onnx(folder: Path) -> dict[str, Seed]:
    """A folder with the ONNX files of a compiled model, tables and external data, and its config.json."""
    from tests.checkpoints import llama

    recipe = "canonicalize, rtn{scheme=int4:g32:asym}, rtn{scheme=int8:g32 include=@head}, fuse, kv_cache, pack"
    compiled = compile(llama(tied=True), recipe, backend="onnxruntime", samples=4, length=16)
    compiled.save(folder / "compiled")
    files = {path.name: path.read_bytes() for path in (folder / "compiled").glob("model.onnx*")}
    files["genai_config.json"] = (folder / "compiled" / "genai_config.json").read_bytes()
    files["config.json"] = json.dumps(compiled.program.info["config"]).encode()
    return {"onnx": Seed(files, _reader(registry().formats["onnx"]), every=4)}


def _programs(folder: Path) -> dict[str, Seed]:
    """A compiled folder, and a whole model that is converted to another format: what is written is watched too."""
    from tests.checkpoints import session, written

    compiled = session("canonicalize, rtn{scheme=int4:g32:asym}, fuse, kv_cache, pack")
    compiled.save(folder / "artifact")
    source = written(compiled, "gptq-v2", folder / "convert")
    return {
        "artifact": Seed.of(folder / "artifact", _load),
        "convert": Seed.of(source, _convert, every=8),
    }


def _convert(folder: Path) -> None:
    convert(folder, folder.parent / OUT, "compressed-tensors", verify=True)


def _load(folder: Path) -> None:
    artifact.load(folder)
