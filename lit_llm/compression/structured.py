"""Structured pruning: removes heads, neurons, channels or blocks, which leaves a network with smaller matrices."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.compression.calibration import answer, mask_of, vectors, watching
from lit_llm.compression.compression import Batch, Compression, Record, is_reformed
from lit_llm.compression.importance import column_squares, cross_entropy, per_example, taylor
from lit_llm.compression.integers import QuantizedConvolution
from lit_llm.compression.patterns import chosen_layers
from lit_llm.compression.surgery import (
    keep_listed,
    keep_units,
    linear_of,
    list_of_blocks,
    require_described,
    set_size,
    size_of,
)
from lit_llm.modes import evaluating
from lit_llm.ranges import require_range
from lit_llm.wording import needing

Importance = Literal["magnitude", "activation", "taylor"]

FEED_FORWARD = (
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),  # Llama and similar
    (("mlp.c_fc",), "mlp.c_proj"),  # GPT-2
    (("intermediate.dense",), "output.dense"),  # BERT and similar, ViT
    (("mlp.Wi",), "mlp.Wo"),  # ModernBERT, whose gate is the second half of `Wi`
    (("ffn.lin1",), "ffn.lin2"),  # DistilBERT
)
"""Names, within a block, of the layers that compute a feed-forward layer's neurons and of the one that reads them."""

WIDTHS = ("d_ff", "intermediate_size", "hidden_dim")
"""Names of the number of these neurons in networks and configs."""

HEADS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"
NUM_HEADS = (("num_heads", "num_kv_heads"), ("num_attention_heads", "num_key_value_heads"))
HEAD_WIDTHS = ("d_head", "head_dim")
NUM_BLOCKS = ("num_layers", "num_hidden_layers", "n_layers")


@dataclass(frozen=True)
class Structured(Compression):
    """Removes the least important units. A subclass defines the units.

    Each layer loses the same number, so the network keeps its architecture: its config states the new size, and
    transformers reads model directories as before. The result computes what the original network would compute with
    those units set to zero.

    Args:
        sparsity: Fraction of the units of each layer to remove, in [0, 1), rounded to whole units; at least one stays.
        importance: How units are ranked: by the size of their weights (`magnitude`), by their contribution on
            calibration batches (`activation`), or by the first-order change of the loss without them (`taylor`; uses
            labels if the batches have them).

    Raises:
        ValueError: When a value is out of range.
    """

    sparsity: float = 0.5
    importance: Importance = "magnitude"

    def __post_init__(self) -> None:
        require_range("in [0, 1)", sparsity=self.sparsity)

    @property
    def needs_batches(self) -> bool:
        """Whether importance depends on more than the weights."""
        return self.importance != "magnitude"

    def kept(self, importance: Tensor) -> Tensor:
        """The indices of the units to keep, in ascending order."""
        num = max(1, len(importance) - round(self.sparsity * len(importance)))
        return importance.argsort(descending=True, stable=True)[:num].sort().values


