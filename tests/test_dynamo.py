"""torch.compile(backend="qcompiler"): what runs quantized, what is left to PyTorch and why, and that results follow."""

import copy
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompiler
import qcompiler.dynamo
from qcompiler.errors import InputError, QCompilerError, RecipeError
from qcompiler.scheme import QTensor, Scheme

RTN = "rtn{scheme=int4:g32:asym}"


class Mlp(nn.Module):
    """Two linear layers and a buffer; returns a tensor, and a number if asked."""

    def __init__(self, split: bool = False, count: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 32), nn.Linear(32, 64)
        self.register_buffer("shift", torch.ones(64))
        self.split, self.count = split, count

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, int]:
        h = torch.relu(self.up(x))
        if self.split:
            torch._dynamo.graph_break()
        y = self.down(h) + self.shift
        return (y, x.shape[0] * 2) if self.count else y


class Gated(nn.Module):
    """A gated MLP, whose first two layers the pass fuse joins."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.gate(x)) * self.up(x))
        return y


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No compiled code from another test; the seed and the threads are ours to set here."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def rounded(model: nn.Module, scheme: str = "int4:g32:asym") -> nn.Module:
    """The model with its weights rounded in place: what the compiled one must compute."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = QTensor.quantize(layer.weight, Scheme.parse(scheme)).dequantize()
    return model


def twin(model: nn.Module) -> Mlp:
    """Another module with the same parameters."""
    again = Mlp(model.split, model.count)
    again.load_state_dict(model.state_dict())
    return again


def compiled(model: nn.Module, recipe: str = RTN, **options: object) -> nn.Module:
    return torch.compile(model, backend="qcompiler", options={"recipe": recipe, **options})


@pytest.mark.parametrize("split", [False, True])
def test_runs_quantized_at_any_size(split: bool) -> None:
    """Also over a graph break, and without a word: nothing is left to PyTorch."""
    model = Mlp(split)
    run, expected = compiled(model, strict=True), rounded(twin(model))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for batch in (4, 5, 7):
            x = torch.randn(batch, 64)
            torch.testing.assert_close(run(x), expected(x))
        x = torch.randn(3, 5, 64)
        torch.testing.assert_close(run(x), expected(x))


def test_numbers_among_the_outputs_follow_the_sizes() -> None:
    model = Mlp(count=True)
    run = torch.compile(model, backend="qcompiler", dynamic=True, options={"recipe": RTN, "strict": True})
    with torch.no_grad():
        assert [run(torch.randn(batch, 64))[1] for batch in (4, 9)] == [8, 18]


def test_blocks_of_one_class_share_a_graph_but_not_weights() -> None:
    blocks = [Mlp(), Mlp()]
    expected = [rounded(twin(block)) for block in blocks]
    x = torch.randn(4, 64)
    with torch.no_grad():
        for block, same in zip(blocks, expected, strict=True):
            block.compile(backend="qcompiler", options={"recipe": RTN, "strict": True})
            torch.testing.assert_close(block(x), same(x))


def test_named_recipes_work_on_any_module() -> None:
    """Without a head, and without a cache: both are parts of the recipe that the module has no place for."""
    model, x = Mlp(), torch.randn(4, 64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run = torch.compile(model, backend="qcompiler")
        torch.testing.assert_close(run(x), rounded(twin(model), "int4:g64:asym")(x))


def test_contracts_are_checked_on_real_inputs() -> None:
    """A batch norm's variance is an input like any other to Dynamo; a made-up one may be negative."""
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 8)).eval()
    expected = rounded(copy.deepcopy(model))
    with torch.no_grad():
        for batch in (3, 5, 6):
            x = torch.randn(batch, 64)
            torch.testing.assert_close(compiled(model, strict=True)(x), expected(x))


def test_what_was_done_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad(), caplog.at_level("INFO", "qcompiler.dynamo"):
        compiled(Mlp(), RTN + ", rtn{include=@head}")(torch.randn(2, 64))
    assert caplog.messages[0] == f"{RTN}: 2 tensors; refused: none"
    assert "no linear layer follows the repeated blocks" in caplog.messages[1]


def test_changed_weights_are_seen() -> None:
    model, other, x = Mlp(), Mlp(), torch.randn(4, 64)
    run = compiled(model)
    with torch.no_grad():
        run(x)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(run(x), rounded(other)(x))


def test_recipes_may_name_layers_by_their_paths() -> None:
    model, x = Mlp(), torch.randn(4, 64)
    expected = twin(model)
    rounded(expected.down)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, "rtn{scheme=int4:g32:asym include=down}")(x), expected(x))
        assert not torch.equal(expected(x), model(x))


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"recipe": "gptq"}, RecipeError, "needs calibration data .* qcompiler.compile"),
        ({"recipe": "rnt"}, RecipeError, 'did you mean "rtn"'),
        ({"recipie": RTN}, InputError, 'did you mean "recipe"'),
        ({"recipe": RTN, "backend": "referense"}, RecipeError, 'did you mean "reference"'),
    ],
)
def test_bad_options_are_said_plainly(options: dict[str, object], kind: type[Exception], words: str) -> None:
    run = torch.compile(Mlp(), backend="qcompiler", options=options)
    with torch.no_grad(), pytest.raises(kind, match=words):
        run(torch.randn(4, 64))


def writes(x: Tensor, weight: nn.Parameter) -> Tensor:
    """Changes its input."""
    x.add_(1)
    return x @ weight


def draws(x: Tensor, weight: nn.Parameter) -> Tensor:
    """Is random."""
    return nn.functional.dropout(nn.functional.linear(x, weight), 0.5)


