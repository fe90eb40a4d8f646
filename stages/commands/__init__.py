"""What the commands of run_stage.py do."""