class _OfBlocks(Structured):
    """Units of each block that some linear layers (writers) compute and another one (the reader) takes as its input."""

    what: ClassVar[str]

    @abstractmethod
    def places(self, network: nn.Module, block: nn.Module) -> tuple[str, int, dict[str, int]] | None:
        """Name of the reader, its inputs per unit, and the rows per unit of each writer by name; `None` if absent."""

    @abstractmethod
    def resize(self, network: nn.Module, num: int) -> None:
        """Sets the new size in the network and its config."""

    def compress(self, network: nn.Module, batches: list[Batch]) -> Record:
        """Removes the units from each block."""
        list_name, blocks = list_of_blocks(network)
        found = [self.places(network, block) for block in blocks]
        if not all(found) or not hasattr(network, "to_hf_config"):
            raise ValueError(
                f"network must have {self.what}, but a {type(getattr(network, 'model', network)).__name__} has not, or "
                f"has been factorised or quantised, which is for afterwards"
            )
        readers = {f"{list_name}.{i}.{name}": linear_of(blocks[i], name) for i, (name, _, _) in enumerate(found)}
        width = found[0][1]
        if self.importance == "activation":
            scores = column_squares(network, readers, width, batches)
        elif self.importance == "taylor":
            scores = taylor(network, readers, batches, lambda x: per_example(x).unflatten(1, (-1, width)).sum(2))
        else:
            scores = {name: self._squares(blocks[i], found[i]) for i, name in enumerate(readers)}
        kept = []
        for block, (reader, _, rows), score in zip(blocks, found, scores.values()):
            stay = self.kept(score)
            kept.append(stay.tolist())
            for writer, num in rows.items():
                layer = linear_of(block, writer)
                halves = layer.out_features // (num * len(score))  # two if a gate is in the same matrix
                places = [_spread(stay, num) + half * num * len(score) for half in range(halves)]
                keep_units(layer, rows=torch.cat(places))
            keep_units(linear_of(block, reader), columns=_spread(stay, width))
        self.resize(network, len(kept[0]))
        require_described(network, batches)
        return {"kept": kept, "of": len(score)}

    def _squares(self, block: nn.Module, place: tuple[str, int, dict[str, int]]) -> Tensor:
        """Sum of squares of all weights of each unit."""
        reader, width, rows = place
        total = linear_of(block, reader).weight.detach().square().sum(0).unflatten(0, (-1, width)).sum(1)
        for writer, num in rows.items():
            squares = linear_of(block, writer).weight.detach().square().sum(1)
            total = total + squares.view(-1, len(total), num).sum((0, 2))
        return total


