"""A tokenizer.json as GGUF metadata: byte-level BPE, cut into words by one of the patterns that llama.cpp knows."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qcompiler.errors import InputError, No
from qcompiler.formats.shards import read_json

# GGUF's numbers of value types.
UINT, INT, FLOAT, BOOL, TEXT, ARRAY = 4, 5, 6, 7, 8, 9
NORMAL, CONTROL, DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens
Pairs = Iterator[tuple[str, tuple[Any, int, int | None]]]  # key: value, its type, and that of an array's items

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name of the way to cut a text into words, by the pre_tokenizer's steps.
CUTS = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (_LETTERS + r"|\p{N}{1,3}" + _REST, "bytes"): "llama-bpe",
    (_LETTERS + r"|\p{N}" + _REST, "bytes"): "qwen2",
}


def tokenizer_pairs(folder: Path, config: Mapping[str, Any]) -> Pairs:
    """The metadata of the tokenizer in a folder; InputError for one that llama.cpp does not have, with the reason."""
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f'"{folder}" holds no tokenizer.json, from which the tokenizer would be written')
    found = read_json(folder / "tokenizer.json")
    cut = _cut(found)
    if isinstance(cut, No):
        raise InputError(f'the tokenizer of "{folder}" cannot be written to a GGUF file: {cut.reason}')
    tokens, types = _tokens(found, int(config["vocab_size"]), folder)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in found["model"]["merges"]]
    yield "tokenizer.ggml.model", ("gpt2", TEXT, None)
    yield "tokenizer.ggml.pre", (cut, TEXT, None)
    yield "tokenizer.ggml.tokens", (tokens, ARRAY, TEXT)
    yield "tokenizer.ggml.token_type", (types, ARRAY, INT)
    yield "tokenizer.ggml.merges", (merges, ARRAY, TEXT)
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    numbers = dict(zip(tokens, range(len(tokens)), strict=True))
    special = _special(settings, config, numbers)
    for key, number in special.items():
        yield f"tokenizer.ggml.{key}_token_id", (number, UINT, None)
    first, last = _ends(folder)
    yield "tokenizer.ggml.add_bos_token", (first is not None and first == special.get("bos"), BOOL, None)
    yield "tokenizer.ggml.add_eos_token", (last is not None and last == special.get("eos"), BOOL, None)
    if template := _template(folder, settings):
        yield "tokenizer.chat_template", (template, TEXT, None)


def _cut(found: Mapping[str, Any]) -> str | No:
    """llama.cpp's name for how the tokenizer cuts words."""
    model = found.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("merges"), list):
        kind = model.get("type") if isinstance(model, dict) else None
        return No(f"it is a {kind} model; byte-level BPE is written")
    normalizer = (found.get("normalizer") or {}).get("type")
    if model.get("byte_fallback") or normalizer not in (None, "NFC"):
        return No("it is no byte-level BPE: it replaces bytes or spaces by tokens of its own")
    steps = tuple(_steps(found.get("pre_tokenizer") or {}))
    name = CUTS.get(steps)
    shown = re.sub(r"\s+", " ", " then ".join(steps))[:120] or "nothing"
    return name or No(f"llama.cpp has no name for its way to cut words ({shown})")


def _steps(given: Mapping[str, Any]) -> Iterator[str]:
    """What a pre_tokenizer does, step by step; a step that is not known is its type."""
    kind = given.get("type")
    if kind == "Sequence":
        for step in given.get("pretokenizers") or ():
            yield from _steps(step)
    elif kind == "ByteLevel" and not given.get("add_prefix_space"):
        yield "words" if given.get("use_regex", True) else "bytes"
    elif kind == "Digits" and given.get("individual_digits"):
        yield "digits"
    elif kind == "Split" and given.get("behavior") == "Isolated" and not given.get("invert"):
        pattern = given.get("pattern") or {}
        yield str(pattern.get("Regex", kind)) if isinstance(pattern, dict) else str(kind)
    else:
        yield str(kind)


def _tokens(found: Mapping[str, Any], count: int, folder: Path) -> tuple[list[str], list[int]]:
    """The tokens by number and their types; numbers that the tokenizer does not use are filled in."""
    vocabulary, added = found["model"].get("vocab"), found.get("added_tokens") or []
    if not isinstance(vocabulary, dict) or not all(isinstance(number, int) for number in vocabulary.values()):
        raise InputError(f'"{folder / "tokenizer.json"}" has no vocabulary of tokens by number')
    by_number = {number: (token, NORMAL) for token, number in vocabulary.items()}
    for one in added:
        by_number[one["id"]] = (one["content"], CONTROL if one.get("special") else DEFINED)
    if by_number and not 0 <= min(by_number) <= max(by_number) < count:
        raise InputError(
            f'"{folder / "tokenizer.json"}" numbers tokens up to {max(by_number)}, config.json has vocab_size {count}'
        )
    pairs = [by_number.get(i, (f"[PAD{i}]", UNUSED)) for i in range(count)]
    return [token for token, _ in pairs], [kind for _, kind in pairs]


def _special(settings: Mapping[str, Any], config: Mapping[str, Any], numbers: Mapping[str, int]) -> dict[str, int]:
    """The numbers of the tokens for begin, end, padding and unknown: the tokenizer's, else the model's."""
    found = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        number = numbers.get(token) if isinstance(token, str) else config.get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < len(numbers):
            found[key] = number
    return found


def _ends(folder: Path) -> tuple[int | None, int | None]:
    """What the tokenizer puts before and after a text."""
    from tokenizers import Tokenizer

    try:
        made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # noqa: BLE001  # the package raises plain Exceptions for files it cannot use
        raise InputError(f'"{folder / "tokenizer.json"}" cannot be read: {str(error)[:160]}') from None
    bare, whole = (made.encode("a", add_special_tokens=some).ids for some in (False, True))
    at = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), 0)
    after = whole[at + len(bare) :]
    return (whole[at - 1] if at else None), (after[0] if after else None)


def _template(folder: Path, settings: Mapping[str, Any]) -> str:
    """The chat template, if there is one."""
    path = folder / "chat_template.jinja"
    found = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
    return found if isinstance(found, str) else ""
