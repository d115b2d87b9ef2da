"""Tools for tensors that know nothing of pruning: bits, buckets, shards, random state."""
