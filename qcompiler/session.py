"""Session: a compiled model, ready to run: logits, text, report, save."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from qcompiler import artifact
from qcompiler.errors import InputError
from qcompiler.program import Program
from qcompiler.report import Report
from qcompiler.sampling import choose
from qcompiler.target import Runner

OnToken = Callable[[int, str], None]


class Session:
    """A compiled model: call it for logits, `generate` for text, `save` it as a folder.

    `program` is what was compiled, `runner` what runs it, `report` what happened, `folder` where the backend's files
    are (a temporary folder until it is saved).
    """

    def __init__(
        self,
        program: Program,
        runner: Runner,
        report: Report,
        tokenizer: Any = None,
        files: "Path | tempfile.TemporaryDirectory[str] | None" = None,
        read_tokenizer: Callable[[], Any] | None = None,
    ) -> None:
        self.program = program
        self.runner = runner
        self.report = report
        self._tokenizer, self._read_tokenizer = tokenizer, read_tokenizer
        self._scratch = files  # a temporary folder lives as long as the session
        self.folder = Path(files.name) if isinstance(files, tempfile.TemporaryDirectory) else files

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None; a saved one is read when it is first wanted, which takes a second or two."""
        if self._read_tokenizer is not None:
            self._tokenizer, self._read_tokenizer = self._read_tokenizer(), None
        return self._tokenizer

    def __call__(self, input_ids: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """The first output (the logits [batch, sequence, vocabulary] of a language model) for the given inputs."""
        if input_ids is not None:
            inputs[self.program.inputs[0].name] = input_ids
        return self.runner(inputs)[self.program.outputs[0]]

    @overload
    def generate(
        self,
        prompt: str,
        max_new_tokens: int = ...,
        *,
        temperature: float = ...,
        seed: int = ...,
        on_token: OnToken | None = ...,
    ) -> str: ...
    @overload
    def generate(
        self, prompt: Tensor, max_new_tokens: int = ..., *, temperature: float = ..., seed: int = ...
    ) -> Tensor: ...
    @overload
    def generate(
        self, prompt: list[str], max_new_tokens: int = ..., *, temperature: float = ..., seed: int = ...
    ) -> list[str]: ...

    def generate(
        self,
        prompt: "str | Tensor | list[str]",
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        on_token: OnToken | None = None,
    ) -> "str | Tensor | list[str]":
        """Continue a prompt: text gives text (without the prompt), several texts a list, token ids [batch, n] ids.

        Several texts run as one batch where the backend takes padding. Greedy at temperature 0, sampled otherwise.
        Generation ends at the model's end token or after
        `max_new_tokens`. `on_token(id, text so far)` is called for each token of a text.
        Raises InputError for an empty prompt, or text without a tokenizer.
        """
        if isinstance(prompt, Tensor):
            return self._continue(prompt, max_new_tokens, temperature, seed)
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer; give token ids instead of text")
        if not isinstance(prompt, str):
            return self._batch(prompt, max_new_tokens, temperature, seed)
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        whole = self._continue(ids, max_new_tokens, temperature, seed, on_token)
        return self._text(whole[0, ids.shape[1] :])

    def _batch(self, prompts: list[str], limit: int, temperature: float, seed: int) -> list[str]:
        """Several texts at once, padded on the left; one by one where the runner takes no padding."""
        rows = [torch.tensor(ids, dtype=torch.int64) for ids in self.tokenizer(prompts)["input_ids"]] if prompts else []
        width = max(map(len, rows), default=0)
        if not self.runner.padding and any(len(row) != width for row in rows):
            return [self.generate(p, limit, temperature=temperature, seed=seed) for p in prompts]
        if not rows:
            return []
        if empty := [text for text, row in zip(prompts, rows, strict=True) if not len(row)]:
            raise InputError(f"the prompt {empty[0]!r} has no tokens; give a text to continue")
        ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
        mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
        whole = self._continue(ids, limit, temperature, seed, mask=mask)
        return [self._text(row) for row in whole[:, width:]]

    def _text(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _continue(
        self,
        ids: Tensor,
        limit: int,
        temperature: float,
        seed: int,
        on_token: OnToken | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        if ids.dim() != 2 or ids.shape[1] == 0:
            raise InputError(f"a prompt is token ids [batch, length >= 1], not {tuple(ids.shape)}")
        random = torch.Generator().manual_seed(seed)
        ends = torch.tensor(self.program.info.get("eos") or [], dtype=torch.int64)
        decoder = self.runner.decoder(ids.shape[0], ids.shape[1] + limit)
        whole, step = ids, ids
        ended = torch.zeros(ids.shape[0], dtype=torch.bool)
        for _ in range(limit):
            logits = decoder.step(step, mask)
            mask = None  # of the prompt
            step = choose(logits, temperature, random)
            step = torch.where(ended[:, None], whole[:, -1:], step)
            whole = torch.cat([whole, step], dim=1)
            ended |= torch.isin(step[:, 0], ends)
            if on_token:
                on_token(int(step[0, 0]), self._text(whole[0, ids.shape[1] :]))
            if bool(ended.all()):
                break
        return whole

    def save(self, folder: str | Path) -> None:
        """Write the artifact: the program, its tensors, the report, the tokenizer, and what the backend made."""
        artifact.save(
            Path(folder),
            self.program,
            self.report,
            recipe=self.report.recipe,
            backend=self.report.backend,
            files=self.folder,
            tokenizer=self.tokenizer,
        )
