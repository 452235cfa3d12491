"""Running the nodes of a graph one by one, in PyTorch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx


def execute(
    nodes: Iterable[fx.Node],
    env: dict[fx.Node, Any],
    tensors: Mapping[str, Tensor],
    watch: Callable[[fx.Node, Any], None] | None = None,
) -> None:
    """Run `nodes` in order, reading and writing values in `env`; a value is dropped after its last use there.

    Values that nodes outside the list still use stay in `env`. `watch` sees every value when it is made. Stored
    tensors are read when used and never kept in `env`.
    """
    nodes = list(nodes)
    last_uses = _last_uses(nodes)

    def value(argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        return tensors[str(argument.target)] if argument.op == "get_attr" else env[argument]

    for i, node in enumerate(nodes):
        if node.op == "call_function":
            args = fx.node.map_aggregate(node.args, value)
            kwargs = fx.node.map_aggregate(node.kwargs, value)
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            if watch:
                watch(node, env[node])
        elif node.op == "output":
            env[node] = fx.node.map_aggregate(node.args[0], value)
        for dead in last_uses.get(i, ()):
            env.pop(dead, None)


def _last_uses(nodes: Sequence[fx.Node]) -> dict[int, list[fx.Node]]:
    """By position: the values that no node after that position, in the list or outside it, uses."""
    place = {node: i for i, node in enumerate(nodes)}
    found: dict[int, list[fx.Node]] = {}
    for used in {used for node in nodes for used in node.all_input_nodes}:
        places = [place.get(user, -1) for user in used.users]
        if -1 not in places:
            found.setdefault(max(places), []).append(used)
    return found
