"""Build large models from scratch on PyTorch Lightning.

Four parts vary independently and have a folder each: `data` (the batches), `models` (the network, plain torch),
`objectives` (the loss) and `compression` (of a trained network). `data`, `models` and `compression` do not import one
another, and no objective imports a network. `callbacks` act during a run. Nothing is re-exported here: a config names a
class by its dotted path.
"""

__version__ = "0.1.0"
