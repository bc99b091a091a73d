"""What can go wrong in `datafree`, in two kinds, each with the exit code the command line gives it."""

from __future__ import annotations

from typing import ClassVar


class DatafreeError(Exception):
    """Base of every error `datafree` raises on purpose: what, where, why and how to fix it."""

    exit_code: ClassVar[int] = 1


class UsageError(DatafreeError):
    """The caller's mistake: another recipe, file or option would have worked.

    key: of the recipe, inside the section that is being read, where the mistake is one key's
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, *key: str | int) -> None:
        super().__init__(message)
        self.key = key


class RunError(DatafreeError):
    """A run that failed although its inputs looked right: a full disk, a corrupt cache, a failed check."""

    exit_code: ClassVar[int] = 1
