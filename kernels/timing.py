"""Times on a GPU: launches captured in a CUDA graph, over so many copies of a weight that no cache holds them."""

import statistics
from collections.abc import Callable, Sequence

import torch

Launch = Callable[[], object]
COLD = 300_000_000  # bytes that no cache holds


def seconds(launches: Sequence[Launch], rounds: int = 7) -> float:
    """The median time of one launch: all are captured in one CUDA graph, which is replayed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches[:2]:
            launch()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for launch in launches:
            launch()
    found = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / len(launches))
    return float(statistics.median(found[1:]))


def copies_of(nbytes: int) -> int:
    """How many copies of so many bytes are more than any cache holds; at least a few, so that a graph has some work.

    >>> copies_of(8_000_000), copies_of(1_000_000_000)
    (38, 4)
    """
    return max(4, -(-COLD // nbytes))
