"""One page about a run root."""
