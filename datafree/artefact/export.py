"""The merged network for tools that know nothing of ours: a `torch.export` program, and ONNX."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datafree.errors import RunError, UsageError

PROGRAM, ONNX = "model.pt2", "model.onnx"
BATCH = "batch"  # what the free dimension is called
CLOSE = 1e-3  # largest difference of an exported network's outputs, relative to the largest output


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

    Both are read again and compared with the network on noise, one and three images; ONNX by the slow reference of the
    onnx package.
    example: two inputs as the network takes them (normalised)
    Raises RunError where a file gives other numbers than the network.
    """
    frozen = copy.deepcopy(module).eval().requires_grad_(False)
    program = torch.export.export(frozen, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(program, folder / PROGRAM)
    chatter = io.StringIO()  # the exporter prints its steps
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(chatter):
        exported = torch.onnx.export(program, dynamo=True, input_names=["images"], output_names=["logits"])
        assert exported is not None
        shape = exported.model.graph.inputs[0].shape
        assert shape is not None
        exported.rename_axes({str(shape[0]): BATCH})
        exported.save(folder / ONNX)
    _compare(folder / PROGRAM, torch.export.load(folder / PROGRAM).module(), frozen, example)
    _compare(folder / ONNX, _onnx_runner(folder / ONNX), frozen, example)
    return [folder / PROGRAM, folder / ONNX]


def _onnx_runner(path: Path) -> Callable[[Tensor], Tensor]:
    from onnx.reference import ReferenceEvaluator

    session = ReferenceEvaluator(str(path))

    def run(images: Tensor) -> Tensor:
        outputs: Any = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(outputs[0])

    return run


def _compare(path: Path, exported: Callable[[Tensor], Tensor], module: nn.Module, example: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 3):
        images = torch.randn(count, *example.shape[1:], generator=generator)
        with torch.no_grad():
            wanted, found = module(images), exported(images)
        apart = float((wanted - found).abs().max() / wanted.abs().max().clamp_min(1e-12))
        if not apart <= CLOSE:
            raise RunError(
                f"{path.name}, read again, gives other numbers than the network ({apart:.1%} of the largest output, "
                f"{count} images): please report this model; without --export the artefact itself is written"
            )
