from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_llm.blocks import blocks_of
from lit_llm.compression.taps import tapping
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.products import MAX_QUERIES
from tests.examples import BERT


def test_blocks_inside_blocks_are_part_of_them(tiny_llama):
    network = tiny_llama()
    assert blocks_of(network) == list(network.layers)
    assert blocks_of(nn.Linear(2, 2)) == []


def test_what_blocks_give_is_what_transformers_calls_hidden_states_and_attentions():
    network = PretrainedClassifier(3, config=BERT).eval()
    network.model.config._attn_implementation = "sdpa"
    ids, mask = torch.randint(20, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    with tapping(network, attention=True) as tapped:
        network(input_ids=ids, attention_mask=mask)
    network.model.config._attn_implementation = "eager"
    said = network.model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    for index in range(2):
        torch.testing.assert_close(tapped.hidden[index], said.hidden_states[index + 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tapped.attention[index].softmax(-1), said.attentions[index], atol=1e-5, rtol=1e-5)
    with tapping(network, attention=True) as again:
        network(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(again.attention[0].softmax(-1), said.attentions[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("documents", [None, torch.tensor([[0, 0, 1, 1, 1, 1]])])
def test_scores_are_the_same_whichever_way_attention_is_computed(tiny_llama, documents):
    network, ids = tiny_llama(num_kv_heads=2), torch.randint(37, (1, 6))
    with tapping(network, attention=True) as fused:
        network(ids, document_ids=documents)
    with tapping(network.to(torch.bfloat16), attention=True) as by_matrices:
        network(ids, document_ids=documents)
    for index in range(2):
        assert fused.attention[index].shape == (1, 4, 6, 6)
        exact, rough = (tapped.attention[index].float().softmax(-1) for tapped in (fused, by_matrices))
        torch.testing.assert_close(exact, rough, atol=0.05, rtol=0.1)
        assert not exact.triu(1).any()


@pytest.mark.parametrize("documents", [None, torch.zeros(1, 200, dtype=torch.long)])
def test_all_scores_of_a_long_text_are_seen_where_attention_is_computed_by_rows(tiny_llama, documents):
    network, ids = tiny_llama(max_seq_len=200).to(torch.bfloat16), torch.randint(37, (1, 200))
    before = dict(MAX_QUERIES)
    with tapping(network, attention=True) as tapped:
        network(ids, document_ids=documents)
    assert before == MAX_QUERIES
    with torch.no_grad(), tapping(network.float(), attention=True) as exact:
        network(ids, document_ids=documents)
    for index in range(2):
        assert tapped.attention[index].requires_grad
        assert tapped.attention[index].shape == (1, 4, 200, 200)
        shares = (found.attention[index].float().softmax(-1) for found in (tapped, exact))
        torch.testing.assert_close(*shares, atol=0.05, rtol=0.1)


def test_nothing_is_left_in_a_network_that_was_tapped(tiny_llama):
    network = tiny_llama()
    with tapping(network, attention=True):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
