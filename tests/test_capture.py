"""Front ends for PyTorch: what is captured computes what the original does, and what cannot be captured says so."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, fx, nn

from qcompiler import ops
from qcompiler.errors import CaptureError, InputError, No
from qcompiler.frontends import attention, huggingface, torch_module
from qcompiler.frontends import fx as fx_frontend
from qcompiler.frontends.exporting import check_weights
from qcompiler.frontends.verification import Case, verify
from qcompiler.program import Program

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import architectures
from tiny_models import WINDOW, tiny_model

SAMPLE = (
    "bert",  # an encoder's layers, as a decoder
    "bloom",  # attention biased by distance, no positions
    "cohere2",  # windows in some layers, no rotary in others
    "deepseek_v3",  # latent attention, groups of experts
    "falcon",  # keys shared by all heads, parallel blocks
    "gemma2",  # soft caps, windows
    "glm4",  # partial rotary, interleaved
    "gpt2",  # linear layers stored transposed
    "gpt_neox",
    "gpt_oss",  # sinks, experts with biases
    "gptj",
    "granite",  # multipliers
    "llama",
    "mistral",  # windows
    "mpt",
    "olmo2",  # norms after the blocks
    "opt",  # positions counted from the padding mask
    "qwen3_moe",  # experts chosen by data
    "roberta",  # positions derived from the ids
    "stablelm",
)


@pytest.fixture(scope="module")
def mistral() -> nn.Module:
    return tiny_model("mistral")


@pytest.fixture(scope="module")
def captured(mistral: nn.Module) -> Program:
    return huggingface.capture(mistral)


@pytest.mark.parametrize("model_type", SAMPLE)
def test_architecture(model_type: str) -> None:
    row = architectures.check(model_type)
    assert row.status == "captured", row.reason
    assert row.error <= 1e-4


def test_signature(captured: Program) -> None:
    described = [f"{i.name} {i.type} {i.default}".strip() for i in captured.inputs]
    assert described == [
        "input_ids int64[batch, sequence]",
        "attention_mask int64[batch, sequence] ones",
        "position_ids int64[batch, sequence] positions",
    ]
    assert captured.outputs == ("logits",)
    assert captured.info["way"] == "attention interface, explicit positions"
    assert captured.info["vocab_size"] == 128


def test_attention_is_one_operator_and_the_mask_one_more(captured: Program) -> None:
    assert len(list(captured.calls(ops.qc.attention))) == 2
    (mask,) = captured.calls(ops.qc.mask)
    assert {k: mask.kwargs[k] for k in ("left", "right")} == {"left": WINDOW - 1, "right": 0}


def test_paths_and_tensor_names_are_the_models_own(captured: Program) -> None:
    linear = captured.linears()[0]
    assert linear.meta["path"] == "model.layers.0.self_attn.q_proj"
    assert linear.args[1].target == "model.layers.0.self_attn.q_proj.weight"  # type: ignore[union-attr]


def test_weights_are_shared_not_copied(mistral: nn.Module, captured: Program) -> None:
    weights = dict(mistral.named_parameters())
    assert all(captured.tensors[n].data_ptr() == weights[n].data_ptr() for n in captured.tensors if n in weights)


def test_tied_weights_are_one_tensor() -> None:
    model = tiny_model("gemma2")
    program = huggingface.capture(model)
    assert "model.embed_tokens.weight" in program.tensors
    assert "lm_head.weight" not in program.tensors


def test_a_dropped_window_is_noticed(mistral: nn.Module, captured: Program) -> None:
    broken = captured.copy()
    for node in broken.calls(ops.qc.mask):
        node.kwargs = {**node.kwargs, "left": -1}
    answer = verify(
        broken,
        lambda given: huggingface.call(mistral, given),
        huggingface.cases(broken, mistral, huggingface.Lengths.of(mistral)),
    )
    assert isinstance(answer, No)
    assert "differs" in answer.reason


def test_a_window_that_is_misread_leads_to_another_way(mistral: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "recognize", lambda function: attention.Window(right=0))
    program = huggingface.capture(mistral)
    assert not program.info["way"].startswith("attention interface")


def test_a_mask_that_only_looks_like_a_window_is_not_taken_for_one() -> None:
    def sliding_window_overlay(sliding_window: int) -> object:
        def inner_mask(batch: int, head: int, query: int, key: int) -> bool:
            return key > query - 2 * sliding_window

        return inner_mask

    function = sliding_window_overlay(4)
    function.__qualname__ = "sliding_window_overlay.<locals>.inner_mask"  # type: ignore[attr-defined]
    assert not attention.recognize(function)  # type: ignore[arg-type]


def test_unusual_masks_are_evaluated_on_all_positions() -> None:
    def function(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query - key) % 3 == 0

    padding = torch.tensor([[False, True, True, True]])
    made = attention.mask(1, 4, 4, mask_function=function, attention_mask=padding)
    place = torch.arange(4)
    assert torch.equal(made[0, 0], ((place[:, None] - place[None]) % 3 == 0) & padding)


def test_encoder_with_padding() -> None:
    from transformers import BertConfig, BertModel

    model = BertModel(
        BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    ).eval()
    program = huggingface.capture(model)
    assert program.outputs == ("last_hidden_state", "pooler_output")
    ids, real = torch.randint(3, 99, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    real[1, 6:] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=real)
    got = program(input_ids=ids, attention_mask=real)
    torch.testing.assert_close(got["pooler_output"], expected.pooler_output)
    torch.testing.assert_close(got["last_hidden_state"][real.bool()], expected.last_hidden_state[real.bool()])


def test_capture_leaves_no_trace(mistral: nn.Module) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    def state() -> list[object]:
        return [
            dict(AttentionInterface._global_mapping),
            dict(AttentionMaskInterface._global_mapping),
            mistral.config._attn_implementation,
            mistral.config._experts_implementation,
            [part.training for part in mistral.modules()],
            torch.get_rng_state().tolist(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            [p.requires_grad for p in mistral.parameters()],
        ]

    mistral.train()
    before = state()
    huggingface.capture(mistral)
    assert state() == before
    mistral.eval()


@pytest.fixture
def folder(mistral: nn.Module, tmp_path: Path) -> Path:
    mistral.save_pretrained(tmp_path)
    return tmp_path


def test_folder(folder: Path, captured: Program) -> None:
    program = huggingface.capture(folder)
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(program(input_ids=ids)["logits"], captured(input_ids=ids)["logits"])
    assert program.info["source"] == str(folder)
    assert program.info["tokenizer"] is None


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        huggingface.capture(folder)


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        huggingface.capture(folder)


def test_a_checkpoint_without_one_of_its_tensors(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        huggingface.capture(folder)


def test_nan_weights() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(CaptureError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*NaN"):
        huggingface.capture(model)


class Classifier(nn.Module):
    """A user's module: tied weights, buffers, dropout, a norm in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        states = self.block(self.embed(ids)) * self.scale
        return {"logits": self.head(states), "states": states}


