"""Rivals: other methods that make one network of several, from the same evidence; one file a family."""

from __future__ import annotations

from pleas.comparators.comparator import Case, Comparator

METHODS: dict[str, type[Comparator]] = {}

__all__ = ["METHODS", "Case", "Comparator"]
