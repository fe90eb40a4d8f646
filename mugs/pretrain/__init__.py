"""Pretraining: schedule, step and loop around a method."""
