"""The contribution of each idea of the main recipe is measured on equal tokens and compared with the whole recipe."""

from __future__ import annotations

import argparse

import pytest
import torch
import yaml

from experiments import trainings
from experiments.time_to_quality import run as quality
from experiments.time_to_quality.networks import NormalLlama
from lit_llm.models.llama import Llama
from tests.writing import places


@pytest.mark.slow
def test_each_idea_is_taken_out_alone_and_measured_once(lit_llm, texts, tmp_path, monkeypatch):
    commands = []

    def inside(words, log, options):
        commands.append(words)
        outcome = lit_llm(*words)
        assert outcome.code == 0, outcome.err

    monkeypatch.setattr(trainings, "lit_llm", inside)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- time_to_quality --><!-- /time_to_quality -->")
    few = [f"--data.path={texts}", "--data.tokenizer=bytes", "--model.network.num_layers=1"]
    few += ["--data.validation_fraction=0.1", "--data.test_fraction=0.1"]
    words = ["--steps", "3", "--seeds", "0", "--work", str(tmp_path / "work"), "--readme", str(readme), *few]
    quality.main(words)
    assert len(commands) == len(quality.IDEAS)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in readme.read_text().splitlines() if "|" in line]
    assert [row[0] for row in rows[2:]] == [idea.text for idea in quality.IDEAS.values()]
    found = trainings.Measurements(tmp_path / "work/measurements.jsonl", {}).found
    assert {one["tokens"] for one in found} == {3 * 2048}
    assert all([tokens for tokens, _ in one["curve"]] == [2048, 4096, 6144] for one in found)
    assert all(one["curve"][-1][1] == one["bits_per_byte"] for one in found)
    # Each change has an effect: no two results are equal.
    assert len({one["bits_per_byte"] for one in found}) == len(found)
    configs = {name: yaml.safe_load((tmp_path / f"work/{name}-0/config.yaml").read_text()) for name in quality.IDEAS}
    optimizer = configs["muon"]["model"]["init_args"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.AdamW"
    assert {name: optimizer["init_args"][name] for name in ("lr", "weight_decay")} == {"lr": 0.003, "weight_decay": 0.1}
    networks = [configs[name]["model"]["init_args"]["network"] for name in ("whole", "initialisation")]
    assert networks[0]["init_args"] == networks[1]["init_args"]
    assert networks[0]["class_path"] != networks[1]["class_path"]
    assert (tmp_path / "time_to_quality.png").stat().st_size > 5000
    assert not list((tmp_path / "work").rglob("*.safetensors"))
    before = readme.read_text()
    quality.main(words)
    assert len(commands) == len(quality.IDEAS)
    assert readme.read_text() == before


def test_ideas_are_set_against_the_whole_recipe_seed_by_seed(tmp_path):
    options, _ = quality.parsed(["--ideas", "muon"])
    assert options.ideas == ["whole", "muon"]
    with pytest.raises(argparse.ArgumentTypeError, match=r"must be of whole, schedule, .*, but has mion"):
        quality.ideas("mion,schedule")

    def one(idea: str, seed: int, *values: float) -> dict:
        curve = [[100 * (1 + place), value] for place, value in enumerate(values)]
        figures = {"bits_per_byte": values[-1], "curve": curve, "seconds": 10.0, "tokens": curve[-1][0]}
        return {"idea": idea, "seed": seed} | figures

    found = [one("whole", 0, 3.0, 2.0, 1.0), one("whole", 1, 3.2, 2.2, 1.2)]
    found += [one("muon", 0, 4.0, 3.0, 1.5), one("muon", 1, 4.0, 3.0, 1.8)]
    lines = quality.table(found, options)
    assert lines[2].endswith("| tokens to reach 1.6500 |")
    assert lines[4] == "| the whole recipe | 1.1000 ± 0.1414 |  |  | 10 ± 0 | 245 |"
    assert "| 1.6500 ± 0.2121 | +0.5500 ± 0.0707 | 0.058 | 10 ± 0 | 300 |" in lines[5]
    assert quality.tokens_to_reach([(100, 2.0), (200, 1.0)], 2.0) == "at most 100"
    assert quality.tokens_to_reach([(100, 2.0), (200, float("nan"))], 1.5) == "not reached"
    quality.draw(tmp_path / "curves.png", found)
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert places("time_to_quality", "time_to_quality") == 1


def test_a_network_without_our_initialisation_is_the_same_network_of_equal_spreads():
    size = {"d_model": 64, "num_layers": 2, "num_heads": 2, "qk_norm": True}
    ours, plain = Llama(500, **size), NormalLlama(500, **size)
    plain.load_state_dict(ours.state_dict())
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(plain(tokens), ours(tokens))
    plain.reset_parameters()
    matrices = [p for p in plain.parameters() if p.ndim == 2]
    assert len(matrices) == 2 + 2 * 7
    assert all(abs(p.std().item() - 0.02) < 0.002 for p in matrices)
    assert all((p == 1).all() for p in plain.parameters() if p.ndim == 1)
