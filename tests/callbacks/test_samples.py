import json
import logging
from pathlib import Path

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lit_llm.callbacks.samples import Samples
from lit_llm.models.pretrained import PretrainedCausalLM

SIZE = {"n_layer": 1, "n_head": 2}
CONFIGS = {
    "OpenAIGPTLMHeadModel": ({"model_type": "openai-gpt", "n_embd": 16, **SIZE}, "no cache of keys and values"),
    "BloomForCausalLM": ({"model_type": "bloom", "hidden_size": 16, **SIZE}, "no positions that can be given"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_network_of_transformers_that_cannot_write_goes_without_samples_and_why_is_said_once(
    name: str, tmp_path: Path, caplog
) -> None:
    config, has = CONFIGS[name]
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.state.fn = TrainerFn.FITTING
    samples, module = Samples(["def"]), LightningModule()
    module.evaluated = PretrainedCausalLM(37, config)
    with caplog.at_level(logging.INFO, "lit_llm"):
        for _ in range(2):
            samples.on_validation_end(trainer, module)
    line = (
        f"No samples: network must be made of attention over given positions to keep documents apart or to decode with "
        f"a cache, but a {name} has {has}"
    )
    assert [record.getMessage() for record in caplog.records if record.name.startswith("lit_llm")] == [line]
    assert not (tmp_path / "samples.txt").exists()


def test_a_prompt_that_the_network_has_no_room_for_is_refused_before_the_first_step(lit_llm, tiny, tmp_path) -> None:
    samples = {"class_path": "lit_llm.callbacks.samples.Samples", "init_args": {"prompts": ["a", "x" * 70]}}
    words = [f"--trainer.callbacks={json.dumps([samples])}", "--model.network.max_seq_len", 64]
    outcome = lit_llm("fit", *tiny, *words, "--run_dir", tmp_path / "run")
    assert outcome.code == 2
    assert outcome.last_line.endswith(
        "prompt must be at most 64 tokens, which the network's max_seq_len 64 has room to go on from, but is 71; "
        "shorten it"
    )
    assert not (tmp_path / "run/metrics.csv").exists()
