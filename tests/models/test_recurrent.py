from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lit_llm.checkpoints import save_model
from lit_llm.models.recurrent import GRU, LSTM, RNN, Pieces
from tests.writing import exactly

kinds = pytest.mark.parametrize(("kind", "theirs"), [(RNN, nn.RNN), (LSTM, nn.LSTM), (GRU, nn.GRU)])


def tokens(batch: int = 2, seq: int = 12, vocab: int = 37) -> torch.Tensor:
    return torch.randint(vocab, (batch, seq), generator=torch.Generator().manual_seed(1))


def pair(kind: type, theirs: type, tie_embeddings: bool = False) -> tuple[nn.Module, nn.Module]:
    """Ours, and torch's own stack of three layers with the same weights."""
    network = kind(37, d_model=16, num_layers=3, tie_embeddings=tie_embeddings).eval()
    stack = theirs(16, 16, num_layers=3, batch_first=True)
    own = {
        f"{n.removesuffix('_l0')}_l{i}": p for i, b in enumerate(network.layers) for n, p in b.cell.named_parameters()
    }
    stack.load_state_dict(own)
    return network, stack


@kinds
@pytest.mark.parametrize("tied", [False, True])
def test_it_is_torchs_own_stack_between_embeddings_and_head(kind, theirs, tied: bool) -> None:
    network, stack = pair(kind, theirs, tied)
    out, _ = stack(network.embed_tokens(tokens()))
    torch.testing.assert_close(network(tokens()), F.linear(out, network.lm_head.weight))
    assert (network.lm_head.weight is network.embed_tokens.weight) == tied


@kinds
def test_gradients_through_packed_documents_are_those_of_each_alone(kind, theirs) -> None:
    network, stack = pair(kind, theirs)
    ids, documents = tokens(), torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [0] * 1 + [1] * 11])
    weights = torch.randn(2, 12, 16)
    (network.hidden(ids, document_ids=documents) * weights).sum().backward()
    embedded = network.embed_tokens.weight.detach()[ids]
    for row in range(2):
        for number in documents[row].unique():
            here = documents[row] == number
            (stack(embedded[row, here][None])[0] * weights[row, here]).sum().backward()
    for index, layer in enumerate(network.layers):
        for name, p in layer.cell.named_parameters():
            expected = getattr(stack, f"{name.removesuffix('_l0')}_l{index}").grad
            torch.testing.assert_close(p.grad, expected, atol=1e-5, rtol=1e-4)


def test_pieces_hold_every_position_once_and_put_it_back() -> None:
    documents = torch.tensor([[0, 0, 1, 2, 2, 2], [3, 3, 3, 3, 3, 3], [0, 1, 0, 1, 0, 1]])
    pieces, x = Pieces(documents), torch.randn(3, 6, 4)
    packed = pieces.pack(x)
    assert packed.batch_sizes.tolist() == [10, 3, 2, 1, 1, 1]
    torch.testing.assert_close(pieces.unpack(packed), x, atol=0, rtol=0)


@kinds
def test_the_memory_goes_on_into_a_row_whose_first_document_began_before(kind, theirs) -> None:
    network, ids = pair(kind, theirs)[0], tokens()
    documents = torch.tensor([[0] * 7 + [1] * 5] * 2)
    cache = network.new_cache(2, 12)
    network(ids[:, :4], cache=cache)
    after = network(ids[:, 4:], document_ids=documents[:, 4:], cache=cache)
    torch.testing.assert_close(after, network(ids, document_ids=documents)[:, 4:])
    fresh = network.new_cache(2, 12)
    network(ids[:, 7:], cache=fresh)
    torch.testing.assert_close(cache.layers, fresh.layers)


@kinds
def test_dropout_acts_in_training_only_and_not_in_time(kind, theirs) -> None:
    network = kind(37, d_model=16, dropout=0.5)
    assert not torch.equal(network(tokens()), network(tokens()))
    assert torch.equal(network.eval()(tokens()), network(tokens()))
    assert all(layer.cell.dropout == 0 for layer in network.layers)


def test_the_forget_gates_of_an_lstm_begin_open() -> None:
    for layer in LSTM(10, d_model=8).layers:
        both = layer.cell.bias_ih_l0 + layer.cell.bias_hh_l0
        assert (both[8:16] == 1).all()
        assert (both[:8].abs() < 0.8).all()


@kinds
def test_flops_per_token_are_those_counted(kind, theirs) -> None:
    network = kind(500, d_model=64, num_layers=2)
    gates = {nn.RNN: 1, nn.LSTM: 4, nn.GRU: 3}[theirs]
    with FlopCounterMode(display=False) as counter:
        head = nn.functional.linear(torch.randn(8, 64, requires_grad=True), network.lm_head.weight)
        for _ in range(2 * 2 * gates):  # the counter does not see into torch's recurrent layers
            head = head.sum() + F.linear(
                torch.randn(8, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
            )
        head.sum().backward()
    assert network.flops_per_token(99) == pytest.approx(counter.get_total_flops() / 8, rel=0.03)


def test_it_is_not_exported_and_says_why(tmp_path: Path) -> None:
    message = "network must have a form that transformers knows, but is a LSTM"
    with pytest.raises(TypeError, match=exactly(message)):
        save_model(tmp_path / "model", LSTM(10, d_model=8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, but is 0"),
        ({"dropout": -0.5}, "dropout must be in [0, 1), but is -0.5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        GRU(10, **changes)
