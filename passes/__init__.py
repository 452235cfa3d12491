"""The built-in methods: one method, one file."""

if __name__ != "qcompiler.passes":
    raise ImportError("import qcompiler.passes, not passes")

from pathlib import Path

from qcompiler.passes.activations import Activations
from qcompiler.passes.awq import Awq, AwqClip
from qcompiler.passes.block_tune import BlockTune
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.carry import Carry
from qcompiler.passes.distill import Distill
from qcompiler.passes.dynamic8 import Dynamic8
from qcompiler.passes.equalize import Equalize
from qcompiler.passes.fp4 import Fp4
from qcompiler.passes.fuse import Fuse
from qcompiler.passes.gptq import Gptq
from qcompiler.passes.hqq import Hqq
from qcompiler.passes.integers import Integers
from qcompiler.passes.kquant import KQuant
from qcompiler.passes.kv import Kv
from qcompiler.passes.kv_cache import KvCache
from qcompiler.passes.nf4 import Nf4
from qcompiler.passes.pack import Pack
from qcompiler.passes.rotate import Rotate
from qcompiler.passes.rptq import Rptq
from qcompiler.passes.rtn import Rtn
from qcompiler.passes.smoothquant import SmoothQuant
from qcompiler.plugins import Plugin

PLUGIN = Plugin(
    passes=(
        Activations,
        Awq,
        AwqClip,
        BlockTune,
        Canonicalize,
        Carry,
        Distill,
        Dynamic8,
        Equalize,
        Fp4,
        Fuse,
        Gptq,
        Hqq,
        Integers,
        KQuant,
        Kv,
        KvCache,
        Nf4,
        Pack,
        Rotate,
        Rptq,
        Rtn,
        SmoothQuant,
    ),
    recipes=Path(__file__).parent / "recipes",
)
