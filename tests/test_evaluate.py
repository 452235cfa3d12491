"""Perplexity, divergence and speed, each against its definition."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from qcompiler import bench, compile, evaluate
from qcompiler.backends.onnxruntime import OnnxRuntime
from qcompiler.errors import BackendError, InputError, QCompilerError
from qcompiler.plugins import lookup
from qcompiler.target import Decoder, Runner
from tests.programs import tiny_encoder, tiny_llama

VOCABULARY = 50


def table(seed: int, vocabulary: int = VOCABULARY) -> evaluate.Run:
    """A model that predicts from the last token alone."""
    logits = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
    return lambda ids: logits[ids]


def text(length: int) -> Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(7))


def test_perplexity_is_its_definition() -> None:
    run, tokens, length = table(0), text(5 * 150 + 30), 150  # windows longer than a block, and a rest that is dropped
    losses = [cross_entropy(run(w)[0, :-1].double(), w[0, 1:]) for w in tokens[:750].view(5, 1, length)]
    assert evaluate.perplexity(run, tokens, length) == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-9)


def test_divergence_and_agreement_are_their_definitions() -> None:
    run, base, tokens = table(0), table(1), text(300)
    found = evaluate.compare(run, base, tokens, length=100)
    divergences, agreements = [], []
    for window in tokens.view(3, 1, 100):
        p, q = (log_softmax(model(window)[0, :-1].double(), -1) for model in (base, run))
        divergences.append((p.exp() * (p - q)).sum(-1).mean())
        agreements.append((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert found.kl == pytest.approx(float(torch.stack(divergences).mean()), rel=1e-9)
    assert found.top1 == pytest.approx(float(torch.stack(agreements).mean()))
    assert found.baseline_perplexity == pytest.approx(evaluate.perplexity(base, tokens, 100))


def test_a_model_agrees_with_itself() -> None:
    found = evaluate.compare(table(3), table(3), text(128), length=64)
    assert found.kl == pytest.approx(0, abs=1e-12)
    assert found.top1 == 1.0


def test_count_limits_the_windows_and_progress_is_told() -> None:
    seen: list[tuple[str, int, int]] = []
    evaluate.perplexity(table(0), text(1000), 100, 2, lambda *news: seen.append(news))
    assert seen == [("evaluating", 0, 2), ("evaluating", 1, 2), ("evaluating", 2, 2)]


def test_two_backends_write_the_same_text() -> None:
    session = compile(tiny_llama(), "canonicalize, rtn{scheme=int4:g32:asym}, kv_cache, pack", backend="onnxruntime")
    reference, exact = (lookup("backends", "reference")(), OnnxRuntime(accuracy_level=0))
    a, b = (backend.lower(session.program) for backend in (reference, exact))
    for seed in range(8):
        ids = torch.randint(
            evaluate.vocabulary_of(session.program), (1, 5 + seed), generator=torch.Generator().manual_seed(seed)
        )
        found = evaluate.agreement(a, b, ids, 64)
        # Random weights make ties likely; a difference that is none would be a fault.
        assert found.same == found.asked or max(found.gaps) <= 1e-3, found


def test_where_texts_part_the_gaps_are_told() -> None:
    class Fixed(Runner):
        def __init__(self, *steps: list[float]) -> None:
            self.steps = list(steps)

        def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            raise NotImplementedError

        def decoder(self, batch: int, capacity: int) -> Any:
            return SimpleNamespace(step=lambda ids: torch.tensor([self.steps.pop(0)]))

    a = Fixed([0.0, 1.0, 0.0], [2.0, 1.5, 0.0])
    b = Fixed([0.0, 1.0, 0.0], [1.0, 1.25, 0.0])
    found = evaluate.agreement(a, b, torch.tensor([[0]]), 8)
    assert found == evaluate.Agreement(same=1, asked=8, gaps=(0.5, 0.25), difference=1.0)


@pytest.mark.parametrize(
    ("length", "count", "said"), [(1, None, "at least 2"), (10, 0, "at least 1"), (600, None, "fewer than one window")]
)
def test_windows_of_nonsense(length: int, count: int | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        evaluate.perplexity(table(0), text(500), length, count)


def test_other_vocabulary_is_an_error() -> None:
    with pytest.raises(InputError, match="the baseline predicts 60 tokens and the model 50"):
        evaluate.compare(table(0), table(0, 60), text(100), 50)


def test_predictions_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(QCompilerError, match="not finite"):
        evaluate.perplexity(lambda ids: torch.full((1, ids.shape[1], VOCABULARY), math.nan), text(100), 50)


def test_hopeless_predictions_give_infinity() -> None:
    def certain(ids: Tensor) -> Tensor:
        return torch.zeros(1, ids.shape[1], VOCABULARY).index_fill(2, torch.tensor([0]), 1e6)

    assert evaluate.perplexity(certain, torch.ones(100, dtype=torch.int64), 50) == math.inf


def test_a_program_can_be_evaluated() -> None:
    program = tiny_llama()
    found = evaluate.perplexity(lambda ids: program(input_ids=ids)["logits"], text(64), 32)
    assert 1 < found < 1000
    assert evaluate.vocabulary_of(program) == 80
    with pytest.raises(InputError, match="language model"):
        evaluate.vocabulary_of(tiny_encoder())


class Counting(Runner, Decoder):
    """A runner that is its own decoder and keeps what it was fed."""

    def __init__(self, cached: bool = True) -> None:
        self.fed: list[tuple[int, ...]] = []
        self.capacity = 0
        self.cached = cached

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": table(0, 80)(inputs["input_ids"] % 80)}

    def decoder(self, batch: int, capacity: int) -> Decoder:
        if not self.cached:
            raise BackendError("the program has no cache; add the pass kv_cache to the recipe")
        self.capacity = capacity
        return self

    def step(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        self.fed.append(tuple(ids.shape))
        return torch.zeros(1, 80)


def test_speed_reads_the_prompt_at_once_and_writes_one_by_one() -> None:
    runner = Counting()
    found = evaluate.speed(runner, 80, prompt_tokens=9, new_tokens=6, repeats=2)
    assert runner.fed == [(1, 9)] + [(1, 1)] * 4 + 2 * ([(1, 9)] + [(1, 1)] * 6)
    assert runner.capacity == 15
    assert found.ms_per_token == pytest.approx(1000 / found.decode_tokens_per_s)
    assert found.prefill_tokens_per_s > 0


def test_speed_says_what_is_wrong() -> None:
    with pytest.raises(BackendError, match="kv_cache"):
        evaluate.speed(Counting(cached=False), 80)
    with pytest.raises(InputError, match="at least 1"):
        evaluate.speed(Counting(), 80, new_tokens=0)


def test_sizes_and_memory(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(bytes(1_000_000))
    (tmp_path / "inner" / "b").write_bytes(bytes(500_000))
    assert evaluate.size_mb(tmp_path) == 1.5
    assert evaluate.size_mb(tmp_path / "a") == 1.0
    assert evaluate.peak_rss_mb() > 10


def test_text_without_tokenizer_is_an_error() -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        evaluate.encode(None, "words")


class FakeSession:
    """As much of a session as measuring needs."""

    def __init__(self) -> None:
        self.runner = Counting()
        self.program = tiny_llama()
        self.tokenizer = lambda text, **options: {"input_ids": [ord(c) % 80 for c in text]}

    def __call__(self, ids: Tensor) -> Tensor:
        return self.runner({"input_ids": ids})["logits"]

    def generate(self, prompt: str, max_new_tokens: int) -> str:
        return " and so on"


def measured(**options: Any) -> dict[str, Any]:
    job = bench.Job(str(Path(__file__).parent), None, 8, 4, 1, **options)
    return bench.measure(job, lambda folder, backend: FakeSession())  # type: ignore[arg-type, return-value]


def test_measure_gives_the_documented_keys() -> None:
    keys = {"prefill_tokens_per_s", "decode_tokens_per_s", "ms_per_token", "load_s", "peak_rss_mb", "size_mb"}
    assert set(measured()) == keys
    more = measured(text="the opening of a book", length=8, prompt="Once")
    assert set(more) == keys | {"completion", "perplexity"}
    assert more["completion"] == " and so on"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("print('noise'); print('{\"error\": \"no such folder\"}')", "^no such folder$"),
        ("import sys; sys.exit(9)", "exit status 9"),
        ("print('no json')", "ended with exit status 0"),
    ],
)
def test_errors_of_the_other_process_are_told(script: str, said: str) -> None:
    with pytest.raises(QCompilerError, match=said):
        bench.measure_apart(bench.Job("somewhere"), (sys.executable, "-c", script))


def test_the_job_reaches_the_other_process() -> None:
    job = bench.Job("somewhere", text="naïve", prompt_tokens=3)
    echo = "import sys, json; print(json.dumps(json.load(sys.stdin)))"
    assert bench.measure_apart(job, (sys.executable, "-c", echo)) == asdict(job)
    assert bench.Job(**json.loads(json.dumps(asdict(job)))) == job


def test_the_demo_compares_what_it_measured() -> None:
    from rich.console import Console

    from qcompiler import demo

    before = {row.key: 10.0 for row in demo.ROWS} | {"completion": " Jupiter."}
    after = {row.key: 5.0 for row in demo.ROWS} | {"completion": " Jupiter, I think."}
    console = Console(width=100, record=True, file=SimpleNamespace(write=len, flush=list))  # type: ignore[arg-type]
    console.print(demo.last_screen(demo.Report(), before, after, Path("build/demo")))
    shown = console.export_text()
    assert shown.count("0.50 x") == len(demo.ROWS)
    for expected in ("Jupiter, I think.", "build/demo", "qcompiler generate", "peak memory"):
        assert expected in shown
