"""Rounded activations: their grids, their codes, and integer arithmetic over them.

An activation [..., channels] is rounded along its last axis. Its scheme's granularity says which values share a scale:
`token` one a token, `group` (`g32`) one for each group of neighbouring channels, `channel` one a channel, `tensor` one
for all. `dynamic` grids are computed from the values at hand, each token's from that token alone; static grids were
measured beforehand and are given as tensors.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from qcompiler.errors import RecipeError
from qcompiler.scheme import QTensor, Scheme, range_grid

# The 16 quantiles of a normal distribution: QLoRA (arXiv 2305.14314), appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

E4M3 = torch.float8_e4m3fn  # 8 bits, of which 4 for an exponent and 3 for a mantissa: Micikevicius et al., 2209.05433
LARGEST = 448.0  # of its values


@functools.lru_cache(maxsize=256)
def activation_scheme(text: str) -> Scheme:
    """The scheme of an activation; RecipeError where it makes no sense for one.

    >>> str(activation_scheme("int8:token:asym:dynamic"))
    'int8:token:asym:dynamic'
    """
    scheme = Scheme.parse(text)
    if (scheme.code, scheme.bits) not in (("fp", 8), ("nf", 4)) and scheme.code != "int":
        raise RecipeError(f'scheme "{text}": activations are rounded to int2 to int8, fp8 or nf4')
    if scheme.code == "fp" and not (scheme.dynamic and scheme.symmetric):
        raise RecipeError(f'scheme "{text}": fp8 scales by the largest magnitude; write fp8:token:dynamic')
    if scheme.code == "nf" and not (scheme.dynamic and scheme.symmetric):
        raise RecipeError(f'scheme "{text}": nf4 scales by the largest magnitude; write nf4:token:dynamic')
    if scheme.dynamic and scheme.granularity in ("tensor", "channel"):
        raise RecipeError(
            f'scheme "{text}": one dynamic scale over all tokens would make a token depend on its neighbours; '
            "write int8:token:dynamic, a group size, or leave out dynamic"
        )
    if scheme.granularity == "token" and not scheme.dynamic:
        raise RecipeError(f'scheme "{text}": a scale for each token can only be dynamic; write {text}:dynamic')
    return scheme


def group_size(scheme: Scheme, channels: int) -> int:
    """How many neighbouring channels share a scale."""
    return 1 if scheme.granularity == "channel" else scheme.group_of(channels)


def grouped(x: Tensor, size: int) -> Tensor:
    """x [..., channels] as [..., groups, size]; a short last group is filled up with zeros."""
    missing = -x.shape[-1] % size
    padded = torch.nn.functional.pad(x, (0, missing)) if missing else x
    return padded.reshape(*x.shape[:-1], padded.shape[-1] // size, size)


def codes_of(x: Tensor, grid: Sequence[Tensor], scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of x [..., channels] as whole numbers in float32 [..., groups, group], and their scale and zero point.

    The codes of fp8 are the numbers of e4m3 themselves, and their zero point is zero.

    `grid` is (scale, zero) or (scale,) of a static scheme, float32 [..., groups], and empty for a dynamic one.
    Scale and zero broadcast against the codes: value = scale * (code - zero).
    """
    values = grouped(x.float(), group_size(scheme, x.shape[-1]))
    if scheme.code == "fp":
        scale = float8_scale(values)
        return (values / scale).to(E4M3).float(), scale, torch.zeros((), device=x.device)
    scale, zero = _spread(grid) if grid else _dynamic_grid(values, scheme)
    middle = zero if zero is not None else torch.tensor(float(scheme.levels >> 1), device=x.device)
    codes = torch.round(values / scale).add_(middle).clamp_(0, scheme.levels - 1)
    return codes, scale, middle


def float8_scale(values: Tensor) -> Tensor:
    """The scale [..., 1], float32, by which the largest magnitude of values [..., group] is the largest of e4m3."""
    scale = values.abs().amax(-1, keepdim=True).float() / LARGEST
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def float8_weight(weight: Tensor, scheme: Scheme) -> QTensor:
    """A weight [n, k] rounded to the nearest numbers of e4m3, scaled by the largest magnitude of each row or group.

    A code is the number's own byte, the codebook what all 256 stand for (the two that are no numbers: zero).

    >>> weight = float8_weight(torch.tensor([[1.0, 7.0, -14.0]]), Scheme.parse("fp8:channel"))
    >>> weight.dequantize()
    tensor([[  1.,   7., -14.]])
    """
    by_row = scheme.symmetric and scheme.granularity in ("channel", "group")
    if (scheme.code, scheme.bits) != ("fp", 8) or not by_row:
        raise RecipeError(f'scheme "{scheme}": floats are stored as fp8:channel or fp8:g<size>')
    groups = grouped(weight.detach().float(), scheme.group_of(weight.shape[1]))
    scale = float8_scale(groups)
    codes = (groups / scale).to(E4M3).view(torch.uint8).flatten(1)[:, : weight.shape[1]].contiguous()
    book = torch.arange(256, dtype=torch.uint8).view(E4M3).float().nan_to_num(0.0).to(weight.device)
    return QTensor(scheme, tuple(weight.shape), codes, scale[..., 0], codebook=book, dtype=weight.dtype)


