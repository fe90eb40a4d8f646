"""Images: sources, order, view plans, renderers and loaders."""
