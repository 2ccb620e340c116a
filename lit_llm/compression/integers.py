"""Layers whose weights are small integers and scales, in their state too."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn


def pack(values: Int[Tensor, "*rows n"]) -> UInt8[Tensor, "*rows half"]:
    """Two integers from -8 to 7 a byte: the even one of each pair in its low half; of an odd number one is added.

    Example:
        >>> pack(torch.tensor([[-8, 7, 0]], dtype=torch.int8)).tolist()
        [[240, 8]]
    """
    shifted = F.pad((values + 8).to(torch.uint8), (0, values.shape[-1] % 2))
    return shifted[..., ::2] | shifted[..., 1::2] << 4


def unpack(packed: UInt8[Tensor, "*rows half"], n: int) -> Int[Tensor, "*rows n"]:
    """What `pack` was given, of which there were `n`."""
    wide = packed.int()  # bytes without a sign are not shifted right by ONNX's exporter
    pairs = torch.stack([wide & 15, wide >> 4], dim=-1).flatten(-2)
    return pairs[..., :n].to(torch.int8) - 8


class Quantized(nn.Module):
    """A layer whose weight is kept as integers and scales, in its state too: `weight_qdata`, of 4 bits two a byte, and
    `weight_scale`.

    Args:
        layer: What it takes the place of.
        weight: torchao's form of its weight as a matrix, symmetric.
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
        """torchao's form of the weight, made once: torch.compile could not see through the making."""
        if self._made is None:
            parts = {"qdata": self.qdata, "scale": self.weight_scale}
            parts["zero_point"] = torch.zeros_like(self.weight_scale, dtype=torch.int8)
            self._made = self._kind.__tensor_unflatten__(parts, self._context, None, None)
        return self._made

    @property
    def weight(self) -> Float[Tensor, "outputs ..."]:
        """The weight as real numbers."""
        return (self.qdata * self.weight_scale.repeat_interleave(self.group_size, dim=1)).view(self.shape)

    @property
    def group_size(self) -> int:
        """How many inputs of an output share a scale."""
        return self.num_inputs // self.weight_scale.shape[1]

    def _apply(self, fn: Any, recurse: bool = True) -> Quantized:
        self._made = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._made = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Bits and shape."""
        return f"{self.shape}, {4 if self.packed else 8} bits, {self.group_size} a scale"


class QuantizedLinear(Quantized):
    """A linear layer; computes as torchao does, in full precision around the integers whatever the run's precision."""

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        """`x Wᵀ + b`."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight_scale.dtype), self.matrix, self.bias).to(x.dtype)


class QuantizedEmbedding(Quantized):
    """An embedding, of which only the rows that are read become real numbers."""

    def forward(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape d"]:
        """The rows of some tokens."""
        values, scale = self.weight_qdata[ids], self.weight_scale[ids]
        values = unpack(values, self.num_inputs) if self.packed else values
        return (values.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


class QuantizedConvolution(Quantized):
    """A convolution whose kernels become real numbers to compute with, at each call."""

    def __init__(self, layer: nn.Module, weight: Tensor) -> None:
        super().__init__(layer, weight)
        if layer.padding_mode != "zeros":
            raise ValueError(
                f"layers must be convolutions padded with zeros, but one is padded by {layer.padding_mode}"
            )
        self._convolve = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
        self._options = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}

    def forward(self, x: Tensor) -> Tensor:
        """Convolves."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._convolve(x, self.weight.to(x.dtype), bias, **self._options)
