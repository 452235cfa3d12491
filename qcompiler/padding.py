"""Batches padded on the left, for attention that counts a row's positions from its first column: moved to the front.

Padding goes behind the real tokens, and what comes out moves back. Rotary attention sees differences of positions only:
the function is the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler.errors import BackendError


@dataclass(frozen=True)
class Shift:
    """By how many columns each row of a batch moves, int64 [batch]."""

    pads: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> "Shift":
        """The padding in front of each row of mask [batch, total]; BackendError for zeros anywhere else."""
        real = mask != 0
        pads = real.long().argmax(1)
        if not bool(real.any(1).all()):
            raise BackendError("a row of the attention mask has no real token; leave such rows out")
        if not bool((real == (torch.arange(mask.shape[1]) >= pads[:, None])).all()):
            raise BackendError("the attention mask has zeros between or after real tokens; pad batches on the left")
        return cls(pads)

    def __bool__(self) -> bool:
        return bool(self.pads.any())

    def to_front(self, x: Tensor, axis: int = 1) -> Tensor:
        """x [batch, ...], its rows' entries along `axis` moved to the front, padding behind them."""
        return self._moved(x, axis, self.pads)

    def back(self, x: Tensor, axis: int = 1) -> Tensor:
        """What `to_front` is undone by.

        >>> shift = Shift(torch.tensor([0, 2]))
        >>> shift.to_front(torch.tensor([[1, 2, 3], [0, 0, 4]]))
        tensor([[1, 2, 3],
                [4, 0, 0]])
        >>> shift.back(_)
        tensor([[1, 2, 3],
                [0, 0, 4]])
        """
        return self._moved(x, axis, -self.pads)

    def _moved(self, x: Tensor, axis: int, by: Tensor) -> Tensor:
        size = x.shape[axis]
        if not size:
            return x
        index = (torch.arange(size) + by[:, None]) % size
        shape = [1] * x.dim()
        shape[0], shape[axis] = index.shape
        return x.gather(axis, index.view(shape).expand_as(x))
