"""Figures for each kind of logger."""
