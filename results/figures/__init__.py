"""Figures of a run root, in two formats and two themes."""
