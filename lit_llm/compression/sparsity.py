"""Unstructured pruning: scores, masks, and methods that set weights to zero."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lit_llm.blocks import Block
from lit_llm.compression.calibration import input_norms
from lit_llm.compression.compression import Batch, Compression, Record, method_of, records_of
from lit_llm.compression.patterns import chosen_layers
from lit_llm.ranges import require_range
from lit_llm.shards import local, whole

MASK = "weight_mask"
"""Buffer next to a layer's weight that is true on kept weights."""

SCORES = "weight_scores"
"""Buffer next to a layer's weight that accumulates scores over steps."""

Scope = Literal["row", "layer", "global"]
Scores = dict[str, Tensor]


def cubic(progress: float, final: float) -> float:
    """The sparsity during gradual pruning, which rises fast at first and slowly towards the end.

    Args:
        progress: Fraction of the pruning that is done; clamped to [0, 1].
        final: The sparsity at the end.

    Source:
        Zhu & Gupta, 2017, "To prune, or not to prune", arXiv:1710.01878, eq. 1, with initial sparsity 0.

    Example:
        >>> [round(cubic(step / 4, final=0.8), 4) for step in range(5)]
        [0.0, 0.4625, 0.7, 0.7875, 0.8]
    """
    left = 1 - min(1.0, max(0.0, progress))
    return final - final * left**3


# Masks as functions of scores.


def lowest(scores: Float[Tensor, "groups n"], num: int) -> Bool[Tensor, "groups n"]:
    """True on exactly the `num` lowest scores of each row; of equal scores, the first."""
    found = torch.zeros_like(scores, dtype=torch.bool)
    return found.scatter_(1, scores.argsort(dim=1, stable=True)[:, :num], True) if num else found


def mask_by_row(scores: Float[Tensor, "rows ..."], sparsity: float) -> Bool[Tensor, "rows ..."]:
    """True on kept weights: each output drops the fraction `sparsity` (rounded) of its inputs, the lowest scores."""
    flat = scores.flatten(1)
    return ~lowest(flat, round(sparsity * flat.shape[1])).view_as(scores)


