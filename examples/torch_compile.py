"""Your own module, with 4-bit weights, under torch.compile.

    python examples/torch_compile.py

The recipe may be any that needs no data. What cannot be compiled is left to PyTorch, with a warning that says why.
"""

import torch
from torch import nn


class Block(nn.Module):
    """Any module: qcompiler knows nothing about it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


torch.manual_seed(0)
model = nn.Sequential(*(Block(64) for _ in range(2)))

with torch.no_grad():
    for recipe in ("rtn-w8a16", "rtn-w4a16"):
        compiled = torch.compile(model, backend="qcompiler", options={"recipe": recipe})
        for batch in (2, 3, 5):  # sizes may change
            x = torch.randn(batch, 7, 64)
            change = (compiled(x) - model(x)).norm() / model(x).norm()
            print(f"{recipe}, batch of {batch}: outputs changed by {change:.2%}")
