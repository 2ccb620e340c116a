from __future__ import annotations

import functools

import pytest

from lit_llm.callbacks.parameter_budget import ParameterBudget
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.objectives.classification import Classification
from tests.examples import BERT, Examples
from tests.objectives.test_classification import trainer
from tests.writing import exactly


def test_a_network_up_to_the_budget_trains_and_a_larger_one_does_not(tmp_path):
    def fit(most):
        made = Classification(functools.partial(PretrainedClassifier, config=BERT))
        fitted = trainer(tmp_path, max_epochs=1, callbacks=[ParameterBudget(most)])
        fitted.fit(made, datamodule=Examples(3))
        return fitted.global_step, sum(p.numel() for p in made.network.parameters())

    steps, size = fit(10**9)
    assert fit(size) == (steps, size)
    assert steps > 0
    line = f"network must have at most {size - 1:,} parameters, but has {size:,}"
    with pytest.raises(ValueError, match=exactly(line)):
        fit(size - 1)


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match=exactly("max_parameters must be at least 1, but is 0")):
        ParameterBudget(0)
