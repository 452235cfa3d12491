"""Small models to write as checkpoints, and weights of every kind."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler.compiler import compile
from qcompiler.export import checkpoint_of
from qcompiler.formats.checkpoint import Checkpoint, Format
from qcompiler.plugins import lookup
from qcompiler.session import Session

VOCABULARY = 96
WORDS = ["the cat sat on the mat, and the dog on the log; it's 1984 again", "hello world, hello cat, hello dog"]
WORDS += ["1984 1984 1984 123456 123456"]


@functools.cache
def llama(
    tied: bool = False, bias: bool = False, seed: int = 0, kv_heads: int = 2, intermediate: int = 96, layers: int = 2
) -> Any:
    """A Llama of two layers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": intermediate, "vocab_size": VOCABULARY}
    more = {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": kv_heads}
    more |= {"max_position_embeddings": 64}
    config = LlamaConfig(**sizes, **more, tie_word_embeddings=tied, attention_bias=bias, pad_token_id=0)
    model = LlamaForCausalLM(config)
    if bias:
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def save_tokenizer(folder: Path, vocabulary: int = 300) -> Any:
    """Write a byte-level BPE tokenizer beside a model, trained on a few words, and give it back.

    With fewer than 256 tokens it has letters and words, and spells nothing else.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if vocabulary > 256 else [],
        show_progress=False,
    )
    made.train_from_iterator(WORDS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return tokenizer


@functools.cache
def session(recipe: str, tied: bool = False, bias: bool = False) -> Session:
    """The small Llama, compiled by a recipe."""
    return compile(llama(tied, bias), recipe, backend="reference", samples=4, length=16)


def ids(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """Token ids of the small Llama."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def written(compiled: Session, to: str, folder: Path, **limits: int) -> Path:
    """The checkpoint of a compiled model in a format."""
    form: Format = lookup("formats", to)
    assert form.write is not None
    form.write(checkpoint_of(compiled.program), folder, **limits)
    return folder


def read(folder: Path, form: str) -> Checkpoint:
    """A checkpoint of that format."""
    reader = lookup("formats", form).read
    found = reader(folder)
    assert isinstance(found, Checkpoint)
    return found


def logits_of(folder: Path, **options: Any) -> Tensor:
    """What transformers computes with the checkpoint."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        found: Tensor = model(ids()).logits
    return found
