"""Figures and settings of a run for each kind of logger, and the pruned checkpoint for W&B."""
