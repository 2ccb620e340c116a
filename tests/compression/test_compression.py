from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from lit_llm.compression.compression import Compression, Record, records_of, replay
from tests.writing import exactly


@dataclass(frozen=True)
class Wider(Compression):
    """Widens a layer: a change of form that no real method makes."""

    by: int = 2

    needs_batches = True

    def compress(self, network: nn.Module, batches: list[Any]) -> Record:
        network[0] = nn.Linear(2, 3 * self.by)
        return {"form": {"width": 3 * self.by}}

    @classmethod
    def reform(cls, network: nn.Module, form: dict[str, Any]) -> None:
        network[0] = nn.Linear(2, form["width"])


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3))


def test_what_was_done_makes_a_network_of_that_form_again() -> None:
    made = network()
    first = Wider(2).apply(made, [{}])
    Wider(5).apply(made, iter([{}]))
    assert records_of(made)[0] is first
    written = json.loads(json.dumps(records_of(made)))
    assert [record["init_args"] for record in written] == [{"by": 2}, {"by": 5}]
    again = replay(network(), written)
    again.load_state_dict(made.state_dict())
    assert records_of(again) == written


def test_what_a_network_remembers_is_not_done_to_it_again(monkeypatch) -> None:
    made, done = network(), []
    records = [Wider(by).apply(made, [{}]) for by in (2, 5)]
    monkeypatch.setattr(Wider, "reform", lambda network, form: done.append(form))
    again = network()
    for num in (1, 2, 2):
        replay(again, json.loads(json.dumps(records[:num])))
        assert records_of(again) == records[:num]
    assert done == [record["form"] for record in records]


def test_a_method_that_looks_at_what_flows_wants_batches() -> None:
    message = "calibration of Wider must have at least one batch, but is empty"
    with pytest.raises(ValueError, match=exactly(message)):
        Wider().apply(network())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"class_path": "os.system"}, "compression must name methods of compression, but names os.system"),
        ({"class_path": "torch.nn.Linear"}, "compression must name methods of compression, but names torch.nn.Linear"),
        ({}, "compression must name methods that can be imported, but names None: Empty module name"),
        (
            {"class_path": f"{__name__}.Wider", "form": {}},
            f"compression must be of this network, but its {__name__}.Wider does not fit: 'width'",
        ),
    ],
)
def test_records_of_anything_else_are_refused(record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        replay(network(), [record])


def test_what_was_done_is_no_part_of_the_weights() -> None:
    made = network()
    Wider().apply(made, [{}])
    assert all(isinstance(value, torch.Tensor) for value in made.state_dict().values())
