"""Adapter from this package's language models to lm-eval (Language Model Evaluation Harness)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn
from transformers import PreTrainedTokenizerBase

from lit_llm.data.tokenizer import boundary_id, first_id, opening_ids
from lit_llm.generation import stream_tokens
from lit_llm.wording import first_line

NEW_TOKENS = 256
"""Maximum number of tokens of an answer if its task sets none, as in lm-eval's own models."""


class LiveModel(TemplateLM):
    """Answers lm-eval's requests with the network itself, without a copy or a class of transformers.

    Args:
        network: A causal language model, with `new_cache` if tasks generate text.
        tokenizer: Its tokeniser.
        batch_size: Rows per forward pass.

    Source:
        Gao et al., 2021, "A Framework for Few-shot Language Model Evaluation", doi:10.5281/zenodo.5371628.
    """

    def __init__(self, network: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8) -> None:
        super().__init__()
        self.network, self.tokenizer, self.batch_size = network, tokenizer, batch_size
        self.longest = getattr(network, "max_seq_len", None) or 2048
        self.opening = opening_ids(tokenizer)
        self._device = next(network.parameters()).device
        # With a separate head, logits are computed only at the positions that are asked for.
        apart = hasattr(network, "hidden")
        self._read, self._head = (network.hidden, network.lm_head) if apart else (network, nn.Identity())

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return boundary_id(self.tokenizer)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that nothing precedes."""
        return first_id(self.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encodes a text; prepends the opening token unless it is there already or not wanted, and appends nothing."""
        ids = self.tokenizer.encode(string, add_special_tokens=False)
        return ids if add_special_tokens is False or ids[:1] == self.opening else [*self.opening, *ids]

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        rows = [((context + wanted)[-self.longest - 1 :], len(wanted)) for _, context, wanted in requests]
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index][0]))
        found: dict[int, tuple[float, bool]] = {}
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            width = len(rows[batch[0]][0]) - 1
            # Padding is on the right, so that causal attention never sees it.
            ids = torch.tensor([[*rows[i][0][:-1], *[0] * (width - len(rows[i][0]) + 1)] for i in batch])
            for i, row in zip(batch, self._read(ids.to(self.device)), strict=True):
                tokens, count = rows[i]
                count = min(count, len(tokens) - 1)
                said = self._head(row[len(tokens) - 1 - count : len(tokens) - 1]).float().log_softmax(dim=-1)
                target = torch.tensor(tokens[len(tokens) - count :], device=self.device)
                nats = said.gather(1, target[:, None]).sum()
                found[i] = float(nats), bool((said.argmax(dim=-1) == target).all())
        return [found[index] for index in range(len(rows))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, window by window."""
        totals = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = map(
                make_disjoint_window, get_rolling_token_windows(tokens, self.prefix_token_id, self.longest, 1)
            )
            pairs = [(("", ""), list(context), list(wanted)) for context, wanted in windows]
            totals.append(sum(nats for nats, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generates continuations up to a stop word; greedily unless a task asks for sampling."""
        ways: dict[tuple[Any, ...], list[int]] = {}
        for index, request in enumerate(requests):
            options = normalize_gen_kwargs(request.args[1], NEW_TOKENS)
            new = min(options["max_gen_toks"], self.longest - 1)  # the context is truncated, as in lm-eval's own
            temperature = options.get("temperature", 1.0) if options.get("do_sample") else 0.0
            until = options.get("until") or []
            stops = filter(None, [until] if isinstance(until, str) else until)
            drawn = float(temperature), options.get("top_k"), options.get("top_p")
            ways.setdefault((new, tuple(stops), *drawn), []).append(index)
        texts: dict[int, str] = {}
        for way, members in ways.items():
            room = self.longest - way[0]
            first = [] if self.opening else [self.prefix_token_id]
            ids = {i: [*first, *self.tok_encode(requests[i].args[0])][-room:] for i in members}
            order = sorted(members, key=lambda index: len(ids[index]))
            for first in range(0, len(order), self.batch_size):
                batch = order[first : first + self.batch_size]
                said = self._written([ids[index] for index in batch], *way, seed=first)
                texts |= dict(zip(batch, said, strict=True))
        return [texts[index] for index in range(len(requests))]

    def _written(self, prompts: list[list[int]], new: int, stops: tuple[str, ...], *drawn: Any, seed: int) -> list[str]:
        """Generates a continuation of each prompt up to the first stop word in it."""
        ends = re.compile("|".join(map(re.escape, stops)) or "(?!)").search
        said: list[list[int]] = [[] for _ in prompts]
        made = stream_tokens(self.network, prompts, new, *drawn, seed=seed, stop=self.eot_token_id)
        for count, tokens in enumerate(made, 1):
            for text, token in zip(said, tokens, strict=True):
                text += [token] if token is not None else []
            over = (
                token is None or ends(self.tokenizer.decode(text)) for text, token in zip(said, tokens, strict=True)
            )
            if count % 8 == 0 and all(over):
                break  # the rest would be cut off
        return [self._cut(text, ends) for text in said]

    def _cut(self, ids: list[int], ends: Callable[[str], re.Match[str] | None]) -> str:
        """The text of an answer without special tokens, up to its first stop, which may be one of them."""
        found = ends(whole := self.tokenizer.decode(ids))
        if found is None:
            return self.tokenizer.decode(ids, skip_special_tokens=True)
        kept = whole[: found.start()]
        for count in range(len(ids), -1, -1):  # whole tokens before the stop, and the begun one's text
            if kept.startswith(begun := self.tokenizer.decode(ids[:count])):
                break
        return self.tokenizer.decode(ids[:count], skip_special_tokens=True) + kept[len(begun) :]


class GivenTasks(TaskManager):
    """lm-eval's task manager; if a task cannot be loaded, the error names it as the user did.

    Loading reads a task's data and renders its first example. Later failures may be the network's fault.

    Args:
        include_defaults: Include lm-eval's own tasks: thousands of files, which take seconds to read.

    Attributes:
        files: Task definitions read from files, by the files' names.
    """

    def __init__(self, include_defaults: bool) -> None:
        super().__init__(include_defaults=include_defaults)
        self.files: dict[str, dict[str, Any]] = {}

    def _load_spec(self, spec: Any) -> Any:
        try:
            return super()._load_spec(spec)
        except Exception as error:  # from a task's functions or the readers of its data
            name = next((file for file, read in self.files.items() if read is spec), spec)
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise ValueError(f"--tasks must be tasks that lm-eval can read, but {name} is none: {reason}") from error
