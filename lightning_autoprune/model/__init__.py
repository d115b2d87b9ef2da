"""Reads a model: its prunable layers, sparsity, cost and channels."""
