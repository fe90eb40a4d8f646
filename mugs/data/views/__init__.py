"""The random views of an image: what is drawn, and how it is rendered."""
