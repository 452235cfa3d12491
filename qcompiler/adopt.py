"""adopt: a program takes over the quantized weights of another one, made from the same model and saved.

That is how a recipe that needs data, run once by `qcompiler.compile`, comes into `torch.compile`.
"""

from qcompiler.errors import InputError, No
from qcompiler.formats.joined import members
from qcompiler.program import Program
from qcompiler.scheme import QTensor

FAR = 0.9  # of a weight's own size: two bits lose half, and what was rotated or reordered has nothing in common


def adopt(program: Program, source: Program) -> list[No]:
    """Quantize the linear layers and embeddings of `program` with the codes that `source` has for them.

    Returns why the others were left alone. Raises InputError if there is nothing that fits.
    """
    refusals, taken = [], 0
    known = {name: record for name, record in members(source) if isinstance(record, QTensor)}
    weights = [str(node.args[1].target) for node in program.linears()]  # type: ignore[union-attr]
    for name in dict.fromkeys(weights):
        found = known.get(name)
        answer = fits(program, name, found) if found else No("the artifact has no quantized weight of this name")
        if found is None or isinstance(answer, No):
            refusals.append(No(getattr(answer, "reason", ""), name))
            continue
        program.quantize_tensor(name, found)
        taken += 1
    if not taken:
        reasons = "; ".join(map(str, refusals[:3])) or "the model has no linear layers"
        raise InputError(f"no weight of the artifact fits this model: {reasons}")
    return refusals


def fits(program: Program, name: str, found: QTensor) -> bool | No:
    """Whether the record stands for that weight, or for something else of its name."""
    weight = program.tensors[name]
    if tuple(weight.shape) != found.shape:
        return No(f"the artifact's is {list(found.shape)}, not {list(weight.shape)}")
    lost = (found.dequantize().float() - weight.float()).norm() / weight.float().norm().clamp(min=1e-30)
    other = "the artifact's stands for other values: its recipe transformed the model, or that is another one"
    return bool(lost < FAR) or No(other)
