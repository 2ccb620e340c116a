"""The measuring harness still works, so that experiments can be repeated with later versions of the package."""

from __future__ import annotations

import json

import pytest

from experiments.throughput import peers, processes, report, run, step_overhead
from experiments.throughput.corpus import prepare
from tests.writing import places


def test_lit_llm_fit_and_its_peers_train_the_same_thing(lit_llm, tmp_path):
    options = run.parsed(["--sizes", "tiny", "--steps", "4", "--warmup", "1", "--work", str(tmp_path)])
    sizes = run.SIZES["tiny"]
    prepare(tmp_path / "corpus", 65, 200)
    outcome = lit_llm(*run.fit_words(tmp_path / "corpus", tmp_path / "ours.json", sizes, 65, "fp32", options)[3:])
    assert outcome.code == 0, outcome.err
    for peer in ("bare", "nanogpt"):
        out = tmp_path / f"{peer}.json"
        peers.PEERS[peer](peers.Setting(str(tmp_path / "corpus"), str(out), dtype="fp32", steps=4, warmup=1, **sizes))
    ours, bare, nanogpt = (json.loads((tmp_path / f"{peer}.json").read_text()) for peer in ("ours", "bare", "nanogpt"))
    assert ours["parameters"] == bare["parameters"] == nanogpt["parameters"]
    assert ours["loss"] == pytest.approx(bare["loss"], rel=1e-6)  # same weights, rows and order
    assert ours["loss"] == pytest.approx(nanogpt["loss"], rel=1e-3)  # a reimplementation of the same network
    assert min(found["tokens_per_second"] for found in (ours, bare, nanogpt)) > 0


def test_the_table_holds_the_ratio_of_each_round_and_goes_between_its_markers(tmp_path):
    options = run.parsed(["--rounds", "3"])
    one = {"peak_bytes": 2**30, "parameters": 10_000_000, "loss": 3.5, "others_cores": 0.01}
    one |= {"device": "a CPU", "threads": 2, "torch": "2.0"}

    def runs(*speeds: float) -> dict[int, dict]:
        return {round_: one | {"tokens_per_second": speed} for round_, speed in enumerate(speeds)}

    found = {"ours": runs(120, 130, 140), "hf": runs(100, 100, 140)}
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- cpu -->\nold\n<!-- /cpu -->\nafter\n")
    report.write_table("cpu", run.table({("baby", 65, "fp32"): found}, options), readme)
    text = readme.read_text()
    assert text.startswith("before\n<!-- cpu -->\n")
    assert text.endswith("<!-- /cpu -->\nafter\n")
    assert "old" not in text
    assert "| ours | 130 [120–140] |  |  | 1,024 met |" in text
    assert "| hf | 100 [100–140] | 1.20 [1.00–1.30] | 1.08 met |" in text
    with pytest.raises(ValueError, match="must have the markers <!-- gpu -->"):
        report.write_table("gpu", [], readme)


@pytest.mark.slow
def test_two_processes_are_timed_beside_one(tmp_path, capsys):
    words = ["--size", "tiny", "--dtypes", "fp32", "--steps", "4", "--warmup", "1", "--rounds", "1"]
    processes.main([*words, "--max_wait", "0", "--work", str(tmp_path), "--no_table"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("| fp32, tokens/s | ")
    both = [json.loads((tmp_path / f"processes-{number}-fp32.json").read_text()) for number in (1, 2)]
    assert both[0]["threads"] == 2
    assert both[1]["threads"] == 1
    assert both[0]["parameters"] == both[1]["parameters"]


@pytest.mark.parametrize("name", ["cpu", "cuda", "step_overhead", "processes", "first_step", "loading", "tokenising"])
def test_the_readme_has_a_place_for_every_table(name):
    assert places("throughput", name) == 1


def test_the_trivial_step_is_measured_as_a_run_of_the_command_line(lit_llm, tmp_path):
    out = tmp_path / "ours.txt"
    options = step_overhead.parsed(["--steps", "20", "--warmup", "5", "--work", str(tmp_path)])
    outcome = lit_llm(*step_overhead.words("ours", options, out)[3:])
    assert outcome.code == 0, outcome.err
    assert float(out.read_text()) > 0
