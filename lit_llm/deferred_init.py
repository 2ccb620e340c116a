"""Networks without weights, for as long as nobody knows where those will be; then the same weights, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_llm.shards import part, shared_as

FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_)
"""What gives a tensor all its values, besides the functions of `torch.nn.init`."""


class Fill(NamedTuple):
    """What has given a parameter its values.

    Attributes:
        state: Of torch's generator, before.
        function: One of `FILLS` or of `torch.nn.init`.
        arguments: After the tensor.
        options: By name.
    """

    state: Tensor
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def values(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The values, in the CPU's memory; torch's generator stands behind them then."""
        torch.set_rng_state(self.state)
        values = torch.empty(shape, dtype=dtype, device="cpu")
        with torch.no_grad():
            self.function(values, *self.arguments, **self.options)
        return values


class _Noted(TorchFunctionMode):
    """Notes what fills a tensor without memory; the generator goes on as if there were some."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[int, tuple[Tensor, Fill]] = {}  # a tensor that is kept keeps its number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls what was called; instead of what fills a tensor without memory, one with memory is filled, and lost."""
        options = dict(kwargs or {})
        if func in FILLS or getattr(func, "__module__", None) == "torch.nn.init":
            tensor = options.pop("tensor", None)
            tensor, others = (args[0], args[1:]) if tensor is None else (tensor, args)
            if tensor.is_meta:
                fill = Fill(torch.get_rng_state(), func, tuple(others), options)
                fill.values(tensor.shape, tensor.dtype)
                self.last[id(tensor)] = tensor, fill
                return tensor
            options = dict(kwargs or {})
        return func(*args, **options)


def deferred(make: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    """A network on the meta device, which `materialize` gives the weights that it would have had.

    torch's generator is left as if they had been drawn. At any time there is memory for one parameter.

    Args:
        make: Makes a network of a class with `defers_init`: one without buffers, each parameter of which is filled at
            once in the end, by one of `FILLS` or of `torch.nn.init`.
        arguments: Of `make`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> real = nn.Linear(3, 2)
        >>> _ = torch.manual_seed(0)
        >>> network = deferred(nn.Linear, 3, 2)
        >>> network.weight.is_meta, materialize(network, torch.device("cpu")).weight.equal(real.weight)
        (True, True)
    """
    with torch.device("meta"), _Noted() as noted:
        network = make(*arguments)
    network.fills = {name: noted.last[id(p)][1] for name, p in network.named_parameters()}
    return network


def materialize(network: nn.Module, device: torch.device) -> nn.Module:
    """Gives what `deferred` has made its weights, in place; where they are shared out, each device its shares.

    Args:
        network: Maybe shared out since then.
        device: Where to.
    """
    state, places = torch.get_rng_state(), {}
    for module in network.modules():
        for name, p in module._parameters.items():
            places.setdefault(p, []).append((module, name))
    for name, p in list(network.named_parameters()):
        values = network.fills[name].values(p.shape, p.dtype)
        own = part(values, p).to(device, copy=True)  # not a view of all
        weight = nn.Parameter(shared_as(own, p), requires_grad=p.requires_grad)
        for module, key in places[p]:  # tied matrices stay tied
            module._parameters[key] = weight
    torch.set_rng_state(state)
    del network.fills
    return network
