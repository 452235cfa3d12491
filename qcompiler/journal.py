"""Journal: finished pieces of long passes, kept in a folder so that a run that died goes on where it was."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, fx

from qcompiler.program import Program
from qcompiler.scheme import QTensor


@dataclass(frozen=True)
class Journal:
    """Quantized tensors by segment; `folder` None keeps nothing.

    A pass asks for its own pages with `of`: they are named by a hash of all that decides their content, so that
    pages of another model, recipe or calibration text are never taken for its own.
    """

    folder: Path | None = None
    prefix: str = ""

    def of(self, step: str, program: Program, samples: Sequence[Mapping[str, Tensor]], seed: int) -> "Journal":
        """The pages of one pass, given as recipe text, over one program, these samples and this seed."""
        if self.folder is None:
            return self
        digest = hashlib.blake2b(f"{step} {program.fingerprint()} {seed}".encode(), digest_size=8)
        for sample in samples:
            for name in sorted(sample):
                digest.update(name.encode() + sample[name].numpy().tobytes())
        return Journal(self.folder, f"{step.partition('{')[0]}-{digest.hexdigest()}")

    def has(self, node: fx.Node) -> bool:
        """Whether the segment of a node is written down."""
        return self.folder is not None and self._page(node.meta["segment"]).is_file()

    def get(self, segment: int) -> dict[str, QTensor] | None:
        """The tensors of a segment by name; None if it is not written down."""
        if self.folder is None or not self._page(segment).is_file():
            return None
        with safe_open(self._page(segment), "pt") as page:
            specs: dict[str, str] = json.loads(page.metadata()["specs"])  # one text: metadata has no order
            parts: dict[str, dict[int, Tensor]] = {name: {} for name in specs}
            for key in page.keys():  # noqa: SIM118
                name, _, place = key.rpartition("::")
                parts[name][int(place)] = page.get_tensor(key)
        return {
            name: QTensor.from_parts([parts[name][i] for i in range(len(parts[name]))], spec)
            for name, spec in specs.items()
        }

    def put(self, segment: int, tensors: Mapping[str, QTensor]) -> None:
        """Write a segment down; a crash leaves the whole page or none."""
        if self.folder is None or not tensors:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = {
            f"{name}::{i}": part.contiguous()
            for name, q in tensors.items()
            for i, part in enumerate(q.parts().values())
        }
        fresh = self._page(segment).with_suffix(f".{os.getpid()}")
        save_file(parts, fresh, metadata={"specs": json.dumps({name: q.spec() for name, q in tensors.items()})})
        fresh.replace(self._page(segment))

    def _page(self, segment: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.prefix}-{segment:04d}.safetensors"
