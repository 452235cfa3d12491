"""Fused norms: an addition and the norm that reads it, in the form that is fastest in ONNX Runtime."""

from typing import Any

from torch import fx

from qcompiler.backends.onnxruntime.graph import sizes_of, typed
from qcompiler.backends.onnxruntime.lowering import Lowering, operator_name, schema_arguments
from qcompiler.errors import No
from qcompiler.program import Type

RMS, LAYER = "aten.rms_norm", "aten.layer_norm"


def skip_norm(low: Lowering, node: fx.Node) -> bool | No:
    """`norm(a + b)` at the addition: gives the norm and the sum, which usually goes on as the residual."""
    norms = [user for user in node.users if operator_name(user) in (RMS, LAYER) and user.args[0] is node]
    if len(norms) != 1:
        return No("")
    norm, (a, b, alpha) = norms[0], schema_arguments(node)
    kind, arguments = node.meta["type"], schema_arguments(norm)
    if alpha != 1 or not all(isinstance(x, fx.Node) and x.meta["type"] == kind for x in (a, b)):
        return No("")
    if not kind.dtype.is_floating_point:
        return No("")
    if operator_name(norm) == LAYER:
        # SkipLayerNormalization takes ten times what LayerNormalization does, and ONNX Runtime makes it of Add.
        low.values[node] = typed(low.op("Sum", low.value(a), low.value(b)), kind)
        return True
    if kind.rank != 3 or len(arguments[1]) != 1:
        return No("")
    weight, eps = arguments[2], arguments[-1]
    if not is_vector(weight, kind) or eps is None:
        return No("the norm has no weight or epsilon of its own")
    values = [low.argument(x) for x in (a, b, weight)]
    normed, _, _, total = low.contrib(
        "SkipSimplifiedLayerNormalization", *values, outputs=4, unused=(1, 2), epsilon=eps
    )
    low.values[norm] = typed(normed, norm.meta["type"])
    low.values[node] = typed(total, kind)
    return True


def is_vector(weight: Any, kind: Type) -> bool:
    """Whether a norm's weight is a stored vector in the dtype of the values."""
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return False
    found: Type = weight.meta["type"]
    return found.rank == 1 and found.dtype == kind.dtype


def heads_last(low: Lowering, node: fx.Node) -> Any:
    """A value [batch, heads, sequence, d] as [batch, sequence, heads * d], without the transpose it came by."""
    turned = node.args[0] if operator_name(node) == "aten.transpose" and set(node.args[1:]) == {1, 2} else None
    if isinstance(turned, fx.Node):
        source = turned.args[0]
        if operator_name(turned) in ("aten.view", "aten.reshape") and isinstance(source, fx.Node):
            wide = source.meta["type"]
            if wide.rank == 3 and wide.shape[:2] == turned.meta["type"].shape[:2]:
                return low.value(source)
        return low.op("Reshape", low.value(turned), [0, 0, -1])
    value = low.value(node)
    assert len(sizes_of(value)) == 4
    return low.op("Reshape", low.op("Transpose", value, perm=[0, 2, 1, 3]), [0, 0, -1])
