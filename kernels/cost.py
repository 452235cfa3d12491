"""Device and Cost: what a GPU can do, what a launch moves and computes, and the least time that takes."""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Device:
    """A GPU: compute capability (90 is 9.0), processors, bytes of shared memory that a program may have; bytes and
    operations on the tensor cores a second as measured on large copies and bf16 products; the shortest launch."""

    capability: int
    processors: int
    shared: int
    bandwidth: float
    operations: float
    launch: float = 2e-6


A100 = Device(80, 108, 166912, 1.8e12, 280e12)
H200 = Device(90, 132, 232448, 4.3e12, 790e12)
B200 = Device(100, 148, 232448, 7.0e12, 1600e12)
DEVICES = (A100, H200, B200)


def device_of(x: Tensor) -> Device:
    """The GPU that x is on, or the one that kernels are laid out for if it is on none."""
    return device_at(x.get_device())


@functools.cache
def device_at(index: int) -> Device:
    """What is known of the nearest listed GPU, with this one's processors and shared memory; -1 is none."""
    if index < 0:
        return H200
    found = torch.cuda.get_device_properties(index)
    capability = 10 * found.major + found.minor
    listed = max((one for one in DEVICES if one.capability <= capability), key=lambda one: one.capability, default=A100)
    shared = getattr(found, "shared_memory_per_block_optin", listed.shared)
    return replace(listed, processors=found.multi_processor_count, shared=shared)


@dataclass(frozen=True)
class Cost:
    """Bytes moved to and from memory, and operations on the tensor cores.

    >>> round(Cost(moved=43_000_000, operations=0).seconds(H200) * 1e6)
    12
    """

    moved: int
    operations: int

    def seconds(self, device: Device) -> float:
        """The least time this can take: moving and computing overlap, starting does not."""
        return device.launch + max(self.moved / device.bandwidth, self.operations / device.operations)
