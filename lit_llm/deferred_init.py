"""Networks on the meta device, whose weights are initialised once it is known which device keeps which shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_llm.shards import part, shared_as

FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_)
"""Methods that fill a whole tensor, besides the functions of `torch.nn.init`."""


class Fill(NamedTuple):
    """The call that initialised a parameter.

    Attributes:
        state: State of torch's generator before the call.
        function: One of `FILLS` or of `torch.nn.init`.
        arguments: Positional arguments after the tensor.
        options: Keyword arguments.
    """

    state: Tensor
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def values(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The values, in CPU memory; leaves torch's generator in the state after the call."""
        torch.set_rng_state(self.state)
        values = torch.empty(shape, dtype=dtype, device="cpu")
        with torch.no_grad():
            self.function(values, *self.arguments, **self.options)
        return values


class _Noted(TorchFunctionMode):
    """Records the calls that fill meta tensors, and advances torch's generator as if they were real."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[int, tuple[Tensor, Fill]] = {}  # holds the tensor, so that its id stays unique

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function; instead of a meta tensor, a real one is filled and discarded."""
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
    """Builds a network on the meta device, which `materialize` later gives the weights it would have had.

    torch's generator is left as if they had been drawn. At most one parameter is in memory at a time.

    Args:
        make: Builds a network of a class with `defers_init`: it has no buffers, and the last initialisation of each
            parameter fills all of it, by one of `FILLS` or of `torch.nn.init`.
        arguments: Arguments of `make`.

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
    """Initialises the weights of a network from `deferred`, in place; each device keeps only its shards.

    Args:
        network: The network, which may have been sharded in the meantime.
        device: Device for the weights.
    """
    state, places = torch.get_rng_state(), {}
    for module in network.modules():
        for name, p in module._parameters.items():
            places.setdefault(p, []).append((module, name))
    for name, p in list(network.named_parameters()):
        values = network.fills[name].values(p.shape, p.dtype)
        own = part(values, p).to(device, copy=True)  # not a view of the whole
        weight = nn.Parameter(shared_as(own, p), requires_grad=p.requires_grad)
        for module, key in places[p]:  # tied matrices stay tied
            module._parameters[key] = weight
    torch.set_rng_state(state)
    del network.fills
    return network
