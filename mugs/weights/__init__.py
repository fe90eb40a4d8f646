"""Backbone files: ours, those of others, and those for timm."""
