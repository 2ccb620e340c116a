"""Quantisation of weights to integers, after training or by quantisation-aware training, with torchao."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_llm.compression.compression import Batch, Compression, Record, records_of
from lit_llm.compression.integers import Quantized, QuantizedConvolution, QuantizedEmbedding, QuantizedLinear, pack
from lit_llm.compression.patterns import chosen_layers

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


class Quantization(Compression):
    """Stores weights as integers. A subclass defines the classes of layers and torchao's config.

    A quantised network is saved as plain tensors and rebuilt from its record; transformers cannot read it. Quantised
    layers cannot be compressed further, so in a chain of methods quantisation comes last.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    """Classes of layers that the method supports."""

    layers: list[str] | None

    @abstractmethod
    def config(self) -> Any:
        """torchao's config."""

    def chosen(self, network: nn.Module) -> dict[str, nn.Module]:
        """The layers.

        Raises:
            ValueError: When there are none, or their inputs do not divide into groups.
        """
        layers = chosen_layers(network, self.layers, self.kinds)
        size = getattr(self, "group_size", None)  # `None`: one scale per output
        for name, layer in layers.items():
            inputs = layer.weight.shape[1:].numel()
            if size is not None and inputs % size:
                raise ValueError(f"group_size must divide the inputs of each layer, {inputs} of {name}, but is {size}")
        return layers

    def quantized(self, layer: nn.Module) -> Quantized:
        """The quantised replacement of a layer."""
        stand_in = nn.Sequential(nn.Linear(1, 1, bias=False, device="meta"))  # torchao quantises linear layers
        stand_in[0].weight = nn.Parameter(layer.weight.detach().flatten(1), requires_grad=False)
        _torchao().quantize_(stand_in, self.config())
        return _in_place_of(layer, stand_in[0].weight)

    def compress(self, network: nn.Module, batches: list[Batch]) -> Record:
        """Replaces the layers."""
        layers = self.chosen(network)
        for name, layer in layers.items():
            network.set_submodule(name, self.quantized(layer))
        return {"form": self.form(layers)}

    def form(self, names: Iterable[str]) -> dict[str, Any]:
        """What is needed to recreate the layers."""
        return {"names": list(names), "init_args": self.described()["init_args"]}

    @classmethod
    def reform(cls, network: nn.Module, form: dict[str, Any]) -> None:
        """Replaces the layers; their values are loaded afterwards."""
        method = cls(**form["init_args"])
        for name in form["names"]:
            layer = network.get_submodule(name)
            if not isinstance(layer, Quantized):
                network.set_submodule(name, method.quantized(layer))


def _in_place_of(layer: nn.Module, weight: Tensor) -> Quantized:
    kinds = {nn.Embedding: QuantizedEmbedding} | dict.fromkeys(CONVOLUTIONS, QuantizedConvolution)
    kind = next((ours for kind, ours in kinds.items() if isinstance(layer, kind)), QuantizedLinear)
    return kind(layer, weight).train(layer.training)


@dataclass(frozen=True)
class Int8WeightOnly(Quantization):
    """8-bit weights with one scale per output; computation is in floating point.

    A quarter of the bytes. Also supports convolutions and embeddings.

    Args:
        layers: Patterns of layer names; `None` is all matrices inside blocks. `*` is all, embeddings and head included.

    Source:
        Jacob et al., 2017, arXiv:1712.05877, section 2.1, symmetric; by torchao's `Int8WeightOnlyConfig`.

    Example:
        >>> network = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
        >>> _ = Int8WeightOnly().apply(network)
        >>> network
        Sequential(
          (0): QuantizedLinear((4, 8), 8 bits, 8 a scale)
          (1): Linear(in_features=4, out_features=2, bias=True)
        )
    """

    layers: list[str] | None = None

    kinds: ClassVar = (nn.Linear, *CONVOLUTIONS, nn.Embedding)

    def config(self) -> Any:
        """torchao's config."""
        return _torchao().Int8WeightOnlyConfig()


