"""`python -m qcompiler` and the command `qcompiler`: runs the command line; errors are one sentence on stderr."""

import os
import sys
from collections.abc import Sequence

from qcompiler.cli import app
from qcompiler.errors import QCompilerError

USAGE, BUG, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for what the user can mend, 1 for a bug, 130 for Ctrl-C.

    Tracebacks are shown only with `--debug`, anywhere on the line, or `QCOMPILER_DEBUG=1`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Other libraries' bars and advice would run through our own; these are read when they are imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # PyTorch then asks for memory in large pages: a calibration sweep takes a quarter less time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    debug = "--debug" in given or os.environ.get("QCOMPILER_DEBUG") == "1"
    try:
        app([argument for argument in given if argument != "--debug"], prog_name="qcompiler")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        return _say(error)
    return 0


def _say(error: Exception) -> int:
    """Print an error as one sentence; returns the exit status."""
    if isinstance(error, QCompilerError | OSError | MemoryError):
        sys.stderr.write(f"error: {_one_line(error) or 'not enough memory'}\n")
        return USAGE
    sys.stderr.write(
        f"error: something unforeseen went wrong ({type(error).__name__}: {_one_line(error)}); "
        "run it again with --debug to see where, and please report it\n"
    )
    return BUG


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
