"""Rotary position embedding, and its scaling to sequences longer than those trained on."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx

Rotation = tuple[Float[Tensor, "#batch 1 _ half"], Float[Tensor, "#batch 1 _ half"]]


@dataclasses.dataclass(frozen=True)
class RopeScaling(ABC):
    """How the rotary frequencies are changed for sequences longer than those trained on.

    Args:
        factor: How many times longer the sequences become; at least 1.

    Raises:
        ValueError: When `factor` is less than 1.
    """

    factor: float

    rope_type: ClassVar[str]
    """Its name in transformers."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"rope_scaling.factor must be at least 1, but is {self.factor}")

    @abstractmethod
    def scaled(self, frequencies: Float[Tensor, " half"], base: float) -> Float[Tensor, " half"]:
        """The new frequencies, in radians a token, of each pair; `base` as in `rotation`."""

    @property
    def length(self) -> float:
        """What the turned queries and keys are multiplied by, each."""
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
        """All of them slower alike."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Divides by the factor what turns slowly, leaves what turns fast, and goes from one to the other in between.

    Args:
        factor: As in `RopeScaling`.
        low_freq_factor: Pairs with fewer turns than this, within `original_max_seq_len` tokens, are slowed down.
        high_freq_factor: Pairs with more turns than this are left as they are.
        original_max_seq_len: Length of the sequences trained on before.

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
        """A mixture by the number of turns."""
        turns = frequencies * (self.original_max_seq_len / (2 * math.pi))
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class YaRN(RopeScaling):
    """As `Llama3Scaling`, but mixed along the pairs' index, and with queries and keys lengthened a little.

    Args:
        factor: As in `RopeScaling`.
        original_max_seq_len: Length of the sequences trained on before.
        beta_fast: Pairs with more turns than this, within `original_max_seq_len` tokens, are left as they are.
        beta_slow: Pairs with fewer turns than this are slowed down.
        attention_factor: Factor on both queries and keys; `None` is `0.1 log(factor) + 1`.

    Source:
        Peng et al., 2023, "YaRN", arXiv:2309.00071, eq. 17, 21 and 22; the ends of the mixture are rounded to whole
        pairs, as in the authors' code and transformers.
    """

    original_max_seq_len: int = 2048
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    rope_type: ClassVar[str] = "yarn"

    @property
    def length(self) -> float:
        """What the turned queries and keys are multiplied by, each."""
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    def scaled(self, frequencies: Float[Tensor, " half"], base: float) -> Float[Tensor, " half"]:
        """A mixture by the pair's index."""
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
"""Values that transformers' config may state and that change nothing."""


def rope_from_hf(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """The base and the scaling that a `config.json` of transformers describes, in its newer or older form.

    Raises:
        ValueError: When there is no such scaling here, or it has a parameter that is not known.
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
    """Cosines and sines of the angles by which each position turns its pairs.

    Computed from the positions each time rather than kept as a buffer: once per forward pass for all layers it costs
    next to nothing, and nothing has to survive the meta device, a cast to bfloat16 or a longer sequence.

    Args:
        positions: Index of each token in its sequence, from 0.
        d_head: Width of a head; must be even.
        base: Wavelengths grow geometrically from 2π to 2π·base tokens.
        scaling: What is done to the frequencies, and to the lengths of what is turned.

    Source:
        Su et al., 2021, "RoFormer", arXiv:2104.09864, eq. 15. Differs in the pairing: component `i` turns with
        `i + d_head / 2`, not with its neighbour, as in Hugging Face's Llama, so that weights are exchanged unchanged.
    """
    half = torch.arange(0, d_head, 2, device=positions.device, dtype=torch.float32)
    frequencies = base ** (-half / d_head)
    length = 1.0
    if scaling is not None:
        frequencies, length = scaling.scaled(frequencies, base), scaling.length
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos() * length, angles.sin() * length


class _CPURotate(torch.autograd.Function):
    """The plain formula of `rotate` in half the passes over memory, into a contiguous output, undone by its inverse."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turns by the angle."""
        ctx.save_for_backward(cos, sin)
        out = torch.empty(x.shape, dtype=x.dtype)
        (first, second), (out_first, out_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
        torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out_second).addcmul_(first, sin)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        """Turns back."""
        cos, sin = ctx.saved_tensors
        return _CPURotate.apply(grad, cos, -sin), None, None


def rotate(x: Float[Tensor, "batch heads seq d_head"], by: Rotation) -> Float[Tensor, "batch heads seq d_head"]:
    """Turns the pairs of each head, and lengthens them where the rotation says so; keeps the dtype of `x`.

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
