"""Run stages on this machine, without Slurm."""
