import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from lit_llm import optimizers
from lit_llm.blocks import Block
from lit_llm.optimizers import Muon, orthogonalize, parameter_groups
from tests.writing import exactly


def ids_of(groups: list[dict], role: str) -> set[int]:
    return {id(p) for group in groups if group["role"] == role for p in group["params"]}


def with_gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def weights(network: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in network.parameters()]


class Convolutions(Block):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall = nn.Conv2d(8, 4, 3), nn.Conv2d(2, 40, 3)
        self.line = nn.Conv1d(3, 5, 3)


class Experts(Block):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.wide, self.tall = nn.Parameter(torch.randn(4, 6, 24)), nn.Parameter(torch.randn(4, 24, 6))
        self.tall_bias = nn.Parameter(torch.randn(4, 24))
        self.line = nn.Conv1d(24, 4, 6)  # same shape as the experts, but a single matrix


class Heads(Block):
    """A matrix stored with its columns split by head, as in XLNet and Funnel."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.q_bias = nn.Parameter(torch.randn(8, 2, 4)), nn.Parameter(torch.randn(2, 4))


# Groups.


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_grouped_by_what_they_do(tiny_llama, tied: bool) -> None:
    network = tiny_llama(tie_embeddings=tied, qk_norm=True)
    groups = parameter_groups(network)
    matrices = {id(p) for layer in network.layers for p in layer.parameters() if p.ndim == 2}
    assert ids_of(groups, "matrices") == matrices
    assert ids_of(groups, "embeddings") == {id(network.embed_tokens.weight)}
    assert ids_of(groups, "head") == (set() if tied else {id(network.lm_head.weight)})
    assert ids_of(groups, "vectors") == {id(p) for p in network.parameters() if p.ndim == 1}
    assert [group["role"] for group in groups] == ["matrices", "embeddings", *(["head"] * (not tied)), "vectors"]


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_one_group_once(tiny_llama, tied: bool) -> None:
    network = tiny_llama(tie_embeddings=tied)
    found = [id(p) for group in parameter_groups(network) for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in network.parameters())


@pytest.mark.parametrize(("decay_embeddings", "undecayed"), [(False, {"embeddings", "vectors"}), (True, {"vectors"})])
def test_weight_decay_leaves_out_vectors_and_unless_asked_embeddings(tiny_llama, decay_embeddings, undecayed) -> None:
    groups = parameter_groups(tiny_llama(), decay_embeddings)
    assert {group["role"] for group in groups if group.get("weight_decay") == 0} == undecayed
    optimizer = torch.optim.AdamW(groups, weight_decay=0.3)
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.0 if group["role"] in undecayed else 0.3)


def test_frozen_parameters_are_left_out(tiny_llama) -> None:
    network = tiny_llama()
    network.embed_tokens.requires_grad_(False)
    network.layers[0].requires_grad_(False)
    groups = parameter_groups(network)
    assert not ids_of(groups, "embeddings")
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in network.parameters())


def test_a_network_without_blocks_has_a_head_and_vectors() -> None:
    groups = parameter_groups(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)))
    assert [(group["role"], len(group["params"])) for group in groups] == [("head", 1), ("vectors", 3)]


def test_a_network_frozen_as_a_whole_is_refused(tiny_llama) -> None:
    message = "network must have trainable parameters, but is frozen as a whole; unfreeze some of it"
    with pytest.raises(ValueError, match=exactly(message)):
        parameter_groups(tiny_llama().requires_grad_(False))


# Orthogonalisation.


def matrix_with(singular_values: torch.Tensor, rows: int, cols: int) -> tuple[torch.Tensor, ...]:
    u = torch.linalg.qr(torch.randn(rows, len(singular_values)))[0]
    v = torch.linalg.qr(torch.randn(cols, len(singular_values)))[0]
    return u * singular_values @ v.T, u @ v.T


@pytest.mark.parametrize(("rows", "cols"), [(16, 16), (16, 40), (40, 16)])
@pytest.mark.parametrize(("scale", "dtype"), [(1e-4, torch.bfloat16), (1.0, torch.float32), (1e4, torch.bfloat16)])
def test_singular_values_become_one_and_singular_vectors_stay(monkeypatch, rows, cols, scale, dtype) -> None:
    monkeypatch.setattr(optimizers, "multiplies_bfloat16", lambda kind: dtype is torch.bfloat16)
    pairs = [matrix_with(scale * torch.linspace(0.3, 1.0, 16), rows, cols) for _ in range(3)]
    found = orthogonalize(torch.stack([matrix for matrix, _ in pairs]))
    assert found.dtype == dtype
    singular_values = torch.linalg.svdvals(found.float())
    assert singular_values.min() > 0.6
    assert singular_values.max() < 1.3
    for matrix, (_, nearest) in zip(found.float(), pairs):
        # The nearest orthogonal matrix, U Vᵀ, has inner product Σσ with U Σ Vᵀ; rotated vectors would lower it.
        cosine = (matrix * nearest).sum() / matrix.norm() / nearest.norm()
        assert cosine > 0.98
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(u @ vh, nearest, atol=0.06, rtol=0)


def test_each_matrix_of_a_stack_is_on_its_own() -> None:
    stack = torch.randn(4, 8, 12) * torch.tensor([1.0, 100.0, 1e-3, 5.0])[:, None, None]
    alone = torch.cat([orthogonalize(matrix[None]) for matrix in stack])
    torch.testing.assert_close(orthogonalize(stack), alone, atol=2e-2, rtol=0)


def test_a_zero_matrix_stays_zero() -> None:
    assert (orthogonalize(torch.zeros(1, 4, 4)) == 0).all()


# Muon.


def test_a_step_on_a_matrix_is_the_orthogonalised_nesterov_momentum() -> None:
    lr, momentum, decay = 0.1, 0.9, 0.2
    tall, wide = nn.Parameter(torch.randn(12, 3)), nn.Parameter(torch.randn(3, 12))
    optimizer = Muon([tall, wide], lr=lr, momentum=momentum, weight_decay=decay)
    expected, buffers = [tall.detach().clone(), wide.detach().clone()], [torch.zeros(12, 3), torch.zeros(3, 12)]
    for step in range(3):
        with_gradients(nn.ParameterList([tall, wide]), step)
        optimizer.step()
        for index, p in enumerate((tall, wide)):
            buffers[index] = momentum * buffers[index] + (1 - momentum) * p.grad
            update = orthogonalize((momentum * buffers[index] + (1 - momentum) * p.grad)[None])[0].float()
            scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
            expected[index] = expected[index] * (1 - lr * decay) - lr * scale * update
    torch.testing.assert_close([tall.detach(), wide.detach()], expected, atol=1e-5, rtol=1e-5)


def test_the_update_of_a_matrix_does_not_depend_on_the_size_of_its_gradient() -> None:
    start, gradient, updates = torch.randn(8, 8), torch.randn(8, 8), []
    for scale in (2**-10, 1, 2**10):
        p = nn.Parameter(start.clone())
        p.grad = scale * gradient
        Muon([p], lr=0.1).step()
        updates.append(p.detach() - start)
    torch.testing.assert_close(updates[0], updates[1], atol=2e-3, rtol=0)
    torch.testing.assert_close(updates[2], updates[1], atol=2e-3, rtol=0)


def test_all_but_the_matrices_are_stepped_by_adamw(tiny_llama) -> None:
    ours, theirs = tiny_llama(), tiny_llama()
    rates = {"embeddings": 0.03, "head": 0.004, "vectors": 0.005}
    muon = Muon(
        parameter_groups(ours), embedding_lr=0.03, head_lr=0.004, vector_lr=0.005, weight_decay=0.1, betas=(0.8, 0.9)
    )
    groups = [group | {"lr": rates[group["role"]]} for group in parameter_groups(theirs) if group["role"] in rates]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.9), weight_decay=0.1, eps=1e-8, fused=True)
    for step in range(4):
        for network, optimizer in ((ours, muon), (theirs, adamw)):
            with_gradients(network, step)
            optimizer.step()
    compared = {id(p) for group in groups for p in group["params"]}
    for here, there in zip(ours.parameters(), theirs.parameters()):
        if id(there) in compared:
            torch.testing.assert_close(here, there, atol=1e-6, rtol=1e-6)
    assert len(compared) == 7


@pytest.mark.parametrize(
    ("kind", "name"), [(Convolutions, "wide"), (Convolutions, "tall"), (Convolutions, "line"), (Experts, "line")]
)
def test_a_convolution_is_a_matrix_of_its_output_channels(kind: type[Block], name: str) -> None:
    network, flat = kind(), kind()
    flat.load_state_dict(network.state_dict())
    layer = getattr(flat, name)
    matrix = nn.Parameter(layer.weight.detach().flatten(1).clone())
    with_gradients(network, 0)
    matrix.grad = getattr(network, name).weight.grad.flatten(1).clone()
    Muon(parameter_groups(network), lr=0.1).step()
    Muon([matrix], lr=0.1).step()
    torch.testing.assert_close(getattr(network, name).weight.detach().flatten(1), matrix.detach(), atol=5e-3, rtol=0)


@pytest.mark.parametrize(("d_in", "d_out"), [(4, 16), (16, 4)])
def test_a_matrix_with_a_column_for_each_output_is_stepped_as_that_with_a_row(d_in: int, d_out: int) -> None:
    """GPT-2 of transformers has such layers: its scale is by outputs and inputs, not by rows and columns."""
    turned, plain = Conv1D(d_out, d_in), nn.Linear(d_in, d_out)
    plain.weight.data = turned.weight.detach().T.clone()
    gradient = torch.randn(d_in, d_out)
    for layer, of_layer in ((turned, gradient), (plain, gradient.T)):
        block = Block()
        block.layer = layer
        layer.weight.grad = of_layer.clone()
        Muon(parameter_groups(block), lr=0.1).step()
    torch.testing.assert_close(turned.weight.T, plain.weight, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_each_of_several_experts_in_one_parameter_is_a_matrix(name: str) -> None:
    network = Experts()
    with_gradients(network, 0)
    stack = getattr(network, name)
    lone = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    for p, gradient in zip(lone, stack.grad):
        p.grad = gradient.clone()
    before = stack.detach().clone()
    Muon(parameter_groups(network), lr=0.1).step()
    Muon(lone, lr=0.1).step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in lone]), atol=2e-3, rtol=0)
    scale = 0.1 * max(1, stack.shape[1] / stack.shape[2]) ** 0.5
    singular_values = torch.linalg.svdvals(stack.detach() - before) / scale
    assert 0.6 < singular_values.min() < singular_values.max() < 1.3


def test_biases_of_several_experts_in_one_parameter_are_vectors() -> None:
    network = Experts()
    assert ids_of(parameter_groups(network), "vectors") == {id(network.tall_bias), id(network.line.bias)}


def test_a_matrix_parted_by_head_is_one_and_its_bias_no_vector() -> None:
    network = Heads()
    groups = parameter_groups(network)
    assert ids_of(groups, "matrices") == {id(network.q), id(network.q_bias)}
    flat = nn.Parameter(network.q.detach().flatten(1).clone())
    with_gradients(network, 0)
    flat.grad = network.q.grad.flatten(1).clone()
    Muon(groups, lr=0.1).step()
    Muon([flat], lr=0.1).step()
    torch.testing.assert_close(network.q.detach().flatten(1), flat.detach(), atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("mixtral", "num_local_experts"),
        ("qwen3_moe", "num_experts"),
        ("olmoe", "num_experts"),
        ("gpt_oss", "num_local_experts"),
        ("granitemoe", "num_local_experts"),
        ("deepseek_v3", "n_routed_experts"),
    ],
)
def test_experts_of_transformers_are_known(kind: str, count: str) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "moe_intermediate_size": 12, "vocab_size": 20, "head_dim": 4}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "first_k_dense_replace": 0}
    sizes |= {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "pad_token_id": None, count: 3}
    network = AutoModel.from_config(AutoConfig.for_model(kind, **sizes))
    vectors = ids_of(parameter_groups(network), "vectors")
    stacks = [p for p in network.parameters() if p.ndim == 3]
    assert len(stacks) == 2
    assert all(p.shape[0] == 3 and p.is_stack for p in stacks)
    biases = [p for name, p in network.named_parameters() if "experts" in name and name.endswith("bias")]
    assert len(biases) == (2 if kind == "gpt_oss" else 0)
    assert {id(p) for p in biases} <= vectors


def test_matrices_of_one_shape_are_stepped_as_each_alone() -> None:
    together = [nn.Parameter(torch.randn(6, 9)) for _ in range(3)]
    alone = copy.deepcopy(together)
    for p, q in zip(together, alone):
        p.grad = torch.randn(6, 9)
        q.grad = p.grad.clone()
        Muon([q], lr=0.1).step()
    Muon(together, lr=0.1).step()
    torch.testing.assert_close(together, alone, atol=2e-3, rtol=0)


def test_a_saved_state_continues_bit_by_bit(tiny_llama, tmp_path) -> None:
    network = tiny_llama(qk_norm=True)
    optimizer = Muon(parameter_groups(network), weight_decay=0.1)
    for step in range(3):
        with_gradients(network, step)
        optimizer.step()
    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    again = tiny_llama(seed=7, qk_norm=True)
    resumed = Muon(parameter_groups(again), weight_decay=0.1)
    state = torch.load(tmp_path / "state", weights_only=True)
    again.load_state_dict(state["network"])
    resumed.load_state_dict(state["optimizer"])
    for step in range(3, 6):
        for one, its in ((network, optimizer), (again, resumed)):
            with_gradients(one, step)
            its.step()
    torch.testing.assert_close(weights(again), weights(network), atol=0, rtol=0)
    torch.testing.assert_close(resumed.state_dict()["state"], optimizer.state_dict()["state"], atol=0, rtol=0)


def test_parameters_without_a_gradient_stay(tiny_llama) -> None:
    network = tiny_llama()
    before = weights(network)
    with_gradients(network, 0)
    for p in network.layers[0].parameters():
        p.grad = None
    optimizer = Muon(parameter_groups(network), weight_decay=0.5)
    optimizer.step()
    stayed = [torch.equal(p, old) for p, old in zip(network.parameters(), before)]
    assert stayed == [key.startswith("layers.0") for key, _ in network.named_parameters()]
    assert len(optimizer.state) == stayed.count(False)


def test_plain_parameters_are_matrices_and_vectors() -> None:
    optimizer = Muon(nn.Linear(3, 4).parameters(), lr=0.5, vector_lr=0.25)
    assert [(group["role"], group["lr"]) for group in optimizer.param_groups] == [("matrices", 0.5), ("vectors", 0.25)]


def test_weight_decay_is_each_groups_own(tiny_llama) -> None:
    optimizer = Muon(parameter_groups(tiny_llama()), weight_decay=0.3)
    decay = {group["role"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decay == {"matrices": 0.3, "embeddings": 0.0, "head": 0.3, "vectors": 0.0}


def test_a_closure_computes_the_loss_with_gradients() -> None:
    layer = nn.Linear(3, 2)
    optimizer = Muon(layer.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    before = closure().item()
    assert optimizer.step(closure).item() == before
    assert closure().item() < before


def test_muon_learns(tiny_llama) -> None:
    network, ids = tiny_llama(), torch.randint(37, (4, 9))
    optimizer, losses = Muon(parameter_groups(network)), []
    for _ in range(8):
        loss = nn.functional.cross_entropy(network(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -0.1}, "lr must be at least 0, but is -0.1"),
        ({"embedding_lr": -1.0}, "embedding_lr must be at least 0, but is -1.0"),
        ({"head_lr": -1.0}, "head_lr must be at least 0, but is -1.0"),
        ({"vector_lr": -1.0}, "vector_lr must be at least 0, but is -1.0"),
        ({"momentum": 1.0}, "momentum must be in [0, 1), but is 1.0"),
        ({"momentum": -0.1}, "momentum must be in [0, 1), but is -0.1"),
        ({"betas": (1.0, 0.9)}, "betas[0] must be in [0, 1), but is 1.0"),
        ({"betas": (0.9, 1.5)}, "betas[1] must be in [0, 1), but is 1.5"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, but is -0.1"),
        ({"eps": -1e-8}, "eps must be at least 0, but is -1e-08"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        Muon(nn.Linear(2, 2).parameters(), **changes)


def test_momentum_rises_to_its_value_over_the_warm_up() -> None:
    """The first step's buffer is `(1 - momentum)` times the gradient."""
    for warmup, expected in ((0, 0.95), (10, 0.85)):
        p = torch.nn.Parameter(torch.randn(4, 4))
        optimizer = Muon([p], lr=0.1, momentum=0.95, momentum_warmup_steps=warmup)
        p.grad = torch.ones(4, 4)
        optimizer.step()
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], torch.full((4, 4), 1 - expected))
    for _ in range(10):
        before = optimizer.state[p]["momentum_buffer"].clone()
        optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], 0.95 * before + 0.05)