def counts(x: Tensor, weight: nn.Parameter, n: int) -> Tensor:
    """Takes a number."""
    return nn.functional.linear(x, weight) * n


@pytest.mark.parametrize(
    ("function", "extra", "words"),
    [(writes, (), "writes to"), (draws, (), "differs"), (counts, (3,), "not the size of a tensor")],
)
def test_what_cannot_be_captured_runs_in_pytorch_and_says_why(function, extra, words) -> None:  # type: ignore[no-untyped-def]
    weight, x = nn.Parameter(torch.randn(8, 8)), torch.randn(4, 8)
    expected_input, given_input = x.clone(), x.clone()
    run = torch.compile(function, backend="qcompiler", dynamic=True, options={"recipe": RTN})
    with torch.no_grad():
        torch.manual_seed(7)
        expected = function(expected_input, weight, *extra)
        torch.manual_seed(7)
        with pytest.warns(UserWarning, match=words):
            found = run(given_input, weight, *extra)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(given_input, expected_input)
        torch._dynamo.reset()
        strict = torch.compile(function, backend="qcompiler", dynamic=True, options={"recipe": RTN, "strict": True})
        with pytest.raises(QCompilerError, match=words):
            strict(x.clone(), weight, *extra)


def test_training_is_left_to_pytorch() -> None:
    model, x = Mlp(), torch.randn(4, 64)
    with pytest.warns(UserWarning, match="under torch.no_grad"):
        compiled(model)(x).sum().backward()
    assert model.up.weight.grad is not None


def test_a_function_without_weights_runs_as_it_is() -> None:
    run = torch.compile(lambda x: x.sin() + 1, backend="qcompiler", options={"strict": True, "recipe": RTN})
    x = torch.randn(4)
    torch.testing.assert_close(run(x), x.sin() + 1)


def test_under_inference_mode() -> None:
    model, x = Mlp(), torch.randn(4, 64)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(model, strict=True)(x), rounded(twin(model))(x))


def test_nothing_global_changes() -> None:
    model, x = Mlp(), torch.randn(4, 64)
    before = (torch.get_rng_state().clone(), torch.get_default_dtype(), torch.get_num_threads())
    with torch.no_grad():
        compiled(model)(x)
    after = (torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads())
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert model.training


def test_the_entry_point_is_ours() -> None:
    assert "qcompiler" in torch.compiler.list_backends()
    assert torch._dynamo.lookup_backend("qcompiler") is qcompiler.dynamo.backend


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler")
def test_inductor_compiles_what_is_left() -> None:
    """The operators that Inductor cannot see into are called by it, and the result is the same."""
    model, x = Mlp(), torch.randn(4, 64)
    run = compiled(model, inductor=True, mode="reduce-overhead", strict=True)
    with torch.no_grad():
        torch.testing.assert_close(run(x), rounded(twin(model))(x))
        torch.testing.assert_close(run(torch.randn(7, 64)).shape, torch.Size([7, 64]))


def test_an_artifact_gives_its_codes(tmp_path: Path) -> None:
    """A recipe that needs data was run once, on another instance of the model; what fuse joined is taken apart."""
    model = Gated()
    samples = [{"x": torch.randn(16, 64)} for _ in range(2)]
    session = qcompiler.compile(
        model, "canonicalize, gptq{scheme=int4:g32 include=*}, fuse", calibration=samples, example_inputs=samples[0]
    )
    session.save(tmp_path / "saved")
    x = torch.randn(5, 64)
    run = compiled(copy.deepcopy(model), str(tmp_path / "saved"), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(run(x), session.program(x=x)["output"])
        assert not torch.equal(run(x), model(x))
        with pytest.raises(InputError, match=r"no weight of the artifact fits this model: up\.weight: .* not \["):
            compiled(Mlp(), str(tmp_path / "saved"), strict=True)(x)
        other = Gated()
        with pytest.raises(InputError, match=r"gate\.weight: the artifact's stands for other values"):
            compiled(other, str(tmp_path / "saved"), strict=True)(x)


@pytest.mark.parametrize(
    ("devices", "backend", "words"),
    [
        (["cpu", "meta"], "", "on cpu and meta; move them to one device"),
        (["meta"], "", "on meta, and programs run on CPUs and CUDA GPUs"),
    ],
)
def test_devices_are_checked(devices: list[str], backend: str, words: str) -> None:
    answer = qcompiler.dynamo.one_device(tuple(torch.empty(1, device=device) for device in devices), backend)
    assert not answer
    assert words in str(answer)


def test_a_model_on_a_gpu_gets_the_triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be asked for there: the user's own dtype, and Inductor for the rest."""

    class OnGpu:
        device = torch.device("cuda", 0)

    chosen = qcompiler.dynamo.backend_for([OnGpu()], qcompiler.dynamo.Options(mode="reduce-overhead"))  # type: ignore[list-item]
    assert (chosen.name, chosen.dtype, chosen.device, chosen.inductor) == ("triton", "", "cuda:0", "reduce-overhead")  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="onnxruntime leaves nothing to Inductor"):
        qcompiler.dynamo.backend_for([], qcompiler.dynamo.Options(backend="onnxruntime", inductor=True))


def test_a_mode_of_torch_compile_is_taken() -> None:
    model, x = Mlp(), torch.randn(4, 64)
    with torch.no_grad():
        run = torch.compile(model, backend="qcompiler", mode="reduce-overhead")
        torch.testing.assert_close(run(x), rounded(twin(model), "int4:g64:asym")(x))
        with pytest.raises(InputError, match='mode="fast"'):
            compiled(Mlp(), mode="fast")(x)
