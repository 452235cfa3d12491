"""Which linear layers a weight pass works on, and how much of the model that is."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import fx

from qcompiler.axis_convolutions import CONVOLUTIONS
from qcompiler.calibration import mark_segments
from qcompiler.errors import ContractError, No, RecipeError
from qcompiler.ops import qc
from qcompiler.pipeline import Context
from qcompiler.program import Program
from qcompiler.rewrite import named_arguments

BODY, HEAD, NORMED = "@body", "@head", "@normed"
_ABSENT = {
    "*": "is there at all",
    BODY: "is there at all",
    HEAD: "follows the repeated blocks",
    NORMED: "reads the output of a norm",
}
NORMS = (torch.ops.aten.rms_norm.default, torch.ops.aten.layer_norm.default)


def layers_of(program: Program) -> list[fx.Node]:
    """All linear layers whose weight is stored, float or quantized."""
    return [n for n in program.calls(torch.ops.aten.linear.default, qc.linear) if weight_name(n)]


def convolutions_of(program: Program) -> list[fx.Node]:
    """All convolutions over float filters that are stored, but transposed ones."""
    found = []
    for node in program.calls(*CONVOLUTIONS):
        given = named_arguments(node)
        if program.tensor_of(given["weight"]) is not None and not given.get("transposed"):
            found.append(node)
    return found


def dense(layers: Sequence[fx.Node], ctx: Context) -> list[fx.Node]:
    """Those convolutions that are not in groups: for a filter for each channel alone it does not pay to round."""
    found = [node for node in layers if named_arguments(node)["groups"] == 1]
    for node in [n for n in layers if n not in found]:
        ctx.refuse(No("a convolution in groups gains nothing from integers", _path(node)))
    return found


def select(
    program: Program,
    include: Sequence[str],
    exclude: Sequence[str],
    ctx: Context,
    layers: Sequence[fx.Node] | None = None,
) -> list[fx.Node]:
    """The float linear layers (or those of `layers`) whose module path or weight name matches `include`, not `exclude`.

    Patterns are shell-style (`*.mlp.*`); `@head` is the layers after the last repeated block (the language-model
    head), `@body` all others, `@normed` those of the body that read the output of a norm. Raises RecipeError for a
    pattern that matches no layer; a model without a head (norms before layers, layers at all) is refused by name
    instead, since named recipes ask for them of every model.
    """
    last = mark_segments(program) - 1
    layers = program.linears() if layers is None else layers
    for pattern in (*include, *exclude):
        if any(_matches(node, pattern, last) for node in layers):
            continue
        if pattern in _ABSENT and (pattern != BODY or not layers):
            ctx.refuse(No(f"no linear layer {_ABSENT[pattern]}", pattern))
        else:
            paths = sorted({_path(node) for node in layers})
            shown = ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "")
            raise RecipeError(
                f'the pattern "{pattern}" matches none of the {len(paths)} linear layers: {shown or "none"}'
            )
    chosen = []
    for node in layers:
        if not any(_matches(node, pattern, last) for pattern in include):
            continue
        if any(_matches(node, pattern, last) for pattern in exclude):
            ctx.refuse(No("excluded by the recipe", _path(node)))
            continue
        chosen.append(node)
    return chosen


def check_coverage(chosen: int, done: int, minimum: float) -> None:
    """Raise ContractError if fewer than `minimum` (0 to 1) of the chosen layers were quantized."""
    if chosen and done / chosen < minimum:
        raise ContractError(
            f"only {done} of {chosen} selected linear layers were quantized, min_coverage is {minimum:g}; "
            "the refusals in the report say why, min_coverage=0 accepts it"
        )


def _matches(node: fx.Node, pattern: str, last: int) -> bool:
    if pattern in (BODY, HEAD, NORMED):
        is_head = last > 0 and node.meta.get("segment") == last
        return is_head == (pattern == HEAD) and (pattern != NORMED or _reads_norm(node))
    return fnmatchcase(_path(node), pattern) or fnmatchcase(weight_name(node), pattern)


def _reads_norm(node: fx.Node) -> bool:
    """Whether a layer's input is the output of a norm, rounded or not."""
    source = node.args[0]
    while isinstance(source, fx.Node) and source.target in (qc.fake_quantize, qc.hadamard):
        source = source.args[0]
    return isinstance(source, fx.Node) and source.target in (*NORMS, qc.reordered_norm)


def _path(node: fx.Node) -> str:
    return str(node.meta.get("path", "")) or weight_name(node)


def weight_name(node: fx.Node) -> str:
    """The name of the stored (or quantized) tensor that a linear layer multiplies by; "" if it is computed."""
    weight = node.args[1]
    first = weight[0] if isinstance(weight, (list, tuple)) else weight
    if not isinstance(first, fx.Node) or first.op != "get_attr":
        return ""
    return str(first.target).partition("::")[0]
