"""Data: corpora, tokenisers, packing, data modules."""
