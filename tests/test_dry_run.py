"""Estimates without data are compared with real steps."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lit_llm.dry_run import Ledger, measure_step
from lit_llm.models.llama import Llama
from lit_llm.models.pretrained import PretrainedCausalLM
from lit_llm.objectives.losses import linear_cross_entropy_sum
from lit_llm.optimizers import Muon, parameter_groups

SMALL = {"vocab_size": 300, "d_model": 64, "num_layers": 3, "num_heads": 4, "d_ff": 128, "max_seq_len": 64}
IDS = torch.zeros(4, 64, dtype=torch.long)
ADAMW = functools.partial(torch.optim.AdamW, fused=True)
PRECISIONS = ("32-true", "bf16-mixed")


def loss(network, batch):
    return linear_cross_entropy_sum(network.hidden(batch), network.lm_head.weight, batch)


def step(make=ADAMW, precision="32-true", checkpointed=None, parts=1, ids=IDS, **changes):
    build = functools.partial(Llama, **(SMALL | changes))
    return measure_step(build, lambda n: make(parameter_groups(n)), loss, ids, precision, checkpointed, parts)


@pytest.fixture(scope="module")
def plain():
    return step()


def test_parameters_weights_gradients_and_optimizer_are_those_of_the_network_itself(plain):
    network = Llama(**SMALL)
    count = sum(p.numel() for p in network.parameters())
    assert (plain.parameters, plain.trained, plain.embeddings) == (count, count, 300 * 64)
    assert plain.weights == plain.gradients == 4 * count
    blocks = [sum(p.numel() for p in block.parameters()) for block in network.layers]
    assert (plain.block, plain.outside) == (4 * max(blocks), 4 * (count - sum(blocks)))
    # Adam: two averages per element, and one step count per parameter.
    assert plain.optimizer == 8 * count + 4 * len(list(network.parameters()))
    assert plain.tokens == 4 * 64


def test_a_precision_changes_no_operation():
    found = [step(ids=torch.zeros(1, 600, dtype=torch.long), precision=name, max_seq_len=600) for name in PRECISIONS]
    assert found[0].flops == found[1].flops


def test_what_the_forward_pass_keeps_is_what_autograd_saves(plain):
    network, kept = Llama(**SMALL), {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    ours = {p.untyped_storage().data_ptr() for p in network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss(network, IDS)
    saved = sum(size for place, size in kept.items() if place not in ours)
    gradients = sum(t.nbytes for t in value.grad_fn.gradients)  # computed by the loss in its forward pass
    assert plain.activations == pytest.approx(saved + gradients, rel=0.05)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_operations_are_nearly_those_of_the_rule(precision):
    found, network = step(precision=precision), Llama(**SMALL)
    # Flash attention recomputes its scores: one additional product to the six of attention.
    again = 2 * 3 * 64 * 64 if precision == "32-true" else 0
    norms = 6 * sum(p.numel() for p in network.parameters() if p.ndim == 1)
    assert found.flops / found.tokens == network.flops_per_token(64) + again - norms


def test_operations_are_those_that_torch_counts_in_a_real_step():
    network = Llama(**SMALL).bfloat16()
    with FlopCounterMode(display=False) as counter:
        loss(network, IDS).backward()
    assert step(precision="bf16-true").flops == counter.get_total_flops() > 0


@pytest.mark.slow
def test_lower_precision_and_checkpointing_and_other_optimizers_keep_less(plain):
    mixed, low, checkpointed, muon = (
        step(precision="bf16-mixed"),
        step(precision="bf16-true"),
        step(checkpointed=True),
        step(Muon),
    )
    assert mixed.weights == plain.weights == 2 * low.weights
    assert mixed.casts > 0 == plain.casts == low.casts
    assert low.gradients == plain.gradients / 2
    assert checkpointed.activations < 0.5 * plain.activations
    assert checkpointed.weights == plain.weights
    assert muon.optimizer < plain.optimizer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_checkpointed_step_is_planned_alike_whenever_python_collects_garbage(precision):
    usual = step(precision=precision, checkpointed=True)
    gc.disable()
    try:
        assert step(precision=precision, checkpointed=True) == usual
    finally:
        gc.enable()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_passes_hold_what_the_tensors_of_a_real_step_do(checkpointed, parts):
    with Ledger() as ledger:
        network, batch = Llama(**SMALL, activation_checkpointing=checkpointed), IDS.clone()
        base = ledger.live
        ledger.begin()
        for _ in range(parts):
            loss(network, batch).backward()
    assert step(checkpointed=checkpointed, parts=parts).passes == ledger.peak - base


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_only_the_passes_take_more_where_gradients_of_several_batches_are_added_up(precision):
    alone, added = step(precision=precision), step(precision=precision, parts=4)
    same = ("weights", "gradients", "optimizer", "activations", "casts", "stepping", "flops", "tokens")
    assert [getattr(added, name) for name in same] == [getattr(alone, name) for name in same]
    assert alone.passes < added.passes <= alone.passes + alone.gradients
    assert added.passes_without_gradients >= alone.passes_without_gradients
    assert added.passes - added.passes_without_gradients == added.gradients


def test_checkpointing_adds_one_more_input_for_each_further_block():
    shallow, deep = (step(checkpointed=True, num_layers=num) for num in (3, 6))
    one = 4 * IDS.numel() * SMALL["d_model"]
    assert deep.passes_without_gradients - shallow.passes_without_gradients == 3 * one


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_experts_of_a_mixture_are_planned_as_a_real_step_takes_them(precision):
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "mixtral", "num_key_value_heads": 1, "num_local_experts": 4, **size}
    build = functools.partial(PretrainedCausalLM, 300, config)
    found = measure_step(build, lambda n: ADAMW(n.parameters()), loss, IDS, precision)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if "bf16" in precision else usual)
    try:
        with Ledger() as ledger:
            network, batch = build(), IDS.clone()
            base = ledger.live
            ledger.begin()
            loss(network, batch).backward()
    finally:
        torch.set_default_dtype(usual)
    assert found.flops == ledger.flops > 0
    assert found.passes == pytest.approx(ledger.peak - base, rel=0.1)


def test_a_network_that_cannot_compute_its_blocks_again_is_refused():
    with pytest.raises(ValueError, match="network must have activation_checkpointing to plan with it, but is a Linear"):
        measure_step(lambda: torch.nn.Linear(2, 2), ADAMW, loss, IDS, activation_checkpointing=True)


def test_a_loss_that_needs_what_a_batch_holds_is_refused():
    def picky(network, batch):
        return network(batch[batch.nonzero()[:, 0]].float()).sum()

    with pytest.raises(ValueError, match="model must be one whose loss can be planned from shapes alone, but needs"):
        measure_step(lambda: torch.nn.Linear(64, 2), lambda n: ADAMW(n.parameters()), picky, IDS)
