"""The sources of the held-out data that trains M: shares of training batches, other loaders, or none."""
