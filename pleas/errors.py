"""What can go wrong in `pleas`, in two kinds: the caller's mistake, and a run that failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class PleasError(Exception):
    """Base of every error `pleas` raises on purpose; the message says what, where, why and how to fix it."""


class InputError(PleasError):
    """The caller's mistake: another input would have worked. The command line exits with 2."""


class UnsupportedModel(InputError):
    """The model cannot be exported or traced, or its symmetry cannot be established.

    operations: the ops to blame where they are known, as plain data: `op`, the `node` of the exported graph, the
    `module` it stands in, the `parameters` behind it, and what would `help`
    """

    def __init__(self, message: str, operations: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(message)
        self.operations = tuple(dict(operation) for operation in operations)


class UnlistedOp(UnsupportedModel):
    """Strict tracing met an op for which there is no symmetry rule."""


class GateFailed(UnsupportedModel):
    """A permutation the tracer believes harmless changed the outputs."""


class ArchitectureMismatch(InputError):
    """The parents are not the same network up to their weights."""


class TooFewRows(InputError):
    """A layer has too few rows for its least-squares problem."""


class NonFinite(InputError):
    """NaN or infinity in weights or activations."""


class MergeFailed(PleasError):
    """A run that failed although its inputs looked right. The command line exits with 1."""
