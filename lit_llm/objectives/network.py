"""An objective's network: how it is built, what weights it starts from, and what checkpoints save and check."""

from __future__ import annotations

import functools
import inspect
import logging
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from lit_llm.adaptation import Adaptation
from lit_llm.batch import keep_unread
from lit_llm.checkpoints import Model, read_image_processor, read_model, unpacked_tokenizer
from lit_llm.compression.compression import records_of, replay
from lit_llm.data.tokenizer import fingerprint, padding_id
from lit_llm.deferred_init import deferred
from lit_llm.objectives import heads
from lit_llm.objectives.optimization import Scheduled
from lit_llm.recipes import built, described, first_argument, require_rebuildable
from lit_llm.schedulers import Schedule
from lit_llm.shards import local, whole_shape
from lit_llm.weights import copy_weights
from lit_llm.wording import listed

log = logging.getLogger(__name__)


class Built(Scheduled):
    """Builds the network in `configure_model`, from a recipe whose first argument is decided by the data.

    A recipe rather than an object, so that the same config can build the network on a GPU, on the meta device and from
    a checkpoint.

    Args:
        network: Makes the network from its first argument (see `size_name`); `None` is the network of `weights`.
        optimizer: As in `Scheduled`.
        schedule: As in `Scheduled`.
        decay_embeddings: As in `Scheduled`.
        adaptation: As in `Scheduled`.
    """

    size_name: ClassVar[str]
    """Name of the objective's argument, and of the data's attribute, that set the network's first argument."""

    stored_size: int | None = None
    """Size in the checkpoint to be evaluated, for data that does not determine it."""

    starts_from_checkpoint: bool = False
    """Whether `weights` is the checkpoint that is loaded later, instead of what its run once started from."""

    planned_for: LightningDataModule | None = None
    """Data that the network is built for if no trainer holds any, for example in a plan."""

    def __init__(
        self,
        network: Callable[..., nn.Module] | None,
        optimizer: OptimizerCallable | None,
        schedule: Schedule | None,
        decay_embeddings: bool,
        adaptation: Adaptation | None,
    ) -> None:
        super().__init__(optimizer, schedule, decay_embeddings, adaptation)
        self.make_network = network

    @property
    def _data(self) -> LightningDataModule | None:
        """The trainer's data; `None` without data or trainer, for example when only a checkpoint is read."""
        return getattr(self._trainer, "datamodule", None)

    def setup(self, stage: str) -> None:
        """Takes the network's size from the data.

        Raises:
            ValueError: When the config's size is too small for the data, or the strategy accumulates gradients itself
                and would average the means of micro-batches.
        """
        if getattr(self.trainer.strategy, "handles_gradient_accumulation", False):  # Lightning's own for DeepSpeed
            raise ValueError(
                f"trainer.strategy must leave the weighing of gradients to the objective, but is "
                f"{type(self.trainer.strategy).__name__}; take configs/strategy/deepspeed_zero2.yaml"
            )
        keep_unread(self.trainer.precision_plugin)
        name, data = self.size_name, self.trainer.datamodule
        needed, given = getattr(data, name, None), self.hparams.get(name)
        if given is None:
            self.hparams[name] = self.stored_size if needed is None else needed
        elif needed is not None and given < needed:
            raise ValueError(f"model.{name} must be at least what the data has, {needed}, but is {given}")

    def configure_model(self) -> None:
        """Builds the network, unless that is done already, and the average of its weights if one is kept."""
        if self.network is None:
            self.build()
        self.keep_average()

    def build(self) -> None:
        """Makes the network and loads the weights to start from.

        Raises:
            ValueError: When the network's size is unknown, or the weights do not fit the data or the network.
        """
        name, source, other_classes = self.size_name, None, False
        if self.hparams.get("weights"):
            source = read_model(self.hparams["weights"], unrounded=self.starts_from_checkpoint)
            if getattr(self._trainer, "ckpt_path", "no trainer") is None:
                getattr(self._data, "splits", None)  # finds the classes now, as no checkpoint will name them
            other_classes = self._has_other_classes(source)
            self._require_same_data(source, other_classes)
            if not other_classes:
                heads.put_in_order(source, self._order_of_classes(source), self.hparams["weights"])
                self.hparams[name] = source.recipe["size"]
        if self.hparams.get(name) is None:
            raise ValueError(f"model.{name} must be given where no data decides it, but is None")
        if self.make_network is not None:
            self.network = self._make_network(fresh=source is None and self.adaptation is None)
            self._require_sized_first()
            if self._fits and self.hparams.get("network") and not hasattr(self.network, "arguments"):
                require_rebuildable(self.hparams["network"], self.make_network)
            if hasattr(self.network, "read_tokens_of") and (self._fits or self.planned_for is not None):
                tokenizer = getattr(self.planned_for or self.trainer.datamodule, "tokenizer", None)
                if tokenizer is not None:
                    self.network.read_tokens_of(tokenizer)
                    if hasattr(self.network, "read_padding"):
                        self.network.read_padding(padding_id(tokenizer))
            if self._image_shape is not None and hasattr(self.network, "read_images_of"):
                self.network.read_images_of(self._image_shape)
        if source is not None:
            self._start_from(source, other_classes)
        self._require_room()
        if self.adaptation is not None:
            self.adaptation.prepare(self.network)

    def _make_network(self, fresh: bool) -> nn.Module:
        """Makes the network, without allocating its weights if they are new and the strategy initialises them later."""
        size, own = self.hparams[self.size_name], type(self)
        untouched = own.build is Built.build and own.configure_model is Built.configure_model
        defers = getattr(getattr(self._trainer, "strategy", None), "defers_init", False)
        if fresh and untouched and defers and not self.averages:
            kind = pkgutil.resolve_name(self.hparams["network"]["class_path"])
            if getattr(kind, "defers_init", False):
                return deferred(self.make_network, size)
        return self.make_network(size)

    def _require_sized_first(self) -> None:
        """Refuses a network that has an argument `size_name`, but not as the first, which is the one that got it."""
        make, kind = self.make_network, type(self.network)
        called = make if getattr(make, "func", None) is kind else kind  # a partial may bind the first arguments
        if self.size_name in [*inspect.signature(called).parameters][1:]:
            raise ValueError(
                f"model.network must take {self.size_name} as its first argument, but is {kind.__name__}, whose first "
                f"is {first_argument(kind)}"
            )

    @property
    def _image_shape(self) -> tuple[int, int, int] | None:
        """Channels, height and width of the data's images; `None` without images, or if a checkpoint gives them."""
        if self.planned_for is not None:
            return getattr(self.planned_for, "image_shape", None)
        if self._trainer is None or (self.trainer.state.fn != "fit" and self.trainer.ckpt_path):
            return None
        return getattr(self.trainer.datamodule, "image_shape", None)

    def _require_room(self) -> None:
        """Checks that the data's rows are not longer than the network's `max_seq_len`."""
        longest, data = getattr(self.network, "max_seq_len", None), self._data
        for name in ("seq_len", "max_seq_len"):
            length = getattr(data, name, None)
            if longest and length and length > longest:
                raise ValueError(f"data.{name} must be at most the network's max_seq_len, {longest}, but is {length}")

    def _require_same_data(self, source: Model, other_classes: bool) -> None:
        """Checks that task, tokeniser, image shape and classes of the weights are those of the data."""
        data, weights, name = self._data, self.hparams["weights"], self.size_name
        sized_by = first_argument(type(source.network))
        if (sized_by == "vocab_size") != (name == "vocab_size"):
            kind = type(source.network).__name__
            raise ValueError(
                f"model.weights must be of a network sized by {name}, but {weights} is a {kind}, sized by {sized_by}; "
                f"a backbone can be named as model.network.path"
            )
        tokenizer = getattr(data, "tokenizer", None)
        both = tokenizer is not None and source.tokenizer is not None
        if both and fingerprint(tokenizer) != fingerprint(source.tokenizer):
            remedy = f"; set data.tokenizer to {source.folder}" if source.folder else ""
            raise ValueError(
                f"data.tokenizer must be the one that model.weights were trained with, but is another than that of "
                f"{weights}{remedy}"
            )
        if self._image_shape is not None and hasattr(source.network, "require_images"):
            source.network.require_images(self._image_shape)
        if other_classes:
            return
        size, needed, given = source.recipe["size"], getattr(data, name, None), self.hparams.get(name)
        more = "" if name == "num_targets" else "at least "  # some classes may have no examples
        if needed is not None and (size < needed or (size > needed and not more)):
            raise ValueError(
                f"model.weights must have {more}the {name} of the data, {needed}, but {weights} has {size}"
            )
        if given not in (None, needed, size):
            raise ValueError(f"model.{name} must be that of model.weights, {size}, but is {given}")
        if self._order_of_classes(source) is None:
            raise ValueError(
                f"model.weights must tell apart the data's classes, {listed(data.class_names)}, but {weights} tells "
                f"apart {listed(source.network.class_names)}; where they are the same, give them the data's names in "
                f"id2label of its config.json"
            )

    def _order_of_classes(self, source: Model) -> list[int] | None:
        """Order in which the classes of the weights' head are those of the data; `None` if they are others."""
        sides = self._data, source.network
        return heads.order_of(*(getattr(side, "class_names", None) for side in sides))

    def _has_other_classes(self, source: Model) -> bool:
        """Whether training is on other classes or values than those of the weights, so that it needs a new head."""
        needed = getattr(self._data, self.size_name, None)
        own = needed is None or source.recipe["size"] in (needed, self.hparams.get(self.size_name))
        own = own and self._order_of_classes(source) is not None
        return self.size_name != "vocab_size" and self._fits and not own

    def _start_from(self, source: Model, other_classes: bool) -> None:
        where, kept = self.hparams["weights"], {key: source.recipe[key] for key in ("class_path", "init_args")}
        before, size = source.recipe["size"], self.hparams[self.size_name]
        if self.network is None and other_classes:
            kept["init_args"] = {k: v for k, v in kept["init_args"].items() if k != "class_names"}
            self.network, self.hparams["network"] = built(kept, Path(where), size), kept
        if self.network is None:
            self.network, self.hparams["network"] = source.network.train(), kept
        else:
            replay(self.network, records_of(source.network))
            head = heads.head_of(source, where) if other_classes and before == size else ()
            sizes = (before, size) if other_classes else None
            new = copy_weights(source.network, self.network, where, sizes, head)
            if new:
                what = f"the classes {listed(source.network.class_names)}" if head else f"{before} classes"
                say = log.warning if head else log.info
                say(f"The head is new, since {where} has one of {what}: {', '.join(new)}")
        log.info(f"Starting from the weights of {where}")
        self.hparams["weights"] = None  # a resumed run takes its weights from the checkpoint

    @functools.cached_property
    def tokenizer_path(self) -> str | None:
        """Path of the tokeniser of the model that the network starts from, for data that names none."""
        place = self._start
        return unpacked_tokenizer(place) if str(place).endswith(".ckpt") else place

    @functools.cached_property
    def image_processor(self) -> dict[str, Any] | None:
        """Image preprocessing of the model that the network starts from, for data that specifies none."""
        return read_image_processor(self._start) if self._start else None

    @property
    def _start(self) -> str | None:
        """The model that the network starts from: a model directory, a run, a checkpoint or a name on the hub."""
        options = (self.hparams.get("network") or {}).get("init_args") or {}
        return options.get("path") or self.hparams.get("weights")

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the network's recipe and the unreported loss to the checkpoint.

        Raises:
            FloatingPointError: When the loss or the weights are not finite, so that no good checkpoint is overwritten.
        """
        if self.trainer.state.fn == "fit":
            loss_sum, target_sum = checkpoint["unreported_loss"] = self._added(self.whole_loss_sums)
            self.require_finite("train/loss", loss_sum / max(target_sum, 1.0))
            members = [p for network in self.networks for p in network.parameters()]
            own = [getattr(p, "ds_tensor", p).detach() for p in members]  # DeepSpeed's shard of a parameter
            norm = torch.stack(torch._foreach_norm(local(own))).sum().to(self.device)
            norm = self.trainer.strategy.reduce(norm, reduce_op="sum")
            self.require_finite("the norm of the weights", float(norm))
        checkpoint["network"] = {**self.hparams["network"], "size": self.hparams[self.size_name]}
        if hasattr(self.network, "arguments"):  # resolved ones, so that a path or a name is no longer needed
            checkpoint["network"]["init_args"] = {n: described(n, v) for n, v in self.network.arguments.items()}
            network = {key: checkpoint["network"][key] for key in ("class_path", "init_args")}
            checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], "network": network}
        if self._image_shape is not None:
            checkpoint["image_shape"] = list(self._image_shape)
        if records := records_of(self.network):
            checkpoint["compression"] = records
        if self.adaptation is not None:
            checkpoint["adaptation"] = described("adaptation", self.adaptation)
        if self.average is not None:
            checkpoint["evaluated"] = "average"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Repeats the compression recorded in a checkpoint, and checks that its weights fit the network.

        Raises:
            ValueError: When the number of classes or tokens, or a parameter, differs; the message names the first. In
                a fit changed data is reported before these, because it may be their cause.
        """
        both = checkpoint.get("hyper_parameters", {}), self.hparams
        self.expect_optimizer(*((options.get("optimizer") or {}).get("class_path") for options in both))
        if self.hparams["network"] is None:
            self.hparams.update(checkpoint["hyper_parameters"])
        first = self._trainer is None or self.trainer.is_global_zero  # the stored sum is over all processes
        self.loss_sums = tuple(checkpoint.get("unreported_loss", (0.0, 0.0))) if first else (0.0, 0.0)
        self._require_images_of(checkpoint.get("image_shape"))
        data = self._data
        if self._fits and hasattr(data, "require_unchanged"):
            data.require_unchanged(checkpoint.get(type(data).__qualname__) or {})
        recipe, name = checkpoint.get("network") or {}, self.size_name
        here, there, arguments = self.hparams.get(name), recipe.get("size"), recipe.get("init_args") or {}
        if None not in (here, there) and here != there:
            raise ValueError(
                f"model.{name} must be that of the checkpoint, {there}, but is {here}; take the data it was trained on"
                + (f", or set --model.{name} {there}" if here < there else "")
            )
        for network in self.networks:
            replay(network, checkpoint.get("compression", []))
            if hasattr(network, "recall_tokens"):
                network.recall_tokens(arguments.get("config") or {})
        self._require_same_zero(checkpoint.get("zero"))
        self.agree_on_average(checkpoint)
        own, stored = self.state_dict(keep_vars=True), checkpoint["state_dict"]
        for name in sorted(own.keys() | stored.keys()):
            here, there = (tuple(whole_shape(d[name])) if name in d else "absent" for d in (own, stored))
            if here != there:
                raise ValueError(
                    f"ckpt_path must be a checkpoint of this network, but its {name} is {there} where the network's "
                    f"is {here}"
                )

    def _require_same_zero(self, there: dict[str, Any] | None) -> None:
        """Refuses to resume training with a different ZeRO stage or number of devices.

        DeepSpeed converts weights between them, but not the optimiser's state.
        """
        if not self._fits:
            return
        own = getattr(self.trainer.strategy, "zero", None)
        here, there = (
            f"DeepSpeed's ZeRO {z['stage']} on {z['devices']} devices" if z else "a strategy that is not DeepSpeed"
            for z in (own, there)
        )
        if here != there:
            raise ValueError(
                f"ckpt_path must be written by {here} to train on with it, but is by {there}; a new run takes its "
                f"weights with --model.weights"
            )

    def _require_images_of(self, there: list[int] | None) -> None:
        """Checks that image channels and size are those of the checkpoint; takes the checkpoint's if none are known."""
        here = self._image_shape
        if there and here and list(here) != there:
            raise ValueError(
                f"data must have images of the channels, height and width that the checkpoint's network was made for, "
                f"{there}, but has {list(here)}; set data.channels and data.image_size"
            )
        for network in self.children():
            if there and here is None and hasattr(network, "read_images_of"):
                network.read_images_of(there)