def mask_together(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """True on kept weights: all layers together drop the fraction `sparsity` (rounded), the lowest scores."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    kept = ~lowest(flat[None], round(sparsity * len(flat)))[0]
    pieces = kept.split([score.numel() for score in scores.values()])
    return {name: piece.view_as(scores[name]) for name, piece in zip(scores, pieces)}


def mask_n_of_m(scores: Float[Tensor, "rows ..."], n: int, m: int) -> Bool[Tensor, "rows ..."]:
    """True on the `n` highest scores of each `m` consecutive inputs of an output.

    Source:
        Mishra et al., 2021, "Accelerating Sparse Deep Neural Networks", arXiv:2104.08378, section 3 (2:4).
    """
    return ~lowest(scores.flatten(1).reshape(-1, m), m - n).view_as(scores)


# On a network.


def masked_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers that have a mask, by name."""
    return {name: layer for name, layer in network.named_modules() if hasattr(layer, MASK)}


@torch.no_grad()
def add_masks(network: nn.Module, names: list[str], scores: bool = False) -> None:
    """Adds masks that keep everything, and optionally scores of 0, to layers that have none yet."""
    for name in names:
        layer = network.get_submodule(name)
        if not hasattr(layer, MASK):
            layer.register_buffer(MASK, torch.ones_like(layer.weight, dtype=torch.bool))
        if scores and not hasattr(layer, SCORES):
            layer.register_buffer(SCORES, torch.zeros_like(layer.weight, dtype=torch.float32))


@torch.no_grad()
def apply_masks(network: nn.Module, gradients: bool = False) -> None:
    """Sets pruned weights, or their gradients, to zero."""
    for layer in masked_layers(network).values():
        tensor = layer.weight.grad if gradients else layer.weight
        if tensor is not None:
            here, mask = local((tensor, getattr(layer, MASK)))
            here.masked_fill_(~mask, 0)  # a product would leave -0.0


def remove_masks(network: nn.Module) -> None:
    """Applies and removes all masks and scores; the records keep only the sparsity."""
    masked = masked_layers(network)
    if not masked:
        return
    apply_masks(network)
    for layer in masked.values():
        for name in (MASK, SCORES):
            if hasattr(layer, name):
                delattr(layer, name)
    records = records_of(network)
    for index, record in enumerate(records):
        masks = "form" in record and issubclass(method_of(record), Sparsity | Zeros)
        if masks and (names := record["form"]["names"])[0] in masked:
            plain = {name: value for name, value in record.items() if name != "form"}
            records[index] = plain | {"sparsity": sparsity_of(network, names)}
    network.compression = records


def sparsity_of(network: nn.Module, names: list[str] | None = None) -> float:
    """The fraction of zeros among the weights of some layers, counted; `None` is the default of `chosen_layers`."""
    chosen = chosen_layers(network) if names is None else {name: network.get_submodule(name) for name in names}
    zeros = sum(whole((layer.weight.detach() == 0).sum()) for layer in chosen.values())
    return int(zeros) / sum(layer.weight.numel() for layer in chosen.values())


@dataclass(frozen=True)
class Sparsity(Compression):
    """Sets the weights with the lowest scores to zero. A subclass defines the score.

    Applied once, it leaves plain weights; `callbacks.pruning` applies it gradually during a run.

    Args:
        sparsity: Fraction of the weights set to zero, in [0, 1).
        layers: Patterns of layer names; `None` is all matrices inside blocks (`compression.patterns`).
        scope: Which weights compete: those of one output (`row`), of one `layer`, or of all layers (`global`).
        pattern: `N:M` keeps N of every M consecutive inputs of an output, for example `2:4`, which hardware supports;
            it overrides `sparsity` and `scope`.

    Raises:
        ValueError: When a value is out of range.
    """

    sparsity: float = 0.5
    layers: list[str] | None = None
    scope: Scope = "layer"
    pattern: str | int | None = None

    def __post_init__(self) -> None:
        require_range("in [0, 1)", sparsity=self.sparsity)
        if isinstance(self.pattern, int):  # YAML 1.1 reads 2:4 as sexagesimal, 124
            object.__setattr__(self, "pattern", "{}:{}".format(*divmod(self.pattern, 60)))
        if self.pattern is not None:
            n, m = self._n_of_m
            if not 0 < n < m:
                raise ValueError(f"pattern must keep at least 1 and less than all, N < M, but is {self.pattern!r}")

    @property
    def _n_of_m(self) -> tuple[int, int]:
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern or "")
        if not found:
            raise ValueError(f"pattern must be N:M, such as 2:4, but is {self.pattern!r}")
        return int(found[1]), int(found[2])

    @property
    def final(self) -> float:
        """The sparsity at the end."""
        if self.pattern is None:
            return self.sparsity
        n, m = self._n_of_m
        return 1 - n / m

    @abstractmethod
    def scores(self, network: nn.Module, layers: Mapping[str, nn.Module], batches: list[Batch]) -> Scores:
        """The importance of each weight, in the shape of the weight."""

    def chosen(self, network: nn.Module) -> dict[str, nn.Module]:
        """The layers that the method acts on.

        Raises:
            ValueError: When there are none, or the inputs of one are not a multiple of the pattern's M.
        """
        chosen = chosen_layers(network, self.layers)
        if self.pattern is not None:
            m = self._n_of_m[1]
            for name, layer in chosen.items():
                if (inputs := layer.weight[0].numel()) % m:
                    raise ValueError(
                        f"layers must have a multiple of {m} inputs for {self.pattern}, but {name} has {inputs}"
                    )
        return chosen

    def masks(self, scores: Scores, sparsity: float, kept: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The masks at a sparsity, true on kept weights.

        Args:
            scores: Scores of each layer's weights.
            sparsity: The current sparsity, at most `final`. With a pattern, the zeros of each M rise one by one.
            kept: Earlier masks; weights that they drop stay dropped.
        """
        before = kept or {}
        scores = {
            name: score.float().masked_fill(~before[name], -torch.inf) if name in before else score.float()
            for name, score in scores.items()
        }
        if self.pattern is not None:
            n, m = self._n_of_m
            zeros = int((m - n) * sparsity / self.final + 1e-6)
            masks = {name: mask_n_of_m(score, m - zeros, m) for name, score in scores.items()}
        elif self.scope == "row":
            masks = {name: mask_by_row(score, sparsity) for name, score in scores.items()}
        elif self.scope == "layer":
            masks = {name: mask_together({name: score}, sparsity)[name] for name, score in scores.items()}
        else:
            masks = mask_together(scores, sparsity)
        return {name: mask & before[name] if name in before else mask for name, mask in masks.items()}

    @torch.no_grad()
    def compress(self, network: nn.Module, batches: list[Batch]) -> Record:
        """Prunes at once; if the scores need batches, block by block, each on the outputs of the pruned ones before it.

        With `scope` `global`, all blocks are scored before any is pruned.
        """
        chosen = self.chosen(network)
        for layers in self._one_after_another(network, chosen):
            for name, mask in self.masks(self.scores(network, layers, batches), self.final).items():
                layers[name].weight.masked_fill_(~mask, 0)
        return {"layers": list(chosen), "sparsity": sparsity_of(network, list(chosen))}

    def _one_after_another(self, network: nn.Module, chosen: dict[str, nn.Module]) -> list[dict[str, nn.Module]]:
        if not self.needs_batches or self.scope == "global":
            return [chosen]
        blocks = [{*module.modules()} for module in network.modules() if isinstance(module, Block)]
        place = {layer: index for index, block in enumerate(blocks) for layer in block}
        parts = groupby(chosen.items(), key=lambda item: place.get(item[1], item[0]))
        return [dict(part) for _, part in parts]

    @classmethod
    def reform(cls, network: nn.Module, form: dict[str, Any]) -> None:
        """Adds the masks of pruning in progress; completed pruning leaves plain weights and no `form`."""
        add_masks(network, **form)


@dataclass(frozen=True)
class Magnitude(Sparsity):
    """Removes the smallest weights; needs no data.

    Idea: weights near zero change the output least. Suggested: 50 % at once, up to 90 % gradually during training;
    `global` for convolutional networks, whose layers differ most in how much can be pruned.

    Arguments are those of `Sparsity`.

    Source:
        Han et al., 2015, "Learning both Weights and Connections", arXiv:1506.02626, section 3.

    Example:
        >>> layer = nn.Linear(3, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -1.0, 2.0]]))
        >>> record = Magnitude(sparsity=1 / 3, layers=["0"]).apply(nn.Sequential(layer))
        >>> layer.weight.tolist()
        [[3.0, 0.0, 2.0]]
    """

    def scores(self, network: nn.Module, layers: Mapping[str, nn.Module], batches: list[Batch]) -> Scores:
        """`|w|`."""
        return {name: whole(layer.weight.detach()).abs() for name, layer in layers.items()}


@dataclass(frozen=True)
class Wanda(Sparsity):
    """Removes weights that are small *and* have small inputs: `|w|` times the norm of the weight's input.

    Idea: a few inputs of a transformer's layers are far larger than the others, so their weights matter even if they
    are small. Needs no training. Suggested: 50 %, compared within each output, on 128 rows of training text.

    Arguments are those of `Sparsity`; `scope` is `row`, as in the paper, unless given.

    Source:
        Sun et al., 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv:2306.11695,
        eq. 1. As in the paper, blocks are pruned one after another, each on the outputs of the pruned ones before it.
        Norms are root mean squares here, which gives the same order.
    """

    needs_batches = True
    scope: Scope = "row"

    def scores(self, network: nn.Module, layers: Mapping[str, nn.Module], batches: list[Batch]) -> Scores:
        """`|w| · ‖x‖`."""
        norms = input_norms(network, layers, batches)
        return {
            name: weight.abs() * norms[name].view_as(weight[0]).to(weight)
            for name, weight in ((name, whole(layer.weight.detach())) for name, layer in layers.items())
        }


@dataclass(frozen=True)
class Movement(Sparsity):
    """Removes weights that training moves towards zero; only during a run (`callbacks.pruning`).

    Idea: in fine-tuning, the direction in which a weight moves matters, not the size that pre-training gave it.
    Suggested: 85 to 97 % of an encoder's blocks during fine-tuning, over most of the run.

    Arguments are those of `Sparsity`.

    Source:
        Sanh et al., 2020, "Movement Pruning", arXiv:2005.07683, eq. 3: a score is the sum of `-w · ∂L/∂w` over the
        steps. Differences: pruned weights become zero at once and stay pruned, while the paper keeps their values
        behind the mask and lets them return; scores use gradients before clipping and no separate learning rate.
    """

    def scores(self, network: nn.Module, layers: Mapping[str, nn.Module], batches: list[Batch]) -> Scores:
        """The scores that `watch` has accumulated.

        Raises:
            ValueError: Outside a run.
        """
        for name, layer in layers.items():
            if not hasattr(layer, SCORES):
                raise ValueError(
                    f"Movement must be applied during a run, by callbacks.pruning, but {name} has no scores of one"
                )
        return {name: whole(getattr(layer, SCORES)) for name, layer in layers.items()}

    @torch.no_grad()
    def watch(self, layers: Mapping[str, nn.Module]) -> None:
        """Adds a step's movement to the scores; to be called after the backward pass."""
        for layer in layers.values():
            if layer.weight.grad is not None:
                scores, weight, grad = local((getattr(layer, SCORES), layer.weight, layer.weight.grad))
                scores.addcmul_(weight, grad, value=-1)


@dataclass(frozen=True)
class Zeros(Compression):
    """Adds masks that keep zero weights at zero, to continue training a pruned model (`callbacks.pruning.KeepZeros`).

    Args:
        layers: As in `Sparsity`.

    Raises:
        ValueError: When no weight is zero.
    """

    layers: list[str] | None = None

    def compress(self, network: nn.Module, batches: list[Batch]) -> Record:
        """Adds the masks."""
        chosen = chosen_layers(network, self.layers)
        sparsity = sparsity_of(network, list(chosen))
        if not sparsity:
            raise ValueError("network must have zeros to keep, but has none; start from the weights of a pruned model")
        add_masks(network, list(chosen))
        for layer in chosen.values():
            mask, weight = local((getattr(layer, MASK), layer.weight))
            mask.copy_(weight != 0)
        return {"form": {"names": list(chosen)}, "sparsity": sparsity}

    @classmethod
    def reform(cls, network: nn.Module, form: dict[str, Any]) -> None:
        """Adds the masks of a run in progress."""
        add_masks(network, **form)
