"""What runs on the login node: profiles, batch scripts, and one submission at a time."""
