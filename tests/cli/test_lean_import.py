"""Packages that are not imported at the start, and are still available on use."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from lit_llm.cli.lean_import import import_torchmetrics
import_torchmetrics()
assert "transformers" not in sys.modules
import lit_llm.cli.training
import lit_llm.objectives.causal_lm, lit_llm.models.llama, lit_llm.data.text
assert not {"scipy", "datasets", "pandas", "matplotlib"} & sys.modules.keys()
import torch, torchmetrics.text.wer
assert torchmetrics.text.WordErrorRate is torchmetrics.text.wer.WordErrorRate
for metric in (torchmetrics.Accuracy("binary"), torchmetrics.ConfusionMatrix("binary")):
    metric.update(torch.tensor([1, 0]), torch.tensor([1, 1]))
    figure, axes = metric.plot()
    assert figure.axes == [axes]
from torchmetrics.text.bert import BERTScore
from torchmetrics.functional.text.bert import AutoModel
from torchmetrics.text import infolm
from torchmetrics.utilities.imports import _SCIPY_AVAILABLE
from torchmetrics.regression import SpearmanCorrCoef
from importlib.util import find_spec
assert bool(_SCIPY_AVAILABLE) == (find_spec("scipy") is not None)
"""


@pytest.mark.slow
def test_a_start_leaves_out_what_no_run_needs_and_hides_nothing():
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
