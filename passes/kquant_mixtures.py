"""Mixtures of types: which of GGUF's types a mixture such as Q4_K_M gives to which tensor.

The tables are llama.cpp's (its quantize tool), so that files of one name have one size: the values of attention and
the second layer of the feed-forward network get more bits, in some blocks or all; the output gets six; and rows that
are no multiple of 256 get the type with blocks of 32 that has a little more.
"""

from collections.abc import Callable
from dataclasses import dataclass

from qcompiler.errors import No, RecipeError, nearest
from qcompiler.formats.gguf_types import KINDS


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: its role (`attn_v`), which of the blocks (of `count`), and what else decides its type.

    - `queries`: how many query heads share a key head
    - `weighed`: whether an importance matrix is at hand
    """

    role: str
    index: int = 0
    count: int = 1
    queries: int = 1
    weighed: bool = False

    @property
    def first_eighth(self) -> bool:
        """Among the blocks nearest to the input."""
        return self.index < self.count // 8

    @property
    def sensitive(self) -> bool:
        """In the first or last eighth of the blocks, or every third of the others."""
        eighth = self.count // 8
        return self.first_eighth or self.index >= 7 * self.count // 8 or (self.index - eighth) % 3 == 2


Rule = Callable[[Place], str | bool]  # a type, or False for the mixture's own


@dataclass(frozen=True)
class Mixture:
    """A type for all matrices, and rules for those of some roles."""

    base: str
    rules: dict[str, Rule]

    def kind(self, place: Place, columns: int) -> str | No:
        """The type of a matrix with rows of `columns` values."""
        if place.role in self.rules:
            return fitting(str(self.rules[place.role](place) or self.base), columns)
        if place.role == "output":
            plain = self.base == "Q8_0" or columns % KINDS[self.base].block
            return fitting("Q8_0" if plain else "Q6_K", columns)
        return fitting(self.base, columns)


FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "IQ4_XS": "IQ4_NL"}


def fitting(kind: str, columns: int) -> str | No:
    """The type, or the one with smaller blocks that stands in for it, whose blocks divide a row.

    >>> fitting("Q4_K", 1536), fitting("Q4_K", 576)
    ('Q4_K', 'Q5_0')
    """
    while columns % KINDS[kind].block:
        if kind not in FALLBACKS:
            return No(f"rows of {columns} values are no multiple of {KINDS[kind].block}")
        kind = FALLBACKS[kind]
    return kind


def _always(kind: str) -> Rule:
    return lambda place: kind


def _if(condition: Callable[[Place], bool], kind: str) -> Rule:
    return lambda place: kind if condition(place) else False


def _shared(place: Place) -> bool:
    return place.queries >= 4


def _where_sensitive(kind: str) -> dict[str, Rule]:
    return {role: _if(lambda place: place.sensitive, kind) for role in ("attn_v", "ffn_down")}


def _iq4() -> dict[str, Rule]:
    unweighed = _if(lambda place: place.first_eighth and not place.weighed, "Q5_K")
    return {"attn_v": _if(_shared, "Q5_K"), "ffn_down": unweighed}


def _weighed_start(kind: str) -> dict[str, Rule]:
    return {"ffn_down": _if(lambda place: place.first_eighth and place.weighed, kind)}


MIXTURES: dict[str, Mixture] = {
    "Q2_K": Mixture(
        "Q2_K",
        {
            "attn_v": lambda place: "Q4_K" if _shared(place) else "Q3_K",
            "ffn_down": _always("Q3_K"),
            "attn_output": _always("Q3_K"),
        },
    ),
    "Q2_K_S": Mixture("Q2_K", {"attn_v": _if(_shared, "Q4_K"), "ffn_down": _if(lambda p: p.first_eighth, "Q4_K")}),
    "Q3_K_S": Mixture("Q3_K", {}),
    "Q3_K_M": Mixture(
        "Q3_K",
        {
            "attn_v": lambda place: "Q5_K" if place.index < 2 else "Q4_K",
            "ffn_down": lambda place: "Q5_K" if place.index < place.count // 16 else "Q4_K",
            "attn_output": _always("Q4_K"),
            "attn_qkv": _always("Q4_K"),
        },
    ),
    "Q3_K_L": Mixture(
        "Q3_K",
        {
            "attn_v": _always("Q5_K"),
            "ffn_down": _always("Q5_K"),
            "attn_output": _always("Q5_K"),
            "attn_qkv": _always("Q4_K"),
        },
    ),
    "Q4_K_S": Mixture(
        "Q4_K", {"attn_v": _if(lambda p: p.index < 4, "Q5_K"), "ffn_down": _if(lambda p: p.first_eighth, "Q5_K")}
    ),
    "Q4_K_M": Mixture("Q4_K", _where_sensitive("Q6_K") | {"attn_qkv": _always("Q5_K")}),
    "Q5_K_S": Mixture("Q5_K", {}),
    "Q5_K_M": Mixture("Q5_K", _where_sensitive("Q6_K") | {"attn_qkv": _always("Q6_K")}),
    "Q6_K": Mixture("Q6_K", {}),
    "Q4_0": Mixture("Q4_0", _weighed_start("Q4_1")),
    "Q4_1": Mixture("Q4_1", {}),
    "Q5_0": Mixture("Q5_0", _weighed_start("Q5_1")),
    "Q5_1": Mixture("Q5_1", {}),
    "Q8_0": Mixture("Q8_0", {}),
    "IQ4_NL": Mixture("IQ4_NL", _iq4()),
    "IQ4_XS": Mixture("IQ4_XS", _iq4()),
}
PURE = ("Q3_K", "Q4_K", "Q5_K")  # types that no mixture is named after: every matrix gets the same


def mixture(name: str) -> Mixture:
    """The mixture of that name, in any case; RecipeError, with the nearest known name, for an unknown one."""
    found = name.upper()
    if found in PURE:
        return Mixture(found, {"output": _always(found)})
    if found not in MIXTURES:
        raise RecipeError(f'kquant has no type "{name}"; {nearest(found, [*MIXTURES, *PURE])}')
    return MIXTURES[found]
