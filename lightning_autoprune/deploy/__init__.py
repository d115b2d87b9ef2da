"""Makes smaller models and files: shrink, sparse files, exports."""
