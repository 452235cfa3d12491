"""The backend `onnxruntime`: a program as one ONNX graph, run by ONNX Runtime's CPU kernels."""

import importlib.util
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from torch import fx

from qcompiler.errors import BackendError, No
from qcompiler.program import Program
from qcompiler.target import Answer, Backend, Runner

PACKAGES = ("onnx", "onnx_ir", "onnxruntime")


@dataclass(frozen=True)
class OnnxRuntime(Backend):
    """Lower programs to ONNX and run them in ONNX Runtime.

    `accuracy_level` is that of quantized matrix products: 4 rounds activations to 8 bits, a block at a time, and is
    the fastest; 0 keeps them float. `threads` (None: as many as PyTorch uses) work inside one operator.
    `padding` lowers attention in plain operators that take any padding mask, which is slower: wanted only where some
    attention is none of GroupQueryAttention's, whose batches may be padded on the left anyway. `max_positions` is the
    longest sequence that rotary tables are made for, where the model itself is not limited to less. `opset_only`
    writes operators of the ONNX standard alone, for other runtimes: slower here. With `top` k > 0 the graph has the
    outputs top_ids, int64 [batch, positions, k], the most likely tokens in order, and top_logits too: who binds these
    alone moves no logits out of it. `integer_prompt` writes a second form, prompt.0.onnx and following, that reads
    prompts in 8-bit integers: faster, a little less exact, and another copy of the weights, of 8 bits, on disk; of it
    a quarter at a time is in memory.
    """

    name: ClassVar[str] = "onnxruntime"
    accuracy_level: int = 4
    threads: int | None = None
    padding: bool = False
    max_positions: int = 8192
    opset_only: bool = False
    top: int = 0
    integer_prompt: bool = False

    def available(self) -> Answer:
        """True, or which package is missing."""
        missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
        if not missing:
            return True
        return No(f'needs the Python package "{missing[0]}"; install it with: pip install "qcompiler[onnx]"')

    def accepts(self, program: Program, node: fx.Node) -> Answer:
        """True if there is a rule that lowers `node`, or a No that says what it cannot express."""
        from qcompiler.backends.onnxruntime.rules import try_rule

        return try_rule(program, node)

    def lower(self, program: Program, folder: Path | None = None) -> Runner:
        """Write model.onnx and model.onnx.data to `folder` (or a temporary one) and open them.

        With a genai_config.json where onnxruntime-genai can run them too.
        """
        from qcompiler.backends.onnxruntime.genai import write_config
        from qcompiler.backends.onnxruntime.lowering import Options
        from qcompiler.backends.onnxruntime.names import PROMPT
        from qcompiler.backends.onnxruntime.prompt import cut, prompt_form, readable
        from qcompiler.backends.onnxruntime.rules import export
        from qcompiler.backends.onnxruntime.runner import OnnxRunner

        self._check()
        temporary = tempfile.TemporaryDirectory(prefix="qcompiler-") if folder is None else None
        place = Path(temporary.name) if temporary else folder
        assert place is not None
        place.mkdir(parents=True, exist_ok=True)
        limit = min(self.max_positions, program.info.get("max_positions") or self.max_positions)
        options = Options(self.accuracy_level, self.padding, limit, self.opset_only, self.top)
        about = export(program, place, options)
        answers = [readable(program, about)] if self.integer_prompt else []
        if self.integer_prompt and all(answers):
            for i, piece in enumerate(cut(prompt_form(program))):
                export(piece, place, replace(options, weights_given=True), PROMPT.format(i))
        runner = OnnxRunner(program, place, self.threads, temporary)
        answers += [write_config(program, place, runner.about, runner.inputs)] if program.caches else []
        runner.refusals = tuple(answer for answer in answers if isinstance(answer, No))
        return runner

    def load(self, program: Program, folder: Path) -> Runner:
        """Open the files that `lower` wrote to `folder`; they are written again if they are not there."""
        from qcompiler.backends.onnxruntime.names import MODEL
        from qcompiler.backends.onnxruntime.runner import OnnxRunner

        self._check()
        if not (folder / MODEL).exists():
            return self.lower(program, folder)
        return OnnxRunner(program, folder, self.threads)

    def _check(self) -> None:
        answer = self.available()
        if isinstance(answer, No):
            raise BackendError(f"backend {self.name} {answer}")
