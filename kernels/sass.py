"""Compile a kernel for a GPU that is not there, and read in the machine code what it will cost.

A weight of 4 bits leaves a Hopper GPU time for about four instructions before its memory waits for its arithmetic.
How many there are is known without running anything: they stand in the kernel's main loop. `compile_and_read` counts
them, and the registers, the bytes spilled and shared, the tensor cores' instructions and the conversions from integers.

Compiling needs functions that Triton has not been told to interpret: use a process without TRITON_INTERPRET.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qcompiler.kernels.cost import Device

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

REGISTERS = 65536  # of a processor, on all GPUs from the A100 to the B200
TENSOR_CORES = re.compile(r"HMMA|HGMMA|IMMA|IGMMA|QGMMA|UTC\w*MMA")
CONVERSION = re.compile(r"I2FP?$|I2F\b")


@dataclass(frozen=True)
class Build:
    """A kernel and all that a launch of it would fix.

    `arguments` gives the type of each run-time argument ("*fp16", "i32"), the others are in `constants`. A pass through
    the main loop, or without one the program, handles `handled` weights (or cached numbers), and may take `budget`
    instructions for each, counting those of all threads; 0 is no limit.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    handled: int
    budget: float = 0.0
    warps: int = 4
    stages: int = 4
    fusion: bool = True  # of products and sums into one operation
    registers: int | None = None  # at most, of a thread; None leaves it to ptxas


@dataclass(frozen=True)
class Reading:
    """What the machine code of a build says."""

    registers: int
    spills: int
    shared_bytes: int
    loop: int
    instructions_per_weight: float
    tensor_cores: int
    conversions: int

    def faults(self, build: Build, device: Device) -> list[str]:
        """What a gate stops: spills, too much shared memory, too many instructions, conversions, idle tensor cores.

        Those of few tokens have a budget, and must leave room on a processor for a second program.
        """
        found = []
        if self.spills:
            found.append(f"{self.spills} bytes of registers spilled")
        if self.shared_bytes > device.shared:
            found.append(f"{self.shared_bytes} bytes of shared memory, of {device.shared}")
        elif build.budget and 2 * self.shared_bytes > device.shared:
            found.append(f"{self.shared_bytes} bytes of shared memory leave no room for a second program")
        if build.budget and 2 * self.registers * 32 * build.warps > REGISTERS:
            found.append(f"{self.registers} registers leave no room for a second program")
        if build.budget and self.instructions_per_weight > build.budget:
            found.append(f"{self.instructions_per_weight} instructions per weight, more than {build.budget}")
        if build.budget and not self.tensor_cores:
            found.append("no tensor core instruction in the loop")
        if build.budget and self.conversions:
            found.append(f"{self.conversions} conversions from integers in the loop")
        return found


def compile_and_read(build: Build, device: Device) -> Reading:
    """Compile for a GPU, and read the code: it takes seconds, and no GPU."""
    names = build.kernel.arg_names
    source = ASTSource(
        fn=build.kernel,
        signature={name: build.arguments.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in build.constants.items()},
        # What a launch would find out: PyTorch's tensors begin at multiples of 16 bytes.
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in build.arguments.items()
            if kind.startswith("*")
        },
    )
    options = {"num_warps": build.warps, "num_stages": build.stages, "enable_fp_fusion": build.fusion}
    options |= {"maxnreg": build.registers} if build.registers else {}
    compiled = triton.compile(source, target=GPUTarget("cuda", device.capability, 32), options=options)
    usage, listing = _dump(compiled.asm["cubin"])
    loop = main_loop(listing)
    threads = 32 * build.warps
    counts = Counter(operation(line) for line in loop)
    return Reading(
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        spills=int(re.findall(r"STACK:(\d+)", usage)[0]),
        shared_bytes=compiled.metadata.shared,
        loop=len(loop),
        instructions_per_weight=round(len(loop) * threads / build.handled, 3),
        tensor_cores=sum(count for name, count in counts.items() if TENSOR_CORES.match(name)),
        conversions=sum(count for name, count in counts.items() if CONVERSION.match(name)),
    )


def _dump(cubin: bytes) -> tuple[str, str]:
    """Resource usage and disassembly, by the tools in Triton's wheel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        commands = (["cuobjdump", "--dump-resource-usage", str(path)], ["nvdisasm", "-c", str(path)])
        usage, listing = (
            subprocess.run([TOOLS / tool, *rest], capture_output=True, text=True, check=True).stdout
            for tool, *rest in commands
        )
    return usage, listing


def main_loop(listing: str) -> list[str]:
    """The instructions from the target to the source of the longest jump backwards; without one, all there are.

    A jump over the program's end is none: Blackwell's code waits for its tensor cores behind it, and comes back.

    >>> main_loop("/*0000*/ MOV R1, R2 ;\\n.L_x_1:\\n/*0010*/ IADD3 R1, R1, 1, RZ ;\\n/*0020*/ @P0 BRA `(.L_x_1) ;")
    ['IADD3 R1, R1, 1, RZ', '@P0 BRA `(.L_x_1)']
    """
    lines: list[str] = []
    labels: dict[str, int] = {}
    longest = range(0)
    for text in listing.splitlines():
        if label := re.match(r"\s*(\.L_[\w.]+):", text):
            labels[label[1]] = len(lines)
        elif line := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", text):
            lines.append(line[1])
            jump = re.search(r"\bBRA\b.*(\.L_[\w.]+)", line[1])
            span = range(labels.get(jump[1], len(lines)) if jump else len(lines), len(lines))
            if len(span) > len(longest) and not any(operation(lines[i]) == "EXIT" for i in span):
                longest = span
    return [lines[i] for i in longest] if len(longest) > 1 else lines  # a program ends in a jump to itself


def operation(line: str) -> str:
    """The operation of an instruction, without predicate and modifiers.

    >>> operation("@!UP0 HGMMA.64x8x16.F32 R24, R4, gdesc[UR4], R24")
    'HGMMA'
    """
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].partition(".")[0]
