"""Recurrent language models (RNN, LSTM, GRU). Transformers has no such classes, so they have no model directory."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lit_llm.blocks import Block
from lit_llm.models.flops import training_flops
from lit_llm.ranges import require_at_least, require_range

State = tuple[Float[Tensor, "1 _ d_model"], ...]
"""Recurrent state of one layer for each sequence: its last output and, for an LSTM, its cell."""


class StateCache:
    """Recurrent state of each layer after the tokens already read; its size does not depend on their number."""

    def __init__(self) -> None:
        self.layers: dict[int, State] = {}


class Pieces:
    """Cuts rows at document starts, so that all documents are read in one call, each from an empty state.

    Args:
        document_ids: Document of each position; an id that differs from the one before begins a piece.
    """

    def __init__(self, document_ids: Int[Tensor, "batch seq"]) -> None:
        begins = torch.ones_like(document_ids, dtype=torch.bool)
        begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        self.shape = document_ids.shape
        starts = begins.flatten().nonzero()[:, 0]
        lengths = torch.diff(starts, append=starts.new_tensor([begins.numel()]))
        # A packed sequence holds the first tokens of all pieces, longest piece first, then the second tokens, …
        order = lengths.argsort(descending=True, stable=True)
        rank = order.argsort()
        piece = begins.flatten().cumsum(0) - 1
        step = torch.arange(begins.numel(), device=starts.device) - starts[piece]
        self.places = (step * len(starts) + rank[piece]).argsort()
        self.batch_sizes = step.bincount().cpu()
        self.first, self.last = rank[piece.view(self.shape)[:, 0]], rank[piece.view(self.shape)[:, -1]]
        self.count = len(starts)

    def pack(self, x: Float[Tensor, "batch seq d_model"]) -> PackedSequence:
        """Packs rows into pieces."""
        return PackedSequence(x.flatten(0, 1)[self.places], self.batch_sizes)

    def unpack(self, pieces: PackedSequence) -> Float[Tensor, "batch seq d_model"]:
        """Restores rows from pieces."""
        flat = torch.empty_like(pieces.data).index_copy(0, self.places, pieces.data)
        return flat.unflatten(0, self.shape)

    def begin(self, state: State) -> State:
        """The state before each piece: the row's state for the first piece of a row, empty for the others."""
        return tuple(part.new_zeros(1, self.count, part.shape[2]).index_copy(1, self.first, part) for part in state)

    def end(self, state: State) -> State:
        """The state after each row's last piece."""
        return tuple(part[:, self.last] for part in state)


