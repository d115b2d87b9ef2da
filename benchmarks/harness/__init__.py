"""Shared by the benchmarks: tasks, training, the methods under comparison, files and tables of results."""
