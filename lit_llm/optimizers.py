"""Parameter groups by role, and an optimiser that uses Muon for matrices and AdamW for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from lit_llm.blocks import Block
from lit_llm.products import multiplies_bfloat16
from lit_llm.ranges import require_at_least, require_range
from lit_llm.shards import local, part, shared_as, whole

ROLES = ("matrices", "embeddings", "head", "vectors")
EXPERTS = (
    "num_experts",
    "num_local_experts",
    "moe_num_experts",
    "n_routed_experts",
    "n_shared_experts",
    "num_routed_experts",
    "total_experts",
)
"""Names under which modules keep the number of experts whose matrices, or biases, one parameter stacks."""


def parameter_groups(network: nn.Module, decay_embeddings: bool = False) -> list[dict[str, Any]]:
    """Sorts the trainable parameters of a network into optimiser groups by role.

    Args:
        network: Any network.
        decay_embeddings: Apply weight decay to embeddings too.

    Returns:
        One group for each role that occurs, with its name under `role`: `matrices` (two or more dimensions, inside a
        `Block`), `embeddings`, `head` (other matrices) and `vectors` (norms and biases, including the biases of all
        experts in one parameter). Groups without weight decay carry `weight_decay: 0.0`; the others take the
        optimiser's. A parameter that stacks one matrix per expert is marked with `is_stack` for `Muon`; it is
        recognised by its module, which states the number of experts (`EXPERTS`). Other parameters of three dimensions,
        such as XLNet's, are one matrix. The weight of a `Conv1D` of transformers, which has a column per output, is
        marked with `is_transposed`.

    Raises:
        ValueError: When nothing is trainable.

    Source:
        No decay on norms and biases: Loshchilov & Hutter's AdamW as practised since Radford et al., 2018.
    """
    in_block = {p for module in network.modules() if isinstance(module, Block) for p in module.parameters()}
    embeddings = {p for module in network.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    of_experts = {p for module in network.modules() for p in module.parameters(recurse=False) if _by_expert(module, p)}
    by_role: dict[str, list[nn.Parameter]] = defaultdict(list)
    transposed = {module.weight for module in network.modules() if type(module).__name__ == "Conv1D"}
    for name, p in network.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim == 3 and p in of_experts:
            p.is_stack = True
        if p in transposed:
            p.is_transposed = True
        if p.ndim < 2 or (p in of_experts and name.endswith("bias")):
            role = "vectors"
        elif p in embeddings:
            role = "embeddings"
        else:
            role = "matrices" if p in in_block else "head"
        by_role[role].append(p)
    if not by_role:
        raise ValueError("network must have trainable parameters, but is frozen as a whole; unfreeze some of it")
    undecayed = {"vectors"} if decay_embeddings else {"vectors", "embeddings"}
    return [
        {"params": by_role[role], "role": role} | ({"weight_decay": 0.0} if role in undecayed else {})
        for role in ROLES
        if role in by_role
    ]


def _by_expert(module: nn.Module, p: nn.Parameter) -> bool:
    """Whether the first dimension of a parameter is the number of experts that its module states."""
    return p.ndim > 1 and any(getattr(module, name, None) == p.shape[0] for name in EXPERTS)


def orthogonalize(matrices: Float[Tensor, "n rows cols"]) -> Float[Tensor, "n rows cols"]:
    """Moves all singular values of each matrix towards one (to about 0.7 to 1.2), keeping the singular vectors.

    Args:
        matrices: A stack of matrices of one shape.

    Returns:
        The result in bfloat16, which is precise enough for a direction; in float32 on a device without known
        instructions for bfloat16, since it is faster without them.

    Source:
        Jordan et al., 2024, "Muon", kellerjordan.github.io/posts/muon.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if multiplies_bfloat16(matrices.device.type) else matrices.float()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):  # Newton–Schulz iterations of the quintic `a X + b (X Xᵀ) X + c (X Xᵀ)² X`
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class Muon(Optimizer):
    """Orthogonalised momentum for the matrices inside blocks, AdamW for embeddings, head and vectors.

    Idea: a matrix's momentum has a few dominant directions; setting all its singular values to one makes every
    direction learn at the same pace. Suggested: `lr` 0.02 to 0.1 for matrices of any size, with warm-up.

    Args:
        params: Groups from `parameter_groups`, or plain parameters (then those of two or more dimensions are matrices).
        lr: Learning rate for matrices; the root mean square of an update is near `lr / sqrt(cols)`. (Of a `Conv1D`
            of transformers, rows and columns change places.)
        momentum: Nesterov momentum for matrices.
        momentum_warmup_steps: Steps over which the momentum rises from 0.85, so that the first, fast-changing gradients
            are forgotten sooner; 0 for none.
        weight_decay: Decoupled weight decay, for groups that do not set their own.
        embedding_lr: AdamW's learning rate for embeddings.
        head_lr: AdamW's learning rate for the output layer.
        vector_lr: AdamW's learning rate for norms and biases.
        betas: AdamW's betas.
        eps: AdamW's epsilon.

    Raises:
        ValueError: When a value is out of range.

    Source:
        Jordan et al., 2024, "Muon", kellerjordan.github.io/posts/muon, with its scale `sqrt(max(1, rows / cols))`.
        Matrices of one shape are orthogonalised in one batched product; each expert's matrix is one of them, and a
        convolution is a matrix with a row per output channel. For sharded matrices (`strategies`) every device
        orthogonalises the whole matrix.

    Example:
        >>> network = nn.Linear(4, 4)
        >>> optimizer = Muon(network.parameters(), lr=0.1)
        >>> network(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        momentum_warmup_steps: int = 0,
        weight_decay: float = 0.0,
        embedding_lr: float = 0.01,
        head_lr: float = 0.002,
        vector_lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        require_at_least(0, lr=lr, embedding_lr=embedding_lr, head_lr=head_lr, vector_lr=vector_lr)
        require_at_least(0, weight_decay=weight_decay, eps=eps, momentum_warmup_steps=momentum_warmup_steps)
        require_range("in [0, 1)", **{"momentum": momentum, "betas[0]": betas[0], "betas[1]": betas[1]})
        groups = list(params)
        if groups and not isinstance(groups[0], dict):
            plain = {"matrices": [p for p in groups if p.ndim >= 2], "vectors": [p for p in groups if p.ndim < 2]}
            groups = [{"params": members, "role": role} for role, members in plain.items() if members]
        rates = {"matrices": lr, "embeddings": embedding_lr, "head": head_lr, "vectors": vector_lr}
        for group in groups:
            group["lr"] = rates[group["role"]]
        super().__init__(
            groups,
            {
                "lr": lr,
                "momentum": momentum,
                "momentum_warmup_steps": momentum_warmup_steps,
                "weight_decay": weight_decay,
                "betas": betas,
                "eps": eps,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step; `closure` computes the loss and gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (self._muon if group["role"] == "matrices" else self._adamw)(group)
        return loss

    def _muon(self, group: dict[str, Any]) -> None:
        alike: dict[tuple[torch.Size, bool, bool], list[nn.Parameter]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                alike[p.shape, getattr(p, "is_stack", False), getattr(p, "is_transposed", False)].append(p)
        for (_, is_stack, is_transposed), members in alike.items():
            grads = local(p.grad for p in members)
            for p in members:
                if not self.state[p]:
                    self.state[p] |= {"step": 0, "momentum_buffer": torch.zeros_like(p)}
            buffers = local(self.state[p]["momentum_buffer"] for p in members)
            momentum = group["momentum"]
            if warmup := group["momentum_warmup_steps"]:
                momentum += (0.85 - momentum) * max(0.0, 1 - self.state[members[0]]["step"] / warmup)
            for p in members:
                self.state[p]["step"] += 1
            torch._foreach_lerp_(buffers, grads, 1 - momentum)
            nesterov = torch._foreach_lerp(grads, buffers, momentum)
            # Every device computes the whole update of a sharded matrix and keeps its own shard.
            wholes = torch.stack([whole(shared_as(u, p)) for u, p in zip(nesterov, members)])
            updates = orthogonalize(wholes.flatten(0, 1) if is_stack else wholes.flatten(2))
            rows, cols = updates.shape[:0:-1] if is_transposed else updates.shape[1:]
            scale = max(1.0, rows / cols) ** 0.5
            mine = local(members)
            if group["weight_decay"]:
                torch._foreach_mul_(mine, 1 - group["lr"] * group["weight_decay"])
            updates = updates.to(members[0].dtype).view(wholes.shape)
            updates = [part(u, p) for u, p in zip(updates.unbind(), members)]
            torch._foreach_add_(mine, updates, alpha=-group["lr"] * scale)

    def _adamw(self, group: dict[str, Any]) -> None:
        members = [p for p in group["params"] if p.grad is not None]
        for p in members:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        if not members:
            return
        for p in members:  # Lightning loads a checkpoint on the CPU and leaves `step` there
            self.state[p]["step"] = self.state[p]["step"].to(p.device)
        states = [self.state[p] for p in members]
        adamw(
            local(members),
            local(p.grad for p in members),
            local(s["exp_avg"] for s in states),
            local(s["exp_avg_sq"] for s in states),
            [],
            [s["step"] for s in states],
            fused=members[0].device.type not in ("meta", "xla"),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
