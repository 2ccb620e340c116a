"""Memory and operations of a training step, measured on fake tensors, which have shapes but no data.

The objective's own code runs the step, and the bytes of all live tensors are counted throughout. So there are no
formulas for particular architectures, which could be wrong.
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
from torch.utils._pytree import tree_leaves, tree_map_with_path
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from lit_llm.batch import NOT_READ, count_items
from lit_llm.blocks import Block
from lit_llm.products import DTYPES

UNKNOWN_TO_TORCH: dict[Any, Callable[..., int]] = {
    torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
    torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * math.prod(a) * b[-1],
}
"""FLOPs, from shapes, of operations that torch's counter leaves out."""

FLOPS = {**flop_registry, **{operation: shape_wrapper(count) for operation, count in UNKNOWN_TO_TORCH.items()}}


class NeedsContent(ValueError):
    """A step cannot be measured, since it depends on the content of tensors."""


@dataclass(frozen=True)
class Step:
    """One training step on one device, with nothing sharded.

    Attributes:
        parameters: Number of parameters.
        embeddings: Number of parameters that are only looked up (not those tied to the head, which are multiplied).
        trained: Number of trainable parameters.
        weights: Bytes of the parameters and buffers.
        gradients: Bytes of the gradients.
        optimizer: Bytes of the optimiser's state.
        activations: Bytes that the forward pass stores for the backward pass, without casts of weights.
        casts: Bytes of the weights' low-precision copies, which autocast caches through the forward pass.
        passes: Peak bytes of the forward and backward pass, beyond weights and optimiser state.
        passes_without_gradients: The same if each gradient leaves the device as soon as it is complete.
        passes_without_weights: The same without gradients and without casts of weights.
        stepping: Peak bytes of the optimiser's step, beyond weights and optimiser state.
        block: Bytes of the largest block's parameters, with their low-precision copies under autocast.
        outside: The same for all parameters outside blocks, such as embeddings and head.
        moved: Bytes that operations read and write, summed over all operations.
        operations: Number of operations called.
        flops: Floating-point operations of matrix products and attention, forward and backward, for the batch.
        tokens: Tokens in the batch, or rows if the data has no tokens.
        average: Bytes of a moving average of the weights, if one is kept.
        parts: Number of batches like the measured one whose gradients are accumulated in one step.
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
        """Peak bytes of a step after the first."""
        return self.weights + self.average + self.optimizer + max(self.passes, self.stepping)


class Ledger(TorchDispatchMode):
    """Counts the bytes of live tensors, and the operations with the bytes they move and their FLOPs.

    torch's `FlopCounterMode` is not used: its module hooks keep recomputed activations alive until Python's garbage
    collector runs.

    Attributes:
        live: Bytes of live tensors.
        peak: Maximum of `live`.
        apart: Bytes of the gradients that are complete.
        peak_without_gradients: Maximum of `live` without those.
        casts: Bytes of the parameters' live copies in another precision.
        peak_without_weights: Maximum of `live` without gradients and casts.
        moved: Bytes read and written.
        operations: Number of operations called.
        flops: Floating-point operations of those in `FLOPS`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.casts = self.apart = 0
        self.begin()
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def begin(self) -> None:
        """Restarts the counts and peaks; `live` is kept."""
        self.peak = self.live
        self.peak_without_gradients = self.peak_without_weights = self.live - self.apart
        self.moved = self.operations = self.flops = 0

    def add(self, tensor: Tensor, is_cast: bool) -> None:
        """Counts a tensor's storage, once, until it is freed."""
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
        """Counts a parameter's gradient as complete."""
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
    """The output of a grouped matmul of experts or of its gradient; torch's fake one supports only bfloat16."""
    return a.new_empty(*([len(offs)] if b.ndim == 2 else []), a.shape[-2], b.shape[-1])


class _Believe(TorchFunctionMode):
    """Answers every condition on missing content with true: labels are present, norms finite."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__:
            return True
        if func is Tensor.__deepcopy__:  # would copy the storage, which fake tensors lack
            made, p = args[0].detach().clone(), args[0]
            return nn.Parameter(made, p.requires_grad) if isinstance(p, nn.Parameter) else made
        return func(*args, **(kwargs or {}))


@contextmanager
def _accepting() -> Iterator[None]:
    """Patches two functions of torch that fail on fake tensors.

    Truncated-normal initialisation skips its rejection loop, which would never end. A module that is moved or cast gets
    new parameters, since tensors with other references cannot be swapped.
    """
    drawing, applying = nn.init._no_grad_trunc_normal_, nn.Module._apply
    changed: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay tied

    @torch.no_grad()
    def apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """As torch's, but ignores gradients; a parameter that `change` returns as it is stays the same tensor."""
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
    """Measures a training step on fake tensors, with the optimiser's state present.

    No token of a batch counts as padding. The step is that of a CPU: on an accelerator, the loss over a large
    vocabulary may take a quarter of a GiB more (`losses.FP32_LOGITS`).

    Args:
        build: Builds the network.
        make_optimizer: Creates its optimiser.
        loss: Computes the loss of a batch.
        batch: Tensors, of which only shapes and types matter.
        precision: The trainer's name of the precision.
        activation_checkpointing: Recompute the network's blocks in the backward pass; `None` leaves it as built.
        parts: Batches per step; if several, the measured pass adds to existing gradients.

    Raises:
        NeedsContent: When the loss needs the content of a batch.
        ValueError: When the network has no activation checkpointing.
    """
    kind, _, how = precision.partition("-")
    dtype, mixed = DTYPES[kind], how == "mixed"

    def emptied(path: Any, t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        is_read = not path or getattr(path[-1], "key", None) not in NOT_READ
        cast = is_read and not mixed and t.is_floating_point()  # as the trainer does
        return torch.empty(t.shape, dtype=dtype if cast else t.dtype)

    tokens = count_items(batch)
    ledger = Ledger()
    try:
        with FakeTensorMode(), ledger, _Believe(), _accepting():
            usual = torch.get_default_dtype()
            torch.set_default_dtype(usual if mixed else dtype)
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
            batch = tree_map_with_path(emptied, batch)
            optimizer = make_optimizer(network)
            weights = sum(t.untyped_storage().nbytes() for t in [*network.parameters(), *network.buffers()])
            base = ledger.live
            noting = [
                p.register_post_accumulate_grad_hook(ledger.set_apart) for p in network.parameters() if p.requires_grad
            ]
            for _ in range(min(parts, 2)):
                ledger.begin()
                with torch.autocast("cpu", dtype if mixed else None, enabled=mixed):
                    value = loss(network, batch)
                    kept, casts = ledger.live - base - ledger.apart, ledger.casts
                value.backward()
                del value
                for handle in noting:  # a second pass adds to the same gradients
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
            optimizer.step()  # the first step created its state
            stepping = ledger.peak - base - state
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise NeedsContent(
            f"model must be one whose loss can be planned from shapes alone, but needs what a batch holds ({error}); "
            f"measure it with --probe"
        ) from error
    heads = {id(m.weight) for m in network.modules() if isinstance(m, nn.Linear)}
    looked_up = [m.weight for m in network.modules() if isinstance(m, nn.Embedding) and id(m.weight) not in heads]
    cast = dtype.itemsize if mixed else 0

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
