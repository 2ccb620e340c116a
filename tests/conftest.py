"""What all tests share: a private cache, no network, a corpus with Chinese in it, and a small network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it once, when it is imported

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from writing import prose


@pytest.fixture(scope="session", autouse=True)
def _private_surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_LLM_CACHE", str(tmp_path_factory.mktemp("lit-llm-cache")))
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets-cache")))
        yield


@pytest.fixture(autouse=True)
def _same_chance_for_every_test() -> None:
    torch.manual_seed(0)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of 60 documents."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.txt").write_text(prose(number), encoding="utf-8")
    return folder


@pytest.fixture
def tiny_llama() -> Callable[..., Any]:
    """Makes a network of a few thousand parameters, none of which is where initialisation put it.

    Some weights start at zero; a test that compares outputs would compare nothing.
    """
    from lit_llm.models.llama import Llama

    def make(seed: int = 0, **changes: Any) -> Llama:
        size = {"vocab_size": 37, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 48, "max_seq_len": 64}
        network = Llama(**(size | changes))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in network.parameters():
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(1 + 0.2 * noise if p.ndim == 1 else noise * p.shape[-1] ** -0.5)
        return network.eval()

    return make
