"""The backend triton, in Triton's interpreter: against the reference, token by token, and what it says it cannot do."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

import qcompiler
from qcompiler.backends.triton import Triton
from qcompiler.backends.triton.caches import Caches
from qcompiler.backends.triton.lowering import lowered
from qcompiler.backends.triton.narrow import narrow
from qcompiler.backends.triton.runner import TritonRunner
from qcompiler.backends.triton.step import fixed_step
from qcompiler.compiler import capture
from qcompiler.errors import BackendError, No
from qcompiler.kernels import operators
from qcompiler.kernels.cost import A100
from qcompiler.kernels.norm_quantize import NormQuantize
from qcompiler.kernels.packed_float8 import PackedFloat8
from qcompiler.kernels.packed_integers import PackedIntegers
from qcompiler.kernels.packed_weight import PackedWeight
from qcompiler.kernels.records import join, split
from qcompiler.ops import meaning, qc
from qcompiler.rounding import float8_weight, integer_linear
from qcompiler.scheme import QTensor, Scheme
from qcompiler.session import Session
from tests import interpreter, test_linear_gguf, test_linear_nf4

W4 = "canonicalize, fuse, rtn{scheme=int4:g64:asym}, rtn{scheme=int8:g64 include=@head}"
A8 = "activations{scheme=int8:token:asym:dynamic}, integers"
F8 = "activations{scheme=fp8:token:dynamic}, integers"
KV8 = "kv"
KV4 = "kv{key=int4:token:asym:dynamic value=int4:token:asym:dynamic}"
RECIPES = {
    "W4A16": f"{W4}, kv_cache",
    "W3A16": "canonicalize, rtn{scheme=int3:g32}, kv_cache",
    "W4A8": "canonicalize, fuse, rtn{scheme=int4:g32}, " + A8 + ", kv_cache",
    "W4A8 asymmetric": "canonicalize, fuse, rtn{scheme=int4:g32:asym}, " + A8 + ", kv_cache",
    "W4A8 static": "canonicalize, fuse, rtn{scheme=int4:g32}, activations{scheme=int8:g32:asym}, integers, kv_cache",
    "W8A8 fp8": f"canonicalize, fuse, rtn{{scheme=fp8:channel}}, {F8}, kv_cache",
    "W4A8 fp8": f"canonicalize, fuse, rtn{{scheme=int4:g32:asym}}, {F8}, kv_cache",
    "W4A16KV8": f"{W4}, {KV8}, kv_cache",
}


@pytest.fixture(autouse=True, scope="module")
def patched() -> None:
    interpreter.install()


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """A Llama of two blocks, with grouped heads, whose logits are not all alike."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 96, "head_dim": 64}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2)
    built: torch.nn.Module = transformers.LlamaForCausalLM(config).eval()
    return built


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 96, (2, 5), generator=torch.Generator().manual_seed(1))


def on_cpu(dtype: str = "", **options: bool) -> Triton:
    return Triton(dtype=dtype, device="cpu", **options)


def stepped(session: Session, ids: Tensor, prompt: int = 3) -> Tensor:
    """The logits of a prompt's last token and of each that follows, [batch, tokens, vocabulary]."""
    decoder = session.runner.decoder(ids.shape[0], ids.shape[1])
    steps = [decoder.step(ids[:, :prompt]), *(decoder.step(ids[:, i : i + 1]) for i in range(prompt, ids.shape[1]))]
    return torch.stack(steps, dim=1)


def close(found: Tensor, expected: Tensor, share: float) -> None:
    """Nowhere further apart than a share of the largest number."""
    assert found.dtype == expected.dtype
    assert float((found - expected).abs().max() / expected.abs().max()) < share


