"""GGUF files of models that came from transformers folders: metadata, tokenizer, and llama.cpp as the judge."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qcompiler.compiler import capture
from qcompiler.convert import convert
from qcompiler.errors import InputError
from qcompiler.formats import gguf_write
from qcompiler.formats.gguf import GgufFile
from qcompiler.formats.gguf_tokenizer import CUTS
from qcompiler.frontends import gguf as frontend
from qcompiler.program import Program
from tests.checkpoints import save_tokenizer, written

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")

VOCABULARY = 300
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "linear": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
}


def folder_of(name: str, folder: Path, **changes: Any) -> Path:
    """A model with random weights, its norms and biases too, and a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**SIZES, **MODELS[name], **changes})
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            elif "self_attn" in key:
                parameter.mul_(8)
    model.save_pretrained(folder)
    save_tokenizer(folder, VOCABULARY)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: folder_of(name, base / name) for name in MODELS}


@pytest.fixture(scope="module")
def captured(folders: dict[str, Path]) -> dict[str, Program]:
    return {name: capture(folder) for name, folder in folders.items()}


def distance(program: Program, path: Path, length: int = 40) -> tuple[float, float]:
    """How far llama.cpp's log-probabilities are from ours, and from ours of another prompt."""
    from tests.llama_cpp import LlamaCpp

    ids = torch.randint(2, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))
    theirs = LlamaCpp(path).logprobs(ids[0].tolist(), VOCABULARY)
    both = torch.cat([ids, torch.cat([ids[:, 1:2], ids[:, :1], ids[:, 2:]], 1)])  # two tokens in the other order
    ours = program(input_ids=both)["logits"][:, -1].log_softmax(-1).numpy()
    return float(np.abs(theirs - ours[0]).max()), float(np.abs(theirs - ours[1]).max())


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_we_compute(name: str, captured: dict[str, Program], tmp_path: Path) -> None:
    gguf_write.write(captured[name], tmp_path / "out.gguf")
    right, wrong = distance(captured[name], tmp_path / "out.gguf")
    assert right < 5e-3
    assert wrong > 4 * right  # positions matter, and are the same


def test_codes_of_another_format_arrive_in_llama_cpp(folders: dict[str, Path], tmp_path: Path) -> None:
    """A GPTQ folder as Q4_0: what 4-bit codes in groups of 32 with float16 scales are there."""
    from qcompiler.compiler import compile

    recipe = "canonicalize, rtn{scheme=int4:g32:sym}, fuse, kv_cache, pack"
    model = compile(str(folders["llama"]), recipe, backend="reference", samples=4, length=16)
    written(model, "gptq", tmp_path / "gptq")
    for path in folders["llama"].glob("tokenizer*"):
        shutil.copyfile(path, tmp_path / "gptq" / path.name)
    lines = convert(tmp_path / "gptq", tmp_path / "out.gguf", "gguf", verify=True)
    assert [line.note for line in lines].count("Q4_0") == 14
    right, wrong = distance(model.program.decoded(), tmp_path / "out.gguf")
    assert right < 0.1 < wrong  # it rounds activations to 8 bits


