"""Evaluations of a frozen backbone."""
