"""Cost: what a launch moves and computes, and the time that takes at best on a device."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What a GPU can do: bytes and floating-point operations a second, and the shortest time of a launch."""

    bandwidth: float
    flops: float
    launch: float = 2e-6


H200 = Device(4.3e12, 790e12)


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
        return device.launch + max(self.moved / device.bandwidth, self.operations / device.flops)
