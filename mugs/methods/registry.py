"""Self-supervised methods by name."""

from mugs.methods.mugs import Mugs

METHODS = {"mugs": Mugs}