@dataclass(frozen=True)
class Int8Dynamic(Quantization):
    """8-bit weights, and inputs of linear layers quantised to 8 bits on the fly with one scale per row.

    A quarter of the bytes; matrix products are of integers.

    Args:
        layers: As in `Int8WeightOnly`, for linear layers.

    Source:
        Dettmers et al., 2022, "LLM.int8()", arXiv:2208.07339, section 2 (vector-wise, without its outliers); by
        torchao's `Int8DynamicActivationInt8WeightConfig`.
    """

    layers: list[str] | None = None

    def config(self) -> Any:
        """torchao's config."""
        return _torchao().Int8DynamicActivationInt8WeightConfig()


@dataclass(frozen=True)
class Int4WeightOnly(Quantization):
    """4-bit weights with one scale per group of inputs, stored two per byte; computation is in floating point.

    About a seventh of the bytes. `QuantizationAwareTraining` trains for this format.

    Args:
        layers: As in `Int8WeightOnly`, for linear layers and embeddings.
        group_size: Inputs that share a scale; 32 to 128 is usual. Smaller is more accurate; a scale takes 32 bits.

    Raises:
        ValueError: When groups do not divide a layer's inputs.

    Source:
        Frantar et al., 2022, "GPTQ", arXiv:2210.17323, section 2 (the rounding it improves on, by groups); by torchao's
        `IntxWeightOnlyConfig`.
    """

    layers: list[str] | None = None
    group_size: int = 64

    kinds: ClassVar = (nn.Linear, nn.Embedding)

    def __post_init__(self) -> None:
        _require_groups(self.group_size)

    def config(self) -> Any:
        """torchao's config."""
        ao = _torchao()
        return ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(self.group_size))


@dataclass(frozen=True)
class Int8DynamicInt4(Quantization):
    """4-bit weights as in `Int4WeightOnly`, and inputs of linear layers quantised to 8 bits with one scale per row.

    Args:
        layers: As in `Int8WeightOnly`, for linear layers.
        group_size: As in `Int4WeightOnly`.

    Raises:
        ValueError: When groups do not divide a layer's inputs.

    Source:
        Yao et al., 2022, "ZeroQuant", arXiv:2206.01861, section 4.1; by torchao's
        `Int8DynamicActivationIntxWeightConfig`.
    """

    layers: list[str] | None = None
    group_size: int = 64

    def __post_init__(self) -> None:
        _require_groups(self.group_size)

    def config(self) -> Any:
        """torchao's config."""
        ao = _torchao()
        return ao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=ao.PerGroup(self.group_size)
        )


def _require_groups(size: int) -> None:
    if size < 2 or size % 2:
        raise ValueError(f"group_size must be even and at least 2, but is {size}")


# Quantisation-aware training.


