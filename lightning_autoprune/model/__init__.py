"""What can be read of a model: its prunable layers, sparsity, cost, and channels."""
