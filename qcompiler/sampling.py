"""Choosing the next token from logits.

On a CPU this is numpy's work, not PyTorch's: PyTorch splits a vocabulary over its threads, which afterwards spin while
they wait for more, on the very cores where the backend's threads compute the next step. Decoding with ONNX Runtime on
two cores is half as fast with them.
"""

import numpy as np
import torch
from torch import Tensor


def choose(logits: Tensor, temperature: float = 0.0, random: torch.Generator | None = None) -> Tensor:
    """The next token ids [batch, 1] for logits [batch, vocabulary]: the most likely, or sampled at a temperature.

    >>> choose(torch.tensor([[0.0, 3.0, 1.0]]))
    tensor([[1]])
    """
    if temperature <= 0.0:
        if logits.device.type == "cpu" and logits.dtype != torch.bfloat16:
            return torch.from_numpy(logits.detach().numpy().argmax(-1, keepdims=True))
        return logits.argmax(-1, keepdim=True)
    scaled = logits.detach().float().cpu().numpy() / temperature
    # Inverse transform: the first id whose cumulated probability passes a uniform draw.
    cumulated = np.exp(scaled - scaled.max(-1, keepdims=True)).cumsum(-1, dtype=np.float64)
    draws = torch.rand(len(cumulated), 1, generator=random, dtype=torch.float64).numpy() * cumulated[:, -1:]
    ids = (cumulated <= draws).sum(-1, keepdims=True)
    return torch.from_numpy(ids).to(logits.device)
