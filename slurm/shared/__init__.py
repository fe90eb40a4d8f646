"""Questions to Slurm and places of logs, for login and compute nodes."""
