"""Progress: bars on a terminal, otherwise a plain line every few seconds; always on stderr."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

QUIET_SECONDS = 5.0


class Reporter:
    """Shows how far something is: `with Reporter() as progress: progress("calibrating", 3, 30)`.

    Things whose names share their first word take turns on one bar, as "pass rtn" and "pass pack" do.

    >>> import io
    >>> file = io.StringIO()
    >>> with Reporter(file) as progress:
    ...     for done in range(1000):
    ...         progress("counting", done, 1000)
    >>> print(file.getvalue(), end="")
    counting: 0 of 1000
    """

    def __init__(self, file: TextIO | None = None) -> None:
        console = Console(file=file or sys.stderr, highlight=False)
        self._view: _Bars | _Lines = _Bars(console) if console.is_terminal else _Lines(console)

    def __enter__(self) -> Self:
        self._view.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._view.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Say that `done` of `total` parts of `what` are done; a total of 0 means unknown."""
        self._view.update(what, done, total)


class _Bars:
    """One rich bar for each kind of work; it goes when that is done, or, having no end, when other work comes."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._endless = ""

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def update(self, what: str, done: int, total: int) -> None:
        kind = what.split(" ", 1)[0]
        if kind != self._endless:
            self._drop(self._endless)
        if total and done >= total:
            self._drop(kind)
            return
        if kind not in self._tasks:
            self._tasks[kind] = self._progress.add_task(what)
        self._endless = self._endless if total else kind
        self._progress.update(self._tasks[kind], description=what, completed=done, total=total or None)

    def _drop(self, kind: str) -> None:
        if kind in self._tasks:
            self._progress.remove_task(self._tasks.pop(kind))


class _Lines:
    """A line for the first news of each thing, then one at most every few seconds over all of them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._seen: set[str] = set()
        self._last = 0.0

    def start(self) -> None:
        """Nothing to set up."""

    def stop(self) -> None:
        """Nothing to clear away."""

    def update(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what in self._seen and now - self._last < QUIET_SECONDS:
            return
        self._seen.add(what)
        self._last = now
        count = f": {done} of {total}" if total else ""
        self._console.print(f"{what}{count}", markup=False, soft_wrap=True)
