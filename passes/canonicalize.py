"""canonicalize: the many spellings of models become few operators."""

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from qcompiler.passes.patterns import activations, attention, convolutions, linear, norms, rotary
from qcompiler.passes.patterns.simplify import fold_constants, merge_equal, simplify
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.rewrite import apply


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Say the same with few operators: linear, layer_norm, rms_norm, qc.rope, qc.attention, elementwise ones, views.

    Dead code, calls that do nothing and values computed twice go; small constants are computed beforehand. What no rule
    knows stays as it is, and what a rule nearly knew is refused with the reason.
    """

    name: ClassVar[str] = "canonicalize"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite `program`; the report notes how often each rule fired."""
        fired: Counter[str] = Counter()
        tidy(program)
        fired += apply(program, linear.RULES, ctx.refuse)
        tidy(program)
        fold_constants(program)
        for rules in (convolutions.RULES, norms.RULES, activations.RULES, rotary.rules(program), attention.RULES):
            fired += apply(program, rules, ctx.refuse)
            tidy(program)
        attention.ungroup(program)
        attention.fold_masks(program, ctx.refuse)
        tidy(program)
        for rule, count in sorted(fired.items()):
            ctx.note(f"{rule}: {count}")


def tidy(program: Program) -> None:
    """Drop what does nothing, and compute nothing twice."""
    program.clean()
    simplify(program)
    merge_equal(program)
