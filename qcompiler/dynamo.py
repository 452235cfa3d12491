"""torch.compile(model, backend="qcompiler"): any user's module, quantized by a recipe that needs no data.

Dynamo hands over one graph at a time: its parameters are inputs like any other, dynamic sizes are inputs that are
numbers. A graph is compiled when it is first called: tracing is over then, the inputs are real, and an error reaches
the user as it is. It is compiled again for other parameters (blocks of one class share a graph) and for parameters
that changed (load_state_dict, an optimizer). A graph that cannot be compiled runs as it is, with a warning that says
why; `strict` makes that an error. A graph without weights is nothing to compress, and runs as it is.
"""

import copy
import logging
import operator
import re
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompiler import artifact
from qcompiler.adopt import adopt
from qcompiler.compiler import capture
from qcompiler.errors import InputError, No, QCompilerError, RecipeError, nearest
from qcompiler.pipeline import Context, Runner
from qcompiler.recipe import Recipe, build_backend
from qcompiler.target import Backend, place
from qcompiler.target import Runner as Lowered

log = logging.getLogger(__name__)
Values = tuple[Any, ...]
_PATH = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_CHANGE_SIGNATURE = ("kv_cache",)  # a module under torch.compile keeps its inputs and outputs


@dataclass(frozen=True)
class Options:
    """What `torch.compile(..., options={...})` may say.

    `recipe` as for `qcompiler.compile`, or the folder of an artifact that it saved: then the model's weights get the
    codes found there. `backend` "" means triton for a model on a GPU, and else reference. `inductor` hands what is
    left of the graph to Inductor; by default it does on a GPU. `mode` says how Inductor compiles: torch.compile takes
    it as an argument of its own, or here, but not both. With `strict`, a graph that cannot be compiled is an error.
    What the passes did and refused is logged by "qcompiler.dynamo" at level INFO.
    """

    recipe: Any = "rtn-w4a16"
    backend: str = ""
    strict: bool = False
    inductor: bool | None = None
    mode: str = "default"

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "Options":
        """Check names and values. Raises InputError for an unknown option, RecipeError for an unusable recipe.

        >>> Options.read({"recipie": "rtn"})
        Traceback (most recent call last):
        ...
        qcompiler.errors.InputError: torch.compile(backend="qcompiler") has no option "recipie"; \
did you mean "recipe"? Known: backend, inductor, mode, recipe, strict
        """
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise InputError(f'torch.compile(backend="qcompiler") has no option "{name}"; {nearest(name, known)}')
        options = cls(**given)
        if options.backend:
            build_backend(options.backend)
        if options.mode not in MODES:
            raise InputError(f'torch.compile(mode="{options.mode}"): {nearest(options.mode, MODES)}')
        folder = Path(str(options.recipe))
        saved = folder.is_dir() or folder.is_absolute()
        recipe = artifact.load(folder).program if saved else data_free(Recipe.parse(options.recipe))
        return replace(options, recipe=recipe)


def data_free(recipe: Recipe) -> Recipe:
    """The recipe without passes that change a program's signature; RecipeError if a pass needs data."""
    for step in recipe.passes:
        if step.uses_data:
            raise RecipeError(
                f'recipe "{recipe.name or recipe}" needs calibration data for its pass "{step.name}", and '
                "torch.compile has none to give; take a recipe that needs no data, such as rtn-w4a16, or save what "
                "qcompiler.compile(model, recipe, calibration=..., example_inputs=...) makes, and give that folder"
            )
    return Recipe(tuple(step for step in recipe.passes if step.name not in _CHANGE_SIGNATURE), recipe.name)


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Callable[..., Values]:
    """The entry point that torch.compile calls, once for each graph; see `Options` for the options.

    Raises nothing itself: what is wrong with options or graph is said when the graph is first called.
    """
    return Graph(gm, example_inputs, {**(options or {}), **kwargs}).run


