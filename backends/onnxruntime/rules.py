"""All rules and fusions, and the two things done with them: exporting a program and trying one node."""

import collections
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from qcompiler.backends.onnxruntime import (
    activations,
    attention,
    convolutions,
    elementwise,
    pooling,
    products,
    quantized,
    shapes,
    verbatim,
)
from qcompiler.backends.onnxruntime.decoder import group_query
from qcompiler.backends.onnxruntime.fusions import skip_norm
from qcompiler.backends.onnxruntime.graph import dtype_of, sizes_of, typed
from qcompiler.backends.onnxruntime.lowering import SCALAR, Fusion, Lowering, Options, Rule, Unsupported, operator_name
from qcompiler.backends.onnxruntime.names import MODEL
from qcompiler.errors import BackendError
from qcompiler.program import Program, Type
from qcompiler.target import Answer

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **shapes.RULES,
    **products.RULES,
    **attention.RULES,
    **activations.RULES,
    **quantized.RULES,
    **convolutions.RULES,
    **pooling.RULES,
    **verbatim.RULES,
}
FUSIONS: dict[str, tuple[Fusion, ...]] = {"aten.add": (skip_norm,), "qc.cached_attention": (group_query,)}


def export(program: Program, folder: Path, options: Options, model: str = MODEL) -> dict[str, Any]:
    """Write the program to `folder` as `model` and its data; returns what it notes in its metadata.

    BackendError names a node that has no form.
    """
    low = Lowering(program, options, RULES, {} if options.opset_only else FUSIONS)
    try:
        outputs = low.run()
        outputs |= most_likely(low, outputs["logits"]) if options.top and "logits" in outputs else {}
    except Unsupported as error:
        where = low.node.name if low.node is not None else ""
        raise BackendError(
            f'ONNX Runtime cannot run node "{where}": {error}; use the backend "reference" for this program'
        ) from error
    about = {
        "kernels": dict(collections.Counter(low.kernels.values())),
        "refusals": sorted({str(no) for no in low.refusals}),
        "accuracy_level": options.accuracy_level,
        "max_positions": options.max_positions,
        "shared_cache": shares_cache(low),
    }
    inline = program.info.get("frontend") == "onnx"  # one file became one file
    metadata = program.info.get("onnx", {}).get("metadata")
    low.graph.save(folder, list(low.inputs.values()), outputs, about, metadata, inline, model)
    return about


def most_likely(low: Lowering, logits: ir.Value) -> dict[str, ir.Value]:
    """The tokens with the largest logits, and these."""
    count = low.options.top
    top, ids = low.ops("TopK", logits, [count], outputs=2, axis=-1, largest=1, sorted=1)
    sizes = (*sizes_of(logits)[:-1], count)
    return {
        "top_ids": typed(ids, Type(sizes, torch.int64)),
        "top_logits": typed(top, Type(sizes, dtype_of(logits))),
    }


def shares_cache(low: Lowering) -> bool:
    """Whether every attention is GroupQueryAttention, which keeps past and present in one buffer."""
    attentions = [node for node in low.program.graph.nodes if operator_name(node) == "qc.cached_attention"]
    fused = [node for node in attentions if low.kernels.get(node.name, "").startswith("GroupQueryAttention")]
    return bool(attentions) and fused == attentions


def try_rule(program: Program, node: fx.Node) -> Answer:
    """True if `node` alone can be lowered: its rule is tried on values of the types that the program gives."""
    low = Lowering(program, Options(), RULES, {})
    low.node = node
    try:
        for argument in node.all_input_nodes:
            if argument.op != "get_attr":
                stand_in(low, argument)
        low.lower(node)
    except Unsupported as error:
        return error.no.at(f"{node.name} ({operator_name(node)})")
    return True


def stand_in(low: Lowering, node: fx.Node) -> None:
    """Give `node` a value of its type that nothing computes."""
    kind = node.meta.get("type")
    try:
        if isinstance(kind, tuple):
            low.values[node] = [low.graph.input(node.name, one) if one else None for one in kind]
        else:
            low.values[node] = low.graph.input(node.name, kind or SCALAR)
    except KeyError:
        raise Unsupported(f"{kind} is not computed in by ONNX Runtime's CPU kernels") from None
