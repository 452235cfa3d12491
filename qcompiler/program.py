"""Program: a captured model as a torch.fx graph, its tensors by name, and its signature.

The meaning of a Program is always "run it in PyTorch": `program(**inputs)` executes the graph node by node.
Tensors live beside the graph, one name each (tied tensors are one tensor), memory-mapped where the source is.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler import ops
from qcompiler.errors import InputError, QCompilerError
from qcompiler.execution import execute
from qcompiler.scheme import QTensor, part_names
from qcompiler.text import lines

Size = int | str  # a static size, or the name of a dynamic one: "batch", "sequence"


@dataclass(frozen=True)
class Type:
    """Shape and dtype of a value; dynamic sizes are names.

    >>> str(Type(("batch", 4), torch.float32))
    'float32[batch, 4]'
    """

    shape: tuple[Size, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{_dtype_name(self.dtype)}[{', '.join(map(str, self.shape))}]"

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)


@dataclass(frozen=True)
class Input:
    """One graph input. `default` says what an absent one is filled with:

    "" required; "ones" (attend everywhere), "positions" (counted from the past) and "every" (all new positions)
    are made from the ids; "empty" is a cache that holds nothing yet (its size named "past" is 0).
    """

    name: str
    type: Type
    default: str = ""


class Decoded(dict[tuple[int, ...], tuple[list[Tensor], Tensor]]):
    """Decoded tensors by the identities of their records' parts, which are kept too."""


