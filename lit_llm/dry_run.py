"""What a training step takes, found on tensors without data: memory and operations.

The step is taken for real, by the objective's own code, on tensors that have shapes and no content; what is alive is
added up as it comes and goes. So there is no formula of an architecture here that could be wrong about it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from lit_llm.batch import count_items
from lit_llm.blocks import Block

UNKNOWN_TO_TORCH: dict[Any, Callable[..., int]] = {
    torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
    torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * math.prod(a) * b[-1],
}
"""Operations that torch's counter leaves out, and theirs."""

FLOPS = {**flop_registry, **{operation: shape_wrapper(count) for operation, count in UNKNOWN_TO_TORCH.items()}}


class NeedsContent(ValueError):
    """Shapes alone do not tell what a step takes."""


@dataclass(frozen=True)
class Step:
    """One training step on one device, all of it there.

    Attributes:
        parameters: Numbers that the network holds.
        embeddings: Those of them that are only looked up (a tied matrix is multiplied with too, and is not counted).
        trained: Those that learn.
        weights: Bytes of the parameters and buffers.
        gradients: Bytes of the gradients.
        optimizer: Bytes of the optimiser's state.
        activations: Bytes that the forward pass leaves for the backward pass, casts of weights left out.
        casts: Bytes of the weights' copies in a lower precision, which autocast keeps through the forward pass.
        passes: Bytes above weights and optimiser at the worst moment of the forward and backward pass.
        passes_without_gradients: The same, where each gradient leaves the device as soon as it is there.
        passes_without_weights: The same, where casts of weights are not counted either.
        stepping: Bytes above weights and optimiser while the optimiser steps.
        block: Bytes of the largest block's parameters, with their copies in the precision of products under autocast.
        outside: The same of the parameters that are in no block, as embeddings and head are.
        moved: Bytes that operations read and write, each counted by itself.
        operations: How many operations were called.
        flops: Floating-point operations of matrix products and attention, forward and backward, over the batch.
        tokens: Tokens of the batch, or its rows where the data has no tokens.
        average: Bytes of an average of the weights that is kept beside them.
        parts: Batches, each as the one that is measured, whose gradients are added up to one step.
    """

    parameters: int
    embeddings: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    casts: int
    passes: int
    passes_without_gradients: int
    passes_without_weights: int
    stepping: int
    block: int
    outside: int
    moved: int
    operations: int
    flops: int
    tokens: int
    average: int = 0
    parts: int = 1

    @property
    def peak(self) -> int:
        """Most bytes at once, in a step after the first."""
        return self.weights + self.average + self.optimizer + max(self.passes, self.stepping)


