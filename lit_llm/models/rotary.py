"""Rotary position embeddings (RoPE), and their scaling to sequences longer than in training."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lit_llm.ranges import require_at_least

Rotation = tuple[Float[Tensor, "#batch 1 _ half"], Float[Tensor, "#batch 1 _ half"]]


@dataclasses.dataclass(frozen=True)
class RopeScaling(ABC):
    """A change of the rotary frequencies for sequences longer than in training.

    Args:
        factor: Ratio of the new length to that in training; at least 1.

    Raises:
        ValueError: When `factor` is less than 1.
    """

    factor: float

    rope_type: ClassVar[str]
    """Its name in transformers."""

    def __post_init__(self) -> None:
        require_at_least(1, "rope_scaling.", factor=self.factor)

    @abstractmethod
    def scaled(self, frequencies: Float[Tensor, " half"], base: float) -> Float[Tensor, " half"]:
        """The new frequency of each pair, in radians per token; `base` as in `rotation`."""

    @property
    def length(self) -> float:
        """Factor on rotated queries and on rotated keys."""
        return 1.0

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` of transformers, without the base."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if "original_max_seq_len" in given:
            given["original_max_position_embeddings"] = given.pop("original_max_seq_len")
        return {"rope_type": self.rope_type, **given}


@dataclasses.dataclass(frozen=True)
class PositionInterpolation(RopeScaling):
    """Divides every frequency by the factor.

    Source:
        Chen et al., 2023, "Extending Context Window of Large Language Models via Positional Interpolation",
        arXiv:2306.15595, eq. 4.
    """

    rope_type: ClassVar[str] = "linear"

    def scaled(self, frequencies: Float[Tensor, " half"], base: float) -> Float[Tensor, " half"]:
        """The frequencies divided by `factor`."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Divides low frequencies by the factor, keeps high ones, and interpolates in between.

    Args:
        factor: As in `RopeScaling`.
        low_freq_factor: The frequency of pairs with fewer turns than this in `original_max_seq_len` tokens is divided.
        high_freq_factor: The frequency of pairs with more turns than this is kept.
        original_max_seq_len: Length of the sequences in the original training.

    Raises:
        ValueError: When `high_freq_factor` is not greater than `low_freq_factor`.

    Source:
        Grattafiori et al., 2024, "The Llama 3 Herd of Models", arXiv:2407.21783; the formula is that of the Llama 3.1
        release (github.com/meta-llama/llama-models, `apply_scaling`).
    """

    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    rope_type: ClassVar[str] = "llama3"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope_scaling.high_freq_factor must be greater than low_freq_factor, {self.low_freq_factor}, but is "
                f"{self.high_freq_factor}"
            )

    def scaled(self, frequencies: Float[Tensor, " half"], base: float) -> Float[Tensor, " half"]:
        """Interpolates linearly in the number of turns."""
        turns = frequencies * (self.original_max_seq_len / (2 * math.pi))
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class YaRN(RopeScaling):
    """Like `Llama3Scaling`, but interpolates in the pair's index, and scales queries and keys up slightly.

    Args:
        factor: As in `RopeScaling`.
        original_max_seq_len: Length of the sequences in the original training.
        beta_fast: The frequency of pairs with more turns than this in `original_max_seq_len` tokens is kept.
        beta_slow: The frequency of pairs with fewer turns than this is divided.
        attention_factor: Factor on both queries and keys; `None` is `0.1 log(factor) + 1`.

    Source:
        Peng et al., 2023, "YaRN", arXiv:2309.00071, eq. 17, 21 and 22; the ends of the ramp are rounded to whole
        pairs, as in the authors' code and transformers.
    """

    original_max_seq_len: int = 2048
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    rope_type: ClassVar[str] = "yarn"

    @property
    def length(self) -> float:
        """Factor on rotated queries and on rotated keys."""
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    def scaled(self, frequencies: Float[Tensor, " half"], base: float) -> Float[Tensor, " half"]:
        """Interpolates linearly in the pair's index."""
        half = len(frequencies)

        def pair_with(turns: float) -> float:
            return half * math.log(self.original_max_seq_len / (turns * 2 * math.pi)) / math.log(base)

        first = max(math.floor(pair_with(self.beta_fast)), 0)
        last = min(math.ceil(pair_with(self.beta_slow)), 2 * half - 1)
        index = torch.arange(half, device=frequencies.device, dtype=torch.float32)
        slowed = ((index - first) / (last - first or 0.001)).clamp(0, 1)
        return frequencies * (1 - slowed + slowed / self.factor)


