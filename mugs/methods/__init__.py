"""Self-supervised methods by name."""

from mugs.methods.config import MugsConfig
from mugs.methods.mugs import Mugs

METHODS = {"mugs": Mugs}

__all__ = ["METHODS", "Mugs", "MugsConfig"]
