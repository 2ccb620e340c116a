"""Networks, plain torch: one architecture a file, over shared layers."""
