"""What the libraries say at every start and nobody can act on."""

from __future__ import annotations

import logging
import os
import warnings


def quieten() -> None:
    """Leaves it out."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # what torchao registers when it is imported
    logging.getLogger("torchao").setLevel(logging.ERROR)  # that it was built for other accelerators too
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # how a checkpoint is gathered
    for text in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*Checkpoint directory.*",
        r".*module\(s\) in eval mode.*",  # what is frozen is so on purpose
        ".*You are using `torch.load`.*",
        ".*LightningCLI's args parameter.*",
        ".*isinstance.treespec.*",
        ".*is a boolean argument.*",
        ".*across ranks is zero.*",
        ".*was deprecated in.*",
        ".*No positional arguments.*",
        ".*was called before the ``update``.*",  # of a process that had none of the rows
        ".*SpearmanCorrcoef` will save all.*",  # a value an example, which is little
    ):
        warnings.filterwarnings("ignore", message=text)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
