"""A GGUF file quantized to another mixture of types, with an importance matrix measured on the way; for llama.cpp.

    python examples/quantize_gguf.py IN.gguf OUT.gguf TEXT_FILE [TYPE]

IN is best an F16 or F32 file, TYPE is q4_k_m, q3_k_l, q2_k, ... (docs/formats.md). The matrix is left beside OUT, for
llama.cpp's own tools.
"""

import sys
from collections import Counter
from pathlib import Path

import qcompiler
from qcompiler import data
from qcompiler.compiler import tokenizer_of
from qcompiler.data import Calibration
from qcompiler.formats import gguf_write
from qcompiler.passes.kquant import measured
from qcompiler.pipeline import Context, Runner
from qcompiler.recipe import Recipe

source, out, text = sys.argv[1:4]
kind = sys.argv[4] if len(sys.argv) > 4 else "q4_k_m"
matrix = str(Path(out).with_suffix(".imatrix.gguf"))

program = qcompiler.capture(source)
runner = Runner(Context(), data.check_samples(program))
runner.run(program, Recipe.parse("canonicalize").passes)
samples = data.load(Calibration(text, samples=16, length=128), program, tokenizer_of(program))
measured(program, samples, text).write(matrix)
runner.run(program, Recipe.parse(f"kquant{{type={kind} imatrix={matrix}}}").passes)
types = Counter(gguf_write.write(program, out).values())
print(f"{Path(out).stat().st_size} bytes: " + ", ".join(f"{count} tensors of {kind}" for kind, count in types.items()))
