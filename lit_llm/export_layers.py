"""Replacements of layers that torch.export cannot export with dynamic numbers of rows and tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.compression.compression import records_of
from lit_llm.compression.integers import QuantizedLinear

ROUNDS_INPUTS = (".Int8Dynamic", ".Int8DynamicInt4")
"""Suffixes of the class paths of methods that quantise activations too, with operations that only torchao has."""


def rounding_inputs(network: nn.Module) -> list[str]:
    """The methods of `ROUNDS_INPUTS` with which a network was compressed."""
    paths = [record["class_path"] for record in records_of(network)]
    return [method for method in ROUNDS_INPUTS if any(path.endswith(method) for path in paths)]


@contextmanager
def exportable(network: nn.Module) -> Iterator[None]:
    """Makes layers compute the same with operations that can be exported with dynamic numbers of rows and tokens."""
    changed: list[nn.Module] = []
    for module in network.modules():
        if isinstance(module, nn.RNNBase) and _is_simple(module):
            module.forward = _scanning(module)
        elif isinstance(module, QuantizedLinear):
            module.forward = _weighing(module)
        else:
            continue
        changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _weighing(layer: QuantizedLinear) -> Callable[[Tensor], Tensor]:
    """A forward that dequantises the weights at each call, so that the file keeps integers."""

    def forward(x: Tensor) -> Tensor:
        groups = layer.qdata.unflatten(-1, (layer.weight_scale.shape[-1], -1))
        return F.linear(x, (groups * layer.weight_scale[..., None]).flatten(-2), layer.bias)

    return forward


def _is_simple(cell: nn.RNNBase) -> bool:
    return cell.num_layers == 1 and cell.batch_first and not cell.bidirectional and not cell.proj_size


def _scanning(cell: nn.RNNBase) -> Callable[..., tuple[Tensor, Any]]:
    """A recurrent layer, from a zero state, as a `scan` in the program: torch would unroll the layer's own loop."""
    from torch._higher_order_ops.scan import scan  # not yet under a public name

    is_lstm, is_gru = isinstance(cell, nn.LSTM), isinstance(cell, nn.GRU)

    def forward(x: Tensor, state: None = None) -> tuple[Tensor, Any]:
        weight, bias = cell.weight_hh_l0, getattr(cell, "bias_hh_l0", None)  # here, to be parameters of the program

        def lstm(state: tuple[Tensor, ...], given: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            enter, forget, new, leave = (given + F.linear(state[0], weight, bias)).chunk(4, dim=-1)
            kept = forget.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
            out = leave.sigmoid() * kept.tanh()
            return (out, kept), out.clone()

        def gru(state: tuple[Tensor, ...], given: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            reset, keep, new = given.chunk(3, dim=-1)
            own_reset, own_keep, own_new = F.linear(state[0], weight, bias).chunk(3, dim=-1)
            kept = (keep + own_keep).sigmoid()
            out = (1 - kept) * (new + (reset + own_reset).sigmoid() * own_new).tanh() + kept * state[0]
            return (out,), out.clone()

        def rnn(state: tuple[Tensor, ...], given: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            total = given + F.linear(state[0], weight, bias)
            out = total.relu() if cell.nonlinearity == "relu" else total.tanh()
            return (out,), out.clone()

        given = F.linear(x, cell.weight_ih_l0, getattr(cell, "bias_ih_l0", None)).transpose(0, 1)
        empty = tuple(x.new_zeros(x.shape[0], cell.hidden_size) for _ in range(2 if is_lstm else 1))
        step = inspect.unwrap(lstm if is_lstm else gru if is_gru else rnn)  # `scan` cannot trace type checks
        last, out = scan(step, empty, given, dim=0)
        after = tuple(part[None] for part in last)
        return out.transpose(0, 1), after if is_lstm else after[0]

    return forward
