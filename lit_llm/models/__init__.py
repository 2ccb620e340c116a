"""Networks: one architecture per file, over shared layers; plain torch, except `pretrained…`, which wrap transformers.

The attributes and methods that the rest of the package looks up by name are listed in CONTRIBUTING.md.
"""
