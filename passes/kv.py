"""kv: keys and values are rounded as a low-bit cache holds them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompiler.attention import block_scheme
from qcompiler.calibration import Needs
from qcompiler.errors import No, PassError, RecipeError
from qcompiler.ops import qc
from qcompiler.passes.ranges import static_grid, statistic_of
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.rewrite import named_arguments
from qcompiler.rounding import activation_scheme
from qcompiler.scheme import Scheme

KEY, VALUE = 1, 2  # their places among the arguments of qc.attention


@dataclass(frozen=True)
class Kv(Pass):
    """Round the keys and values of every attention; `kv_cache` afterwards gives it a cache.

    `key` and `value` are schemes along the channels of a head: one scale a token (`int8:token:asym:dynamic`), one for
    each group of channels of a token (`int4:g32:asym:dynamic`, `nf4:g32:dynamic`), or static, one for each head and
    group of channels (`int4:g16:asym`; after `rptq` these are its clusters, arXiv 2304.01089). With `block` > 0 keys
    have one scale for each channel over that many tokens (`int2:channel:asym:dynamic`; KIVI, arXiv 2402.02750,
    section 4.1). `recent` tokens are kept in float, and the `first` ones, which attention often sinks into
    (arXiv 2309.17453). `rotary=before` rounds keys before they are turned: their channels keep their ranges there
    (KVQuant, arXiv 2401.18079, section 3.2). Static ranges after rotary hold at every position, where the
    calibration text turned the slow channel pairs through part of the circle only; `widen=false` takes what was seen.
    `query` rounds queries too, and `levels` the attention weights, to so many equal steps up to each query's largest.
    """

    name: ClassVar[str] = "kv"
    contract: ClassVar[Contract] = Contract.LOSSY

    key: Scheme = Scheme.parse("int8:token:asym:dynamic")
    value: Scheme = Scheme.parse("int8:token:asym:dynamic")
    query: Scheme | None = None
    block: int = 0
    recent: int = 0
    first: int = 0
    rotary: str = "after"
    ranges: str = "minmax"
    levels: int = 0
    widen: bool = True

    @property
    def uses_data(self) -> bool:
        return any(not scheme.dynamic for scheme in self._schemes().values())

    def plan(self) -> Pass:
        dynamic = Scheme.parse("int8:token:asym:dynamic")
        return Kv(dynamic, dynamic, dynamic if self.query else None, rotary=self.rotary, levels=self.levels)

    def _schemes(self) -> dict[int, Scheme]:
        """The schemes, by argument of the attention."""
        query = {0: self.query} if self.query else {}
        return {**query, KEY: self.key, VALUE: self.value}

    def run(self, program: Program, ctx: Context) -> None:
        self._check()
        attentions = list(program.calls(qc.attention))
        if not attentions:
            ctx.refuse(No("the program has no attention that was recognized"))
        static = {i: scheme for i, scheme in self._schemes().items() if not scheme.dynamic}
        if not static:
            for node in attentions:
                self.round_attention(program, node, {}, ctx)
            return
        if not ctx.samples:
            raise PassError(
                "static ranges of keys and values need calibration data; give some, or take dynamic schemes"
            )

        def needs(nodes: Sequence[fx.Node]) -> Needs:
            statistic = statistic_of(self.ranges, heads=True)
            return {f"{node.name}:{i}": statistic for node in nodes if node.target is qc.attention for i in static}

        for segment in ctx.sweep(program, needs):
            for node in [n for n in segment.nodes if n.target is qc.attention]:
                ctx.node = node
                grids = {}
                for i, scheme in static.items():
                    seen, heads = segment.statistics[f"{node.name}:{i}"], heads_of(node, i)
                    if self.widen:
                        seen = at_every_position(seen, node.args[i], heads)
                    grids[i] = static_grid(seen, scheme, self.ranges, heads=heads)
                self.round_attention(program, node, grids, ctx)

    def _check(self) -> None:
        if self.rotary not in ("after", "before"):
            raise RecipeError(f'rotary "{self.rotary}" is neither after nor before')
        if self.block:
            block_scheme(str(self.key), self.block)
        else:
            activation_scheme(str(self.key))
        activation_scheme(str(self.value))
        if self.rotary == "before" and (self.block or self.recent or self.first or not self.key.dynamic):
            raise RecipeError(
                "rotary=before rounds each key where it is made: block, recent, first and static schemes "
                "need rotary=after"
            )

    def round_attention(
        self, program: Program, node: fx.Node, grids: Mapping[int, Sequence[Tensor]], ctx: Context
    ) -> None:
        """Let an attention round its arguments, to `grids` where their schemes are static."""
        stored: dict[int, Any] = {}
        with program.graph.inserting_before(node):
            for i, grid in grids.items():
                name = f"{node.meta.get('path') or node.name}.{('query', 'key', 'value')[i]}"
                parts = zip(("scale", "zero"), grid, strict=False)
                stored[i] = [program.store(f"{name}_{part}", tensor, like=node) for part, tensor in parts]
        if self.query:
            self._insert(program, node, 0, self.query, stored.get(0, []))
        how: dict[str, Any] = {
            "value": str(self.value),
            "recent": self.recent,
            "first": self.first,
            "levels": self.levels,
        }
        if self.rotary == "after":
            how |= {"key": str(self.key), "block": self.block}
        elif not self._before_rotary(program, node):
            ctx.refuse(No("its keys are not turned by rotary positions", str(node.meta.get("path", node.name))))
            how |= {"key": str(self.key)}
        grid_of = {"key_grid": stored.get(KEY), "value_grid": stored.get(VALUE)}
        node.kwargs = {**node.kwargs, **{k: v for k, v in {**how, **grid_of}.items() if v}}

    def _insert(self, program: Program, node: fx.Node, place: int, scheme: Scheme, grid: Sequence[fx.Node]) -> None:
        """Round one argument of a node before it gets there."""
        x = node.args[place]
        assert isinstance(x, fx.Node)
        with program.graph.inserting_before(node):
            how = {"scheme": str(scheme)}
            rounded = program.call(qc.fake_quantize, (x, list(grid)), how, like=node, type=x.meta["type"])
        node.update_arg(place, rounded)

    def _before_rotary(self, program: Program, node: fx.Node) -> bool:
        key = node.args[KEY]
        if not isinstance(key, fx.Node) or key.target is not qc.rope:
            return False
        self._insert(program, key, 0, self.key, [])
        return True


def at_every_position(seen: Tensor, value: Any, heads: int) -> Tensor:
    """What was seen [rows, heads * d] of a value, and where rotary positions turned it, what other positions make it.

    Both channels of a pair come to be the pair's radius and its opposite.
    """
    if not isinstance(value, fx.Node) or value.target is not qc.rope:
        return seen
    given = named_arguments(value)
    width = 2 * int(given["cos"].meta["type"].shape[-1])
    channels = seen.unflatten(-1, (heads, -1))
    turned, rest = channels[..., :width], channels[..., width:]
    pairs = turned.unflatten(-1, (-1, 2) if given["interleaved"] else (2, -1))
    axis = -1 if given["interleaved"] else -2
    # Of extremes by channel all that is known is that the radius is no larger than theirs together.
    known = pairs.abs().amax(0, keepdim=True) if len(seen) == 2 else pairs
    radius = known.pow(2).sum(axis, keepdim=True).sqrt().expand_as(known).flatten(-2)
    both = torch.cat([-radius, radius])
    rest = torch.cat([rest, rest]) if len(both) > len(rest) else rest
    return torch.cat([both, rest], -1).flatten(1)


def heads_of(node: fx.Node, place: int) -> int:
    """How many heads an argument [batch, heads, tokens, d] has."""
    value = node.args[place]
    assert isinstance(value, fx.Node)
    heads = value.meta["type"].shape[1]
    if not isinstance(heads, int):
        raise PassError(f'the attention at "{node.meta.get("path", node.name)}" has a dynamic number of heads')
    return heads
