"""Statistics that more than one pass asks for, each a fold over activations [tokens, channels]."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompiler.calibration import Statistic

BLOCK = 384  # rows of a Hessian computed at once


@dataclass(frozen=True)
class Hessian(Statistic):
    """The mean of x x' over tokens, float32 [channels, channels]: the curvature of the layer's squared error."""

    def start(self) -> tuple[int, Tensor | None]:
        return 0, None

    def step(self, state: tuple[int, Tensor | None], x: Tensor) -> tuple[int, Tensor]:
        count, mean = state
        x = x.float()
        total, channels = count + x.shape[0], x.shape[1]
        if mean is None:
            mean = torch.zeros(channels, channels)
        # A running mean: the sum over all tokens would lose the small entries. Only the upper triangle, by blocks.
        mean.mul_(count / total)
        for start in range(0, channels, BLOCK):
            stop = start + BLOCK
            mean[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:], alpha=1 / total)
        return total, mean

    def done(self, state: tuple[int, Tensor | None]) -> Tensor | None:
        mean = state[1]
        return mean if mean is None else mean.triu_().add_(mean.triu(1).T)


@dataclass(frozen=True)
class SumSquares(Statistic):
    """How many tokens there were, and the sum of each channel's squares over them: float64 [channels]."""

    def start(self) -> tuple[int, Tensor | None]:
        return 0, None

    def step(self, state: tuple[int, Tensor | None], x: Tensor) -> tuple[int, Tensor]:
        count, total = state
        new = x.double().square().sum(0)
        return count + x.shape[0], new if total is None else total + new


@dataclass(frozen=True)
class AbsMax(Statistic):
    """The largest magnitude of each channel, float32 [channels]."""

    def start(self) -> None:
        return None

    def step(self, state: Tensor | None, x: Tensor) -> Tensor:
        largest = x.float().abs().amax(0)
        return largest if state is None else torch.maximum(state, largest)


@dataclass(frozen=True)
class MinMax(Statistic):
    """The smallest and largest value of each channel, float32 [2, channels].

    With `momentum` m > 0 a moving average of those of each sample, m of the old and 1 - m of the new, as RPTQ's code
    does (arXiv 2304.01089): rare extremes count less.
    """

    momentum: float = 0.0
    heads: bool = False

    def start(self) -> None:
        return None

    def step(self, state: Tensor | None, x: Tensor) -> Tensor:
        x = x.float()
        new = torch.stack([x.amin(0), x.amax(0)])
        if state is None:
            return new
        if self.momentum:
            return state * self.momentum + new * (1 - self.momentum)
        return torch.stack([torch.minimum(state[0], new[0]), torch.maximum(state[1], new[1])])


@dataclass(frozen=True)
class Sampled(Statistic):
    """Evenly spaced rows, at most `rows` of them, float32 [rows, channels]: memory does not grow with the data."""

    rows: int = 2048
    heads: bool = False

    def start(self) -> tuple[int, int, Tensor | None]:
        return 1, 0, None

    def step(self, state: tuple[int, int, Tensor | None], x: Tensor) -> tuple[int, int, Tensor]:
        stride, seen, kept = state
        new = x[-seen % stride :: stride].float()
        kept = new if kept is None else torch.cat([kept, new])
        while len(kept) > self.rows:
            stride, kept = 2 * stride, kept[::2].contiguous()
        return stride, seen + x.shape[0], kept

    def done(self, state: tuple[int, int, Tensor | None]) -> Tensor | None:
        return state[2]


@dataclass(frozen=True)
class TokenPeaks(Statistic):
    """By how much the largest magnitude of any token exceeds the median token's.

    3 to 10 as a rule; hundreds where there are massive activations (Sun et al., arXiv 2402.17762), which no static
    range can serve together with the others. The median is of at most `rows` evenly spaced tokens.
    """

    rows: int = 4096
    heads: bool = False

    def start(self) -> tuple[Any, float]:
        return Sampled(self.rows).start(), 0.0

    def step(self, state: tuple[Any, float], x: Tensor) -> tuple[Any, float]:
        peaks = x.float().abs().amax(1, keepdim=True)
        return Sampled(self.rows).step(state[0], peaks), max(state[1], peaks.max().item())

    def done(self, state: tuple[Any, float]) -> float:
        peaks = state[0][2]
        return 0.0 if peaks is None else state[1] / max(peaks.median().item(), 1e-30)


@dataclass(frozen=True)
class Pair(Statistic):
    """Two statistics of the same value."""

    first: Statistic
    second: Statistic

    @property
    def heads(self) -> bool:  # type: ignore[override]
        return self.first.heads

    def start(self) -> tuple[Any, Any]:
        return self.first.start(), self.second.start()

    def step(self, state: tuple[Any, Any], x: Tensor) -> tuple[Any, Any]:
        return self.first.step(state[0], x), self.second.step(state[1], x)

    def done(self, state: tuple[Any, Any]) -> tuple[Any, Any]:
        return self.first.done(state[0]), self.second.done(state[1])


@dataclass(frozen=True)
class Along(Statistic):
    """Another statistic, of channels that are not the last axis: those of images [batch, channels, height, width]."""

    inner: Statistic
    axis: int = 1

    def start(self) -> Any:
        return self.inner.start()

    def step(self, state: Any, x: Tensor) -> Any:
        return self.inner.step(state, x)

    def done(self, state: Any) -> Any:
        return self.inner.done(state)
