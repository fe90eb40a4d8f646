"""Checkpoints: saving, loading, and their files on disk."""