@dataclass(frozen=True)
class Variant:
    """The graph compiled for some parameters as they were."""

    run: Callable[..., Values]
    parameters: tuple[weakref.ref[Tensor], ...]  # the user's model holds them, not we
    versions: tuple[int, ...]

    def fits(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the parameters it was compiled for, unchanged since."""
        return self.versions == _versions(parameters) and all(
            known() is given for known, given in zip(self.parameters, parameters, strict=True)
        )


class Graph:
    """One graph of Dynamo's, and what it was compiled to so far."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], given: Mapping[str, Any]) -> None:
        self.gm = gm
        self.given = given
        self.options: Options | None = None
        self.layout = Layout(gm, example_inputs)
        self.variants: dict[tuple[int, ...], Variant] = {}
        self.warned = False

    def run(self, *args: Any) -> Values:
        """Run the graph, compiled if it can be."""
        if self.options is None:
            self.options = Options.read(self.given)
        parameters = [args[i] for i in self.layout.names] + list(self.gm.parameters())
        if not any(p.dim() > 1 for p in parameters):
            return self._as_it_is(*args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in (*args, *parameters)):
            return self._fall_back(No("gradients are wanted; call it under torch.no_grad()"))(*args)
        key = tuple(map(id, parameters))
        known = self.variants.get(key)
        if known is None or not known.fits(parameters):
            living = {k: v for k, v in self.variants.items() if all(p() is not None for p in v.parameters)}
            run = self._compile(args, self.options)
            known = Variant(run, tuple(map(weakref.ref, parameters)), _versions(parameters))
            self.variants = {**living, key: known}
        return known.run(*args)

    def _compile(self, args: Values, options: Options) -> Callable[..., Values]:
        layout = self.layout
        answer = layout.answer if not layout.answer else one_device(args, options.backend)
        if isinstance(answer, No):
            return self._fall_back(answer)
        try:
            names, runner = self._lower(layout.module(args), layout.tensors(args), options)
        except QCompilerError as error:
            if options.strict:
                raise
            return self._fall_back(No(str(error)))

        def run(*args: Any) -> Values:
            return layout.results(args, runner(dict(zip(names, layout.tensors(args), strict=True))))

        return run

    def _lower(self, module: fx.GraphModule, inputs: tuple[Tensor, ...], options: Options) -> tuple[list[str], Lowered]:
        """The names of the inputs, and what runs the program; contracts are checked on the user's own inputs."""
        here = tuple(value.cpu() for value in inputs)
        program = capture(module, here)
        names = [i.name for i in program.inputs]
        if isinstance(options.recipe, Recipe):
            pipeline = Runner(Context(), [dict(zip(names, here, strict=True))])
            pipeline.run(program, options.recipe.passes)
            for record in pipeline.records:
                log.info(
                    "%s: %d tensors; refused: %s", record.text, len(record.layers), "; ".join(record.refusals) or "none"
                )
        else:
            refusals = adopt(program, options.recipe)
            log.info("weights of an artifact; refused: %s", "; ".join(map(str, refusals)) or "none")
        return names, place(program, [backend_for(inputs, options)]).backend.lower(program)

    def _fall_back(self, no: No) -> Callable[..., Values]:
        """The graph as it is, with a warning; an error if the options ask for it."""
        if self.options and self.options.strict:
            raise QCompilerError(f"strict: {no}")
        if not self.warned:
            warnings.warn(f"qcompiler leaves a graph of torch.compile to PyTorch: {no}", stacklevel=3)
            self.warned = True
        return self._as_it_is

    def _as_it_is(self, *args: Any) -> Values:
        results: Values = self.gm(*args)
        return results


class Layout:
    """What the inputs and outputs of Dynamo's graph are, and the same graph over tensors alone.

    `names` maps the positions of parameters to their names, `inputs` are the positions of the other tensors, `sizes`
    says where the dynamic size of each symbol is read: (position, dimension). `answer` is True, or why the graph
    cannot be brought to this form.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self.gm = gm
        self.placeholders = gm.graph.find_nodes(op="placeholder")
        self.values = [node.meta.get("example_value") for node in self.placeholders]
        self.names = parameter_names(self.placeholders, example_inputs)
        self.inputs = [i for i, v in enumerate(self.values) if isinstance(v, Tensor) and i not in self.names]
        self.sizes: dict[str, tuple[int, int]] = {}
        for i in self.inputs:
            for dim, size in enumerate(self.values[i].shape):
                if isinstance(size, torch.SymInt):
                    self.sizes.setdefault(str(size), (i, dim))
        self.returned = list(gm.graph.output_node().args[0])  # type: ignore[arg-type]
        self.answer = self._answer()
        if self.answer:
            self.graph = self._over_tensors()

    def _answer(self) -> bool | No:
        for node, value in zip(self.placeholders, self.values, strict=True):
            if not isinstance(value, Tensor) and str(value) not in self.sizes:
                return No(f'its input "{node.name}" is a number that is not the size of a tensor')
        for result in self.returned:
            if not is_tensor(result) and self._number(result) is None:
                return No(f'its output "{result}" is a number that its input sizes do not determine')
        if not any(map(is_tensor, self.returned)):
            return No("it returns no tensors")
        return True

    def _number(self, result: Any) -> Callable[[Mapping[str, int]], int] | None:
        """How to compute a returned number from the dynamic sizes; None if they do not determine it."""
        value = result.meta.get("example_value") if isinstance(result, fx.Node) else result
        if isinstance(value, int):
            return lambda sizes: value
        if not isinstance(value, torch.SymInt) or not {str(s) for s in value.node.expr.free_symbols} <= set(self.sizes):
            return None
        formula = value.node.expr
        return lambda sizes: int(formula.subs({s: sizes[str(s)] for s in formula.free_symbols}))

    def _over_tensors(self) -> fx.Graph:
        """The graph with parameters as attributes, sizes read from tensors, and tensors as its only outputs."""
        graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
        for i in self.inputs:
            env[self.placeholders[i]] = graph.node_copy(self.placeholders[i])
            env[self.placeholders[i]].meta = {"val": self.values[i]}
        for i, node in enumerate(self.placeholders):
            if i in self.names:
                env[node] = graph.get_attr(self.names[i])
            elif i not in self.inputs:
                source, dim = self.sizes[str(self.values[i])]
                env[node] = graph.call_method("size", (env[self.placeholders[source]], dim))
        for node in self.gm.graph.nodes:
            if node.op == "output":
                graph.output(tuple(env[result] for result in self.returned if is_tensor(result)))
            elif node.op != "placeholder":
                env[node] = graph.node_copy(node, env.__getitem__)
                env[node].args, env[node].kwargs = on_host(env[node].args), on_host(env[node].kwargs)
                env[node].meta = {}
        return graph

    def module(self, args: Values) -> fx.GraphModule:
        """The graph over tensors, on the CPU, with the parameters found in `args`."""
        held = [n for n in self.gm.graph.nodes if n.op in ("get_attr", "call_module")]
        attributes = {str(node.target): operator.attrgetter(str(node.target))(self.gm) for node in held}
        attributes |= {name: args[i] for i, name in self.names.items()}
        # A module moves itself, a tensor is copied: the user's own stay where they are.
        here = {k: copy.deepcopy(v).cpu() if isinstance(v, nn.Module) else v.cpu() for k, v in attributes.items()}
        return fx.GraphModule(here, self.graph)

    def tensors(self, args: Values) -> tuple[Tensor, ...]:
        """The inputs of that module."""
        return tuple(args[i] for i in self.inputs)

    def results(self, args: Values, outputs: Mapping[str, Tensor]) -> Values:
        """What Dynamo's graph returns: the module's outputs, and the numbers between them."""
        sizes = {symbol: args[i].shape[dim] for symbol, (i, dim) in self.sizes.items()}
        found = iter(outputs.values())
        return tuple(
            next(found) if is_tensor(result) else self._number(result)(sizes)  # type: ignore[misc]
            for result in self.returned
        )


def parameter_names(placeholders: Sequence[fx.Node], example_inputs: Sequence[Any]) -> dict[int, str]:
    """The positions of parameters, and their names in the user's module where Dynamo knows them."""
    found: dict[int, str] = {}
    for i, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
        if isinstance(value, nn.Parameter):
            source = getattr(getattr(node, "_dynamo_source", None), "name", "")
            name = ".".join(_PATH.findall(str(source() if callable(source) else source)))
            found[i] = name if name and name not in found.values() else node.name
    return found


def on_host(values: Any) -> Any:
    """Arguments with every GPU in them replaced by the CPU, where programs are made.

    >>> on_host((torch.device("cuda", 1), {"device": "cuda"}, 3))
    (device(type='cpu'), {'device': 'cpu'}, 3)
    """

    def moved(value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == "cuda":
            return torch.device("cpu")
        return "cpu" if isinstance(value, str) and re.fullmatch(r"cuda(:\d+)?", value) else value

    return fx.node.map_aggregate(values, moved)


def is_tensor(result: Any) -> bool:
    """Whether a value that a graph returns is a tensor: a node that is not known to be a number."""
    return isinstance(result, fx.Node) and not isinstance(
        result.meta.get("example_value"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    )


def one_device(args: Values, backend: str) -> bool | No:
    """True if all tensors are on one device, and the backend that was asked for runs there."""
    devices = sorted({str(value.device) for value in args if isinstance(value, Tensor)})
    if len(devices) > 1:
        return No(f"its tensors are on {' and '.join(devices)}; move them to one device")
    kind = devices[0].partition(":")[0] if devices else "cpu"
    if kind not in ("cpu", "cuda"):
        return No(f"its tensors are on {devices[0]}, and programs run on CPUs and CUDA GPUs")
    if kind == "cuda" and backend not in ("", "triton"):
        return No(f"its tensors are on {devices[0]}, and the backend {backend} runs programs on the CPU; take triton")
    return True


def backend_for(inputs: Sequence[Tensor], options: Options) -> Backend:
    """The backend that was asked for, or the usual one of the device; Inductor behind it if that is wanted."""
    device = inputs[0].device if inputs else torch.device("cpu")
    chosen: Any = build_backend(options.backend or ("triton" if device.type == "cuda" else "reference"))
    wanted = device.type == "cuda" if options.inductor is None else options.inductor
    known = {f.name for f in fields(chosen)} if is_dataclass(chosen) else set()
    if wanted and "inductor" not in known:
        raise InputError(f"the backend {chosen.name} leaves nothing to Inductor; drop inductor=True")
    # A module of the user's keeps the dtypes that the user gave it.
    given = {"inductor": options.mode if wanted else "", "dtype": "", "device": str(device)}
    found: Backend = replace(chosen, **{name: value for name, value in given.items() if name in known})
    return found


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """How often each was written to (PyTorch does not count for those made under inference_mode)."""
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)
