"""Checkpoints on disk: their files, their checks, and room for them."""