def _spread(grid: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    scale, *zero = (part.float().unsqueeze(-1) for part in grid)
    return scale, zero[0] if zero else None


def _dynamic_grid(values: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    scale, zero = grid_of(*values.aminmax(dim=-1, keepdim=True), scheme)
    return scale, zero.float() if zero is not None else None


def grid_of(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scale (float32) and zero point (uint8; None if symmetric) of the grid that covers [low, high] and zero.

    Asymmetric grids use all codes. Symmetric ones leave out the lowest, so that both ends of the range are codes:
    with it the ends lie halfway between two, and the last bit of a float decides which.
    """
    if not scheme.symmetric:
        return range_grid(low, high, scheme, torch.float32)
    scale = torch.maximum(low.abs(), high.abs()).float() / ((scheme.levels >> 1) - 1)
    return torch.where(scale > 0, scale, torch.ones_like(scale)), None


def fake_quantize(x: Tensor, grid: Sequence[Tensor], *, scheme: str) -> Tensor:
    """x [..., channels] rounded to the grid of `scheme` and back: the values that its codes stand for, in x's dtype.

    Its derivative is the straight-through estimate, that of x itself (Bengio et al., arXiv 1308.3432).

    >>> fake_quantize(torch.tensor([[0.0, 0.26, 1.0]]), [], scheme="int2:token:asym:dynamic")
    tensor([[0.0000, 0.3333, 1.0000]])
    """
    return straight_through(x, _rounded(x.detach(), grid, activation_scheme(scheme)))


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the derivative of x."""
    return x + (rounded - x).detach() if x.requires_grad else rounded


def _rounded(x: Tensor, grid: Sequence[Tensor], scheme: Scheme) -> Tensor:
    if scheme.code == "nf":
        return _nearest_quantile(x, scheme)
    codes, scale, zero = codes_of(x, grid, scheme)
    return codes.sub_(zero).mul_(scale).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def _nearest_quantile(x: Tensor, scheme: Scheme) -> Tensor:
    values = grouped(x.float(), group_size(scheme, x.shape[-1]))
    scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    book = torch.tensor(NF4, device=x.device)
    nearest = torch.bucketize(values / scale, (book[1:] + book[:-1]) / 2)
    return (book[nearest] * scale).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def integer_linear(
    x: Tensor,
    parts: Sequence[Tensor],
    grid: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    spec: str,
    scheme: str,
) -> Tensor:
    """A linear layer in integers: x [..., k], rounded by `scheme`, times quantized weight [n, k], plus bias [n].

    Over each run of columns that share a scale in both operands the products of (code - zero) are added up in
    integers; each such sum is multiplied by float32 (scale of x * scale of the weight) and added to a float32 total,
    runs in ascending order. Returns float32 [..., n] in x's dtype. A kernel that does the same gives the same bits;
    the zero points' share, sum(code) * zero, it may of course compute beforehand. Of fp8 the products are of floats of
    8 bits, and the sums of a run exact: a kernel's are as near as its tensor cores add up.
    """
    weight, kind = QTensor.from_parts(parts, spec), activation_scheme(scheme)
    codes, scale, zero = codes_of(x, grid, kind)
    size = group_size(kind, x.shape[-1])
    whole = (codes - zero).flatten(-2)[..., : x.shape[-1]].double()  # sums of products are exact up to 2^53
    steps, factors = _weight_steps(weight)
    run = run_length(weight.scheme, kind, x.shape[-1])
    total = torch.zeros(*x.shape[:-1], weight.shape[0], device=x.device)
    for start in range(0, x.shape[-1], run):
        stop = min(start + run, x.shape[-1])
        sums = whole[..., start:stop] @ steps[:, start:stop].T
        mine = scale[..., start // size if scale.shape[-2] > 1 else 0, :]
        total += sums.float() * (mine * factors[:, start // weight.scheme.group_of(x.shape[-1])])
    return (total if bias is None else total + bias).to(x.dtype)


def run_length(weight: Scheme, activation: Scheme, columns: int) -> int:
    """How many neighbouring columns share one scale in both operands; 0 if their groups do not nest."""
    first, second = sorted((weight.group_of(columns), group_size(activation, columns)))
    return first if second % first == 0 or second >= columns else 0


def _weight_steps(weight: QTensor) -> tuple[Tensor, Tensor]:
    """code - zero, or what the codes stand for, float64 [n, k], and the scales, float32 [n, groups]."""
    assert isinstance(weight.scale, Tensor)
    groups = weight.scheme.groups(weight.columns)
    scale = weight.scale.float().expand(weight.rows, groups)
    if weight.codebook is not None:
        return weight.codebook[weight.unpacked().long()].double(), scale
    middle = torch.full_like(scale, weight.scheme.levels >> 1) if weight.zero is None else weight.zero.float()
    spread = middle.expand(weight.rows, groups)[:, weight.group_index()]
    return (weight.unpacked().float() - spread).double(), scale
