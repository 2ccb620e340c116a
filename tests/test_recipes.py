import functools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_llm.models.llama import Llama
from lit_llm.models.rotary import YaRN
from lit_llm.recipes import built, described
from lit_llm.schedulers import Cosine
from tests.writing import exactly

PLACE = Path("x.ckpt")


def test_a_network_is_built_again_from_the_plain_values_it_was_made_from() -> None:
    make = functools.partial(Llama, d_model=16, num_layers=1, num_heads=2, rope_scaling=YaRN(4.0, 64))
    recipe = described("network", make)
    assert json.loads(json.dumps(recipe)) == recipe
    network = built(recipe, PLACE, 9)
    assert network.rope_scaling == YaRN(4.0, 64)
    assert network.lm_head.weight.shape == (9, 16)


def test_nothing_is_called_but_a_network_and_the_plain_values_among_its_arguments(tmp_path: Path) -> None:
    recipe = described("network", functools.partial(Llama, d_model=16, num_layers=1, num_heads=2))
    recipe["init_args"]["rope_scaling"] = {"class_path": "os.mkdir", "init_args": {"path": str(tmp_path / "trap")}}
    with pytest.raises(ValueError, match=exactly("network in x.ckpt must be a torch module, but is os.mkdir")):
        built(recipe, PLACE, 9)
    assert not (tmp_path / "trap").exists()


def test_a_schedule_and_a_class_are_described_by_their_paths() -> None:
    schedule = described("schedule", Cosine(warmup_steps=3))
    assert schedule["class_path"] == "lit_llm.schedulers.Cosine"
    assert schedule["init_args"]["warmup_steps"] == 3
    assert described("optimizer", torch.optim.SGD) == {"class_path": "torch.optim.sgd.SGD"}


def test_a_function_is_refused_as_nothing_could_be_built_again() -> None:
    with pytest.raises(TypeError, match=r"^network must be a class or a functools\.partial of one, so that a "):
        described("network", lambda size: nn.Linear(size, size))
