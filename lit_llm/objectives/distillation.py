"""Distillation: a student network learns from a teacher's predictions as well as from the labels."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from lightning.pytorch.utilities.types import TRAIN_DATALOADERS
from torch import Tensor, nn

from lit_llm.batch import IGNORE_INDEX, TokenBatch, inputs
from lit_llm.compression.calibration import answer, watching
from lit_llm.compression.inheritance import inherit, layer_map
from lit_llm.compression.taps import UNSEEN, Tapped, tapping
from lit_llm.modes import evaluating
from lit_llm.objectives.causal_lm import CausalLM
from lit_llm.objectives.classification import Classification
from lit_llm.objectives.divergences import Divergence, ForwardKL, SoftTargets, linear_loss_sum
from lit_llm.objectives.exact_steps import Loss
from lit_llm.objectives.losses import cross_entropy_sum
from lit_llm.objectives.masked_lm import MaskedLM
from lit_llm.objectives.objective import Objective
from lit_llm.objectives.teacher import Teacher, TeacherCache
from lit_llm.ranges import require_at_least, require_range


class Distillation(Objective):
    """A mixin that adds to an objective's loss the divergence from a teacher that reads the same batch.

    The loss is `1 - teacher_weight` times the objective's own loss, plus `teacher_weight` times the divergence between
    the teacher's and the student's distributions, both softened by `temperature`, times `temperature` squared. Losses
    between hidden states and between attention scores can be added.

    The teacher is frozen and in evaluation mode. It is neither in checkpoints nor in the exported model, and is loaded
    only for training; a resumed run needs it again.

    Args:
        args: As in the objective.
        teacher: A model directory, a run folder, a checkpoint file or a name on the hub, with the student's task,
            tokeniser and classes.
        temperature: Divisor of both sets of logits, above 0; 2 to 5 is usual for classes, 1 to 2 for tokens.
        teacher_weight: Weight of the divergence in the loss, in [0, 1]; the rest is the objective's own loss.
        divergence: Divergence between the two distributions; `None` is `ForwardKL`.
        hidden_weight: Weight of the mean squared difference between the outputs of blocks, after a learned projection
            of the student's to the teacher's width; 0 for none.
        attention_weight: Weight of the mean squared difference between attention scores before the softmax; needs
            equally many heads. 0 for none.
        layers: For each block of the student, the index of the teacher's block it learns from; `None` is every k-th.
        inherit: Start with the weights of those blocks, cut to the student's width.
        teacher_precision: Precision of the teacher's computation.
        cache_top_k: Cache this many of the teacher's most likely classes per row, or tokens per position, on disk, so
            that it does not read the row again in this run or the next. Only for rows that are the same in each epoch.
        kwargs: As in the objective.

    Raises:
        ValueError: When a value is out of range, or the teacher does not fit the student or the data.

    Source:
        Hinton et al., 2015, arXiv:1503.02531, section 2 (predictions); Jiao et al., 2019, "TinyBERT", arXiv:1909.10351,
        eq. 7 and 8 (attention and hidden states; here trained together with the predictions, and means over positions
        and components, so that the weights do not depend on a network's size); Sanh et al., 2019, arXiv:1910.01108
        (initialisation).
    """

    rows_come_again: ClassVar[bool] = True
    """Whether the networks read a row unchanged in each epoch, so that predictions can be cached."""

    def __init__(
        self,
        *args: Any,
        teacher: str,
        temperature: float = 2.0,
        teacher_weight: float = 0.5,
        divergence: Divergence | None = None,
        hidden_weight: float = 0.0,
        attention_weight: float = 0.0,
        layers: list[int] | None = None,
        inherit: bool = False,
        teacher_precision: Literal["32-true", "bf16-mixed"] = "32-true",
        cache_top_k: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        require_range("above 0", "model.", temperature=temperature)
        require_range("in [0, 1]", "model.", teacher_weight=teacher_weight)
        require_at_least(0, "model.", hidden_weight=hidden_weight, attention_weight=attention_weight)
        if inherit and self.hparams.get("weights"):
            raise ValueError("model.inherit must be false with model.weights to start from, but is true")
        require_at_least(1, "model.", cache_top_k=cache_top_k)
        if cache_top_k is not None and not self.rows_come_again:
            raise ValueError(
                f"model.cache_top_k must be None where other tokens are hidden at each step, but is {cache_top_k}"
            )
        if cache_top_k is not None and (hidden_weight or attention_weight):
            raise ValueError(
                f"model.cache_top_k must be None with hidden_weight or attention_weight, for which the teacher reads "
                f"each batch, but is {cache_top_k}"
            )
        if getattr(self.adaptation, "cache_features", False):
            raise ValueError("model.adaptation.cache_features must be false to learn from a teacher, but is true")
        self.save_arguments()
        self.temperature, self.teacher_weight, self.divergence = temperature, teacher_weight, divergence or ForwardKL()
        self.hidden_weight, self.attention_weight = hidden_weight, attention_weight
        self.layers, self.inherits, self.cache_top_k = layers, inherit, cache_top_k
        self.teacher_precision, self.teacher_path = teacher_precision, teacher
        self.projections = nn.ModuleList()
        self._held: list[Teacher] = []
        self._cache: TeacherCache | None = None
        self._map: list[int] = []

    @property
    def teacher(self) -> Teacher:
        """The teacher; available only in a fit."""
        if not self._held:
            plain = next(kind for kind in type(self).__mro__[1:] if not issubclass(kind, Distillation))
            raise ValueError(
                f"model must be without a teacher to be planned, but is a {type(self).__name__}; plan its student by "
                f"--model {plain.__module__}.{plain.__qualname__}"
            )
        return self._held[0]

    @property
    def beside(self) -> nn.Module:
        """The projections of the student's hidden states."""
        return self.projections

    # Building.

    def configure_model(self) -> None:
        """Builds the student, and in a fit loads the teacher."""
        super().configure_model()  # (an average copies the network when training starts, after `inherit` below)
        if self._held or not self._fits:
            return
        if self.attention_weight and getattr(self.network, "activation_checkpointing", None):
            raise ValueError(
                f"model.attention_weight must be 0 where blocks are computed again in the backward pass, but is "
                f"{self.attention_weight}; set model.network.activation_checkpointing to false"
            )
        teacher = Teacher(self.teacher_path, self.teacher_precision)
        data = self.trainer.datamodule
        teacher.require(self.network, self.size_name, self.hparams[self.size_name], getattr(data, "tokenizer", None))
        self._held = [teacher]
        if self.inherits:
            inherit(self.network, teacher.network, self.layers)
        if self.cache_top_k is not None:
            self._require_rows_as_they_are(data)
        if self.hidden_weight or self.attention_weight:
            self._map = layer_map(self.network, teacher.network, self.layers)
        if self.hidden_weight:
            self._make_projections()

    def _require_rows_as_they_are(self, data: Any) -> None:
        for what in ("augmentation", "streaming", "unlabelled_ratio"):
            if getattr(data, what, None):
                raise ValueError(
                    f"model.cache_top_k must be None where rows do not come again as they were, but data.{what} is "
                    f"{getattr(data, what)!r}"
                )

    @torch.no_grad()
    def _make_projections(self) -> None:
        """One for each block of the student, initialised to the identity; the widths are found by reading a batch."""
        source: TRAIN_DATALOADERS = self.trainer.fit_loop._data_source.dataloader()
        batch = self.trainer.precision_plugin.convert_input(next(iter(source)))
        with evaluating(self.network), tapping(self.network) as student, tapping(self.teacher.network) as taught:
            answer(self.network, batch), answer(self.teacher.network, batch)
        for index, layer in enumerate(self._map):
            widths = (_positions(tapped.hidden[at]).shape[-1] for tapped, at in ((student, index), (taught, layer)))
            projection = nn.Linear(*widths, bias=False)
            self.projections.append(projection)
            nn.init.eye_(projection.weight)

    def on_fit_start(self) -> None:
        """Moves the teacher to the student's device."""
        self.teacher.network.to(self.device)

    def on_train_start(self) -> None:
        """Tells the teacher how images are read, as a checkpoint may have said it, and opens what it said of them."""
        super().on_train_start()
        processor = getattr(self.trainer.datamodule, "image_processor", None)
        if processor is not None:
            self.teacher.read_images_of(processor)
        if self.cache_top_k is not None:
            self._cache = TeacherCache(self.teacher, self.temperature, self.cache_top_k, self.trainer.global_rank)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Loads as in the objective, without the projections if there are none here, as outside a fit."""
        if not len(self.projections):
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {n: v for n, v in state.items() if not n.startswith("projections.")}
        super().on_load_checkpoint(checkpoint)

    # The loss.

    @abstractmethod
    def position_weights(self, batch: Any, num_positions: int) -> Float[Tensor, "batch positions"]:
        """Weights of positions in the losses of hidden states and attention; they sum to the number of targets."""

    def tapped(self, network: nn.Module) -> Any:
        """A context that records a network's hidden states and attention scores, if the loss needs them."""
        if self.hidden_weight or self.attention_weight:
            return tapping(network, attention=self.attention_weight > 0)
        return tapping(nn.Module())

    def say(self, batch: Any, ask: Callable[[nn.Module], SoftTargets]) -> SoftTargets:
        """The teacher's predictions for a batch, from the cache if they are in it.

        Args:
            batch: The batch.
            ask: Computes the predictions with the teacher's network.
        """
        taught = self._cache.read(batch) if self._cache is not None else None
        if taught is None:
            with self.teacher.asked() as network:
                taught = ask(network)
            if self._cache is not None:
                taught = self._cache.add(batch, taught)
        return SoftTargets(taught.log_p.to(self.device), None if taught.index is None else taught.index.to(self.device))

    def mixed(self, hard: Tensor, soft: Tensor) -> Tensor:
        """The weighted sum of the objective's own loss and the divergence."""
        return (1 - self.teacher_weight) * hard + self.teacher_weight * soft

    def inside(self, batch: Any, student: Tapped, teacher: Tapped) -> Tensor | float:
        """The losses of hidden states and attention, averaged over blocks and summed over the batch's targets."""
        total: Tensor | float = 0.0
        weights = functools.cache(lambda count: self.position_weights(batch, count))  # cached across blocks
        for index, layer in enumerate(self._map):
            if self.hidden_weight:
                mine, theirs = _positions(student.hidden[index]), _positions(teacher.hidden[layer])
                if mine.shape[:2] != theirs.shape[:2]:
                    raise ValueError(
                        f"model.hidden_weight must be 0 where blocks see other positions than the teacher's, but block "
                        f"{index} sees {mine.shape[1]} and the teacher's {layer} sees {theirs.shape[1]}"
                    )
                apart = (self.projections[index](mine).float() - theirs.float()).square().mean(dim=-1)
                total = total + self.hidden_weight * (apart * weights(apart.shape[1])).sum()
            if self.attention_weight:
                apart = self._attention_apart(student, teacher, index, layer)
                total = total + self.attention_weight * (apart * weights(apart.shape[1])).sum()
        return total / max(len(self._map), 1)

    def _attention_apart(
        self, student: Tapped, teacher: Tapped, index: int, layer: int
    ) -> Float[Tensor, "batch positions"]:
        if index not in student.attention or layer not in teacher.attention:
            raise ValueError("model.attention_weight must be 0 for networks without attention in blocks, but is not")
        mine, theirs = student.attention[index].float(), teacher.attention[layer].float()
        if mine.shape != theirs.shape:
            raise ValueError(
                f"model.attention_weight must be 0 where heads are not as many as the teacher's, but block {index} has "
                f"{mine.shape[1]} and the teacher's {layer} has {theirs.shape[1]}"
            )
        seen = (mine > UNSEEN) & (theirs > UNSEEN)
        apart = (mine.where(seen, 0) - theirs.where(seen, 0)).square()
        return apart.sum(dim=(1, 3)) / seen.sum(dim=(1, 3)).clamp(min=1)


def _positions(hidden: Tensor) -> Float[Tensor, "batch positions width"]:
    """The output of a block with one axis of positions: tokens of a text, places in an image, or a single one."""
    if hidden.ndim == 4:
        return hidden.flatten(2).mT
    return hidden if hidden.ndim == 3 else hidden[:, None]


class ClassificationDistillation(Distillation, Classification):
    """Classification of texts or images that also learns from a teacher; class weights apply to the divergence too.

    Arguments are those of `Distillation` and `Classification`.

    Source:
        As `Distillation`.
    """

    def loss(self, batch: Mapping[str, Any]) -> Loss:
        """The mixed loss, as a weighted sum over the examples, and the sum of the weights."""
        said: list[Tensor] = []
        with (
            self.tapped(self.network) as student,
            watching({"": self.network}, lambda name, logits: said.append(logits), outputs=True),
        ):
            hard, targets = super().loss(batch)
        with self.tapped(self.teacher.network) as taught:
            teacher = self.say(batch, lambda network: SoftTargets.of(network(**inputs(batch)), self.temperature))
        apart = teacher.against(said[-1], self.temperature, self.divergence)
        return self.mixed(hard, (apart * self.weights_of(batch)).sum()) + self.inside(batch, student, taught), targets

    def position_weights(self, batch: Mapping[str, Any], num_positions: int) -> Float[Tensor, "batch positions"]:
        """The weight of an example, spread evenly over its positions without padding."""
        weights, mask = self.weights_of(batch)[:, None], batch.get("attention_mask")
        if mask is None or mask.shape[1] != num_positions:
            return (weights / num_positions).expand(-1, num_positions)
        return weights * mask / mask.sum(dim=1, keepdim=True)


class CausalLMDistillation(Distillation, CausalLM):
    """Causal language modelling that also learns from a teacher.

    If a network has `hidden` and `lm_head`, its logits are computed for a chunk of tokens at a time.

    Arguments are those of `Distillation` and `CausalLM`.

    Source:
        As `Distillation`; at each token, as Kim & Rush, 2016, arXiv:1606.07947, section 3.1.
    """

    shares_vocabulary: ClassVar[bool] = False
    """A divergence needs all logits of a token on one device."""

    def loss(self, batch: TokenBatch) -> Loss:
        """The mixed loss, summed over the labels, and their number."""
        labels = batch["labels"].flatten()
        kept = labels != IGNORE_INDEX
        with self.tapped(self.network) as student:
            said, weight = self._read(self.network, batch)
        with self.tapped(self.teacher.network) as taught:
            teacher = self._asked(batch, kept)
        said, labels = said.flatten(0, 1)[kept], labels[kept]

        def loss_of(logits: Tensor, here: slice) -> Tensor:
            hard = cross_entropy_sum(logits[None], labels[None, here], self.label_smoothing, self.z_loss)
            return self.mixed(hard, teacher(here).against(logits, self.temperature, self.divergence).sum())

        total = loss_of(said, slice(None)) if weight is None else linear_loss_sum(said, weight, loss_of)
        return total + self.inside(batch, student, taught), kept.sum().float()

    def _read(self, network: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor | None]:
        """The input of a network's output layer and its weight; or all logits and `None`."""
        about = {name: batch[name] for name in ("input_ids", "document_ids", "positions") if name in batch}
        if hasattr(network, "hidden") and isinstance(getattr(network.lm_head, "weight", None), Tensor):
            return network.hidden(**about), network.lm_head.weight
        return network(**about), None

    def _asked(self, batch: TokenBatch, kept: Tensor) -> Callable[[slice], SoftTargets]:
        """A function that returns the teacher's predictions for a slice of the kept labels."""
        if self._cache is not None:
            said = self.say(batch, lambda network: self._likeliest(network, batch))
            flat = SoftTargets(said.log_p.flatten(0, 1), said.index.flatten(0, 1))[kept]
            return lambda here: flat[here]
        with self.teacher.asked() as network:
            hidden, weight = self._read(network, batch)
        hidden = hidden.flatten(0, 1)[kept]

        def of(here: slice) -> SoftTargets:
            with self.teacher.asked():
                return SoftTargets.of(
                    hidden[here] if weight is None else network.lm_head(hidden[here]), self.temperature
                )

        return of

    def _likeliest(self, network: nn.Module, batch: TokenBatch) -> SoftTargets:
        hidden, weight = self._read(network, batch)
        rows = (SoftTargets.of(x if weight is None else network.lm_head(x), self.temperature) for x in hidden)
        tops = [row.top(self.cache_top_k) for row in rows]
        return SoftTargets(torch.stack([top.log_p for top in tops]), torch.stack([top.index for top in tops]))

    def position_weights(self, batch: TokenBatch, num_positions: int) -> Float[Tensor, "batch positions"]:
        """1 where there is a label."""
        return (batch["labels"] != IGNORE_INDEX).float()


class MaskedLMDistillation(Distillation, MaskedLM):
    """Masked language modelling that also learns from a teacher, which predicts the same masked tokens.

    Arguments are those of `Distillation` and `MaskedLM`.

    Source:
        As `Distillation`; Sanh et al., 2019, arXiv:1910.01108, section 3.
    """

    rows_come_again: ClassVar[bool] = False

    def loss(self, batch: TokenBatch) -> Loss:
        """The mixed loss, summed over the chosen tokens, and their number."""
        read, ids, chosen = self.hide(batch, self.trainer.global_step)
        about = {name: batch[name] for name in ("document_ids", "positions") if name in batch}
        with self.tapped(self.network) as student:
            logits = self.network.logits_at(chosen, read, **about)
        with self.tapped(self.teacher.network) as taught:
            teacher = self.say(
                batch, lambda network: SoftTargets.of(network.logits_at(chosen, read, **about), self.temperature)
            )
        hard = cross_entropy_sum(logits[None], ids[chosen][None])
        soft = teacher.against(logits, self.temperature, self.divergence).sum()
        return self.mixed(hard, soft) + self.inside(batch, student, taught), chosen.sum().float()

    def position_weights(self, batch: TokenBatch, num_positions: int) -> Float[Tensor, "batch positions"]:
        """1 where a token is chosen."""
        return self.hide(batch, self.trainer.global_step)[2].float()
