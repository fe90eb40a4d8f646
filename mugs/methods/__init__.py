"""Self-supervised methods by name."""

from mugs.methods.mugs import Mugs, MugsConfig

METHODS = {"mugs": Mugs}

__all__ = ["METHODS", "Mugs", "MugsConfig"]
