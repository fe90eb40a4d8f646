"""Renderers: they follow a view plan to the letter and draw nothing themselves."""
