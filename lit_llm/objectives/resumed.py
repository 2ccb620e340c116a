"""Checkpoints of an objective: what is written beside its weights, and what is refused when they are read."""

from __future__ import annotations

from typing import Any

import torch

from lit_llm.compression.compression import records_of, replay
from lit_llm.objectives.built import Built
from lit_llm.recipes import described
from lit_llm.shards import local, whole_shape


class Resumed(Built):
    """A network that a checkpoint makes again, with which a run goes on, or is evaluated.

    Arguments are those of `Built`.
    """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds how to build the network; refuses to write weights that are spoilt over good ones."""
        if self.trainer.state.fn == "fit":
            loss_sum, target_sum = checkpoint["unreported_loss"] = self._added(self.whole_loss_sums)
            self.require_finite("train/loss", loss_sum / max(target_sum, 1.0))
            members = [p for network in self.networks for p in network.parameters()]
            own = [getattr(p, "ds_tensor", p).detach() for p in members]  # DeepSpeed's of its part
            norm = torch.stack(torch._foreach_norm(local(own))).sum().to(self.device)
            norm = self.trainer.strategy.reduce(norm, reduce_op="sum")
            self.require_finite("the norm of the weights", float(norm))
        checkpoint["network"] = {**self.hparams["network"], "size": self.hparams[self.size_name]}
        if hasattr(self.network, "arguments"):  # they say what a path or a name stood for
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
        """Gives the network the form that compression had given it; refuses weights of another network in one line.

        Raises:
            ValueError: Naming the first parameter that differs, or the number of classes or tokens; before these, to
                train on, when the data have changed, which may be why.
        """
        both = checkpoint.get("hyper_parameters", {}), self.hparams
        self.expect_optimizer(*((options.get("optimizer") or {}).get("class_path") for options in both))
        if self.hparams["network"] is None:
            self.hparams.update(checkpoint["hyper_parameters"])
        first = self._trainer is None or self.trainer.is_global_zero  # the sum of all processes counts once
        self._loss_sum, self._target_sum = checkpoint.get("unreported_loss", (0.0, 0.0)) if first else (0.0, 0.0)
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
        """Refuses to train on where the optimiser's state is in another form: DeepSpeed converts weights only."""
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
        """Refuses to go on with images of other channels or size than a checkpoint's; elsewhere takes those of it."""
        here = self._image_shape
        if there and here and list(here) != there:
            raise ValueError(
                f"data must have images of the channels, height and width that the checkpoint's network was made for, "
                f"{there}, but has {list(here)}; set data.channels and data.image_size"
            )
        for network in self.children():
            if there and here is None and hasattr(network, "read_images_of"):
                network.read_images_of(there)