def test_the_tokenizer_is_the_folders(folders: dict[str, Path], captured: dict[str, Program], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    gguf_write.write(captured["llama"], tmp_path / "out.gguf")
    theirs, ours = AutoTokenizer.from_pretrained(folders["llama"]), frontend.tokenizer(tmp_path / "out.gguf")
    for text in ("hello world, the cat sat", "it's 1984 again\n\n", "größer 🙂</s>"):
        assert ours(text, add_special_tokens=False)["input_ids"] == theirs(text, add_special_tokens=False)["input_ids"]
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    metadata = GgufFile.read(tmp_path / "out.gguf").metadata
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert len(metadata["tokenizer.ggml.tokens"]) == VOCABULARY


def pre_tokenizer(steps: tuple[str, ...]) -> dict[str, Any]:
    """A pre_tokenizer of tokenizer.json that takes these steps."""
    known: dict[str, dict[str, Any]] = {
        "words": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "bytes": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "digits": {"type": "Digits", "individual_digits": True},
    }
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    found = [known.get(step) or {**split, "pattern": {"Regex": step}} for step in steps]
    return {"type": "Sequence", "pretokenizers": found}


@pytest.mark.parametrize("steps", CUTS, ids=list(CUTS.values()))
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(
    steps: tuple[str, ...], folders: dict[str, Path], captured: dict[str, Program], tmp_path: Path
) -> None:
    """A prompt as text and as our tokens: llama.cpp counts as many and goes on alike."""
    from transformers import AutoTokenizer

    from tests.llama_cpp import LlamaCpp

    folder = edited(folders["llama"], tmp_path / "copy", "tokenizer.json", pre_tokenizer=pre_tokenizer(steps))
    program = captured["llama"].copy()
    program.info["tokenizer"] = str(folder)
    gguf_write.write(program, tmp_path / "out.gguf")
    model, text = LlamaCpp(tmp_path / "out.gguf"), "the cat's 1984\n\n  IT'S 123456!! hello  world 🙂"
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    assert model.count(text) == len(ids)
    assert model.greedy(text, 8) == model.greedy(ids, 8)


def test_a_token_before_the_text_is_announced(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "model")
    found = json.loads((folder / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pieces = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
    found["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": pieces}
    (folder / "tokenizer.json").write_text(json.dumps(found))
    gguf_write.write(capture(folder), tmp_path / "out.gguf")
    assert GgufFile.read(tmp_path / "out.gguf").metadata["tokenizer.ggml.add_bos_token"] is True


def edited(folder: Path, out: Path, name: str, **changes: Any) -> Path:
    """A copy of a folder with other values in one of its JSON files."""
    shutil.copytree(folder, out)
    (out / name).write_text(json.dumps({**json.loads((out / name).read_text()), **changes}))
    return out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "no byte-level BPE"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}}, "it is a Unigram model"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, r"no name for its way to cut words \(Whitespace\)"),
    ],
)
def test_other_tokenizers_are_refused(
    changes: dict[str, Any], message: str, folders: dict[str, Path], captured: dict[str, Program], tmp_path: Path
) -> None:
    program = captured["llama"].copy()
    program.info["tokenizer"] = str(edited(folders["llama"], tmp_path / "copy", "tokenizer.json", **changes))
    with pytest.raises(InputError, match=message):
        gguf_write.write(program, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "its architecture 'gemma2' is not among llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "its activation is 'gelu', not silu"),
        ({"model_type": "mistral", "sliding_window": 16}, "a window of 16"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "stretched by 'yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "only a part of each head is rotated"),
        ({"vocab_size": 40}, r"numbers tokens up to \d+, config.json has vocab_size 40"),
    ],
)
def test_other_models_are_refused(
    changes: dict[str, Any], message: str, captured: dict[str, Program], tmp_path: Path
) -> None:
    program = captured["llama"].copy()
    program.info["config"] |= changes
    with pytest.raises(InputError, match=message):
        gguf_write.write(program, tmp_path / "out.gguf")


def test_without_a_tokenizer_there_is_no_file(captured: dict[str, Program], tmp_path: Path) -> None:
    program = captured["llama"].copy()
    program.info["tokenizer"] = str(tmp_path)
    with pytest.raises(InputError, match=r"holds no tokenizer\.json"):
        gguf_write.write(program, tmp_path / "out.gguf")
    del program.info["tokenizer"]
    with pytest.raises(InputError, match=r"capture a model folder with a tokenizer\.json, or a GGUF file"):
        gguf_write.write(program, tmp_path / "out.gguf")


def test_the_cuts_differ_on_that_text() -> None:
    """Digits are tokens of their own, in threes, or as many as stand together: the test above tells the names apart."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    counts = set()
    for steps in CUTS:
        made = Tokenizer(models.BPE())
        made = Tokenizer.from_str(json.dumps({**json.loads(made.to_str()), "pre_tokenizer": pre_tokenizer(steps)}))
        cutter: pre_tokenizers.PreTokenizer = made.pre_tokenizer
        counts.add(len(cutter.pre_tokenize_str("IT'S 123456!!")))
    assert len(counts) == 4


@pytest.mark.slow
def test_smollm2_says_the_same_in_llama_cpp(tmp_path: Path) -> None:
    """Its transformers folder as a GGUF file: 32 tokens as ours, but for ties."""
    from tests.llama_cpp import LlamaCpp
    from tests.test_gguf import smollm2

    model, _ = frontend.load(GgufFile.read(smollm2()))
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    frontend.tokenizer(smollm2()).save_pretrained(tmp_path / "model")
    program = capture(tmp_path / "model")
    gguf_write.write(program, tmp_path / "out.gguf")
    ids = [504, 3575, 282, 4649, 314]  # The capital of France is
    client = LlamaCpp(tmp_path / "out.gguf")
    said = client.greedy(ids, 32)
    logits = program(input_ids=torch.tensor([ids + said]))["logits"][0, len(ids) - 1 : -1]
    ours = logits[0].log_softmax(-1).numpy()
    assert float((np.exp(ours) * (ours - client.logprobs(ids, 49152))).sum()) < 1e-5
    logits[:, [0, 2]] = -torch.inf  # the ends of texts, which llama.cpp is told to ignore
    chosen = logits.gather(1, torch.tensor(said)[:, None])[:, 0]
    assert float((logits.amax(1) - chosen).max()) < 0.02
    assert client.count("The capital of France is") == len(ids)
