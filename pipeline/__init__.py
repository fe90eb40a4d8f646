"""What to run and what has run: reproductions, run identities, plans and the manifest."""
