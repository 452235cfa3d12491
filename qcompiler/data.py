"""Where calibration data comes from: a file, texts, tensors, or the model itself.

Data-free calibration follows LLM-QAT (Liu et al., arXiv 2305.17888, section 2.1): each text starts with a random
token, goes on greedily for three to five tokens, and is then sampled from the model's own predictions.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler import arrays
from qcompiler.calibration import Sample
from qcompiler.errors import InputError
from qcompiler.program import Input, Program

TOKENS_PER_BATCH = 2048
SELF = "self"
ARRAYS = ".npz"


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on: a source, how many sequences of how many tokens, the seed of self-written ones."""

    source: Any = SELF
    samples: int = 64
    length: int = 256
    seed: int = 0

    def describe(self) -> str:
        """One line for the report."""
        kind = self.source if isinstance(self.source, (str, Path)) else type(self.source).__name__
        return f"{kind}, {self.samples} x {self.length} tokens, seed {self.seed}"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise InputError(
                f"calibration needs at least 1 sample of 2 tokens, not {self.samples} of {self.length}; "
                "raise --samples or --length"
            )


def load(
    calibration: Calibration,
    program: Program,
    tokenizer: Any = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Sample]:
    """The calibration data as batches of inputs; InputError for a source that is missing, empty or unreadable."""
    source = calibration.source
    if isinstance(source, str) and source == SELF:
        ids = write_text(program, calibration, progress)
        return _batches(list(ids), program)
    if isinstance(source, (str, Path)) and Path(source).suffix == ARRAYS:
        return arrays.samples(arrays.read(Path(source)), program, calibration.samples)
    if isinstance(source, (str, Path)):
        source = list(read_texts(Path(source)))
    if not isinstance(source, Sequence) or not source:
        raise InputError('calibration data is empty; give a text or JSONL file, a list of texts or tensors, or "self"')
    if all(isinstance(entry, Mapping) for entry in source):
        return [dict(entry) for entry in source[: calibration.samples]]
    if all(isinstance(entry, Tensor) for entry in source):
        rows = [row for entry in source for row in (entry if entry.dim() == 2 else entry[None])]
        if rows[0].is_floating_point():
            name = program.inputs[0].name
            return [{name: entry} for entry in source[: calibration.samples]]
        return _batches(rows[: calibration.samples], program)
    return _batches(_windows(source, calibration, tokenizer), program)


def check_source(path: Path) -> None:
    """InputError for a calibration file that is missing, empty or unreadable."""
    if path.suffix == ARRAYS:
        arrays.read(path)
    else:
        next(read_texts(path))


def examples(source: Any) -> dict[str, Tensor] | None:
    """Example inputs from calibration data that name the inputs: the first two samples of arrays, or None."""
    if not isinstance(source, (str, Path)) or Path(source).suffix != ARRAYS:
        return None
    return {name: array[:2] for name, array in arrays.read(Path(source)).items()}


def read_texts(path: Path) -> Iterator[str | list[int]]:
    """The texts of a file: each line's `text` (or `input_ids`) for JSONL, the whole text otherwise."""
    if not path.is_file():
        raise InputError(f'calibration file "{path}" does not exist; give a text or JSONL file, or "self"')
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        place = f"{error.reason} at byte {error.start}"
        raise InputError(f'calibration file "{path}" is not UTF-8 text: {place}') from error
    if not content.strip():
        raise InputError(f'calibration file "{path}" is empty; give a file with text, or "self"')
    if path.suffix not in (".jsonl", ".json"):
        yield content
        return
    for number, line in enumerate(filter(str.strip, content.splitlines()), start=1):
        try:
            entry = json.loads(line)
            yield entry["input_ids"] if "input_ids" in entry else entry["text"]
        except (ValueError, KeyError, TypeError) as error:
            place = f'calibration file "{path}", line {number}'
            raise InputError(f'{place}: no JSON object with "text" or "input_ids"') from error


def _windows(entries: Sequence[Any], calibration: Calibration, tokenizer: Any) -> list[Tensor]:
    """Texts (or token lists) joined and cut into windows, spread evenly over the text."""
    if tokenizer is None and any(isinstance(entry, str) for entry in entries):
        raise InputError("texts need a tokenizer and this model has none; give token tensors as calibration data")
    tokens: list[int] = []
    for entry in entries:
        tokens += tokenizer(entry, add_special_tokens=False)["input_ids"] if isinstance(entry, str) else list(entry)
    count = len(tokens) // calibration.length
    if count == 0:
        raise InputError(
            f"the calibration text has {len(tokens)} tokens, fewer than one window of {calibration.length}; "
            "give more text or a smaller --length"
        )
    chosen = torch.linspace(0, count - 1, min(count, calibration.samples)).round().long().unique().tolist()
    stream = torch.tensor(tokens[: count * calibration.length]).view(count, calibration.length)
    return [stream[i] for i in chosen]