def _spread(units: Tensor, width: int) -> Tensor:
    """The indices of all `width` parts of each unit, for units that are stored contiguously."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


@dataclass(frozen=True)
class Neurons(_OfBlocks):
    """Removes neurons of the feed-forward layers.

    Idea: two thirds of the parameters of a transformer's blocks are in feed-forward layers, and many neurons are seldom
    active. Suggested: half of them by `activation`, then a recovery run; the first method to try on a decoder or an
    encoder.

    Arguments are those of `Structured`.

    Source:
        Groups of coupled weights: Ma et al., 2023, "LLM-Pruner", arXiv:2305.11627, section 3.1; uniform widths: Xia et
        al., 2023, "Sheared LLaMA", arXiv:2310.06694. `activation` is Wanda's score (arXiv:2306.11695) for whole
        columns.
    """

    what = "feed-forward layers of a known form"

    def places(self, network: nn.Module, block: nn.Module) -> tuple[str, int, dict[str, int]] | None:
        """One row of each writer and one input of the reader."""
        for writers, reader in FEED_FORWARD:
            if all(linear_of(block, name) is not None for name in (*writers, reader)):
                return reader, 1, dict.fromkeys(writers, 1)
        return None

    def resize(self, network: nn.Module, num: int) -> None:
        """Sets the width of the feed-forward layers."""
        set_size(network, WIDTHS, num)


@dataclass(frozen=True)
class Heads(_OfBlocks):
    """Removes attention heads; a key-value head is removed together with all query heads that share it.

    For networks whose config states the head width separately: Llama, Qwen3 and similar. If it is the network's width
    divided by the number of heads (GPT-2, BERT, ModernBERT), no config could describe the result.

    Suggested: up to half of the heads, by `activation`, together with `Neurons`.

    Arguments are those of `Structured`.

    Source:
        Michel et al., 2019, "Are Sixteen Heads Really Better than One?", arXiv:1905.10650.
    """

    what = "attention heads whose width its config states"

    def places(self, network: nn.Module, block: nn.Module) -> tuple[str, int, dict[str, int]] | None:
        """One key-value head, and all query heads that share it."""
        writers, reader = HEADS
        width = size_of(network, HEAD_WIDTHS)
        if width is None or any(linear_of(block, name) is None for name in (*writers, reader)):
            return None
        group = linear_of(block, writers[0]).out_features // linear_of(block, writers[1]).out_features
        rows = dict(zip(writers, (group * width, width, width)))
        return reader, group * width, rows

    def resize(self, network: nn.Module, num: int) -> None:
        """Sets the numbers of query heads and key-value heads."""
        for queries, keys in NUM_HEADS:
            heads, groups = size_of(network, (queries,)), size_of(network, (keys,))
            if heads is not None and groups is not None:
                set_size(network, (queries,), num * heads // groups)
                set_size(network, (keys,), num)


@dataclass(frozen=True)
class Blocks(Structured):
    """Removes whole blocks: those that change their input least.

    Idea: in the upper half of a deep network, blocks are nearly the identity. This saves as much time as parameters, on
    any hardware. Suggested: up to a third, by `activation`, then a recovery run. The first block always stays.

    Args:
        sparsity: Fraction of the blocks to remove, in [0, 1), rounded to whole blocks.
        importance: `activation` is one minus the cosine similarity of a block's input and output, over tokens without
            padding; `magnitude` is the mean square of its weights; `taylor` is the first-order change of the loss if
            the block added nothing.

    Source:
        Men et al., 2024, "ShortGPT", arXiv:2403.03853, eq. 1.
    """

    importance: Importance = "activation"

    def compress(self, network: nn.Module, batches: list[Batch]) -> Record:
        """Removes the blocks."""
        name, blocks = list_of_blocks(network)
        if not hasattr(network, "to_hf_config") or size_of(network, NUM_BLOCKS) is None:
            raise ValueError(
                f"network must have a config that counts its blocks, but a {type(network).__name__} has none"
            )
        if is_reformed(network):
            raise ValueError(
                "network must be whole where blocks are taken out, but has been factorised or quantised, which is for "
                "afterwards"
            )
        scores = self._scores(blocks, network, batches)
        scores[0] = torch.inf
        stay = self.kept(scores).tolist()
        rest = nn.ModuleList([blocks[index] for index in stay])
        rest.training = blocks.training
        network.set_submodule(name, rest)
        for index, old in enumerate(stay):
            for module in blocks[old].modules():
                if vars(module).get("layer_idx") == old:
                    module.layer_idx = index
        set_size(network, NUM_BLOCKS, len(stay))
        keep_listed(network, stay, len(scores))
        require_described(network, batches)
        return {"kept": stay, "of": len(scores)}

    def _scores(self, blocks: nn.ModuleList, network: nn.Module, batches: list[Batch]) -> Tensor:
        if self.importance == "magnitude":
            squares = [[p.detach().square().mean() for p in block.parameters() if p.ndim > 1] for block in blocks]
            return torch.stack([torch.stack(of_block).mean() for of_block in squares])
        named = {str(index): block for index, block in enumerate(blocks)}
        scores = torch.zeros(len(blocks))
        for batch in batches:
            read: dict[str, Tensor] = {}
            given: dict[str, Tensor] = {}

            def give(name: str, x: Any, given: dict[str, Tensor] = given) -> None:
                given[name] = x[0] if isinstance(x, tuple) else x

            wants = self.importance == "taylor"
            looking = watching(named, read.__setitem__), watching(named, give, outputs=True)
            with evaluating(network), looking[0], looking[1], torch.set_grad_enabled(wants):
                loss = cross_entropy(network, batch)
            if wants:
                gradients = torch.autograd.grad(loss, [given[name] for name in named])
                for index, (name, gradient) in enumerate(zip(named, gradients)):
                    added = (given[name] - read[name]).detach()
                    scores[index] += (added * gradient).flatten(1).sum(1).abs().sum().cpu()
            else:
                mask = mask_of(batch)
                for index, (name, block) in enumerate(named.items()):
                    before, after = (vectors(block, x[name], mask) for x in (read, given))
                    scores[index] += (1 - F.cosine_similarity(before, after, dim=-1)).mean().cpu()
        return scores


@dataclass(frozen=True)
class Channels(Structured):
    """Removes channels of convolutions and everything that depends on them: inputs of the next layer, norms, shortcuts.

    Idea: filters with weak outputs can be removed. Suggested: half of the channels, by `taylor` or `activation`, then a
    recovery run. Torch-pruning finds the dependencies from one calibration batch.

    Args:
        sparsity: Fraction of the channels of each convolution to remove, in [0, 1), rounded; at least one stays.
        importance: As in `Structured`; `magnitude` is the sum of squares of the filter's weights, `activation` the mean
            square of the positive part of its output.
        layers: Patterns of the names of convolutions; `None` is all of them.

    Source:
        Li et al., 2016, "Pruning Filters for Efficient ConvNets", arXiv:1608.08710; the dependency graph: Fang et al.,
        2023, "DepGraph", arXiv:2301.12900.
    """

    layers: list[str] | None = None

    needs_batches = True

    def chosen(self, network: nn.Module) -> dict[str, nn.Module]:
        """The convolutions.

        Raises:
            ValueError: When there are none.
        """
        kinds = (nn.Conv1d, nn.Conv2d)
        if not any(isinstance(module, (*kinds, QuantizedConvolution)) for module in network.modules()):
            raise ValueError(
                f"network must have convolutions to take channels out of, but a {type(network).__name__} has none; "
                f"transformers have Neurons, Heads and Blocks"
            )
        return chosen_layers(network, self.layers or ["*"], kinds)

    def compress(self, network: nn.Module, batches: list[Batch]) -> Record:
        """Removes the channels."""
        with needing("torch-pruning", "compression", "to take channels out"):
            import torch_pruning

        out = torch_pruning.prune_conv_out_channels
        convolutions = self.chosen(network)
        scores = self._scores(network, convolutions, batches)
        before, done = _shapes(network), set()
        with evaluating(network), torch.enable_grad():
            graph = torch_pruning.DependencyGraph().build_dependency(
                network, example_inputs=batches[0], forward_fn=answer, verbose=False
            )
            for layer in convolutions.values():
                if layer in done:
                    continue
                group = graph.get_pruning_group(layer, out, [0])
                # Layers whose outputs are added, as by shortcuts, must keep the same channels.
                together = {d.target.module for d, _ in group if d.handler == out}
                done |= together
                score = sum(score for name, score in scores.items() if convolutions[name] in together)
                gone = sorted(set(range(layer.out_channels)) - set(self.kept(score).tolist()))
                group = graph.get_pruning_group(layer, out, gone)
                if gone and graph.check_pruning_group(group):
                    group.prune()
        after = _shapes(network)
        changed = {name: shape for name, shape in after.items() if before[name] != shape}
        if not changed and self.sparsity:
            raise ValueError(f"network must have channels that can go, but a {type(network).__name__} has none")
        return {"form": changed} if changed else {}

    def _scores(self, network: nn.Module, layers: Mapping[str, nn.Module], batches: list[Batch]) -> dict[str, Tensor]:
        if self.importance == "magnitude":
            found = {name: layer.weight.detach().square().flatten(1).sum(1) for name, layer in layers.items()}
        elif self.importance == "taylor":
            found = taylor(network, layers, batches, lambda x: x.flatten(2).sum(2), outputs=True)
        else:
            found = {}

            def see(name: str, x: Tensor) -> None:
                found[name] = found.get(name, 0) + x.relu().square().flatten(2).mean(2).sum(0)

            for batch in batches:
                with torch.no_grad(), evaluating(network), watching(layers, see, outputs=True):
                    answer(network, batch)
        return {name: score / score.sum().clamp(min=1e-30) for name, score in found.items()}

    @classmethod
    def reform(cls, network: nn.Module, form: dict[str, Any]) -> None:
        """Gives layers their reduced shapes."""
        for name, shape in form.items():
            layer = network.get_submodule(name)
            for attribute, value in shape["attributes"].items():
                setattr(layer, attribute, tuple(value) if isinstance(value, list) else value)
            for place, size in shape["tensors"].items():
                old = getattr(layer, place)
                if list(old.shape) != size:
                    new = torch.zeros(size, dtype=old.dtype, device=old.device)
                    setattr(layer, place, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)


WIDTHS_OF_LAYERS = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features")


def _shapes(network: nn.Module) -> dict[str, Any]:
    """The tensor shapes and size attributes of all modules, as plain values."""
    return {
        name: {
            "attributes": {a: getattr(module, a) for a in WIDTHS_OF_LAYERS if isinstance(getattr(module, a, None), int)}
            | ({"normalized_shape": list(module.normalized_shape)} if isinstance(module, nn.LayerNorm) else {}),
            "tensors": {place: list(tensor.shape) for place, tensor in module.state_dict().items() if "." not in place},
        }
        for name, module in network.named_modules()
    }
