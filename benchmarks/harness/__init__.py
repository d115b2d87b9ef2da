"""What the benchmarks share: tasks, one way to train, the methods under comparison, tables of results."""
