"""Running the ONNX files: whole calls, and what decodes."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from qcompiler.backends.onnxruntime.buffers import SharedDecoder, empty
from qcompiler.backends.onnxruntime.names import MASK, METADATA, MODEL
from qcompiler.backends.onnxruntime.reader import PromptReader
from qcompiler.backends.onnxruntime.sessions import SPINNING, open_session
from qcompiler.errors import BackendError, No
from qcompiler.padding import Shift
from qcompiler.program import Program, Type
from qcompiler.target import NO_CACHE, Answer, Decoder, GrowingDecoder, Runner

DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(int16)": torch.int16,
    "tensor(uint16)": torch.uint16,
    "tensor(int32)": torch.int32,
    "tensor(uint32)": torch.uint32,
    "tensor(int64)": torch.int64,
    "tensor(uint64)": torch.uint64,
    "tensor(bool)": torch.bool,
}


class OnnxRunner(Runner):
    """A program in an ONNX Runtime session."""

    def __init__(
        self,
        program: Program,
        folder: Path,
        threads: int | None,
        temporary: "tempfile.TemporaryDirectory[str] | None" = None,
    ) -> None:
        self.program = program
        self.session = open_session(folder / MODEL, threads)
        self.reader = PromptReader.of(folder, threads, program.info.get("caches", {}))
        optional = self.session.get_overridable_initializers()
        self.inputs = [i.name for i in (*self.session.get_inputs(), *optional)]
        held = {i.name: DTYPES[i.type] for i in self.session.get_inputs()}
        widths = {i.name: i.shape[-1] for i in self.session.get_inputs() if i.shape}
        self.caches = {  # in the types in which the graph holds them: a cache of codes is no float tensor
            spec.name: Type((*spec.type.shape[:-1], widths[spec.name]), held[spec.name])
            for spec in program.caches
            if spec.name in held
        }
        self.about: dict[str, Any] = json.loads(self.session.get_modelmeta().custom_metadata_map.get(METADATA, "{}"))
        self._temporary = temporary  # removed with the runner

    @property
    def shared(self) -> bool:
        """Whether past and present of every cache are one buffer."""
        return bool(self.about.get("shared_cache"))

    @property
    def padding(self) -> Answer:
        """GroupQueryAttention among other attention would take padding for tokens."""
        if self.shared or (MASK in self.inputs and "GroupQueryAttention" not in self.about.get("nodes", {})):
            return True
        return No("some of its attention cannot tell padding from tokens; lower with OnnxRuntime(padding=True)")

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs for the given inputs; BackendError for padding or positions that the graph cannot take."""
        values = {str(n.target): v for n, v in self.program.bind(inputs).items()}
        if not self.caches and MASK not in self.inputs:
            return self._run(values)
        ids = values[self.program.inputs[0].name]
        batch, new = ids.shape[:2]
        values |= {name: empty(kind, batch, 0) for name, kind in self.caches.items() if name not in inputs}
        if MASK in self.inputs:
            past = self.program.past_length(inputs)
            values.setdefault(MASK, torch.ones((batch, past + new), dtype=torch.int64))
            self._check(values, inputs, past)
            if self.shared:
                return self._shared(values, inputs, past, new)
        return self._run(values)

    def _run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        feeds = {name: as_numpy(values[name]) for name in self.inputs if name in values}
        found = self.session.run(list(self.program.outputs), feeds)
        return {name: as_torch(value) for name, value in zip(self.program.outputs, found, strict=True)}

    def _shared(
        self, values: dict[str, Tensor], inputs: Mapping[str, Tensor], past: int, new: int
    ) -> dict[str, Tensor]:
        """A whole call of GroupQueryAttention, padding moved behind the tokens."""
        self.check_positions(past + new)
        if past and new > 1 and len(values[MASK]) > 1:
            return self._in_steps(inputs, past, new)
        shift = Shift.of(values[MASK])
        if not shift:
            return self._run(values)
        wanted = values.get("logits_positions")
        columns = {self.program.inputs[0].name, MASK, "position_ids"} & set(values)
        if past:  # the one new token of each row is at its place already
            columns = {MASK}
        moved = {name: shift.to_front(values[name]) for name in columns}
        moved |= {name: shift.to_front(values[name], axis=2) for name in self.caches}
        if wanted is not None:
            moved["logits_positions"] = torch.arange(new)
        found = self._run(values | moved)
        presents = set(self.program.info["caches"].values())
        for name, value in found.items():
            if name in presents:
                found[name] = shift.back(value, axis=2)
            elif not past:
                found[name] = shift.back(value)
        return found if wanted is None else found | {"logits": found["logits"][:, wanted]}

    def _check(self, values: Mapping[str, Tensor], inputs: Mapping[str, Tensor], past: int) -> None:
        """GroupQueryAttention counts positions itself: what it is not told must be what it assumes."""
        mask = values[MASK]
        if not self.padding and not bool((mask != 0).all()):
            raise BackendError(f"this program takes no padding: {self.padding}")
        if "position_ids" in inputs and "position_ids" not in self.inputs:
            ids, real = values["position_ids"], mask[:, past:] != 0
            steps = (ids[:, 1:] - ids[:, :-1] == 1) | ~(real[:, 1:] & real[:, :-1])
            first = ids.gather(1, real.long().argmax(1, keepdim=True))[:, 0]
            before = (mask[:, :past] != 0).sum(1)  # tokens, or columns with their padding: the same differences
            starts = (first == before) | (first == past + real.long().argmax(1))
            if not bool(steps.all() and starts.all()):
                raise BackendError(
                    "this program was lowered for positions counted from the past; "
                    "leave position_ids out, or lower with OnnxRuntime(padding=True)"
                )

    def check_positions(self, count: int) -> None:
        """BackendError if there may be more positions than the rotary tables hold."""
        limit = self.about.get("max_positions", count)
        if count > limit:
            raise BackendError(
                f"{count} positions are more than the {limit} this program was lowered for; "
                f"lower it with OnnxRuntime(max_positions={count})"
            )

    def _in_steps(self, inputs: Mapping[str, Tensor], past: int, new: int) -> dict[str, Tensor]:
        """New positions over a past, one by one: GroupQueryAttention takes several for one sequence only."""
        first, state = self.program.inputs[0].name, dict(inputs)
        wanted, mask = state.pop("logits_positions", None), state.pop(MASK, None)
        state.pop("position_ids", None)
        found = []
        for step in range(new):
            if mask is not None:
                state[MASK] = mask[:, : past + step + 1]
            outputs = self(state | {first: inputs[first][:, step : step + 1]})
            state |= self.program.cache_updates(outputs)
            found.append(outputs["logits"])
        logits = torch.cat(found, dim=1)
        return outputs | {"logits": logits if wanted is None else logits[:, wanted]}

    def decoder(self, batch: int, capacity: int) -> Decoder:
        """A fresh generation; BackendError if the program has no cache."""
        if not self.program.caches:
            raise BackendError(NO_CACHE)
        if self.shared:
            self.check_positions(capacity)
            return SharedDecoder(self.program, self.session, self.inputs, self.caches, batch, capacity, self.reader)
        return GrowingDecoder(self.program, self)

    def details(self) -> dict[str, Any]:
        """Threads, version, operators by count, kernels and refusals."""
        options = self.session.get_session_options()
        session = {
            "threads": options.intra_op_num_threads,
            "spinning": options.get_session_config_entry(SPINNING) == "1",
            "memory_arena": options.enable_cpu_mem_arena,
            "weights": "memory-mapped, then packed for the kernels",
        }
        return {"onnxruntime": ort.__version__, **session, **self.about}


def as_torch(value: Any) -> Tensor:
    """An array of ONNX Runtime's as a tensor: numpy may have made a number of it, and its uint64 is not torch's."""
    array = np.asarray(value)
    return torch.from_numpy(array.view(array.dtype.str))


def as_numpy(tensor: Tensor) -> Any:
    """A tensor's memory as a contiguous numpy array."""
    return np.asarray(tensor.detach().numpy(), order="C")  # ascontiguousarray would make a scalar a vector
