"""llama.cpp as the tests use it, from the prebuilt package xllamacpp: its server, and its quantizer of rows."""

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
xllamacpp = pytest.importorskip(
    "xllamacpp", reason="xllamacpp (a prebuilt llama.cpp) is not installed; `make dev` does"
)


class LlamaCpp:
    """A model that llama.cpp has loaded."""

    def __init__(self, path: Path, context: int = 128) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel = context, context, context, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_prompt, params.cache_ram_mib, params.fit_params, params.n_ctx_checkpoints = False, 0, False, 0
        self.server = xllamacpp.Server(params)

    def _answer(self, prompt: list[int] | str, **options: Any) -> Any:
        request = {
            "prompt": prompt,
            "cache_prompt": False,
            "ignore_eos": True,
            "stream": False,
            "samplers": ["temperature"],
        }
        answer = self.server.handle_completions(request | options)
        answer = answer[0] if isinstance(answer, list | tuple) else answer
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        assert "choices" in answer, answer
        return answer

    def _complete(self, prompt: list[int] | str, **options: Any) -> Any:
        return self._answer(prompt, **options)["choices"][0]["logprobs"]["content"]

    def count(self, text: str) -> int:
        """How many tokens a text has."""
        return int(self._answer(text, n_predict=1, temperature=0.0)["usage"]["prompt_tokens"])

    def greedy(self, prompt: list[int] | str, count: int) -> list[int]:
        """The ids of a greedy continuation."""
        return [token["id"] for token in self._complete(prompt, n_predict=count, temperature=0.0, logprobs=1)]

    def logprobs(self, ids: list[int], vocabulary: int) -> np.ndarray:
        """The logarithms of the next token's probabilities, float32 [vocabulary]."""
        # It reports nothing of a token that is half a letter, so a whole one is forced; the logits it reports are raw.
        forced = [[ids[0], 1000.0]]
        (first,) = self._complete(ids, n_predict=1, temperature=1.0, logprobs=vocabulary, logit_bias=forced)
        found = np.full(vocabulary, np.nan, np.float32)
        for entry in first["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found


def quantized(weight: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    """What llama.cpp's quantizer makes of rows, decoded again by gguf-py: float32 [rows, columns]."""
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    function = library.ggml_quantize_chunk
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    function.restype, function.argtypes = (
        ctypes.c_size_t,
        [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer],
    )
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    rows, columns = weight.shape
    out = np.zeros((rows, columns // block * size), np.uint8)
    weight = np.ascontiguousarray(weight, np.float32)
    scale = None if importance is None else np.ascontiguousarray(importance, np.float32)
    where = None if scale is None else scale.ctypes.data
    assert function(int(number), weight.ctypes.data, out.ctypes.data, 0, rows, columns, where) == out.nbytes
    decoded: np.ndarray = gguf.dequantize(out, number)
    return decoded
