"""ONNX Runtime's sessions on a CPU, and how tensors are bound to them."""

from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

from qcompiler.errors import BackendError

SPINNING = "session.intra_op.allow_spinning"


def open_session(path: Path, threads: int | None, yields: bool = False) -> ort.InferenceSession:
    """An ONNX Runtime session on the CPU; BackendError if ONNX Runtime refuses the file.

    One that `yields` leaves no thread spinning and no buffers behind when a run is over: another session works next.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry(SPINNING, "1")
    options.add_session_config_entry("session.force_spinning_stop", str(int(yields)))
    options.enable_cpu_mem_arena = not yields
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises classes of its own, without a common parent
        raise BackendError(f"ONNX Runtime does not open {path.name}: {error}") from error


def bind(how: Any, name: str, tensor: Tensor) -> None:
    """Bind a tensor's memory as an input or an output; the tensor must outlive the binding."""
    how(name, "cpu", 0, tensor.numpy().dtype, tuple(tensor.shape), tensor.data_ptr())
