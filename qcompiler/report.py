"""Report: what happened, what did not, and why; one record, printed, saved, drawn."""

import json
import platform
import threading
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from qcompiler.errors import No

PACKAGES = ("qcompiler", "torch", "transformers", "onnxruntime", "numpy")


@dataclass
class LayerRecord:
    """What quantization did to one tensor.

    `output_error` is ||WX - QX|| / ||WX|| on calibration data (None without data), `sqnr_db` the signal to
    quantization noise ratio of the weight in decibels, `bytes_before` and `bytes_after` the stored sizes.
    """

    name: str
    scheme: str
    sqnr_db: float
    output_error: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    method: str = ""


@dataclass
class PassRecord:
    """What one pass did.

    `output_change` is the largest change of the program's outputs on the check samples, relative to their largest
    magnitude; `kl` the mean Kullback-Leibler divergence of its predictions, in nats (None where it has none).
    """

    name: str
    text: str
    contract: str
    seconds: float = 0.0
    peak_rss_mb: float = 0.0
    changed: bool = False
    nodes: tuple[int, int] = (0, 0)
    megabytes: tuple[float, float] = (0.0, 0.0)
    output_change: float | None = None
    kl: float | None = None
    notes: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    layers: list[LayerRecord] = field(default_factory=list)


@dataclass
class Report:
    """The whole story of one compilation."""

    model: str = ""
    recipe: str = ""
    backend: str = ""
    seed: int = 0
    calibration: str = ""
    captured: dict[str, Any] = field(default_factory=dict)
    passes: list[PassRecord] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    coverage: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    sizes_mb: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def refuse(self, no: No) -> None:
        """Keep a refusal that belongs to no pass (a backend that did not take the program)."""
        self.refusals.append(str(no))

    @property
    def all_refusals(self) -> list[str]:
        """Every refusal, those of passes named by their pass."""
        return [f"{p.name}: {text}" for p in self.passes for text in p.refusals] + self.refusals

    @property
    def layers(self) -> list[LayerRecord]:
        """The quantized tensors, each as the last pass that touched it left it."""
        last = {layer.name: layer for p in self.passes for layer in p.layers}
        return list(last.values())

    def __str__(self) -> str:
        """The report in a few lines of plain text."""
        sizes, found, refusals = self.sizes_mb, self.coverage, self.all_refusals
        share = found.get("bytes_share", 0)
        lines = [
            f"{self.model} compiled with {self.recipe} for {self.backend or 'no backend'}",
            f"  size      {sizes.get('float', 0):.1f} MB -> {sizes.get('compiled', 0):.1f} MB",
            f"  coverage  {found.get('quantized', 0)} of {found.get('linears', 0)} linear layers, {share:.1%} of bytes",
        ]
        for record in self.passes:
            kl = "" if record.kl is None else f", KL {record.kl:.4f}"
            lines.append(f"  {record.text}: {record.contract}, {record.seconds:.1f} s{kl}")
        lines += [f"  refused   {text}" for text in refusals[:10]]
        if len(refusals) > 10:
            lines.append(f"  and {len(refusals) - 10} more refusals")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The report as indented JSON; `from_json` inverts it."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Read back what `to_json` wrote."""
        fields = json.loads(text)
        passes = fields.pop("passes")
        report = cls(**fields)
        for record in passes:
            layers = [LayerRecord(**layer) for layer in record.pop("layers")]
            record |= {"nodes": tuple(record["nodes"]), "megabytes": tuple(record["megabytes"])}
            report.passes.append(PassRecord(**record, layers=layers))
        return report

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(self.to_json() + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter; an absent package is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Meter:
    """Measures wall-clock seconds and peak resident memory (MB) of a `with` block.

    >>> with Meter() as meter:
    ...     pass
    >>> meter.seconds >= 0 and meter.peak_rss_mb > 0
    True
    """

    def __init__(self, interval: float = 0.05) -> None:
        self.seconds = 0.0
        self.peak_rss_mb = 0.0
        self._interval = interval
        self._process = psutil.Process()
        self._stop = threading.Event()

    def __enter__(self) -> "Meter":
        self._start = time.perf_counter()
        self._sample()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
        self.seconds = time.perf_counter() - self._start

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        self.peak_rss_mb = max(self.peak_rss_mb, self._process.memory_info().rss / 1e6)
