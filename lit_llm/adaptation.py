"""Fine-tuning methods: which parameters of a network are trained, from when on, and at what learning rate.

Each is declared before the first step and depends only on depth and step, so a resumed run continues exactly like an
uninterrupted one: there is no state that a checkpoint would have to hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import nn

from lit_llm.blocks import Block, depths
from lit_llm.ranges import require_at_least, require_range
from lit_llm.weights import hf_names


class Adaptation(ABC):
    """A fine-tuning method. Without one, all parameters are trained from the first step at their optimiser's rate.

    Depths are those of `blocks.depths`: 0 is below the blocks, `top` is the head.
    """

    cache_features: ClassVar[bool] = False
    """Whether to compute the backbone's features of each example only once, since they are the same at each step."""

    adds: ClassVar[bool] = False
    """Whether `prepare` adds parameters that can be saved separately from the network."""

    @abstractmethod
    def start(self, depth: int, top: int) -> float | None:
        """Fraction of the training, in [0, 1), after which the parameters at a depth are trained; `None` for never."""

    def rate(self, depth: int, top: int) -> float:
        """Factor on the learning rate at a depth."""
        return 1.0

    def prepare(self, network: nn.Module) -> None:
        """Prepares a network for training, in place: freezes what is never trained.

        Must be called once, after the initial weights have been loaded.

        Raises:
            ValueError: When nothing would be trained, for example if only the head should be and it is tied to the
                embeddings.
        """
        found, top = depths(network)
        for p, depth in found.items():
            p.requires_grad_(p.requires_grad and self.start(depth, top) is not None)  # what came frozen stays so
        if not any(p.requires_grad for p in network.parameters()):
            raise ValueError(
                f"adaptation must leave something to learn, but {type(self).__name__} freezes all of a network that "
                f"has no head apart from its embeddings; take another, such as LoRA"
            )
        freeze_batch_norm_statistics(network)

    def finish(self, network: nn.Module) -> None:  # noqa: B027 (most leave nothing to do)
        """Restores, in place, the form that a trained network had before `prepare`."""

    def save(self, network: nn.Module, folder: Path) -> None:  # noqa: B027 (the same)
        """Writes what was added to the network into `folder`."""

    def groups(self, groups: list[dict[str, Any]], network: nn.Module) -> list[dict[str, Any]]:
        """Splits an optimiser's groups by start and learning-rate factor, which each group holds as `start`, `rate`."""
        found, top = depths(network)
        # A head tied to the embeddings starts with them, so it may be that nothing starts at 0: the earliest then does.
        earliest = min(self.start(found[p], top) or 0.0 for group in groups for p in group["params"])
        split = []
        for group in groups:
            members: dict[tuple[float, float], list[nn.Parameter]] = {}
            for p in group["params"]:
                key = (self.start(found[p], top) or 0.0) - earliest, self.rate(found[p], top)
                members.setdefault(key, []).append(p)
            split += [{**group, "params": members[key], "start": key[0], "rate": key[1]} for key in sorted(members)]
        return split


@dataclass(frozen=True)
class HeadOnly(Adaptation):
    """Trains only the head, on the features of a frozen backbone (a linear probe): the cheapest start.

    Args:
        cache_features: Compute each example's features once, before the first step and without dropout, so that a step
            costs only what the head costs. Not for augmented training examples; without effect (which is logged) if
            the head reads whole sequences.

    Source:
        Alain & Bengio, 2016, "Understanding intermediate layers using linear classifier probes", arXiv:1610.01644.
    """

    cache_features: bool = True

    def start(self, depth: int, top: int) -> float | None:
        """The head from the beginning, the rest never."""
        return 0.0 if depth == top else None


