"""Clusters of channels with similar ranges, in sizes that a kernel's groups fit."""

import numpy as np
import torch
from torch import Tensor

from qcompiler.errors import No

ROUNDS = 10


def cluster(points: Tensor, clusters: int, group: int, seed: int = 0) -> Tensor | No:
    """The order, int64 [channels], that brings similar channels together; clusters are runs of whole groups.

    `points` [channels, features] are clustered by K-Means, the sizes rounded to multiples of `group`, and each channel
    given to the nearest cluster that has room: those that lose most by going elsewhere choose first. Clusters follow
    each other by their extent, and the channels of one by theirs, so that neighbours in a large cluster are alike too.
    """
    count = points.shape[0]
    if count < 2 * group or count % group:
        return No(f"{count} channels are not two or more groups of {group}")
    centers, sizes = _free(points.double().numpy(), min(clusters, count // group), seed)
    if group > 1:
        room = whole_groups(sizes, group)
        for _ in range(ROUNDS):
            distance = ((points.double().numpy()[:, None] - centers[None]) ** 2).sum(-1)
            labels = assign(distance, room)
            moved = np.stack([points.double().numpy()[labels == c].mean(0) for c in range(len(room))])
            if np.allclose(moved, centers):
                break
            centers = moved
    else:
        labels = ((points.double().numpy()[:, None] - centers[None]) ** 2).sum(-1).argmin(1)
    extent = points.double().abs().amax(1).numpy()
    rank = np.array([extent[labels == c].mean() if (labels == c).any() else 0.0 for c in range(len(centers))])
    return torch.from_numpy(np.lexsort((extent, rank[labels])).astype(np.int64))


def _free(points: np.ndarray, clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Centers and sizes of K-Means; as many clusters as there are distinct points, at most."""
    from sklearn.cluster import KMeans  # half a second to import, and only this pass wants it

    clusters = min(clusters, len(np.unique(points, axis=0)))
    found = KMeans(clusters, n_init=4, random_state=seed).fit(points)
    return found.cluster_centers_, np.bincount(found.labels_, minlength=clusters)


def whole_groups(sizes: np.ndarray, group: int) -> np.ndarray:
    """Sizes as near as can be that are multiples of `group`, one group at least, with the same sum.

    >>> whole_groups(np.array([1, 30, 33]), 16).tolist()
    [16, 16, 32]
    """
    total = sizes.sum() // group
    wanted = sizes / group
    given = np.maximum(np.floor(wanted), 1)
    while given.sum() > total:
        given[np.where(given > 1, given - wanted, -np.inf).argmax()] -= 1
    while given.sum() < total:
        given[(wanted - given).argmax()] += 1
    return (given * group).astype(int)


def assign(distance: np.ndarray, room: np.ndarray) -> np.ndarray:
    """A cluster for each channel, given `distance` [channels, clusters] and how many each cluster takes."""
    left, labels = room.copy(), np.full(len(distance), -1)
    cost = distance.copy()
    while (waiting := np.flatnonzero(labels < 0)).size:
        cost[:, left == 0] = np.inf
        here = cost[waiting]
        best = here.argmin(1)
        if here.shape[1] > 1:
            two = np.partition(here, 1, axis=1)
            regret = np.where(np.isfinite(two[:, 1]), two[:, 1] - two[:, 0], np.inf)
        else:
            regret = np.zeros(len(here))
        # All choose until a cluster is full; then the others' second choices are counted anew.
        for i in np.argsort(-regret, kind="stable"):
            if left[best[i]] == 0:
                break
            labels[waiting[i]] = best[i]
            left[best[i]] -= 1
    return labels
