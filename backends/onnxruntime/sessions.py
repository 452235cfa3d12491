"""ONNX Runtime's sessions on a CPU, and how tensors are bound to them."""

import functools
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

from qcompiler.errors import BackendError

SPINNING = "session.intra_op.allow_spinning"
# How long a thread waits for more work before it sleeps, in microseconds: longer than what lies between two steps of
# decoding, and not so long that it is in the way of what comes after the last, as it is by itself.
PATIENCE = ("session.intra_op.spin_duration_us", "1000")


def open_session(path: Path, threads: int | None, yields: bool = False) -> ort.InferenceSession:
    """An ONNX Runtime session on the CPU; BackendError if ONNX Runtime refuses the file.

    One that `yields` to another session leaves no thread spinning when a run is over, and has its buffers where all of
    its kind have theirs.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry(SPINNING, "1")
    options.add_session_config_entry(*PATIENCE)
    if yields:
        common_buffers()
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.enable_mem_pattern = False
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises classes of its own, without a common parent
        raise BackendError(f"ONNX Runtime does not open {path.name}: {error}") from error


@functools.cache
def common_buffers() -> None:
    """One arena, kept by ONNX Runtime, for the sessions that ask for it: with one each, all keep what one needs."""
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    as_requested = ort.OrtArenaCfg({"arena_extend_strategy": 1})
    ort.create_and_register_allocator(place, as_requested)


def bind(how: Any, name: str, tensor: Tensor) -> None:
    """Bind a tensor's memory as an input or an output; the tensor must outlive the binding."""
    how(name, "cpu", 0, tensor.numpy().dtype, tuple(tensor.shape), tensor.data_ptr())
