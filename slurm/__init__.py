"""Where stage runs execute: on a Slurm cluster through submitit, or on this machine."""
