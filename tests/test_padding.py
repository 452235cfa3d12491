"""Batches padded on the left: the same logits as the rows alone, whole and step by step, on every backend that can."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qcompiler.backends.onnxruntime import OnnxRuntime
from qcompiler.backends.reference import Reference
from qcompiler.errors import BackendError, No
from qcompiler.padding import Shift
from qcompiler.passes.fuse import Fuse
from qcompiler.passes.kv_cache import KvCache
from qcompiler.pipeline import Context
from qcompiler.program import Program
from qcompiler.report import Report
from qcompiler.session import Session
from qcompiler.target import Backend
from tests.programs import tiny_llama

PADS = (0, 4, 7, 1)
IDS = torch.randint(0, 80, (len(PADS), 9), generator=torch.Generator().manual_seed(3))
MASK = (torch.arange(9) >= torch.tensor(PADS)[:, None]).long()
EXACT = OnnxRuntime(accuracy_level=0, threads=1)
BACKENDS = [Reference(), EXACT, OnnxRuntime(accuracy_level=0, threads=1, padding=True)]


def decoder_program(**options: Any) -> Program:
    program = tiny_llama(**options)
    Fuse().run(program, Context())
    KvCache().run(program, Context())
    program.clean()
    return program


def alone(program: Program, row: int, more: Tensor | None = None) -> Tensor:
    """The logits of a row without its padding, and perhaps with more tokens behind it."""
    ids = IDS[row : row + 1, PADS[row] :]
    ids = ids if more is None else torch.cat([ids, more[row : row + 1]], 1)
    return program(input_ids=ids)["logits"][0]


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"sinks": True}, {"rotary": 8}, {"kv_heads": 1}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=["reference", "onnxruntime", "onnxruntime-masked"])
def test_rows_are_what_they_are_alone(backend: Backend, options: dict[str, Any]) -> None:
    program = decoder_program(**options)
    runner = backend.lower(program)
    assert runner.padding
    whole = runner({"input_ids": IDS, "attention_mask": MASK})
    some = runner({"input_ids": IDS, "attention_mask": MASK, "logits_positions": torch.tensor([8, 7])})["logits"]
    more = torch.tensor([[5], [6], [7], [8]])
    longer = torch.cat([MASK, torch.ones_like(more)], 1)
    past = {name: whole[present] for name, present in program.info["caches"].items()}
    next_ = runner({"input_ids": more, "attention_mask": longer, **past})["logits"]
    for row, pad in enumerate(PADS):
        expected = alone(program, row, more)
        torch.testing.assert_close(whole["logits"][row, pad:], expected[:-1], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(some[row, 0], expected[-2], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(next_[row, 0], expected[-1], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS, ids=["reference", "onnxruntime", "onnxruntime-masked"])
def test_a_padded_prompt_is_continued(backend: Backend) -> None:
    program = decoder_program()
    decoder = backend.lower(program).decoder(len(PADS), 16)
    more = torch.randint(0, 80, (len(PADS), 3), generator=torch.Generator().manual_seed(4))
    found = [decoder.step(IDS, MASK), decoder.step(more[:, :1]), decoder.step(more[:, 1:])]
    for row in range(len(PADS)):
        expected = alone(program, row, more)
        for logits, place in zip(found, (-4, -3, -1), strict=True):
            torch.testing.assert_close(logits[row], expected[place], rtol=1e-5, atol=2e-5)


def test_positions_may_be_given_as_they_are_counted() -> None:
    program = decoder_program()
    inputs = {"input_ids": IDS, "attention_mask": MASK, "position_ids": (MASK.cumsum(-1) - 1).clamp(min=0)}
    found, expected = EXACT.lower(program)(inputs)["logits"], program(**inputs)["logits"]
    torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], rtol=1e-5, atol=2e-5)


class Words:
    """A tokenizer whose tokens are numbers."""

    def __call__(self, text: "str | list[str]", return_tensors: str = "") -> dict[str, Any]:
        rows = [[int(word) for word in one.split()] for one in ([text] if isinstance(text, str) else text)]
        return {"input_ids": torch.tensor(rows) if return_tensors else rows}

    def decode(self, ids: Tensor, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids.tolist()))


@pytest.mark.parametrize("backend", BACKENDS[:2], ids=["reference", "onnxruntime"])
def test_texts_are_continued_together_as_they_are_alone(backend: Backend) -> None:
    program = decoder_program()
    session = Session(program, backend.lower(program), Report("", "", ""), Words())
    prompts = ["1 2 3 4 5", "7", "9 8 7"]
    assert session.generate(prompts, 6) == [session.generate(prompt, 6) for prompt in prompts]
    assert session.generate([], 6) == []


def test_what_cannot_be_moved_is_refused() -> None:
    runner = EXACT.lower(decoder_program())
    with pytest.raises(BackendError, match="zeros between or after real tokens; pad batches on the left"):
        runner({"input_ids": IDS, "attention_mask": MASK.flip(1)})
    with pytest.raises(BackendError, match="a row of the attention mask has no real token"):
        Shift.of(torch.zeros(1, 3))
    decoder = runner.decoder(len(PADS), 32)
    decoder.step(IDS, MASK)
    with pytest.raises(BackendError, match="padding comes with the prompt"):
        decoder.step(IDS, MASK)


def test_attention_that_cannot_tell_padding_says_so() -> None:
    runner = EXACT.lower(decoder_program())
    runner.about["shared_cache"] = False  # as where another attention of the program is not fused
    assert isinstance(runner.padding, No)
    with pytest.raises(BackendError, match="takes no padding: some of its attention cannot tell"):
        runner({"input_ids": IDS, "attention_mask": MASK})
