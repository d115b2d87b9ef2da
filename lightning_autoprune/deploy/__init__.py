"""Smaller models and files: shrink, sparse files, exports."""
