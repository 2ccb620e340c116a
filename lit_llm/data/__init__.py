"""What comes in: corpora, tokenisers, packing, data modules."""
