"""kquant: GGUF's block types and llama.cpp's mixtures of them, with a search for the scales that lose least."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qcompiler.calibration import Needs, Sample, measure
from qcompiler.errors import No
from qcompiler.formats.gguf_names import gguf_names
from qcompiler.formats.imatrix import Imatrix
from qcompiler.passes.kquant_mixtures import Mixture, Place, mixture
from qcompiler.passes.kquant_types import quantize
from qcompiler.passes.rtn import layer_record
from qcompiler.passes.selection import check_coverage, layers_of, select, weight_name
from qcompiler.passes.statistics import SumSquares
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program

CALIBRATION = "calibration"


@dataclass(frozen=True)
class KQuant(Pass):
    """Quantize the selected linear layers and embeddings as llama.cpp's quantize tool would, with less error.

    `type` is a mixture (q4_k_m, q3_k_l, q2_k, ...), which gives tensors of some roles more bits than others, or a type
    for all (q4_k); docs/formats.md has the list. `imatrix` weighs the errors of a layer's input channels by
    their squared activations: the path of a file that llama.cpp or `Imatrix.write` wrote, or "calibration", which
    measures them. `include` and `exclude` are as everywhere; embeddings go by their weights' names.
    """

    name: ClassVar[str] = "kquant"
    contract: ClassVar[Contract] = Contract.LOSSY

    type: str = "q4_k_m"
    imatrix: str = ""
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    min_coverage: float = 1.0

    @property
    def uses_data(self) -> bool:
        return self.imatrix == CALIBRATION

    def plan(self) -> Pass:
        return replace(self, imatrix="" if self.uses_data else self.imatrix)

    def needs(self, program: Program) -> Needs:
        return {node.name: SumSquares() for node in layers_of(program)} if self.uses_data else {}

    def run(self, program: Program, ctx: Context) -> None:
        chosen = mixture(self.type)
        names = dict.fromkeys(weight_name(node) for node in select(program, self.include, self.exclude, ctx))
        names |= dict.fromkeys(name for name in _tables(program) if self._wants(name))
        importance = self._importance(program, ctx)
        places = _places(program, bool(importance))
        done = 0
        for i, name in enumerate(names):
            ctx.progress("quantizing", i, len(names))
            answer = _kind(chosen, places.get(name, Place("")), program.tensors[name])
            if isinstance(answer, No):
                ctx.refuse(answer.at(name))
                continue
            weight, weights = program.tensors[name], importance.get(name)
            if importance and weights is None:
                ctx.refuse(No("the importance matrix has no entry for it: all its channels count alike", name))
            elif weights is not None and len(weights) != weight.shape[1]:
                ctx.refuse(No(f"the importance matrix has {len(weights)} channels, not {weight.shape[1]}", name))
                weights = None
            q = quantize(weight, answer, weights)
            ctx.layer(layer_record(name, weight, q, f"{self.name} {answer}"))
            program.quantize_tensor(name, q)
            done += 1
        program.info["gguf_mixture"] = self.type.upper()
        check_coverage(len(names), done, self.min_coverage)

    def _wants(self, name: str) -> bool:
        wanted = any(fnmatchcase(name, pattern) for pattern in self.include)
        return wanted and not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def _importance(self, program: Program, ctx: Context) -> dict[str, Tensor]:
        """Means of squares by the program's names; nothing without an importance matrix."""
        if self.uses_data:
            found = _by_weight(program, ctx.statistics)
            return {name: total.float() / max(count, 1) for name, (count, total) in found.items()}
        if not self.imatrix:
            return {}
        means = Imatrix.read(self.imatrix).means
        return {name: means[stored] for name, stored in gguf_names(program).items() if stored in means}


def measured(program: Program, samples: Sequence[Sample], dataset: str = "") -> Imatrix:
    """The importance matrix of a program's linear layers over samples, to be written for llama.cpp or for kquant.

    Layers for which GGUF has no name are left out; a head that shares its weight with the embedding goes by the name of
    that.
    """
    found = _by_weight(program, measure(program, samples, {n.name: SumSquares() for n in layers_of(program)}))
    names = gguf_names(program)
    named = {names[name]: value for name, value in found.items() if name in names}
    return Imatrix(
        {name: total.float() for name, (_, total) in named.items()},
        {name: float(count) for name, (count, _) in named.items()},
        (Path(dataset).name,) if dataset else (),
        len(samples),
        max((next(iter(sample.values())).numel() for sample in samples), default=0),
    )


def _by_weight(program: Program, statistics: Any) -> dict[str, tuple[int, Tensor]]:
    """The measured (count, sums) by the names of the weights that read them, where a token reached them."""
    found = {weight_name(node): statistics.get(node.name, (0, None)) for node in layers_of(program)}
    return {name: (count, total) for name, (count, total) in found.items() if total is not None}


def _tables(program: Program) -> list[str]:
    """The weights of token embeddings; those of positions stay floats, as llama.cpp has them."""
    sources = [node.args[0] for node in program.calls(torch.ops.aten.embedding.default)]
    names = [str(s.target) for s in sources if isinstance(s, torch.fx.Node) and s.op == "get_attr"]
    known = gguf_names(program)
    return [name for name in names if known.get(name, "token_embd").startswith("token_embd")]


def _places(program: Program, weighed: bool) -> dict[str, Place]:
    """Where each tensor stands, by the names GGUF has for them."""
    names = {name: stored.split(".") for name, stored in gguf_names(program).items()}
    blocks = {name: words for name, words in names.items() if words[0] == "blk"}
    count = 1 + max((int(words[1]) for words in blocks.values()), default=-1)
    rows = {words[2]: program.tensors[name].shape[0] for name, words in blocks.items() if name in program.tensors}
    queries = rows.get("attn_q", 1) // max(rows.get("attn_v", 1), 1)
    found = {name: Place(words[2], int(words[1]), count, queries, weighed) for name, words in blocks.items()}
    tied = all(words[0] != "output" for words in names.values())
    for name in names.keys() - blocks.keys():
        role = names[name][0]
        found[name] = Place("output" if tied and role == "token_embd" else role, weighed=weighed)
    return found


def _kind(chosen: Mixture, place: Place, weight: Tensor) -> str | No:
    if weight.dim() != 2:
        return No(f"the weight has {weight.dim()} dimensions, not 2")
    return chosen.kind(place, weight.shape[1])
