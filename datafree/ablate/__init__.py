"""Ablations: a grid of recipes, run cell by cell, found again after any death, and told in one table and one page."""
