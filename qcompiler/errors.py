"""Errors and refusals: every one says what was asked, what was found and what to do."""

import difflib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class No:
    """A refusal with its reason; falsy, so that `if not answer` reads naturally.

    `where` names the node, tensor or component that was refused.

    >>> answer = No("k=40 is not a multiple of 32", where="layers.0.down_proj")
    >>> bool(answer), str(answer)
    (False, 'layers.0.down_proj: k=40 is not a multiple of 32')
    """

    reason: str
    where: str = ""

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" if self.where else self.reason

    def at(self, where: str) -> "No":
        """The same refusal, naming the place it is about.

        >>> str(No("not a multiple of 32").at("lm_head"))
        'lm_head: not a multiple of 32'
        """
        return No(self.reason, where)


class QCompilerError(Exception):
    """Any error that is the user's to read: one or two sentences, no traceback needed."""


class InputError(QCompilerError):
    """A file, a folder, a text or an option that cannot be used as given."""


class RecipeError(QCompilerError):
    """An unknown recipe, pass or option, or an option whose value makes no sense."""


class CaptureError(QCompilerError):
    """A model that could not be captured, or whose capture does not reproduce the model."""


class PassError(QCompilerError):
    """A pass that failed; names the pass and the node, and the program is as it was before."""


class ContractError(QCompilerError):
    """A pass that did something else than it promised."""


class BackendError(QCompilerError):
    """A backend that cannot run the program, or is not available here."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the nearest known one, and the list.

    >>> nearest("gtpq", ["rtn", "gptq"])
    'did you mean "gptq"? Known: gptq, rtn'
    >>> nearest("zzz", ["rtn"])
    'known: rtn'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    listed = ", ".join(names) if names else "none"
    return f'did you mean "{close[0]}"? Known: {listed}' if close else f"known: {listed}"


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module, or say which extra brings it.

    >>> require("json", "onnx").__name__
    'json'
    >>> require("no_such_module", "onnx")
    Traceback (most recent call last):
    ...
    qcompiler.errors.InputError: this needs the Python package "no_such_module", which is not installed; \
install it with: pip install "qcompiler[onnx]"
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(
            f'this needs the Python package "{package}", which is not installed; '
            f'install it with: pip install "qcompiler[{extra}]"'
        ) from error
