import pytest
from torch import nn

from lit_llm.compression.patterns import chosen_layers
from lit_llm.compression.quantization import Int8WeightOnly
from tests.writing import exactly


def test_without_patterns_all_matrices_inside_blocks_are_chosen(tiny_llama) -> None:
    network = tiny_llama()
    chosen = chosen_layers(network)
    assert len(chosen) == 14
    assert all(name.startswith("layers.") and chosen[name] is network.get_submodule(name) for name in chosen)


def test_a_pattern_reaches_over_dots_and_order_is_the_networks(tiny_llama) -> None:
    chosen = chosen_layers(tiny_llama(), ["*.mlp.*", "lm_head", "layers.0.self_attn.q_proj"])
    assert [name.rpartition(".")[2] for name in chosen] == [
        "q_proj",
        *["gate_proj", "up_proj", "down_proj"] * 2,
        "lm_head",
    ]


def test_without_blocks_the_last_layer_is_left_out() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 3))
    assert list(chosen_layers(network)) == ["0", "2"]


def test_each_pattern_must_match(tiny_llama) -> None:
    known = ", ".join(f"layers.0.self_attn.{name}_proj" for name in "qkvo")
    message = f"layers must be patterns that match a layer ({known}, …), but '*.conv' matches none"
    with pytest.raises(ValueError, match=exactly(message)):
        chosen_layers(tiny_llama(), ["*.mlp.*", "*.conv"])


def test_a_network_with_nothing_to_compress_is_refused() -> None:
    message = "network must have layers to compress (Linear or Conv1d or Conv2d), but is a Embedding"
    with pytest.raises(ValueError, match=exactly(message)):
        chosen_layers(nn.Embedding(2, 3))


@pytest.mark.parametrize("patterns", [None, ["*"]])
def test_layers_that_are_quantised_already_are_refused(patterns: list[str] | None) -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    Int8WeightOnly(["*"]).apply(network)
    message = (
        "network must have layers of real weights to compress, but those of a Sequential are quantised already; start "
        "from the model before that, and quantise last"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        chosen_layers(network, patterns)