class Ledger(TorchDispatchMode):
    """Adds up the bytes of the tensors that are alive, and what operations move and compute.

    Torch's own counter of operations is not used: it follows modules by hooks, which hold what checkpointing computes
    again until Python's garbage collector happens to come.

    Attributes:
        live: Bytes now.
        peak: Most bytes so far.
        apart: Bytes of the gradients, as far as they are there.
        peak_without_gradients: Most bytes so far without those.
        casts: Bytes of the parameters' copies in another precision, now.
        peak_without_weights: Most bytes so far without gradients and casts.
        moved: Bytes read and written.
        operations: Operations called.
        flops: Floating-point operations of those that `FLOPS` has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.casts = self.apart = 0
        self.begin()
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def begin(self) -> None:
        """Counts from here: what is alive now is what there was before."""
        self.peak = self.live
        self.peak_without_gradients = self.peak_without_weights = self.live - self.apart
        self.moved = self.operations = self.flops = 0

    def add(self, tensor: Tensor, is_cast: bool) -> None:
        """Counts a tensor's storage, once, until nothing holds it."""
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            size = storage.nbytes()
            cast = size if is_cast else 0
            self.live += size
            self.casts += cast
            kept = self.live - self.apart
            self.peak = max(self.peak, self.live)
            self.peak_without_gradients = max(self.peak_without_gradients, kept)
            self.peak_without_weights = max(self.peak_without_weights, kept - self.casts)
            weakref.finalize(storage, self._leave, size, cast)

    def set_apart(self, p: nn.Parameter) -> None:
        """Notes that a parameter has its gradient."""
        self.apart += p.grad.nbytes

    def _leave(self, size: int, cast: int) -> None:
        self.live -= size
        self.casts -= cast

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor):
            out = _grouped_mm(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if not func.is_view:
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.moved += sum(t.nbytes for t in (*read, *made))
            self.operations += 1
        if func._overloadpacket in FLOPS:
            self.flops += FLOPS[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        is_cast = func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter)
        for tensor in made:
            self.add(tensor, is_cast)
        return out


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """Room for the products of experts, each with its rows, or their gradients: torch has it in bfloat16 alone."""
    return a.new_empty(*([len(offs)] if b.ndim == 2 else []), a.shape[-2], b.shape[-1])


class _Believe(TorchFunctionMode):
    """Answers every question about a content that is not there with yes: labels are all there, norms finite."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__:
            return True
        if func is Tensor.__deepcopy__:  # by its storage, which is nowhere; metrics and averages copy
            made, p = args[0].detach().clone(), args[0]
            return nn.Parameter(made, p.requires_grad) if isinstance(p, nn.Parameter) else made
        return func(*args, **(kwargs or {}))


@contextmanager
def _accepting() -> Iterator[None]:
    """Has torch do without content what it does not.

    The first draw of a truncated normal is taken, which would be rejected for ever; and a module that is moved or cast
    gets new parameters, since tensors that others know of cannot be swapped.
    """
    drawing, applying = nn.init._no_grad_trunc_normal_, nn.Module._apply
    changed: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay tied

    @torch.no_grad()
    def apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """As torch's, before there are gradients; what does not change stays the tensor that it is."""
        for child in module.children() if recurse else ():
            child._apply(change)
        for name, p in module._parameters.items():
            if p is None or (p not in changed and (made := change(p)) is p):
                continue
            if p not in changed:
                changed[p] = nn.Parameter(made, p.requires_grad)
            module._parameters[name] = changed[p]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = change(buffer)
        return module

    nn.init._no_grad_trunc_normal_ = lambda tensor, *args, **kwargs: tensor
    nn.Module._apply = apply
    try:
        yield
    finally:
        nn.init._no_grad_trunc_normal_, nn.Module._apply = drawing, applying


def measure_step(
    build: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    precision: str = "32-true",
    activation_checkpointing: bool | None = None,
    parts: int = 1,
) -> Step:
    """Takes two steps on tensors without content and says what the second one took.

    Rows are taken as full: nothing in a batch is padding. The step is a CPU's: an accelerator's loss over a large
    vocabulary may hold a quarter of a GiB more (`losses.FP32_LOGITS`).

    Args:
        build: Makes the network.
        make_optimizer: Makes its optimiser.
        loss: The loss of a batch.
        batch: Tensors, of which only shapes and types matter.
        precision: As the trainer names it.
        activation_checkpointing: Has the network compute its blocks again in the backward pass; `None` is as built.
        parts: Batches of a step; where there are several, the pass is one beside the gradients of those before.

    Raises:
        NeedsContent: When the loss needs the content of a batch.
        ValueError: When the network cannot compute its blocks again.
    """
    low = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else None
    tokens = count_items(batch)
    ledger = Ledger()
    try:
        with FakeTensorMode(), ledger, _Believe(), _accepting():
            usual = torch.get_default_dtype()
            torch.set_default_dtype(low if low is not None and precision.endswith("true") else usual)
            try:
                network = build()
            finally:
                torch.set_default_dtype(usual)
            if activation_checkpointing is not None:
                if not hasattr(network, "activation_checkpointing"):
                    raise ValueError(
                        f"network must have activation_checkpointing to plan with it, but is a {type(network).__name__}"
                    )
                network.activation_checkpointing = activation_checkpointing
            batch = tree_map(lambda t: torch.empty(t.shape, dtype=t.dtype) if isinstance(t, Tensor) else t, batch)
            optimizer = make_optimizer(network)
            weights = sum(t.untyped_storage().nbytes() for t in [*network.parameters(), *network.buffers()])
            base = ledger.live
            noting = [
                p.register_post_accumulate_grad_hook(ledger.set_apart) for p in network.parameters() if p.requires_grad
            ]
            for _ in range(min(parts, 2)):
                ledger.begin()
                with torch.autocast("cpu", low, enabled=low is not None and precision.endswith("mixed")):
                    value = loss(network, batch)
                    kept, casts = ledger.live - base - ledger.apart, ledger.casts
                value.backward()
                del value
                for handle in noting:  # what a second pass adds to gradients is no gradient more
                    handle.remove()
            passes, flops = ledger.peak - base, ledger.flops
            without_gradients, without_weights = (
                peak - base for peak in (ledger.peak_without_gradients, ledger.peak_without_weights)
            )
            gradients = sum(p.grad.nbytes for p in network.parameters() if p.grad is not None)
            optimizer.step()
            state = sum(
                t.nbytes for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)
            )
            moved, operations = ledger.moved, ledger.operations
            ledger.peak = ledger.live
            optimizer.step()  # the first one made its state
            stepping = ledger.peak - base - state
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise NeedsContent(
            f"model must be one whose loss can be planned from shapes alone, but needs what a batch holds ({error}); "
            f"measure it with --probe"
        ) from error
    heads = {id(m.weight) for m in network.modules() if isinstance(m, nn.Linear)}
    looked_up = [m.weight for m in network.modules() if isinstance(m, nn.Embedding) and id(m.weight) not in heads]
    cast = 2 if low is not None and precision.endswith("mixed") else 0

    def gathered(parameters: Iterable[nn.Parameter]) -> int:
        return sum(p.nbytes + cast * p.numel() for p in parameters)

    blocks = [list(m.parameters()) for m in network.modules() if isinstance(m, Block)]
    inside = {id(p) for block in blocks for p in block}
    return Step(
        parameters=sum(p.numel() for p in network.parameters()),
        embeddings=sum(p.numel() for p in looked_up),
        trained=sum(p.numel() for p in network.parameters() if p.requires_grad),
        weights=weights,
        gradients=gradients,
        optimizer=state,
        activations=kept - casts,
        casts=casts,
        passes=passes,
        passes_without_gradients=without_gradients,
        passes_without_weights=without_weights,
        stepping=stepping,
        block=max(map(gathered, blocks), default=0),
        outside=gathered(p for p in network.parameters() if id(p) not in inside),
        moved=moved,
        operations=operations,
        flops=flops,
        tokens=tokens,
        parts=parts,
    )
