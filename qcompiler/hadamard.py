"""Hadamard matrices: entries 1 and -1, rows orthogonal, H H' = n I.

Orders are m 2^k: Paley's constructions give m (12, 20, 28, 36, ...) where a prime fits, Sylvester's doubles it.
"""

import functools
import math

import torch
from torch import Tensor


def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix, float64 [order, order]; None where neither construction gives one.

    >>> hadamard(2)
    tensor([[ 1.,  1.],
            [ 1., -1.]], dtype=torch.float64)
    >>> hadamard(6) is None
    True
    """
    base = base_order(order)
    return None if base is None else torch.kron(paley(base), sylvester(order // base))


def random_rotation(order: int, random: torch.Generator) -> Tensor:
    """An orthogonal matrix, float64 [order, order], that spreads each channel over all.

    It is a Hadamard matrix over columns of random sign, or, where there is none of that order, a random one: the Q of
    a normal matrix, columns of random sign, which is uniform over all orthogonal matrices.
    """
    found = hadamard(order)
    if found is None:
        found, upper = torch.linalg.qr(torch.randn(order, order, generator=random, dtype=torch.float64))
        return torch.mul(found, upper.diagonal().sign())
    signs = torch.randint(0, 2, (order,), generator=random).double() * 2 - 1
    return torch.mul(found, signs / math.sqrt(order))


def transform(x: Tensor, size: int) -> Tensor:
    """Multiply each block of `size` channels of x [..., channels] by the Hadamard matrix of that order / sqrt(size).

    The power of two in `size` takes additions only, size log size of them. Half precision is added up in float32.
    """
    base = base_order(size)
    assert base is not None, size
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = paley(base).to(wide) @ wide.unflatten(-1, (-1, base, size // base))
    width = 1
    while width < size // base:  # Sylvester: [[H, H], [H, -H]]
        a, b = y.unflatten(-1, (-1, 2, width)).unbind(-2)
        y = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        width *= 2
    return torch.div(y.flatten(-3), math.sqrt(size)).to(x.dtype)


@functools.lru_cache(maxsize=256)
def base_order(order: int) -> int | None:
    """The least m of an order m 2^k whose matrix is known (1 for a power of two); None if there is none."""
    base = order & -order  # the power of two in it
    if base == order:
        return 1
    odd = order // base
    return next((odd * 2**k for k in range(2, base.bit_length()) if _paley_prime(odd * 2**k)), None)


def sylvester(order: int) -> Tensor:
    """The Hadamard matrix of a power of two, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


@functools.lru_cache(maxsize=64)
def paley(order: int) -> Tensor:
    """The Hadamard matrix of order q + 1 (q = 3 mod 4) or 2 (q + 1) (q = 1 mod 4) for a prime q, float64; [[1]] for 1.

    Source: Paley, On orthogonal matrices (1933).
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    q = _paley_prime(order)
    i = torch.arange(q)
    squares = torch.full((q,), -1.0, dtype=torch.float64)
    squares[i * i % q] = 1.0
    squares[0] = 0.0
    core = torch.ones(q + 1, q + 1, dtype=torch.float64)
    core[0, 0] = 0.0
    core[1:, 1:] = squares[(i[:, None] - i) % q]
    if q % 4 == 3:
        core[1:, 0] = -1.0
        return core + torch.eye(q + 1, dtype=torch.float64)
    spread = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    turned = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, spread) + torch.kron(torch.eye(q + 1, dtype=torch.float64), turned)


def _paley_prime(order: int) -> int:
    """The prime that gives a Hadamard matrix of this order, a multiple of 4; 0 if none does."""
    first, second = order - 1, order // 2 - 1
    if _prime(first):
        return first
    return second if second % 4 == 1 and _prime(second) else 0


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
