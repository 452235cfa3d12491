"""Damages files of every kind that qcompiler reads, thousands of times, and demands one sentence from the reader.

`make fuzz` runs `python -m tests.fuzz_formats`; a sample runs with the tests. For each mutation the reader must succeed
or raise a QCompilerError whose text is one line; nothing else may come out, no file may appear but in the output folder
of a conversion that succeeded, and memory stays below 1 GB.
"""

import argparse
import itertools
import json
import math
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

from qcompiler.errors import QCompilerError
from tests.fuzz_seeds import OUT, Seed, seeds

LIMIT_MB = 1000
VALUES = (
    *(0, 1, -1, 2**31, 2**63, -(2**63), 1e308, 0.5, True, None, "", "x", "../../etc/passwd", [], {}, [[]]),
    *("NaN", "re:(a+)+$", "re:[", 10**30, [2**40, 2**40], {"a": {"a": {}}}),
)


def mutate(files: Mapping[str, bytes], chance: random.Random) -> dict[str, bytes]:
    """The files with one to three things wrong."""
    found = dict(files)
    for _ in range(chance.choice((1, 1, 2, 3))):
        name = chance.choice(sorted(found))
        data = found[name]
        if name.endswith(".json") and chance.random() < 0.7:
            found[name] = _other_json(data, chance)
        elif name.endswith(".safetensors") and chance.random() < 0.5:
            found[name] = _other_header(data, chance)
        elif chance.random() < 0.1:
            del found[name]
            if not found:
                return {name: b""}
        else:
            found[name] = _other_bytes(data, chance)
    return found


def _other_bytes(data: bytes, chance: random.Random) -> bytes:
    """Cut off, prolonged, or some bytes replaced, the first ones more often."""
    kind = chance.random()
    if kind < 0.25 or not data:
        return data[: chance.randrange(len(data) + 1)]
    if kind < 0.3:
        return data + bytes(chance.randrange(256) for _ in range(chance.randrange(1, 64)))
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 4, 64))):
        near = len(out) if chance.random() < 0.5 else min(len(out), 16 if chance.random() < 0.3 else 2000)
        out[chance.randrange(near)] = chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256)))
    return bytes(out)


def _places(value: object) -> list[tuple[dict | list, str | int]]:
    """Everything in a JSON value that can be replaced."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    found: list[tuple[dict | list, str | int]] = [(value, key) for key in keys]  # type: ignore[misc]
    for key in keys:
        found += _places(value[key])  # type: ignore[index]
    return found


def _other_json(data: bytes, chance: random.Random) -> bytes:
    """A JSON text with a value replaced or gone; those of the quantization more often."""
    try:
        value = json.loads(data)
    except ValueError:
        return _other_bytes(data, chance)
    inner = value.get("quantization_config") if isinstance(value, dict) else None
    places = _places(inner if isinstance(inner, dict) and chance.random() < 0.8 else value)
    if not places:
        return _other_bytes(data, chance)
    holder, key = chance.choice(places)
    if chance.random() < 0.15:
        del holder[key]  # type: ignore[arg-type]
    else:
        holder[key] = chance.choice(VALUES)  # type: ignore[index]
    return json.dumps(value).encode()


def _other_header(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose header says something else: a dtype, a size, a place, a name."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
        name = chance.choice([n for n in header if n != "__metadata__"])
    except (ValueError, IndexError, TypeError):
        return _other_bytes(data, chance)
    entry = header[name]
    what = chance.random()
    if what < 0.2:
        entry["dtype"] = chance.choice(("F16", "F32", "I8", "U8", "I32", "F64", "BF16", "BOOL", "nonsense"))
    elif what < 0.5:
        entry["shape"] = chance.choice(([], [0], [2**40, 2**30], entry["shape"][::-1], [*entry["shape"], 1], [-1], [7]))
    elif what < 0.8:
        other = header[chance.choice([n for n in header if n != "__metadata__"])]
        entry["data_offsets"] = chance.choice(([0, 2**62], other.get("data_offsets"), [5, 1], [0, 0], "x"))
    else:
        header[chance.choice(("../x", "model.a.weight", "", "model.z.qweight", "y" * 5000))] = header.pop(name)
    text = json.dumps(header).encode()
    length = len(text) if chance.random() < 0.9 else chance.choice((0, 2**40, 2**63, len(text) + 9))
    return length.to_bytes(8, "little") + text + data[8 + size :]


def run(count: int, seed: int = 0, only: str = "") -> tuple[Counter[str], list[str]]:
    """Try `count` mutations over all readers; what came out how often, and what should not have."""
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as base, tempfile.TemporaryDirectory(prefix="seeds-") as sound:
        known = {name: one for name, one in seeds(Path(sound)).items() if only in name}
        rounds = math.lcm(*(one.every for one in known.values()))
        turns = [name for i in range(rounds) for name, one in known.items() if i % one.every == 0]
        with mock.patch.object(tempfile, "tempdir", base):  # what readers put there must be gone, too
            for i, name in zip(range(count), itertools.cycle(turns), strict=False):
                outcome = _try(known[name], Path(base), chance)
                outcomes[outcome if outcome in ("read", "refused") else "wrong"] += 1
                if outcome not in ("read", "refused"):
                    wrong.append(f"{name} #{i} (seed {seed}): {outcome}")
    return outcomes, wrong


def _try(sound: Seed, base: Path, chance: random.Random) -> str:
    """What reading one damaged folder came to: read, refused, or what is wrong with either."""
    folder = base / "broken"
    folder.mkdir()
    broken = mutate(sound.files, chance)
    for file, data in broken.items():
        (folder / file).write_bytes(data)
    outcome = _outcome(sound.read, folder)
    if {path.name for path in folder.iterdir()} != set(broken):
        outcome = "wrote into the folder that it read"
    allowed = {"broken", OUT} if outcome == "read" else {"broken"}
    if strangers := {path.name for path in base.iterdir()} - allowed:
        outcome = f"left {sorted(strangers)} behind ({outcome})"
    for path in base.iterdir():
        shutil.rmtree(path)
    return outcome


def _outcome(read: Callable[[Path], None], folder: Path) -> str:
    """What reading a broken folder came to."""
    start = time.perf_counter()
    try:
        read(folder)
        outcome = "read"
    except QCompilerError as error:
        text = str(error)
        outcome = "refused" if text and "\n" not in text and len(text) < 1000 else f"no sentence: {text[:200]!r}"
    except Exception as error:  # noqa: BLE001  # that is what is looked for
        outcome = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    return outcome if seconds < 20 else f"took {seconds:.0f} s"


def peak_mb() -> float:
    """The most memory this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    """Run as a script; the exit status is 1 if anything but an answer or a sentence came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    import transformers

    transformers.logging.set_verbosity_error()  # it says at length what it misses in a damaged folder
    transformers.logging.disable_progress_bar()
    outcomes, wrong = run(given.count, given.seed, given.only)
    for line in wrong[:40]:
        print(line)
    print(f"{dict(outcomes)}, {peak_mb():.0f} MB at most")
    return 1 if wrong or peak_mb() > LIMIT_MB else 0


if __name__ == "__main__":
    sys.exit(main())