@pytest.mark.parametrize("name", RECIPES)
def test_programs_match_the_reference(name: str, model: torch.nn.Module, ids: Tensor) -> None:
    """At once, and token by token over caches of fixed size; only the kernels' 16 bits stand between."""
    reference = qcompiler.compile(model, RECIPES[name], backend="reference")
    session = qcompiler.compile(model, RECIPES[name], backend=on_cpu())
    share = 0.08 if "fp8" in name else 0.02  # a float of 8 bits that falls to the other side moves by a sixteenth
    close(session(ids), reference(ids), share)
    close(stepped(session, ids), stepped(reference, ids), 1.5 * share)
    assert not session.runner.refusals
    assert "decoded" not in session.report.details["kernels"]
    assert session.report.details["kernels"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_programs_are_as_near_as_their_dtype(dtype: str, model: torch.nn.Module, ids: Tensor) -> None:
    reference = qcompiler.compile(model, RECIPES["W4A16"], backend="reference")
    session = qcompiler.compile(model, RECIPES["W4A16"], backend=on_cpu(dtype))
    share = {"bfloat16": 0.08, "float16": 0.01}[dtype]
    close(session(ids), reference(ids), share)
    close(stepped(session, ids), stepped(reference, ids), share)


def test_narrow_leaves_positions_and_logits_wide(model: torch.nn.Module) -> None:
    program = capture(model).copy()
    qcompiler.pipeline.Runner(qcompiler.pipeline.Context(), []).run(
        program, qcompiler.recipe.Recipe.parse("canonicalize, kv_cache").passes
    )
    narrow(program, torch.bfloat16)
    kinds = {str(n.target): n.meta["type"].dtype for n in program.calls() if hasattr(n.meta["type"], "dtype")}
    assert kinds["aten.cos.default"] == kinds["aten._to_copy.default"] == torch.float32
    assert kinds["aten.rms_norm.default"] == kinds["qc.rope.default"] == torch.bfloat16
    assert all(cache.type.dtype == torch.bfloat16 for cache in program.caches)
    assert program.output_node.args[0][0].meta["type"].dtype == torch.float32  # type: ignore[index,union-attr]


def test_other_steps_and_sliding_windows(ids: Tensor) -> None:
    """Each token sees the last four only."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96, "head_dim": 64}
    config = transformers.MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=4)
    model = transformers.MistralForCausalLM(config).eval()
    for recipe in (f"canonicalize, {KV4}, kv_cache", "canonicalize, kv_cache"):
        reference = qcompiler.compile(model, recipe, backend="reference")
        session = qcompiler.compile(model, recipe, backend=on_cpu())
        close(stepped(session, ids), stepped(reference, ids), 0.02)
        assert torch.equal(session.generate(ids, 3), reference.generate(ids, 3))


def test_saved_artifacts_run_here_too(model: torch.nn.Module, ids: Tensor, tmp_path: Path) -> None:
    qcompiler.compile(model, RECIPES["W4A16"], backend="reference").save(tmp_path / "out")
    session = qcompiler.load(tmp_path / "out", backend=on_cpu())
    close(session(ids), qcompiler.load(tmp_path / "out")(ids), 0.02)


def test_layers_that_no_kernel_takes_are_decoded_and_said(model: torch.nn.Module, ids: Tensor) -> None:
    recipe = "canonicalize, rtn{scheme=int4:g16 include=*down_proj*}, rtn{scheme=int4:g32 include=*up_proj*}"
    session = qcompiler.compile(model, recipe, backend=on_cpu())
    assert session.report.details["kernels"] == {"decoded": 2, "linear_wq": 2}
    assert session.report.refusals[0] == (
        "triton: model.layers.0.mlp.down_proj: linear_wq: groups of 16, not one of [32, 64, 128, 256]; "
        "linear_nf4: has no codebook; linear_gguf: scales of two levels as Q4_K or Q6_K have them are wanted"
    )
    close(session(ids), qcompiler.compile(model, recipe, backend="reference")(ids), 0.02)


def test_what_a_fixed_step_cannot_hold_grows_its_caches(model: torch.nn.Module, ids: Tensor) -> None:
    recipe = "canonicalize, kv{key=int4:channel:asym:dynamic block=4 value=int4:g32:asym:dynamic}, kv_cache"
    session = qcompiler.compile(model, recipe, backend=on_cpu())
    [refusal] = session.report.refusals
    assert refusal.startswith(
        "triton: decoding without a CUDA graph: keys of int4:channel:asym:dynamic over blocks of 4 tokens"
    )
    close(stepped(session, ids), stepped(qcompiler.compile(model, recipe, backend="reference"), ids), 1e-5)
    no = fixed_step(session.program)
    assert isinstance(no, No)


@pytest.mark.parametrize(
    "kv",
    [
        "key=nf4:token:dynamic value=nf4:token:dynamic",
        "key=int4:g32:asym:dynamic value=int4:g32:asym:dynamic",
        "key=int4:token:asym:dynamic value=int4:token:asym:dynamic recent=2 first=1",
        "key=int4:channel:asym:dynamic block=32 value=int4:g32:asym:dynamic",
    ],
)
def test_every_kind_of_cache_stays_fixed(kv: str, model: torch.nn.Module) -> None:
    """Also where blocks of keys fill up on the way. The same program over caches that grow says what is right."""
    ids = torch.randint(0, 96, (1, 34), generator=torch.Generator().manual_seed(2))
    session = qcompiler.compile(model, f"canonicalize, kv{{{kv}}}, kv_cache", backend=on_cpu("float16"))
    assert not session.report.refusals
    found = stepped(session, ids, 30)
    assert isinstance(session.runner, TritonRunner)
    session.runner.step = No("for comparison")
    close(found, stepped(session, ids, 30), 0.02)


def test_a_prompt_too_long_is_refused(model: torch.nn.Module, ids: Tensor) -> None:
    session = qcompiler.compile(model, RECIPES["W4A16"], backend=on_cpu())
    decoder = session.runner.decoder(2, 4)
    decoder.step(ids[:, :3])
    with pytest.raises(BackendError, match="5 tokens do not fit in caches of 4"):
        decoder.step(ids[:, :2])


def test_availability_has_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        assert "needs an NVIDIA GPU" in str(Triton().available())
        with pytest.raises(BackendError, match="backend triton: needs an NVIDIA GPU"):
            qcompiler.compile(torch.nn.Linear(4, 4), "canonicalize", backend="triton", example_inputs=(torch.ones(4),))
    assert on_cpu().available()
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "set TRITON_INTERPRET=1" in str(on_cpu().available())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "qcompiler[triton]"' in str(Triton().available())


def weight_of(scheme: str, n: int = 48, k: int = 128) -> QTensor:
    random = torch.Generator().manual_seed(0)
    return QTensor.quantize(torch.randn(n, k, generator=random), Scheme.parse(scheme))


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a CPU where nothing interprets."""
    monkeypatch.setattr(operators, "on_kernels", lambda x: False)
    return


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("scheme", ["int2:g32", "int3:g64:asym", "int4:channel", "int8:g128:asym"])
def test_weights_mean_the_same_on_the_cpu(scheme: str) -> None:
    weight, x, bias = weight_of(scheme), torch.randn(3, 128), torch.randn(48)
    parts, spec = split(PackedWeight.pack(weight))
    found = operators.qct.linear(x, parts, bias, spec=spec)
    close(found, qc.linear(x, list(weight.parts().values()), bias, spec=weight.spec()), 2e-3)


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize("activation", ["int8:token:dynamic", "int8:token:asym:dynamic", "int8:g32:asym"])
@pytest.mark.parametrize("scheme", ["int4:g32", "int8:channel", "int4:g32:asym", "int8:channel:asym"])
def test_integers_mean_the_same_on_the_cpu(
    scheme: str, activation: str, interpreted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, by kernel and without."""
    monkeypatch.setattr(operators, "on_kernels", lambda x: interpreted)
    weight, x = weight_of(scheme), torch.randn(2, 3, 128)
    grid = [torch.full((4,), 0.03), torch.tensor([120, 128, 130, 127])] if "dynamic" not in activation else []
    if grid and "channel" in scheme:
        pytest.skip("the kernel's runs are of one length: those of the weight")
    parts, spec = split(PackedIntegers.pack(weight, activation, grid))
    found = operators.qct.linear_a8(x, parts, grid, spec=spec)
    how = {"spec": weight.spec(), "scheme": activation}
    assert torch.equal(found, integer_linear(x, list(weight.parts().values()), grid, **how))


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize("scheme", ["int4:g32", "int4:channel:asym", "fp8:channel", "fp8:g64"])
def test_floats_of_8_bits_mean_the_same_on_the_cpu(
    scheme: str, interpreted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "on_kernels", lambda x: interpreted)
    x, kind = torch.randn(2, 3, 128), Scheme.parse(scheme)
    weight = float8_weight(torch.randn(48, 128), kind) if kind.code == "fp" else weight_of(scheme)
    parts, spec = split(PackedFloat8.pack(weight, "fp8:token:dynamic"))
    found = operators.qct.linear_a8(x, parts, [], spec=spec)
    parts = list(weight.parts().values())
    close(found, integer_linear(x, parts, [], spec=weight.spec(), scheme="fp8:token:dynamic"), 1e-5)


def test_gpus_without_floats_of_8_bits_decode_the_weight_and_say_so(
    model: torch.nn.Module, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompiler.backends.triton.lowering.gpu_of", lambda device: A100)
    session = qcompiler.compile(model, RECIPES["W8A8 fp8"], backend=on_cpu())
    assert session.report.details["kernels"] == {"decoded": 8}
    assert session.report.refusals[0].endswith("products of fp8 need compute capability 8.9, and this GPU has 8.0")
    close(session(ids), qcompiler.compile(model, RECIPES["W8A8 fp8"], backend="reference")(ids), 0.02)


def test_records_come_back_whole() -> None:
    packed = PackedWeight.pack(weight_of("int3:g64:asym"), torch.bfloat16)
    again = join(*split(packed))
    assert vars(again).keys() == vars(packed).keys()
    assert all(vars(again)[name] is value or vars(again)[name] == value for name, value in vars(packed).items())


def test_nothing_is_registered_at_import() -> None:
    """Operators are defined at their first use, as the house rules say."""
    import subprocess

    code = "import torch, qcompiler.kernels.operators; print(hasattr(torch.ops.qct, 'linear'))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("scheme", ["int8:token:dynamic", "int8:token:asym:dynamic", "int8:g32:asym"])
def test_norms_mean_the_same_on_the_cpu(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes by kernel and without differ where a value lies between two, and by no more than that."""
    x, residual, order = torch.randn(2, 3, 64), torch.randn(2, 3, 64), torch.randperm(64)
    grid = () if "dynamic" in scheme else (torch.tensor([0.02, 0.03]), torch.tensor([120, 130]))
    norm = NormQuantize.pack(
        torch.rand(64), torch.randn(64), order, grid, kind="layer", eps=1e-5, scheme=scheme, run=32
    )
    found = []
    for interpreted in (True, False):
        monkeypatch.setattr(operators, "on_kernels", lambda x, here=interpreted: here)
        found.append(operators.qct.norm_quantize(x, residual, *[split(norm)[0]], spec=split(norm)[1]))
    for kernel, other in zip(*found, strict=True):
        assert kernel.shape == other.shape
        far = (kernel.float() - other.float()).abs()
        assert bool((far <= {torch.int8: 1, torch.int32: 2}.get(kernel.dtype, 1e-5)).all())
    assert float((found[0][0] != found[1][0]).float().mean()) < 0.01


def test_a_norm_adds_and_rounds_in_one_launch(model: torch.nn.Module) -> None:
    session = qcompiler.compile(model, RECIPES["W4A8"], backend=on_cpu())
    assert session.report.details["kernels"] == {"norm_quantize": 4, "linear_w4a8": 8}
    assert isinstance(session.runner, TritonRunner)
    lines = str(session.runner.program).splitlines()
    sums = [line for line in lines if "aten.add" in line]
    assert len(sums) == 1  # the last: the other three are the norms' own


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize("name", ["linear_nf4", "linear_gguf"])
def test_other_formats_get_their_kernels(name: str, interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A codebook, and scales of two levels: what no pass makes yet, but files hold."""
    layer, x = torch.nn.Linear(256, 130), torch.randn(3, 256)
    weight = test_linear_nf4.weight_of("g64", 130, 256)
    if name == "linear_gguf":
        weight = test_linear_gguf.weight_of("Q4_K", 130, 256)
    program = capture(layer, (x,))
    [linear] = program.linears()
    program.quantize_tensor(str(linear.args[1].target), weight)  # type: ignore[union-attr]
    runner = on_cpu("float16").lower(program)
    assert isinstance(runner, TritonRunner)
    assert runner.kernels == {name: 1}
    assert not runner.refusals
    monkeypatch.setattr(operators, "on_kernels", lambda x: interpreted)
    [found], [expected] = (list(run.values()) for run in (runner({"input": x}), program(input=x)))
    close(found, expected, 5e-3)


@pytest.mark.parametrize(
    "recipe",
    [
        f"{W4}, {KV4}, kv_cache",
        "canonicalize, fuse, rtn{scheme=int4:g32}, " + A8 + ", kv_cache",
        "canonicalize, fuse, rtn{scheme=int4:g32}, activations{scheme=int8:g32:asym}, integers, kv_cache",
        "canonicalize, fuse, rtn{scheme=int4:g32:asym}, " + A8 + ", kv_cache",
        "canonicalize, fuse, rtn{scheme=fp8:channel}, " + F8 + ", kv_cache",
        (
            "canonicalize, rotate, rptq, rtn{scheme=int4:g32}, activations{scheme=nf4:g32:dynamic}, "
            "kv{key=int4:channel:asym:dynamic block=4 value=int4:g32:asym:dynamic recent=2 first=1}, kv_cache"
        ),
    ],
)
def test_nothing_stays_behind_on_the_cpu(recipe: str, model: torch.nn.Module, ids: Tensor) -> None:
    """On the device "meta" nothing is computed, but tensors of two devices do not mix: as on a GPU."""
    meta = torch.device("meta")
    reference = qcompiler.compile(model, recipe, backend="reference", samples=2, length=16)
    found = lowered(reference.program, "bfloat16", meta)
    assert {tensor.device for tensor in found.program.tensors.values()} == {meta}
    for node in found.program.calls():  # what really runs on a GPU, not what was registered for shapes
        node.target = meaning(node.target)
    outputs = found.program.module()(*found.program.bind({"input_ids": ids.to(meta)}).values())
    assert {value.device for value in outputs} == {meta}
    assert outputs[0].shape == (2, ids.shape[1], 96)
    if step := fixed_step(found.program):
        caches = Caches.empty(found.program, 2, 16, meta)
        one = torch.zeros(2, 1, dtype=torch.int64, device=meta)
        [logits] = step.module()(one, one, torch.zeros(2, dtype=torch.int32, device=meta), *caches.tensors)
        assert (logits.device, logits.shape) == (meta, (2, 1, 96))
