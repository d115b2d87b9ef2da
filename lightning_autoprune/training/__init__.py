"""Pruning inside a Lightning Trainer."""
