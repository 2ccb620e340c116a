"""Build large models from zero on PyTorch Lightning.

Four things vary on their own and have a folder each, none of which knows another's names: `data` (what comes in),
`models` (the network, plain torch), `objectives` (what is minimised) and, once a network is trained, what is done to
it. `callbacks` say when during a run. Nothing is re-exported here: a class's dotted path is its name in a config.
"""

__version__ = "0.1.0"
