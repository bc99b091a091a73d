"""The merged network for tools that know nothing of ours: a `torch.export` program, and ONNX."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from datafree.errors import UsageError

PROGRAM, ONNX = "model.pt2", "model.onnx"


def check_export() -> None:
    """Raises UsageError where the packages that ONNX needs are missing."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--export writes ONNX as well, which needs {' and '.join(missing)}: pip install onnx "
            "onnxscript, or leave "
            "--export out"
        )


def write_exports(folder: Path, module: nn.Module, example: Tensor) -> list[Path]:
    """Write `module` as a torch.export program and as ONNX, both with a free batch size; returns the files.

    example: two inputs as the network takes them (normalised)
    """
    frozen = copy.deepcopy(module).eval().requires_grad_(False)
    program = torch.export.export(frozen, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(program, folder / PROGRAM)
    chatter = io.StringIO()  # the exporter prints its steps
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(chatter):
        exported = torch.onnx.export(program, dynamo=True, input_names=["images"], output_names=["logits"])
        assert exported is not None
        exported.save(folder / ONNX)
    return [folder / PROGRAM, folder / ONNX]
