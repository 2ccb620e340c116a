"""Low-rank factorisation: a matrix becomes the product of two thin ones, in ordinary layers."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lit_llm.compression.calibration import answer, input_covariances
from lit_llm.compression.compression import Batch, Compression, Record
from lit_llm.compression.patterns import MATRICES, chosen_layers
from lit_llm.modes import evaluating
from lit_llm.ranges import require_at_least, require_range

Allocation = Literal["uniform", "energy", "sensitivity"]


class Factors(NamedTuple):
    """A matrix as `left · right`; at rank r, the first r columns of `left` and rows of `right`.

    Attributes:
        left: Left singular vectors (outputs).
        right: Right singular vectors (inputs), multiplied by the singular values.
        singular_values: In descending order. Each one's square is what its rank adds to the squared norm of the
            weight, or, for `activation_svd`, to the mean squared norm of the output.
    """

    left: Float[Tensor, "outputs full"]
    right: Float[Tensor, "full inputs"]
    singular_values: Float[Tensor, " full"]


def svd(weight: Float[Tensor, "outputs inputs"]) -> Factors:
    """The factors with the smallest error of the weight at each rank, in the Frobenius norm.

    Source:
        Eckart & Young, 1936, "The approximation of one matrix by another of lower rank".
    """
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    return Factors(u, s[:, None] * v, s)


def activation_svd(
    weight: Float[Tensor, "outputs inputs"], covariance: Float[Tensor, "inputs inputs"], ridge: float = 1e-6
) -> Factors:
    """The factors with the smallest error of the output at each rank, in mean square over the calibration inputs.

    Args:
        weight: Outputs by inputs.
        covariance: The mean of `x xᵀ`.
        ridge: Added to the covariance's diagonal, as a fraction of the mean variance, so that few rows are enough.

    Source:
        Wang et al., 2024, "SVD-LLM", arXiv:2403.07378, section 3.1: with `L Lᵀ` the covariance (Cholesky), the
        singular values of `W L` are the output errors of dropping them.
    """
    covariance = covariance.double()
    floor = ridge * covariance.diagonal().mean().clamp(min=1e-30)
    root = torch.linalg.cholesky(
        covariance + floor * torch.eye(len(covariance), dtype=torch.float64, device=weight.device)
    )
    u, s, v = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    return Factors(u, torch.linalg.solve_triangular(root, s[:, None] * v, upper=False, left=False), s)


def matrix(layer: nn.Module) -> Float[Tensor, "outputs inputs"]:
    """A layer's weight as a matrix; a convolution's inputs are channels × kernel positions."""
    return layer.weight.detach().flatten(1)


def factorized(layer: nn.Module, rank: int) -> nn.Sequential:
    """Two layers of the layer's class with `rank` features between them; their weights are not initialised.

    For a convolution, the first keeps kernel size, stride, padding and dilation; the second is 1 × 1. Parameters
    require gradients if those of the layer do.
    """

    def make(*sizes: Any, **options: Any) -> nn.Module:  # draws no random numbers, so that a run's stay the same
        kind = next(kind for kind in MATRICES if isinstance(layer, kind))
        return skip_init(kind, *sizes, device=layer.weight.device, dtype=layer.weight.dtype, **options)

    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        pair = make(layer.in_features, rank, bias=False), make(rank, layer.out_features, bias=bias)
    else:
        looks = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}
        pair = make(layer.in_channels, rank, bias=False, **looks), make(rank, layer.out_channels, 1, bias=bias)
    for made in pair:
        made.weight.requires_grad_(layer.weight.requires_grad)
    if bias:
        pair[1].bias.requires_grad_(layer.bias.requires_grad)
    return nn.Sequential(*pair).train(layer.training)


@torch.no_grad()
def factorize(layer: nn.Module, factors: Factors, rank: int) -> nn.Sequential:
    """The layer at a rank, with the singular values split evenly between both factors and the bias in the second."""
    made = factorized(layer, rank)
    scale = factors.singular_values[:rank].clamp(min=1e-30).sqrt()
    made[0].weight.copy_((factors.right[:rank] / scale[:, None]).view_as(made[0].weight))
    made[1].weight.copy_((factors.left[:, :rank] * scale).view_as(made[1].weight))
    if layer.bias is not None:
        made[1].bias.copy_(layer.bias)
    return made


def allocate(
    energies: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], budget: int, weights: Mapping[str, float]
) -> dict[str, int | None]:
    """Distributes ranks over layers greedily: the next rank goes where it keeps the most energy per parameter.

    Args:
        energies: Energy that each rank of a layer keeps, in descending order.
        shapes: Outputs and inputs of each layer.
        budget: Number of parameters for all layers together.
        weights: Weight of each layer's energy.

    Returns:
        The rank of each layer, at least 1; `None` if the whole layer costs no more than its factors.

    Example:
        >>> flat, steep = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([8.0, 0.1, 0.1, 0.1])
        >>> shapes = {"flat": (4, 8), "steep": (4, 8)}
        >>> allocate({"flat": flat, "steep": steep}, shapes, budget=44, weights={"flat": 1.0, "steep": 1.0})
        {'flat': None, 'steep': 1}
    """
    full = {name: -(-outputs * inputs // (outputs + inputs)) for name, (outputs, inputs) in shapes.items()}
    ranks: dict[str, int | None] = dict.fromkeys(energies, 1)
    left = budget - sum(sum(shape) for shape in shapes.values())
    queue: list[tuple[float, int, str]] = []

    def offer(name: str) -> None:
        """Queues the next step of a layer: one more rank, or the whole layer if the factors would cost as much."""
        rank, (outputs, inputs) = ranks[name], shapes[name]
        last = rank + 1 >= full[name]
        gain = energies[name][rank:].sum() if last else energies[name][rank]
        cost = outputs * inputs - rank * (outputs + inputs) if last else outputs + inputs
        heapq.heappush(queue, (-weights[name] * float(gain) / max(cost, 1), cost, name))

    for name in energies:
        offer(name)
    while queue:
        _, cost, name = heapq.heappop(queue)
        if cost > left:
            continue
        left -= cost
        if ranks[name] + 1 >= full[name]:
            ranks[name] = None
        else:
            ranks[name] += 1
            offer(name)
    return ranks


@dataclass(frozen=True)
class SVD(Compression):
    """Replaces each matrix by the closest product of two thin matrices.

    Idea: a matrix whose singular values fall fast needs few of them. Suggested: keep at least half of the parameters,
    followed by a recovery run (`callbacks.low_rank`, or training on from the directory); without one, quality suffers
    much.

    Args:
        parameters: Fraction of the layers' parameters to keep, in (0, 1), over all layers together.
        allocation: Distribution of the parameters. `uniform` keeps the same fraction of each layer. `energy` gives the
            next rank to the layer where a parameter keeps the largest share of the squared singular values.
            `sensitivity` does the same, with each layer weighted by how much its factorisation changes the network's
            output on calibration batches.
        rank: The same rank for all layers that it makes smaller, instead of the two arguments above.
        layers: Patterns of layer names; `None` is all matrices inside blocks (`compression.patterns`).

    Raises:
        ValueError: When a value is out of range, a rank exceeds a layer's, or no layer would become smaller.

    Source:
        Denton et al., 2014, arXiv:1404.0736; budgets by singular values as in Yang et al., 2020, arXiv:2004.09031;
        sensitivity after Yuan et al., 2023, "ASVD", arXiv:2312.05821, section 3.3, with the KL divergence of outputs
        instead of perplexity and one measurement per layer. A convolution becomes one of the same kernel and a 1 × 1.
    """

    parameters: float = 0.5
    allocation: Allocation = "energy"
    rank: int | None = None
    layers: list[str] | None = None

    def __post_init__(self) -> None:
        require_range("in (0, 1)", parameters=self.parameters)
        require_at_least(1, rank=self.rank)

    @property
    def needs_batches(self) -> bool:
        """Whether sensitivity is measured."""
        return self.allocation == "sensitivity" and self.rank is None

    def factors(self, network: nn.Module, layers: Mapping[str, nn.Module], batches: list[Batch]) -> dict[str, Factors]:
        """The factors of each layer, at full rank."""
        return {name: svd(matrix(layer)) for name, layer in layers.items()}

    def chosen(self, network: nn.Module) -> dict[str, nn.Module]:
        """The layers.

        Raises:
            ValueError: When there are none, one has groups, or `rank` exceeds that of one.
        """
        layers = chosen_layers(network, self.layers)
        for name, layer in layers.items():
            if getattr(layer, "groups", 1) != 1:
                raise ValueError(f"layers must be convolutions without groups, but {name} has {layer.groups}")
            if self.rank is not None and self.rank > (most := min(matrix(layer).shape)):
                raise ValueError(
                    f"rank must be at most that of the layers, but is {self.rank}, above the {most} of {name}"
                )
        return layers

    def compress(self, network: nn.Module, batches: list[Batch]) -> Record:
        """Replaces each layer by two if these are smaller."""
        layers = self.chosen(network)
        own = dict(network.named_parameters())  # lists tied matrices once, under their first name
        if tied := [name for name in layers if f"{name}.weight" not in own]:
            raise ValueError(f"layers must have weights of their own, but {tied[0]} shares another's")
        factors = self.factors(network, layers, batches)
        ranks = self._ranks(network, layers, factors, batches)
        if not any(ranks.values()):
            given = f"rank is {self.rank}" if self.rank is not None else f"parameters is {self.parameters}"
            raise ValueError(f"layers must have one that two thin ones are smaller than, but have none where {given}")
        form = {}
        for name, rank in ranks.items():
            if rank is not None:
                network.set_submodule(name, factorize(layers[name], factors[name], rank))
                form[name] = rank
        before = sum(matrix(layer).numel() for layer in layers.values())
        after = sum(
            form[name] * sum(matrix(layer).shape) if name in form else matrix(layer).numel()
            for name, layer in layers.items()
        )
        return {"parameters": after / before, "form": form}

    def _ranks(
        self, network: nn.Module, layers: Mapping[str, nn.Module], factors: Mapping[str, Factors], batches: list[Batch]
    ) -> dict[str, int | None]:
        shapes = {name: tuple(matrix(layer).shape) for name, layer in layers.items()}
        even = {name: self.rank or max(1, int(self.parameters * o * i / (o + i))) for name, (o, i) in shapes.items()}
        if self.allocation == "uniform" or self.rank is not None:
            return {
                name: rank if rank * sum(shapes[name]) < math.prod(shapes[name]) else None
                for name, rank in even.items()
            }
        squares = {name: found.singular_values.square() for name, found in factors.items()}
        shares = {name: square / square.sum().clamp(min=1e-30) for name, square in squares.items()}
        weights = dict.fromkeys(layers, 1.0)
        if self.allocation == "sensitivity":
            lost = {name: float(share[even[name] :].sum()) for name, share in shares.items()}
            harm = self._harm(network, layers, factors, even, batches)
            weights = {name: harm[name] / max(lost[name], 1e-12) for name in layers}
        budget = int(self.parameters * sum(outputs * inputs for outputs, inputs in shapes.values()))
        return allocate(shares, shapes, budget, weights)

    @torch.no_grad()
    def _harm(
        self,
        network: nn.Module,
        layers: Mapping[str, nn.Module],
        factors: Mapping[str, Factors],
        ranks: Mapping[str, int],
        batches: list[Batch],
    ) -> dict[str, float]:
        """Mean KL divergence of the network's output, in nats, if one layer alone is reduced to its rank."""
        with evaluating(network):
            whole = [answer(network, batch).float().log_softmax(-1) for batch in batches]
            harm = {}
            for name, layer in layers.items():
                network.set_submodule(name, factorize(layer, factors[name], ranks[name]))
                moved = 0.0
                for batch, expected in zip(batches, whole):
                    said = answer(network, batch).float().log_softmax(-1)
                    divergence = F.kl_div(said, expected, reduction="sum", log_target=True)
                    moved += float(divergence) / expected[..., 0].numel()
                network.set_submodule(name, layer)
                harm[name] = moved / len(batches)
        return harm

    @classmethod
    def reform(cls, network: nn.Module, form: dict[str, Any]) -> None:
        """Replaces each factorised layer by two."""
        for name, rank in form.items():
            layer = network.get_submodule(name)
            if not isinstance(layer, nn.Sequential):
                network.set_submodule(name, factorized(layer, rank))


@dataclass(frozen=True)
class ActivationSVD(SVD):
    """Replaces each matrix by the product of two thin ones with the closest output on calibration batches.

    Idea: a layer's inputs lie in few directions, so the matrix can be inexact in the others. Suggested: as for `SVD`,
    on at least 64 rows of training text.

    Arguments are those of `SVD`; energies are those of the outputs.

    Source:
        Wang et al., 2024, "SVD-LLM", arXiv:2403.07378, section 3.1; Yuan et al., 2023, "ASVD", arXiv:2312.05821.
    """

    needs_batches = True

    def factors(self, network: nn.Module, layers: Mapping[str, nn.Module], batches: list[Batch]) -> dict[str, Factors]:
        """The factors of each layer, at full rank, for its inputs on the batches."""
        covariances = input_covariances(network, layers, batches)
        return {name: activation_svd(matrix(layer), covariances[name]) for name, layer in layers.items()}