@dataclass(frozen=True)
class FrozenLayers(Adaptation):
    """Freezes the embeddings and the first blocks.

    Args:
        num_layers: Number of frozen blocks; 0 freezes only the embeddings.

    Source:
        Lee et al., 2019, "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning", arXiv:1911.03090.
    """

    num_layers: int

    def __post_init__(self) -> None:
        require_at_least(0, num_layers=self.num_layers)

    def start(self, depth: int, top: int) -> float | None:
        """Everything above the frozen blocks from the beginning."""
        return None if depth <= self.num_layers else 0.0

    def prepare(self, network: nn.Module) -> None:
        """Freezes the embeddings and the first blocks.

        Raises:
            ValueError: When the network has fewer than `num_layers` blocks.
        """
        blocks = sum(isinstance(module, Block) for module in network.modules())
        if self.num_layers > blocks:
            raise ValueError(
                f"num_layers must be at most the blocks of the network, {blocks}, but is {self.num_layers}"
            )
        super().prepare(network)


@dataclass(frozen=True)
class LayerDecay(Adaptation):
    """Discriminative learning rates: each layer learns more slowly than the one above it.

    Args:
        decay: Factor from each layer to the one below, in (0, 1]; 0.65 to 0.95 is usual, smaller for fewer examples.
        head_factor: Factor on the head's rate, above 0: a new head may learn faster than pretrained layers. A head
            tied to the embeddings has their rate.

    Source:
        Howard & Ruder, 2018, "ULMFiT", arXiv:1801.06146, section 3.2 (with 1/2.6); Clark et al., 2020, "ELECTRA",
        arXiv:2003.10555, app. B (0.8, 0.9).
    """

    decay: float = 0.8
    head_factor: float = 1.0

    def __post_init__(self) -> None:
        require_range("in (0, 1]", decay=self.decay)
        require_range("above 0", head_factor=self.head_factor)

    def start(self, depth: int, top: int) -> float | None:
        """Everything from the beginning."""
        return 0.0

    def rate(self, depth: int, top: int) -> float:
        """`head_factor` for the head, `decay ** (top - depth)` below it."""
        return self.head_factor if depth == top else self.decay ** (top - depth)


@dataclass(frozen=True)
class GradualUnfreezing(LayerDecay):
    """Trains the head from the first step, and each layer a little later than the one above it.

    A layer that is not trained yet costs no backward pass.

    Args:
        decay: As in `LayerDecay`; 1 for equal rates.
        head_factor: As in `LayerDecay`.
        until: Fraction of the training, in (0, 1), after which all layers are trained.

    Source:
        Howard & Ruder, 2018, "ULMFiT", arXiv:1801.06146, section 3.3, which adds a layer each epoch.
    """

    decay: float = 1.0
    until: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("in (0, 1)", until=self.until)

    def start(self, depth: int, top: int) -> float | None:
        """Evenly spaced, from 0 for the head to `until` for the embeddings."""
        return self.until * (top - depth) / top