def test_module_with_dynamic_sizes() -> None:
    module = Classifier()
    program = torch_module.capture(module, torch.randint(0, 50, (1, 7)))
    assert module.training
    assert program.outputs == ("logits", "states")
    assert program.info["way"] == "dynamic batch and sequence"
    assert "embed.weight" in program.tensors
    assert "head.weight" not in program.tensors
    ids = torch.randint(0, 50, (4, 11))
    with torch.no_grad():
        expected = module.eval()(ids)
    torch.testing.assert_close(program(ids=ids)["logits"], expected["logits"], atol=1e-5, rtol=1e-5)


def test_module_whose_sizes_are_fixed_says_why() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(6) + 1

    program = torch_module.capture(Fixed(), torch.randn(2, 3))
    assert program.info["way"] == "fixed sizes"
    assert any("batch" in reason for reason in program.info["refused"])


def test_module_that_depends_on_chance_is_refused() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    with pytest.raises(CaptureError, match="differs"):
        torch_module.capture(Noise(), torch.randn(2, 3))


def test_module_needs_example_inputs() -> None:
    with pytest.raises(InputError, match="example inputs"):
        torch_module.capture(nn.Linear(2, 2))
    with pytest.raises(InputError, match="takes"):
        torch_module.capture(nn.Linear(2, 2), (torch.ones(2), torch.ones(2)))


def test_graph_module() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    module.eval()
    program = fx_frontend.capture(fx.symbolic_trace(module), torch.randn(1, 3, 8, 8))
    assert program.info["frontend"] == "fx"
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(program(**{program.inputs[0].name: x})["output"], module(x))


def test_front_ends_know_whose_model_it_is(mistral: nn.Module, folder: Path) -> None:
    graph = fx.symbolic_trace(nn.Linear(2, 2))
    accepted = {
        name: [bool(front.accepts(source)) for source in (mistral, folder, nn.Linear(2, 2), graph, 3)]
        for name, front in (("hf", huggingface), ("module", torch_module), ("fx", fx_frontend))
    }
    assert accepted == {
        "hf": [True, True, False, False, False],
        "module": [False, False, True, False, False],
        "fx": [False, False, False, True, False],
    }


def test_verification_compares_real_positions_only() -> None:
    module = nn.Linear(2, 2)
    program = torch_module.capture(module, torch.randn(2, 3, 2))
    name = program.inputs[0].name
    real = torch.tensor([[False, True, True], [True, True, True]])

    def original(given: dict[str, Tensor]) -> dict[str, Tensor]:
        out = module(given[name]).detach().clone()
        out[~real] = 9.0
        return {"output": out}

    inputs = {name: torch.randn(2, 3, 2)}
    assert isinstance(verify(program, original, [Case("padded", inputs, real)]), float)
    assert isinstance(verify(program, original, [Case("unpadded", inputs)]), No)


def test_weights_that_cannot_be_captured_are_said() -> None:
    """Without data, damaged, or on a GPU (which a stand-in has to play here)."""

    class OnGpu(nn.Module):
        def named_parameters(self, *args: object, **kwargs: object) -> Iterator[tuple[str, nn.Parameter]]:
            yield "up.weight", SimpleNamespace(is_meta=False, device=torch.device("cuda", 0))  # type: ignore[misc]

    damaged = nn.Linear(2, 2)
    damaged.weight.data[0, 0] = torch.nan
    for module, words in (
        (nn.Linear(2, 2, device="meta"), 'the weight "weight" has no data'),
        (damaged, 'the weight "weight" holds NaN'),
        (OnGpu(), r'the weight "up.weight" is on cuda:0, and programs are made on the CPU: capture model.cpu\(\)'),
    ):
        with pytest.raises(CaptureError, match=words):
            check_weights(module)
