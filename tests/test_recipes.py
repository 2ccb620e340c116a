import dataclasses
import enum
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.models.llama import Llama
from lit_llm.models.rotary import YaRN
from lit_llm.recipes import built, described, require_rebuildable
from lit_llm.schedulers import Cosine
from tests.writing import exactly

PLACE = Path("x.ckpt")


class Act(enum.Enum):
    """Written by name in a config; values differ from names, so that a mix-up is noticed."""

    silu = "of Elfwing et al."
    tanh = "of old"


@dataclasses.dataclass
class Layer:
    width: int = 8
    act: Act = Act.silu


class Own(nn.Module):
    """A network whose arguments are of many types."""

    def __init__(
        self,
        vocab_size: int,
        act: Act | None = Act.silu,
        layers: list[Layer] | None = None,
        sizes: tuple[int, ...] = (1, 2),
        table: dict[str, Layer] | None = None,
        place: Path = Path("there"),
        either: int | str = 1,
        activation: nn.Module | None = None,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        kind: type[nn.Module] = nn.Linear,
        function: Callable[[Tensor], Tensor] = F.silu,
        dtype: torch.dtype = torch.float32,
        unsaid=Act.silu,
    ) -> None:
        super().__init__()
        self.given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}


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
    message = "network.rope_scaling in x.ckpt must be a torch module or a dataclass, but is os.mkdir"
    with pytest.raises(ValueError, match=exactly(message)):
        built(recipe, PLACE, 9)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"out_features": 3, "layers": 2}, "got an unexpected keyword argument 'layers'"),
        ({}, "missing a required argument: 'out_features'"),
    ],
)
def test_a_network_that_this_version_knows_by_other_arguments_is_refused(arguments: dict, found: str) -> None:
    recipe = {"class_path": "torch.nn.Linear", "init_args": arguments}
    message = f"network in x.ckpt must be told what a Linear takes, but is of another version of it: {found}"
    with pytest.raises(ValueError, match=exactly(message)):
        built(recipe, PLACE, 9)


def test_a_schedule_and_a_class_are_described_by_their_paths() -> None:
    schedule = described("schedule", Cosine(warmup_steps=3))
    assert schedule["class_path"] == "lit_llm.schedulers.Cosine"
    assert schedule["init_args"]["warmup_steps"] == 3
    assert described("optimizer", torch.optim.SGD) == {"class_path": "torch.optim.sgd.SGD"}


def test_a_function_is_refused_as_nothing_could_be_built_again() -> None:
    with pytest.raises(TypeError, match=r"^network must be a class or a functools\.partial of one, so that a "):
        described("network", lambda size: nn.Linear(size, size))


ARGUMENTS = {
    "act": Act.tanh,
    "layers": [Layer(3), Layer(4, Act.tanh)],
    "sizes": (3, 4, 5),
    "table": {"a": Layer(5)},
    "place": Path("here"),
    "either": "two",
    "unsaid": Act.silu,
}


def test_arguments_come_back_as_the_types_they_were() -> None:
    make = functools.partial(Own, **ARGUMENTS, kind=nn.Conv2d, norm=functools.partial(nn.RMSNorm, eps=0.5))
    recipe = described("network", make)
    require_rebuildable(recipe, make)
    given = built(json.loads(json.dumps(recipe)), PLACE, 9).given  # JSON has no tuples
    assert {name: given[name] for name in ARGUMENTS} == ARGUMENTS
    assert given["kind"] is nn.Conv2d
    assert given["norm"](4).eps == 0.5


def test_arguments_are_made_of_what_the_command_line_keeps_of_them() -> None:
    kept = {
        "act": "tanh",
        "layers": [{"width": 3, "act": "silu"}],
        "sizes": [3],
        "activation": {"class_path": "torch.nn.GELU", "init_args": {"approximate": "tanh"}},
        "norm": {"class_path": "torch.nn.LayerNorm", "init_args": {"eps": 0.5}},
        "kind": "torch.nn.Conv2d",
        "function": "torch.nn.functional.silu",
        "dtype": "torch.float16",
        "unsaid": "silu",
    }
    given = built({"class_path": f"{__name__}.Own", "init_args": kept}, PLACE, 9).given
    assert (given["act"], given["unsaid"]) == (Act.tanh, Act.silu)
    assert (given["layers"], given["sizes"]) == ([Layer(3)], (3,))
    assert given["activation"].approximate == "tanh"
    assert given["norm"](4).eps == 0.5
    assert (given["kind"], given["function"], given["dtype"]) == (nn.Conv2d, F.silu, torch.float16)


@pytest.mark.parametrize(
    ("name", "given", "kept", "annotation"),
    [
        ("unsaid", Act.tanh, "tanh", "none"),
        ("sizes", [1], [1], "tuple[int, ...]"),
        ("either", 1.5, 1.5, "int | str"),
        ("act", "relu", "relu", f"{__name__}.Act | None"),
    ],
)
def test_an_argument_that_would_come_back_as_another_is_refused(
    name: str, given: Any, kept: Any, annotation: str
) -> None:
    recipe = {"class_path": f"{__name__}.Own", "init_args": {name: kept}}
    message = (
        f"model.network.{name} must be what a checkpoint can make again by its annotation, {annotation}, but is "
        f"{given!r}; let it be a plain type, an enum, a dataclass or a torch module, and be annotated so"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        require_rebuildable(recipe, functools.partial(Own, **{name: given}))


def test_a_function_that_is_no_default_is_refused_by_the_name_of_its_argument() -> None:
    recipe = {"class_path": f"{__name__}.Own", "init_args": {"function": "torch.nn.functional.relu"}}
    message = "model.network.function must be a torch module or a dataclass, but is torch.nn.functional.relu"
    with pytest.raises(ValueError, match=exactly(message)):
        require_rebuildable(recipe, functools.partial(Own, function=F.relu))


@pytest.mark.parametrize("name", ["function", "kind", "norm", "activation", "unsaid"])
def test_no_argument_calls_what_a_file_names(name: str, tmp_path: Path) -> None:
    trap = {"class_path": "os.mkdir", "init_args": {"path": str(tmp_path / "trap")}}
    with pytest.raises(ValueError, match=rf"^network\.{name} in x\.ckpt must be "):
        built({"class_path": f"{__name__}.Own", "init_args": {name: trap}}, PLACE, 9)
    assert not (tmp_path / "trap").exists()
