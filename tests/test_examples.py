"""Each example runs as its first lines say, and prints what it promises."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    """What an example prints; it must end well and without a warning of ours."""
    command = (sys.executable, str(EXAMPLES / name), *arguments)
    done = subprocess.run(
        command, text=True, capture_output=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "qcompiler" not in done.stderr, done.stderr
    return done.stdout


def test_every_example_is_tested() -> None:
    tested = {"torch_compile.py", "huggingface_to_onnx.py", "own_calibration.py", "quantize_gguf.py"}
    tested |= {"plain_onnxruntime.py"}  # tests/test_travel.py
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_say_how_to_run_them(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source)) or ""
    assert f"python examples/{path.name}" in docstring
    code = source.split('"""', 2)[2]
    assert sum(bool(line.strip()) for line in code.splitlines()) < 40


def test_torch_compile() -> None:
    lines = run("torch_compile.py").splitlines()
    assert len(lines) == 6
    assert all(float(line.split()[-1].rstrip("%")) < 10 for line in lines)


def test_huggingface_to_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(tmp_path / "model")
    printed = run("huggingface_to_onnx.py", str(tmp_path / "model"), str(tmp_path / "out"))
    assert "5 of 5 linear layers quantized" in printed  # q, k and v are one, gate and up too
    assert "continued: tensor" in printed
    assert list((tmp_path / "out").rglob("*.onnx"))


def test_own_calibration() -> None:
    printed = run("own_calibration.py")
    assert printed.count("by gptq, outputs changed by") == 14
    assert "lm_head.weight: int8:g128:sym by rtn" in printed


def test_quantize_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
    from tests.test_gguf import write_model

    text = tmp_path / "text.txt"
    text.write_text("then in the end " * 400)
    source = write_model(tmp_path / "in.gguf")
    printed = run("quantize_gguf.py", str(source), str(tmp_path / "out.gguf"), str(text), "q5_0")
    assert "tensors of Q5_0" in printed
    assert (tmp_path / "out.imatrix.gguf").is_file()
