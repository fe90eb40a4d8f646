"""What runs on a compute node, on every rank of a job."""
