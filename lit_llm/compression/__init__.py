"""Compression methods, without Lightning: pruning, low rank, quantisation. Callbacks apply them during training."""
