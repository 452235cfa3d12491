"""Every benchmark that needs nothing but this package and a text; results go to results/*.json.

    make bench ARGS="--text valid.txt [--peer-python .peers/bin/python --peer-model Q4_0.gguf]"

The peers (llama.cpp, gptqmodel) live in an environment of their own: see peers/README.md.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Run quality, then speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file to measure perplexity on")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--peer-model", type=Path)
    parser.add_argument("--artifact", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    peer = ["--peer-python", str(options.peer_python)] if options.peer_python else []
    _run("benchmarks/quality.py", "--text", str(options.text), "--windows", str(options.windows), *peer)
    _run("-m", "qcompiler", "compile", "demo", "-r", "gptq-w4a16", "-o", str(options.artifact))
    model = ["--peer-model", str(options.peer_model)] if options.peer_model else []
    _run("benchmarks/speed.py", str(options.artifact), *(peer + model if model else []))


def _run(*command: str) -> None:
    print("$ python", *command, flush=True)
    subprocess.run([sys.executable, *command], check=True, cwd=HERE.parent)


if __name__ == "__main__":
    main()
