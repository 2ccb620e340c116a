"""Compression methods, in plain torch: pruning, low rank, quantisation. Callbacks apply them during training."""