@dataclass
class Program:
    """A captured model.

    `graph` holds placeholders (the inputs, in order), get_attr nodes (targets are names in `tensors`), calls of
    ATen, `qc::` and a few Python operators, and one output node. Every node has `meta["type"]`: a Type, a tuple of
    them, or None for a plain number; `meta["path"]` is the module path it came from, `meta["segment"]` the index
    of its repeated block (see calibration.py). `info` is free JSON-able provenance. `quantized` maps the name of a
    quantized tensor to its spec; its parts stand in `tensors` as `name::part`. `codes` holds the quantized form in
    which the source stored a float tensor, where it did (pass `carry` puts it in place).
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    info: dict[str, Any] = field(default_factory=dict)
    quantized: dict[str, str] = field(default_factory=dict)
    codes: dict[str, QTensor] = field(default_factory=dict)
    _digests: dict[str, tuple[Tensor, int, bytes]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        ops.load()

    # -- running ---------------------------------------------------------------------------------------------

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run the program in PyTorch without gradients; returns its outputs by name.

        Absent inputs get their defaults. Raises InputError for missing or unknown ones.
        """
        with torch.no_grad():
            env = self.bind(inputs)
            execute(self.graph.nodes, env, self.tensors)
        values = env[self.output_node]
        return dict(zip(self.outputs, values, strict=True))

    def module(self) -> fx.GraphModule:
        """The graph as a module that PyTorch compiles: called with all inputs in order, it returns all outputs."""
        names = {name: f"tensor_{i}" for i, name in enumerate(self.tensors)}
        graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.graph.nodes:
            env[node] = graph.node_copy(node, env.__getitem__)
            if node.op == "get_attr":
                env[node].target = names[str(node.target)]
        root = torch.nn.Module()
        for name, tensor in self.tensors.items():
            root.register_buffer(names[name], tensor)
        return fx.GraphModule(root, graph)

    def bind(self, inputs: Mapping[str, Tensor]) -> dict[fx.Node, Any]:
        """The placeholders' values: those given, and defaults for the others."""
        known = {i.name for i in self.inputs}
        if unknown := set(inputs) - known:
            raise InputError(f"unknown input {sorted(unknown)}; the program takes {sorted(known)}")
        return {
            node: inputs[spec.name] if spec.name in inputs else self._default(spec, inputs)
            for node, spec in zip(self.placeholders, self.inputs, strict=True)
        }

    def _default(self, spec: Input, inputs: Mapping[str, Tensor]) -> Tensor:
        first = self.inputs[0].name
        if not spec.default or first not in inputs:
            raise InputError(f'input "{spec.name}" is missing; the program takes {[i.name for i in self.inputs]}')
        ids = inputs[first]
        past = self.past_length(inputs)
        if spec.default == "ones":
            return ids.new_ones((ids.shape[0], ids.shape[1] + past), dtype=spec.type.dtype)
        if spec.default == "positions":
            return torch.arange(past, past + ids.shape[1], device=ids.device).expand(ids.shape[0], -1)
        if spec.default == "every":
            return torch.arange(ids.shape[1], device=ids.device)
        sizes = {"batch": ids.shape[0], "past": 0}
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.type.shape]
        return torch.zeros(shape, dtype=spec.type.dtype, device=ids.device)

    def past_length(self, inputs: Mapping[str, Tensor]) -> int:
        """How many positions the caches among `inputs` already hold."""
        for spec in self.caches:
            if spec.name in inputs:
                return inputs[spec.name].shape[spec.type.shape.index("past")]
        return 0

    @property
    def caches(self) -> tuple[Input, ...]:
        """The inputs that are cache state; empty before the kv_cache pass."""
        return tuple(i for i in self.inputs if i.default == "empty")

    def newest_logits(self, ids: Tensor) -> dict[str, Tensor]:
        """The input that asks for the logits of the last of these ids alone, where the program has one."""
        asked = any(i.name == "logits_positions" for i in self.inputs)
        return {"logits_positions": torch.tensor([ids.shape[1] - 1])} if asked else {}

    def cache_updates(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The cache inputs of the next step, from this step's outputs."""
        updates: Mapping[str, str] = self.info.get("caches", {})
        return {name: outputs[updates[name]] for name in (i.name for i in self.caches)}

    # -- reading ---------------------------------------------------------------------------------------------

    @property
    def placeholders(self) -> list[fx.Node]:
        """The input nodes, in the order of `inputs`."""
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def output_node(self) -> fx.Node:
        """The graph's one output node."""
        node: fx.Node = self.graph.output_node()
        return node

    def calls(self, *targets: Any) -> Iterator[fx.Node]:
        """The call nodes of the given operators (or all), in graph order; safe while nodes are replaced."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and (not targets or node.target in targets):
                yield node

    def linears(self) -> list[fx.Node]:
        """Float linear layers whose weight is a stored tensor: what weight quantization works on."""
        return [
            node
            for node in self.calls(torch.ops.aten.linear.default)
            if isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr"
        ]

    def tensor_of(self, node: Any) -> Tensor | None:
        """The stored tensor a get_attr node stands for; None for any other argument."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.tensors[str(node.target)]
        return None

    def qtensor(self, name: str) -> QTensor:
        """The quantized tensor of that name."""
        prefix = f"{name}::"
        spec = self.quantized[name]
        parts = [self.tensors[prefix + part] for part in part_names(spec)]
        return QTensor.from_parts(parts, spec)

    def weight(self, node: fx.Node) -> Tensor:
        """What a linear layer multiplies by, [n, k]; a quantized weight is decoded."""
        source = node.args[1]
        if isinstance(source, (list, tuple)):
            first = source[0]
            assert isinstance(first, fx.Node)
            return self.qtensor(str(first.target).partition("::")[0]).dequantize()
        weight = self.tensor_of(source)
        if weight is None:
            raise QCompilerError(f'the weight of node "{node.name}" is computed, not stored')
        return weight

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    # -- changing --------------------------------------------------------------------------------------------

    def get(self, name: str, like: fx.Node | None = None) -> fx.Node:
        """A get_attr node of the stored tensor `name`, inserted at the graph's current insertion point."""
        node = self.graph.get_attr(name)
        tensor = self.tensors[name]
        node.meta = {"type": Type(tuple(tensor.shape), tensor.dtype)} | _origin(like)
        return node

    def store(self, name: str, tensor: Tensor, like: fx.Node | None = None) -> fx.Node:
        """Store a new tensor, under that name or the next that is free, and return a get_attr node of it."""
        free, count = name, 1
        while free in self.tensors:
            count += 1
            free = f"{name}_{count}"
        self.tensors[free] = tensor
        return self.get(free, like)

    def call(
        self,
        target: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        like: fx.Node,
        type: Any = None,
    ) -> fx.Node:
        """A call node at the current insertion point; origin (and type, unless given) are those of `like`."""
        node = self.graph.call_function(target, tuple(args), dict(kwargs or {}))
        node.meta = {"type": like.meta.get("type") if type is None else type} | _origin(like)
        return node

    def replace(
        self, node: fx.Node, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, type: Any = None
    ) -> fx.Node:
        """Put a call in the place of `node`: same users, same origin, same type unless given."""
        with self.graph.inserting_before(node):
            new = self.call(target, args, kwargs, like=node, type=type)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        return new

    def add_qtensor(self, name: str, weight: QTensor) -> list[fx.Node]:
        """Store the parts of `weight` under `name` and return get_attr nodes for them, at the insertion point."""
        self.quantized[name] = weight.spec()
        nodes = []
        for part, tensor in weight.parts().items():
            self.tensors[f"{name}::{part}"] = tensor
            nodes.append(self.get(f"{name}::{part}"))
        return nodes

    def quantize_tensor(self, name: str, weight: QTensor) -> None:
        """Put `weight` in the place of the float tensor `name`, at every use of it.

        Linear layers and embeddings become `qc.linear` and `qc.embedding`; any other use reads
        `qc.dequantize`. The float tensor is dropped.
        """
        spec = {"spec": weight.spec()}
        for source in [n for n in self.graph.nodes if n.op == "get_attr" and n.target == name]:
            for user in list(source.users):
                with self.graph.inserting_before(user):
                    parts = self.add_qtensor(name, weight)
                    for part in parts:
                        part.meta |= _origin(user)
                aten = torch.ops.aten
                if user.target == aten.linear.default and user.args[1] is source and user.args[0] is not source:
                    bias = user.args[2:3]
                    self.replace(user, ops.qc.linear, (user.args[0], parts, *bias), {**user.kwargs, **spec})
                elif user.target == aten.embedding.default and user.args[0] is source:
                    self.replace(user, ops.qc.embedding, (user.args[1], parts), spec)
                else:
                    with self.graph.inserting_before(user):
                        whole = self.call(ops.qc.dequantize, (parts,), spec, like=source)
                    user.replace_input_with(source, whole)
            self.graph.erase_node(source)
        del self.tensors[name]

    def restore_tensor(self, name: str, weight: Tensor | None = None) -> None:
        """Put a float tensor (its own dequantized one) in the place of the quantized tensor `name`, at every use."""
        self.tensors[name] = self.qtensor(name).dequantize() if weight is None else weight
        for user in self._users_of(name):
            with self.graph.inserting_before(user):
                source = self.get(name, like=user)
            if user.target is ops.qc.integer_linear:
                x, grid, scheme = user.args[0], user.args[2], {"scheme": user.kwargs["scheme"]}
                assert isinstance(x, fx.Node)
                with self.graph.inserting_before(user):
                    rounded = self.call(ops.qc.fake_quantize, (x, grid), scheme, like=user, type=x.meta["type"])
                self.replace(user, torch.ops.aten.linear.default, (rounded, source, *user.args[3:4]))
            elif user.target is ops.qc.linear:
                self.replace(user, torch.ops.aten.linear.default, (user.args[0], source, *user.args[2:3]))
            elif user.target is ops.qc.embedding:
                self.replace(user, torch.ops.aten.embedding.default, (source, user.args[0]))
            else:
                user.replace_all_uses_with(source)
                self.graph.erase_node(user)
        del self.quantized[name]

    def decoded(self, known: "Decoded | None" = None) -> "Program":
        """A copy whose quantized tensors are float tensors: the same results, without decoding at every call.

        `known` is where a caller keeps what was decoded, by identity of the parts, for its next copy.
        """
        copy, fresh = self.copy(), Decoded()
        for name in list(copy.quantized):
            weight = copy.qtensor(name)
            parts = list(weight.parts().values())
            key = tuple(map(id, parts))
            value = known[key][1] if known and key in known else weight.dequantize()
            fresh[key] = (parts, value)  # held: the identity of a part that is gone could be another's
            copy.restore_tensor(name, value)
        if known is not None:
            known.clear()
            known.update(fresh)
        copy.clean()
        return copy

    def _users_of(self, name: str) -> list[fx.Node]:
        """The qc:: calls that read the quantized tensor `name`."""
        first = f"{name}::{part_names(self.quantized[name])[0]}"
        parts = [n for n in self.graph.nodes if n.op == "get_attr" and n.target == first]
        return [user for part in parts for user in part.users]

    def replace_qtensor(self, name: str, weight: QTensor) -> None:
        """Put another record in the place of the quantized tensor `name`, at every use of it."""
        for user in self._users_of(name):
            with self.graph.inserting_before(user):
                parts = self.add_qtensor(name, weight)
            user.update_arg(0 if user.target is ops.qc.dequantize else 1, parts)
            user.update_kwarg("spec", weight.spec())
        self.clean()

    def clean(self) -> int:
        """Remove dead nodes and tensors nobody reads; returns how many nodes went."""
        before = len(self.graph.nodes)
        for node in reversed(list(self.graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users and not _has_effect(node):
                self.graph.erase_node(node)
        used = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        for name in [name for name in self.tensors if name not in used]:
            del self.tensors[name]
        for name in [q for q in self.quantized if not any(t.startswith(f"{q}::") for t in used)]:
            del self.quantized[name]
        for name in [name for name in self.codes if name not in self.tensors]:
            del self.codes[name]
        return before - len(self.graph.nodes)

    def copy(self) -> "Program":
        """A copy whose graph can be changed freely; tensors are shared, never written to."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        return Program(
            graph,
            dict(self.tensors),
            self.inputs,
            self.outputs,
            deepcopy(self.info),
            dict(self.quantized),
            dict(self.codes),
            dict(self._digests),
        )

    def restore(self, snapshot: "Program") -> None:
        """Become what `snapshot` was (a copy made earlier)."""
        fresh = snapshot.copy()
        self.graph, self.tensors = fresh.graph, fresh.tensors
        self.inputs, self.outputs = fresh.inputs, fresh.outputs
        self.info, self.quantized, self.codes = fresh.info, fresh.quantized, fresh.codes

    # -- checking --------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Check that the program is well-formed; QCompilerError names the first thing that is not."""
        seen: set[fx.Node] = set()
        placeholders = [n.target for n in self.placeholders]
        if placeholders != [i.name for i in self.inputs]:
            raise QCompilerError(f"placeholders {placeholders} are not the inputs {[i.name for i in self.inputs]}")
        for node in self.graph.nodes:
            for used in node.all_input_nodes:
                if used not in seen:
                    raise QCompilerError(f'node "{node.name}" uses "{used.name}", which comes later or is gone')
            if node.op == "get_attr" and str(node.target) not in self.tensors:
                raise QCompilerError(f'node "{node.name}" reads tensor "{node.target}", which does not exist')
            if node.op not in ("placeholder", "get_attr", "call_function", "output"):
                raise QCompilerError(f'node "{node.name}" is a {node.op}; programs hold calls of functions only')
            if node.op != "output" and "type" not in node.meta:
                raise QCompilerError(f'node "{node.name}" has no type')
            seen.add(node)
        for name, spec in self.quantized.items():
            for part in part_names(spec):
                if f"{name}::{part}" not in self.tensors:
                    raise QCompilerError(f'quantized tensor "{name}" has no part "{part}"')
        values = self.output_node.args[0]
        if not isinstance(values, (tuple, list)) or len(values) != len(self.outputs):
            raise QCompilerError(f"the output node does not give the outputs {list(self.outputs)}")

    def fingerprint(self) -> str:
        """A hash of graph and tensor contents; equal fingerprints mean equal programs."""
        digest = hashlib.blake2b(self.text().encode(), digest_size=16)
        for name in sorted(self.tensors):
            digest.update(name.encode() + self._digest(name))
        for gone in self._digests.keys() - self.tensors.keys():  # a digest keeps its tensor alive
            del self._digests[gone]
        return digest.hexdigest()

    def _digest(self, name: str) -> bytes:
        """The hash of one tensor's bytes, computed again only when the tensor was replaced or written to."""
        tensor = self.tensors[name]
        version = 0 if tensor.is_inference() else tensor._version
        known = self._digests.get(name)
        if known is None or known[0] is not tensor or known[1] != version:
            known = self._digests[name] = (tensor, version, _tensor_digest(tensor))
        return known[2]

    def text(self) -> str:
        """The graph as text: one line a node, readable and stable."""
        return "\n".join(lines(self.graph, self.inputs, self.outputs)) + "\n"

    def __str__(self) -> str:
        return self.text()


def type_of(value: Any, names: Mapping[str, str] | None = None) -> Any:
    """The Type of a (fake) tensor; a tuple for several; None for a number. `names` renames dynamic sizes."""
    if isinstance(value, Tensor):
        shape = tuple(s if isinstance(s, int) else _size_name(str(s), names or {}) for s in value.shape)
        return Type(shape, value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple(type_of(v, names) for v in value)
    return None


def _size_name(text: str, names: Mapping[str, str]) -> str:
    for symbol, name in sorted(names.items(), key=lambda item: -len(item[0])):
        text = text.replace(symbol, name)
    return text


def _origin(like: fx.Node | None) -> dict[str, Any]:
    return {} if like is None else {key: like.meta[key] for key in ("path", "segment") if key in like.meta}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _has_effect(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _tensor_digest(tensor: Tensor) -> bytes:
    """A hash of a tensor's dtype, shape and bytes."""
    digest = hashlib.blake2b(f"{tensor.dtype}{list(tensor.shape)}".encode(), digest_size=16)
    # A single element may have any stride; what is hashed lies side by side.
    flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()
