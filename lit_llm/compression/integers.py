"""Layers that store their weights as integers and scales."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn


def pack(values: Int[Tensor, "*rows n"]) -> UInt8[Tensor, "*rows half"]:
    """Packs integers from -8 to 7, two per byte, the first in the low half; rows of odd length are padded by one.

    Example:
        >>> pack(torch.tensor([[-8, 7, 0]], dtype=torch.int8)).tolist()
        [[240, 8]]
    """
    shifted = F.pad((values + 8).to(torch.uint8), (0, values.shape[-1] % 2))
    return shifted[..., ::2] | shifted[..., 1::2] << 4


def unpack(packed: UInt8[Tensor, "*rows half"], n: int) -> Int[Tensor, "*rows n"]:
    """The `n` integers per row that `pack` was given."""
    wide = packed.int()  # the ONNX exporter cannot right-shift unsigned bytes
    pairs = torch.stack([wide & 15, wide >> 4], dim=-1).flatten(-2)
    return pairs[..., :n].to(torch.int8) - 8


class Quantized(nn.Module):
    """A layer that stores its weight as integers `weight_qdata` (4-bit ones two per byte) and scales `weight_scale`.

    Args:
        layer: The layer that it replaces.
        weight: torchao's tensor of the weight as a matrix, quantised symmetrically.
    """

    def __init__(self, layer: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.shape, self.num_inputs = tuple(layer.weight.shape), weight.shape[1]
        self.packed = getattr(weight, "target_dtype", torch.int8) == torch.int4
        _, self._context = weight.__tensor_flatten__()
        self._kind, self._made = type(weight), None
        self.register_buffer("weight_qdata", pack(weight.qdata) if self.packed else weight.qdata.clone())
        self.register_buffer("weight_scale", weight.scale.clone())
        self.bias = getattr(layer, "bias", None)

    @property
    def qdata(self) -> Int[Tensor, "outputs inputs"]:
        """The integers."""
        return unpack(self.weight_qdata, self.num_inputs) if self.packed else self.weight_qdata

    @property
    def matrix(self) -> Tensor:
        """torchao's tensor of the weight, built once, since torch.compile cannot trace its construction."""
        if self._made is None:
            parts = {"qdata": self.qdata, "scale": self.weight_scale}
            parts["zero_point"] = torch.zeros_like(self.weight_scale, dtype=torch.int8)
            self._made = self._kind.__tensor_unflatten__(parts, self._context, None, None)
        return self._made

    @property
    def weight(self) -> Float[Tensor, "outputs ..."]:
        """The dequantised weight."""
        return (self.qdata * self.weight_scale.repeat_interleave(self.group_size, dim=1)).view(self.shape)

    @property
    def group_size(self) -> int:
        """Number of inputs that share a scale."""
        return self.num_inputs // self.weight_scale.shape[1]

    def _apply(self, fn: Any, recurse: bool = True) -> Quantized:
        self._made = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._made = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Shape, bits and group size."""
        return f"{self.shape}, {4 if self.packed else 8} bits, {self.group_size} a scale"


class QuantizedLinear(Quantized):
    """A linear layer, computed by torchao; autocast is disabled, so that it computes in the precision of the scales."""

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        """`x Wᵀ + b`."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight_scale.dtype), self.matrix, self.bias).to(x.dtype)


class QuantizedEmbedding(Quantized):
    """An embedding that dequantises only the rows it looks up."""

    def forward(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape d"]:
        """The embeddings of token ids."""
        values, scale = self.weight_qdata[ids], self.weight_scale[ids]
        values = unpack(values, self.num_inputs) if self.packed else values
        return (values.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


class QuantizedConvolution(Quantized):
    """A convolution that dequantises its weight at each call."""

    def __init__(self, layer: nn.Module, weight: Tensor) -> None:
        super().__init__(layer, weight)
        if layer.padding_mode != "zeros":
            raise ValueError(
                f"layers must be convolutions padded with zeros, but one is padded by {layer.padding_mode}"
            )
        self._convolve = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
        self._options = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of `x` with the dequantised weight."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._convolve(x, self.weight.to(x.dtype), bias, **self._options)
