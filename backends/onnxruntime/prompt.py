"""Reading prompts: a second form of a program, whose linear layers multiply 8-bit integers and which has no head.

Decoding is bound by the bytes of the weights, reading a prompt by arithmetic: MatMulNBits unpacks its codes again for
every few tokens, while a product of 8-bit codes is packed once and runs at the rate of the integer units.
"""

from collections.abc import Mapping
from typing import Any

from qcompiler.errors import No
from qcompiler.ops import qc
from qcompiler.program import Program
from qcompiler.scheme import QTensor, Scheme
from qcompiler.target import Answer

WEIGHTS, ACTIVATIONS = Scheme.parse("int8:channel:sym"), "int8:token:sym:dynamic"


def readable(program: Program, about: Mapping[str, Any]) -> Answer:
    """Whether a form that reads prompts can stand beside the program, lowered as `about` says, or why not."""
    if not program.caches:
        return No("prompts are read in integers by programs that have a cache")
    if not about["shared_cache"]:
        return No("prompts are read in integers where past and present share a buffer, which its attention cannot")
    if next(program.calls(qc.linear), None) is None:
        return No("prompts are read in integers where linear layers are quantized and their inputs are not")
    return True


def prompt_form(program: Program) -> Program:
    """A copy that fills the caches and gives nothing else.

    Quantized weights are rounded again to 8 bits, one scale a row; what they multiply is rounded to 8 bits, one scale
    a token.
    """
    copy = program.copy()
    values = dict(zip(copy.outputs, copy.output_node.args[0], strict=True))  # type: ignore[arg-type]
    kept = {name: values[name] for name in program.info["caches"].values()}
    copy.outputs, copy.output_node.args = tuple(kept), (tuple(kept.values()),)
    copy.clean()
    for node in copy.calls(qc.linear):
        eight = QTensor.quantize(copy.weight(node), WEIGHTS)
        with copy.graph.inserting_before(node):
            parts = copy.add_qtensor(f"{node.name}.prompt", eight)
        spec = {"spec": eight.spec(), "scheme": ACTIVATIONS}
        copy.replace(node, qc.integer_linear, (node.args[0], parts, [], *node.args[2:3]), spec)
    copy.clean()
    return copy