SCALINGS: tuple[type[RopeScaling], ...] = (PositionInterpolation, Llama3Scaling, YaRN)
AS_DEFAULT = {"partial_rotary_factor": 1.0, "truncate": True}
"""Entries of transformers' config that have no effect with these values."""


def rope_from_hf(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """The base and the scaling that a `config.json` of transformers describes, in its newer or older form.

    Raises:
        ValueError: When the scaling or one of its parameters is unknown, or the factor is missing.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    given = {name: value for name, value in rope.items() if value is not None and AS_DEFAULT.get(name) != value}
    base = float(given.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0)
    old_type = given.pop("type", "default")
    rope_type = given.pop("rope_type", old_type)
    known = {scaling.rope_type: scaling for scaling in SCALINGS}
    if rope_type not in ("default", *known):
        raise ValueError(f"rope_type in config.json must be one of default, {', '.join(known)}, but is {rope_type!r}")
    scaling = known.get(rope_type)
    fields = {field.name: field.type for field in dataclasses.fields(scaling)} if scaling else {}
    if "original_max_seq_len" in fields:
        length = given.pop("original_max_position_embeddings", config["max_position_embeddings"])
        given["original_max_seq_len"] = config.get("original_max_position_embeddings") or length
    if scaling is YaRN:
        given.setdefault("factor", config["max_position_embeddings"] / given["original_max_seq_len"])
    if unknown := [name for name in given if name not in fields]:
        raise ValueError(
            f"rope_parameters in config.json must have no {unknown[0]} with rope_type {rope_type}, but it is "
            f"{given[unknown[0]]!r}"
        )
    if scaling and "factor" not in given:
        raise ValueError(f"rope_parameters in config.json must have a factor with rope_type {rope_type}, but have none")
    return base, scaling(**{n: v if fields[n] == "int" else float(v) for n, v in given.items()}) if scaling else None


def rotation(
    positions: Int[Tensor, "batch seq"], d_head: int, base: float, scaling: RopeScaling | None = None
) -> Rotation:
    """Cosines and sines of the angles by which each position rotates its pairs.

    Computed once per forward pass for all layers, which costs next to nothing. A buffer would have to survive the meta
    device, a cast to bfloat16 and longer sequences.

    Args:
        positions: Index of each token in its sequence, from 0.
        d_head: Width of a head; must be even.
        base: Wavelengths grow geometrically from 2π to 2π·base tokens.
        scaling: Changes the frequencies, and scales the cosines and sines.

    Source:
        Su et al., 2021, "RoFormer", arXiv:2104.09864, eq. 15. Differs in the pairing: component `i` is rotated
        with `i + d_head / 2`, not with its neighbour, as in Hugging Face's Llama, so weights need no permutation.
    """
    half = torch.arange(0, d_head, 2, device=positions.device, dtype=torch.float32)
    frequencies = base ** (-half / d_head)
    length = 1.0
    if scaling is not None:
        frequencies, length = scaling.scaled(frequencies, base), scaling.length
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos() * length, angles.sin() * length


class _CPURotate(torch.autograd.Function):
    """The formula of `rotate` with half the passes over memory and a contiguous output."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates by the angle."""
        ctx.save_for_backward(cos, sin)
        out = torch.empty(x.shape, dtype=x.dtype)
        (first, second), (out_first, out_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
        torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out_second).addcmul_(first, sin)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        """Rotates the gradient by the negative angle."""
        cos, sin = ctx.saved_tensors
        return _CPURotate.apply(grad, cos, -sin), None, None


def rotate(x: Float[Tensor, "batch heads seq d_head"], by: Rotation) -> Float[Tensor, "batch heads seq d_head"]:
    """Rotates the pairs of each head, and scales them if the rotation does; keeps the dtype of `x`.

    Example:
        >>> x = torch.randn(1, 1, 1, 4)
        >>> still = rotation(torch.zeros(1, 1, dtype=torch.long), d_head=4, base=10_000.0)
        >>> bool((rotate(x, still) == x).all())
        True
    """
    cos, sin = (part.to(x.dtype) for part in by)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _CPURotate.apply(x, cos, sin)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