@dataclass(frozen=True)
class LoRA(Adaptation):
    """Low-rank adapters beside the blocks' frozen matrices: `x W + (alpha / rank) x A B`.

    For a convolution, `A` has its kernel size and `B` is a 1 x 1 convolution; grouped convolutions get no adapter. The
    head is trained in full, unless it predicts tokens: then it is pretrained like the rest, and stays frozen.

    When the model is exported, the adapters are merged into plain weights, and also saved separately in `adapter/` in
    peft's format: peft loads them into networks that transformers has.

    Args:
        rank: Rank of the adapters.
        alpha: Numerator of the scale of their output; `None` is twice the rank.
        dropout: Dropout probability of their input, in [0, 1).
        targets: Suffixes of the names of the layers that get an adapter; `None` is all layers inside blocks.

    Raises:
        ValueError: When no layer has such a name.

    Source:
        Hu et al., 2021, "LoRA", arXiv:2106.09685, eq. 3; on all matrices as in Dettmers et al., 2023, "QLoRA",
        arXiv:2305.14314, section 4. `B` starts at zero, so that training starts from the network as it was.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: list[str] | None = None

    adds = True
    peft_options: ClassVar[dict[str, Any]] = {}
    """Options of peft's `LoraConfig` that select this kind of adapter."""

    def __post_init__(self) -> None:
        require_at_least(1, rank=self.rank)
        require_range("in [0, 1)", dropout=self.dropout)

    def start(self, depth: int, top: int) -> float | None:
        """Everything that is trained, from the beginning."""
        return 0.0

    def prepare(self, network: nn.Module) -> None:
        """Inserts the adapters; freezes everything else, except a head that does not predict tokens."""
        from peft import inject_adapter_in_model

        found, top = depths(network)
        # Wrapped, so that peft does not see the network's config: it would take the names for those of old checkpoints.
        holder = nn.ModuleDict({"network": network})
        inject_adapter_in_model(self._config([f"network.{name}" for name in self._layers(network)]), holder)
        for name, p in network.named_parameters():
            p.requires_grad_("lora_" in name or (found.get(p) == top and not hasattr(network, "vocab_size")))
        freeze_batch_norm_statistics(network)

    def _layers(self, network: nn.Module) -> list[str]:
        inside = {
            id(layer)
            for block in network.modules()
            if isinstance(block, Block)
            for layer in block.modules()
            if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D" or _is_convolution(layer)
        }
        names = [name for name, layer in network.named_modules() if id(layer) in inside]
        chosen = [name for name in names if self.targets is None or name.endswith(tuple(self.targets))]
        if not chosen:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names})) or "none"
            raise ValueError(f"targets must name layers with a matrix inside blocks ({known}), but are {self.targets}")
        return chosen

    def _config(self, names: list[str]) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=names,
            **self.peft_options,
        )

    @torch.no_grad()
    def finish(self, network: nn.Module) -> None:
        """Merges the adapters into the weights beside them, and removes them."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, layer in list(network.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                layer.merge(safe_merge=True)
                network.set_submodule(name, layer.get_base_layer())

    def save(self, network: nn.Module, folder: Path) -> None:
        """Writes the adapters, and whatever else was trained, in the format of peft's `PeftModel.from_pretrained`."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        name_of = hf_names(network)
        config = self._config([name_of(n) for n, m in network.named_modules() if isinstance(m, BaseTunerLayer)])
        learnt = {name_of(name): p for name, p in network.named_parameters() if p.requires_grad}
        whole = {name.rpartition(".")[0] for name in learnt if "lora_" not in name}
        config.modules_to_save = sorted(n for n in whole if not any(n.startswith(f"{o}.") for o in whole)) or None
        config.inference_mode = True
        config.save_pretrained(folder)
        tensors = {f"base_model.model.{_saved(name)}": p.detach().cpu().contiguous() for name, p in learnt.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _is_convolution(layer: nn.Module) -> bool:
    """Whether a layer is a convolution that can get an adapter; a grouped one has too few weights for it."""
    return isinstance(layer, nn.Conv2d) and layer.groups == 1


def freeze_batch_norm_statistics(network: nn.Module) -> None:
    """Puts frozen batch-norm layers into evaluation mode, so that they keep their running statistics."""
    for module in network.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and own and not any(p.requires_grad for p in own):
            module.eval()


def _saved(name: str) -> str:
    """The name under which peft saves a parameter of an adapter."""
    return name.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA that adapts direction and magnitude of the weights separately: closer to full fine-tuning at low ranks.

    Arguments are those of `LoRA`.

    Source:
        Liu et al., 2024, "DoRA", arXiv:2402.09353, eq. 5.
    """

    peft_options: ClassVar[dict[str, Any]] = {"use_dora": True}


@dataclass(frozen=True)
class RSLoRA(LoRA):
    """LoRA scaled by `alpha / sqrt(rank)`, so that larger ranks do not learn more slowly.

    Arguments are those of `LoRA`.

    Source:
        Kalajdzievski, 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732, eq. 3.
    """

    peft_options: ClassVar[dict[str, Any]] = {"use_rslora": True}
