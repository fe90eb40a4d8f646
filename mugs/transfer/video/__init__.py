"""DAVIS label propagation."""
