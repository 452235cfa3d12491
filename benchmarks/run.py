"""Every benchmark that needs nothing but this package and a text; results go to results/*.json.

    make bench ARGS="--text valid.txt [--gptqmodel-python PYTHON] [--llama-python PYTHON --llama-model Q4_0.gguf]"

The peers (gptqmodel, llama.cpp) live in environments of their own: see peers/README.md.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RECIPES = ("gptq-w4a16", "gptq-w4a16-fast")


def main() -> None:
    """Run quality, speed, and the agreement of the backends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file to measure perplexity on")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--gptqmodel-python", type=Path)
    parser.add_argument("--llama-python", type=Path)
    parser.add_argument("--llama-model", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="where the compiled models go")
    options = parser.parse_args()
    peer = ["--peer-python", str(options.gptqmodel_python)] if options.gptqmodel_python else []
    _run("benchmarks/quality.py", "--text", str(options.text), "--windows", str(options.windows), *peer)
    folders = [str(options.out / recipe) for recipe in RECIPES]
    for recipe, folder in zip(RECIPES, folders, strict=True):
        _run("-m", "qcompiler", "compile", "demo", "-r", recipe, "-o", folder)
    ours = [f"{recipe}={folder}" for recipe, folder in zip(RECIPES, folders, strict=True)]
    llama = ["--llama", f"{options.llama_python}={options.llama_model}"] if options.llama_python else []
    _run("benchmarks/cpu.py", "--ours", *ours, "--text", str(options.text), *llama)
    _run("benchmarks/agreement.py", folders[0])


def _run(*command: str) -> None:
    print("$ python", *command, flush=True)
    subprocess.run([sys.executable, *command], check=True, cwd=HERE.parent)


if __name__ == "__main__":
    main()
