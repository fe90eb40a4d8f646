"""The Mugs method: networks, losses, views, training engine and evaluations."""