class RecurrentBlock(Block):
    """One recurrent layer.

    Args:
        cell: A recurrent module of torch with one layer.
    """

    def __init__(self, cell: nn.RNNBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(
        self, x: Float[Tensor, "batch new d_model"], state: State | None = None, pieces: Pieces | None = None
    ) -> tuple[Float[Tensor, "batch new d_model"], State]:
        """Reads the new positions.

        Args:
            x: The new positions.
            state: The state before them; `None` is empty.
            pieces: Where in the rows the state is reset.

        Returns:
            The output at each position, and the state after the last.
        """
        before = pieces.begin(state) if pieces and state else state
        given = before[0] if before and not isinstance(self.cell, nn.LSTM) else before
        out, after = self.cell(pieces.pack(x) if pieces else x, given)
        after = after if isinstance(after, tuple) else (after,)
        return (pieces.unpack(out), pieces.end(after)) if pieces else (out, after)


class Recurrent(nn.Module, ABC):
    """Base class of the recurrent language models: embeddings, a stack of layers, a head.

    Args:
        vocab_size: Number of tokens; decided by the data.
        d_model: Width of embeddings and recurrent states.
        num_layers: Number of recurrent layers.
        dropout: Dropout probability of the input of each layer and of the head, in [0, 1).
        tie_embeddings: Share one matrix between input and output embeddings.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 512,
        num_layers: int = 2,
        dropout: float = 0.0,
        tie_embeddings: bool = False,
    ) -> None:
        super().__init__()
        require_at_least(1, d_model=d_model, num_layers=num_layers)
        require_range("in [0, 1)", dropout=dropout)
        self.vocab_size, self.tie_embeddings = vocab_size, tie_embeddings
        self.embed_tokens = nn.Embedding(vocab_size, d_model)
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList(RecurrentBlock(self.cell(d_model)) for _ in range(num_layers))
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
        self.reset_parameters()

    @staticmethod
    @abstractmethod
    def cell(d_model: int) -> nn.RNNBase:
        """One recurrent layer, batch first."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws initial weights: uniform within ±0.1 for embeddings and head, torch's defaults for the layers."""
        if self.tie_embeddings:  # not in the constructor: moving off the meta device unties them
            self.lm_head.weight = self.embed_tokens.weight
        for layer in self.layers:
            layer.cell.reset_parameters()
        for weight in (self.embed_tokens.weight, self.lm_head.weight):
            nn.init.uniform_(weight, -0.1, 0.1)

    def hidden(
        self,
        input_ids: Int[Tensor, "batch new"],
        document_ids: Int[Tensor, "batch new"] | None = None,
        positions: Int[Tensor, "#batch new"] | None = None,
        mask: Bool[Tensor, "#batch 1 new seq"] | None = None,
        cache: StateCache | None = None,
    ) -> Float[Tensor, "batch new d_model"]:
        """The input of the head: the last layer's output after dropout. Arguments as in `forward`."""
        if document_ids is None and mask is not None:
            document_ids = mask[:, 0, -1, -input_ids.shape[1] :].long().expand_as(input_ids)
        pieces = Pieces(document_ids) if document_ids is not None else None
        states = cache.layers if cache is not None else {}
        x = self.embed_tokens(input_ids)
        for index, layer in enumerate(self.layers):
            x, states[index] = layer(self.drop(x), states.get(index), pieces)
        return self.drop(x)

    def forward(
        self,
        input_ids: Int[Tensor, "batch new"],
        document_ids: Int[Tensor, "batch new"] | None = None,
        positions: Int[Tensor, "#batch new"] | None = None,
        mask: Bool[Tensor, "#batch 1 new seq"] | None = None,
        cache: StateCache | None = None,
    ) -> Float[Tensor, "batch new vocab"]:
        """Logits of the token that follows each position.

        Args:
            input_ids: Tokens.
            document_ids: Document of each token; the state is reset where a new document begins.
            positions: Ignored: only the order of the tokens matters.
            mask: Tokens that the last position may not attend to are left padding, and do not affect the state. Not
                used with `document_ids`.
            cache: The state after earlier tokens; replaced by the state after the new ones.
        """
        return self.lm_head(self.hidden(input_ids, document_ids, positions, mask, cache))

    def new_cache(self, batch_size: int, max_seq_len: int) -> StateCache:
        """An empty cache for `forward`; neither size matters."""
        return StateCache()

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of one training step per token, for any `seq_len`; see `training_flops`."""
        return training_flops(self)


class RNN(Recurrent):
    """A language model with simple recurrent layers, `h = tanh(W x + U h + b)`; arguments as in `Recurrent`.

    Source:
        Elman, 1990, "Finding Structure in Time"; as a language model: Mikolov et al., 2010, "Recurrent neural network
        based language model", eq. 1 to 3. Differs in the tanh and in dropout, which is as in `LSTM`.

    Example:
        >>> RNN(vocab_size=10, d_model=16)(torch.zeros(1, 3, dtype=torch.long)).shape
        torch.Size([1, 3, 10])
    """

    @staticmethod
    def cell(d_model: int) -> nn.RNN:
        """One recurrent layer, batch first."""
        return nn.RNN(d_model, d_model, batch_first=True)


class LSTM(Recurrent):
    """A language model with long short-term memory (LSTM) layers; arguments as in `Recurrent`.

    Source:
        Hochreiter & Schmidhuber, 1997, "Long Short-Term Memory", with forget gates (Gers et al., 2000) whose biases
        start at one (Jozefowicz et al., 2015, "An Empirical Exploration of Recurrent Network Architectures", section
        2.2); dropout on non-recurrent connections: Zaremba et al., 2014, arXiv:1409.2329, section 3.2.

    Example:
        >>> LSTM(vocab_size=10, d_model=16)(torch.zeros(1, 3, dtype=torch.long)).shape
        torch.Size([1, 3, 10])
    """

    @staticmethod
    def cell(d_model: int) -> nn.LSTM:
        """One recurrent layer, batch first."""
        return nn.LSTM(d_model, d_model, batch_first=True)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As in `Recurrent`, but the biases of the forget gates start at one."""
        super().reset_parameters()
        for layer in self.layers:
            _, forget, _, _ = layer.cell.bias_ih_l0.chunk(4)
            forget.fill_(1.0)
            layer.cell.bias_hh_l0.chunk(4)[1].zero_()  # torch adds both biases


class GRU(Recurrent):
    """A language model with gated recurrent units; arguments as in `Recurrent`.

    Source:
        Cho et al., 2014, arXiv:1406.1078, section 2.3; the reset gate is applied after the product with the state, as
        in torch and cuDNN. Dropout is as in `LSTM`.

    Example:
        >>> GRU(vocab_size=10, d_model=16)(torch.zeros(1, 3, dtype=torch.long)).shape
        torch.Size([1, 3, 10])
    """

    @staticmethod
    def cell(d_model: int) -> nn.GRU:
        """One recurrent layer, batch first."""
        return nn.GRU(d_model, d_model, batch_first=True)