@dataclass(frozen=True)
class FakeQuantized(Compression):
    """Fake quantisation for quantisation-aware training: floating-point weights that are rounded in the forward pass.

    Gradients pass the rounding unchanged. Scales are buffers next to the weights, recomputed at each step until they
    are frozen. `convert` turns the weights into integers.

    Args:
        class_path: Class path of the method: `Int4WeightOnly` or `Int8DynamicInt4`.
        init_args: Arguments of the method.

    Raises:
        ValueError: For a method without quantisation-aware training in torchao.

    Source:
        Jacob et al., 2017, arXiv:1712.05877, section 3; Bengio et al., 2013, arXiv:1308.3432 (straight through). By
        torchao's `QATConfig`.
    """

    class_path: str = f"{__name__}.Int4WeightOnly"
    init_args: dict[str, Any] | None = None

    @classmethod
    def by(cls, method: Quantization) -> FakeQuantized:
        """Creates it from the method itself."""
        return cls(**method.described())

    @property
    def method(self) -> Quantization:
        """The method that the network is trained for."""
        kinds = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in (Int4WeightOnly, Int8DynamicInt4)}
        if self.class_path not in kinds:
            raise ValueError(
                f"method must be Int4WeightOnly or Int8DynamicInt4 to train with, but is {self.class_path}"
            )
        return kinds[self.class_path](**(self.init_args or {}))

    def compress(self, network: nn.Module, batches: list[Batch]) -> Record:
        """Replaces the chosen layers by fake-quantised ones with the same parameters and buffers, such as masks."""
        form = self.method.form(self.method.chosen(network)) | {"class_path": self.class_path, "frozen": False}
        self.reform(network, form)
        return {"form": form}

    @classmethod
    def reform(cls, network: nn.Module, form: dict[str, Any]) -> None:
        """Replaces the layers if they are not fake-quantised yet, and freezes or unfreezes their scales."""
        method = cls(form["class_path"], form["init_args"]).method
        step = _torchao().qat.QATConfig(method.config(), step="prepare")
        for name in form["names"]:
            layer = network.get_submodule(name)
            if not hasattr(layer, "weight_fake_quantizer"):
                buffers = dict(layer.named_buffers(recurse=False))
                with torch.random.fork_rng(devices=[]):  # torchao first initialises the layers at random
                    _torchao().quantize_(network, step, filter_fn=lambda _, fqn, name=name: fqn == name)
                layer, device = network.get_submodule(name).train(layer.training), layer.weight.device
                for buffer, value in buffers.items():
                    layer.register_buffer(buffer, value)
                quantizer = layer.weight_fake_quantizer
                quantizer(layer.weight.detach())  # computes the scales
                for part in ("scale", "zero_point"):
                    value = getattr(quantizer, part).to(device)
                    delattr(quantizer, part)
                    quantizer.register_buffer(part, value)
                quantizer.register_forward_hook(_keep_ordinary)
            layer.weight_fake_quantizer.config.is_dynamic = not form["frozen"]


def _keep_ordinary(quantizer: nn.Module, args: Any, output: Tensor) -> None:
    """Turns scales computed in inference mode into ordinary tensors, into which a checkpoint can be loaded."""
    for part in ("scale", "zero_point"):
        if getattr(quantizer, part).is_inference():
            with torch.inference_mode(False):
                setattr(quantizer, part, getattr(quantizer, part).clone())


def freeze_scales(network: nn.Module) -> None:
    """Freezes the scales of a fake-quantised network, in its record too."""
    for record in records_of(network):
        if record["class_path"].endswith(".FakeQuantized"):
            record["form"]["frozen"] = True
            FakeQuantized.reform(network, record["form"])


@torch.no_grad()
def convert(network: nn.Module) -> None:
    """Quantises the fake-quantised layers of a network, in place; leaves other networks unchanged."""
    records = records_of(network)
    for number, record in enumerate(records):
        if not record["class_path"].endswith(".FakeQuantized"):
            continue
        method = FakeQuantized(record["form"]["class_path"], record["form"]["init_args"]).method
        for name in record["form"]["names"]:
            layer = network.get_submodule(name)
            plain = method.quantized(layer)
            quantizer = layer.weight_fake_quantizer
            if quantizer.config.is_dynamic:
                quantizer(layer.weight)
            plain.weight_scale.copy_(quantizer.scale.view_as(plain.weight_scale))
            scales = plain.weight_scale.repeat_interleave(plain.group_size, dim=1)
            values = (layer.weight.detach() * (1 / scales)).round().clamp(-8, 7).to(torch.int8)  # as torchao rounds
            plain.weight_qdata.copy_(pack(values))
            network.set_submodule(name, plain)
        records[number] = method.described() | {"form": method.form(record["form"]["names"]), "trained": True}
    if records:
        network.compression = records


def _torchao() -> ModuleType:
    """torchao's quantisation module, imported on first use."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it warns of missing GPU kernels at import
    try:
        import torchao.quantization.qat
    except ImportError as error:
        raise ImportError(
            f"package torchao must be installed to quantise, but is not ({error}); pip install lit-llm[compression]"
        ) from error
    finally:
        logging.disable(before)
    return torchao.quantization
