"""Recipes: the YAML file, its sections, and messages that point at its lines."""