def _batches(rows: Sequence[Tensor], program: Program) -> list[Sample]:
    """Token rows stacked into batches of about TOKENS_PER_BATCH tokens; only rows of one length share a batch."""
    name, vocabulary = program.inputs[0].name, program.info.get("vocab_size")
    largest = max(int(row.max()) for row in rows) if rows else 0
    if vocabulary and largest >= vocabulary:
        raise InputError(
            f"the calibration data holds token {largest} and the model knows {vocabulary} tokens; "
            "give tokens of this model's own tokenizer"
        )
    batches: list[Sample] = []
    pending: list[Tensor] = []
    for row in rows:
        full = pending and len(pending) * pending[0].shape[0] >= TOKENS_PER_BATCH
        if pending and (full or row.shape != pending[0].shape):
            batches.append({name: torch.stack(pending)})
            pending = []
        pending.append(row.long())
    return [*batches, {name: torch.stack(pending)}] if pending else batches


def write_text(
    program: Program, calibration: Calibration, progress: Callable[[str, int, int], None] | None = None
) -> Tensor:
    """Token ids [samples, length] that the model writes itself. The program may have caches, or none (slower)."""
    vocabulary = program.info.get("vocab_size")
    if "logits" not in program.outputs or not vocabulary:
        raise InputError("only a language model can write its own calibration data; give calibration data for this one")
    random = torch.Generator().manual_seed(calibration.seed)
    ids = torch.randint(0, int(vocabulary), (calibration.samples, 1), generator=random)
    greedy = torch.randint(3, 6, (calibration.samples, 1), generator=random)
    state: dict[str, Tensor] = {}
    while ids.shape[1] < calibration.length:
        given = ids[:, -1:] if state else ids
        outputs = program(input_ids=given, **program.newest_logits(given), **state)
        state = program.cache_updates(outputs)
        logits = outputs["logits"][:, -1].float()
        sampled = torch.multinomial(logits.softmax(-1), 1, generator=random)
        best = logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, torch.where(ids.shape[1] < greedy, best, sampled)], dim=1)
        if progress:
            progress("writing calibration text", ids.shape[1], calibration.length)
    return ids


def check_samples(program: Program, seed: int = 0, examples: Any = None) -> list[Sample]:
    """Small random inputs on which contracts are checked: two sizes, the second with left padding where it exists.

    `examples` (tensors by name) take their place for a model whose front end says what it tried (`info["tried"]`):
    noise is no fair test of a network that was made for images. Without them the sizes are those it tried.
    """
    random = torch.Generator().manual_seed(seed)
    found: list[Sample] = []
    tried = program.info.get("tried")
    if tried is not None and isinstance(examples, Mapping):
        exact = all(examples[i.name].dim() == i.type.rank for i in program.inputs)
        return [dict(examples)] if exact else arrays.samples(examples, program, most=1)
    if tried is not None:
        return [
            {i.name: _random(program, i, sizes, random, integers) for i in program.inputs} for sizes, integers in tried
        ]
    for batch, length in ((2, 19), (1, 11)):
        sizes = {"batch": batch, "sequence": length}
        sample = {i.name: _random(program, i, sizes, random) for i in program.inputs if not i.default}
        names = {i.name for i in program.inputs}
        if found and "attention_mask" in names and not program.info.get("caches"):
            mask = torch.ones(batch, length, dtype=torch.int64)
            mask[:, :3] = 0
            sample["attention_mask"] = mask
        found.append(sample)
    return found


def _random(
    program: Program, spec: Input, sizes: Mapping[str, int], random: torch.Generator, integers: str = "bits"
) -> Tensor:
    shape = [size if isinstance(size, int) else sizes.get(size, 5) for size in spec.type.shape]
    if spec.type.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    if spec.type.dtype.is_floating_point:
        return torch.randn(shape, generator=random).to(spec.type.dtype)
    if integers != "bits":
        return torch.full(shape, int(integers == "ones"), dtype=spec.type.dtype)
    return torch.randint(0, int(program.info.get("vocab_size") or 2), shape, generator=random, dtype=spec.type.dtype)
