"""Silences log lines and warnings of libraries that appear at every start and that no user can act on."""

from __future__ import annotations

import logging
import os
import warnings


def quieten() -> None:
    """Raises log levels of the libraries and filters their warnings."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao registers types on import
    logging.getLogger("torchao").setLevel(logging.ERROR)  # notes that kernels are for other accelerators
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # gathering a checkpoint
    for text in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*Checkpoint directory.*",
        r".*module\(s\) in eval mode.*",  # frozen modules are in eval mode on purpose
        ".*You are using `torch.load`.*",
        ".*LightningCLI's args parameter.*",
        ".*isinstance.treespec.*",
        ".*is a boolean argument.*",
        ".*across ranks is zero.*",
        ".*was deprecated in.*",
        ".*No positional arguments.*",
        ".*was called before the ``update``.*",  # in a process that got no rows
        r"Glyph .* missing from font\(s\).*",  # class names in a script without a font; classes.csv has them
        ".*SpearmanCorrcoef` will save all.*",  # one value per example is little
    ):
        warnings.filterwarnings("ignore", message=text)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
