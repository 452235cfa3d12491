"""GGUF's block types and QTensors: which type a record is, and what is written for one that is none exactly."""

import torch
from torch import Tensor

from qcompiler.bits import pack_bits
from qcompiler.errors import No
from qcompiler.formats import gguf_blocks, k_quants
from qcompiler.formats.gguf_blocks import Kind
from qcompiler.scheme import QTensor

KINDS: dict[str, Kind] = {kind.name: kind for kind in (*gguf_blocks.KINDS, *k_quants.KINDS)}
SIGNED = ("Q4_0", "Q5_0", "Q8_0")  # scale * (code - half the codes), a float16 scale for 32 neighbours


def decode(kind: str, data: Tensor, shape: tuple[int, ...]) -> QTensor:
    """The record of a matrix of `shape` stored as `kind`, from the bytes of its blocks, uint8, row by row."""
    of = KINDS[kind]
    return of.decode(data.reshape(shape[0], shape[1] // of.block, of.nbytes), shape)


def encode(record: QTensor) -> tuple[str, Tensor] | No:
    """The type that holds exactly what a record stands for, and its blocks, uint8 [rows, bytes].

    A record in one of GGUF's own forms keeps its codes. One with integer codes around a zero point, and groups of a
    multiple of 32, keeps its steps: as Q4_0, Q5_0 or Q8_0, whichever is the smallest that counts as far.

    >>> from qcompiler.scheme import Scheme
    >>> kind, blocks = encode(QTensor.quantize(torch.randn(2, 256), Scheme.parse("int4:g128:sym")))
    >>> kind, tuple(blocks.shape)
    ('Q4_0', (2, 144))
    """
    form = in_form(record)
    if isinstance(form, No):
        return form
    kind = str(kind_of(form))
    blocks = KINDS[kind].encode(form)
    return blocks if isinstance(blocks, No) else (kind, blocks.flatten(1))


def in_form(record: QTensor) -> QTensor | No:
    """The record itself, if one of GGUF's types has its form, or the same values in such a form."""
    return record if kind_of(record) else recounted(record)


def kind_of(record: QTensor) -> str | No:
    """The type whose form a record has."""
    found = next((name for name, kind in KINDS.items() if kind.holds(record)), None)
    return found or No(f"none of GGUF's types stores {record.scheme} in these parts")


def recounted(record: QTensor) -> QTensor | No:
    """The same values in the form of Q4_0, Q5_0 or Q8_0: steps from the zero point, groups of 32."""
    if len(record.shape) != 2 or record.axis not in (-1, 1) or record.scheme.code != "int":
        return No("only matrices of integer codes, their groups in rows, have a form that GGUF holds")
    parts = (record.minimum, record.codebook, record.boundaries, record.permutation)
    if any(part is not None for part in parts) or not isinstance(record.scale, Tensor):
        return No(f"none of GGUF's types stores {record.scheme} in these parts")
    rows, columns = record.shape
    group = record.scheme.group_of(columns)
    if group % 32 or columns % 32:
        return No(f"groups of {group} in rows of {columns} values are not whole blocks of 32")
    index = torch.arange(columns // 32) * 32 // group
    scale = record.scale.expand(rows, record.scheme.groups(columns))[:, index]
    steps = record.unpacked().to(torch.int16).unflatten(1, (-1, 32))
    middle = torch.tensor(record.scheme.levels >> 1) if record.zero is None else record.zero
    steps = steps - middle.to(torch.int16).expand(rows, record.scheme.groups(columns))[:, index, None]
    low, high = int(steps.min()), int(steps.max())
    for name in SIGNED:
        scheme = KINDS[name].scheme
        middle_code = scheme.levels >> 1
        if -middle_code <= low and high < middle_code:
            codes = (steps + middle_code).to(torch.uint8).flatten(1)
            return QTensor(scheme, record.shape, pack_bits(codes, scheme.bits), scale, dtype=record.dtype)
    return No(f"its codes reach {low} to {high} steps from zero, Q8_0 has -128 to 127")
