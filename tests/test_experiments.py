"""The measuring harness still measures, so that an experiment can be repeated when the package has moved on."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from experiments.checkpoints import run as checkpoints
from experiments.compression import run as compression
from experiments.mnist import run as mnist
from experiments.mnist import seed
from experiments.planning import run as planning
from experiments.scaling import run as scaling
from experiments.throughput import peers, report, run, step_overhead
from experiments.throughput.corpus import prepare
from lit_llm.models.cnn import CNN
from tests.writing import REPOSITORY


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
    assert ours["loss"] == pytest.approx(nanogpt["loss"], rel=1e-3)  # the same network, written anew
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


@pytest.mark.parametrize("name", ["cpu", "cuda", "step_overhead", "first_step", "loading", "tokenising"])
def test_the_readme_has_a_place_for_every_table(name):
    text = (REPOSITORY / "experiments/throughput/README.md").read_text(encoding="utf-8")
    assert text.count(f"<!-- {name} -->") == text.count(f"<!-- /{name} -->") == 1


def test_the_trivial_step_is_measured_as_a_run_of_the_command_line(lit_llm, tmp_path):
    out = tmp_path / "ours.txt"
    options = step_overhead.parsed(["--steps", "20", "--warmup", "5", "--work", str(tmp_path)])
    outcome = lit_llm(*step_overhead.words("ours", options, out)[3:])
    assert outcome.code == 0, outcome.err
    assert float(out.read_text()) > 0


@pytest.fixture
def tiny_mnist(tmp_path):
    """A hundred and some images of noise in the hub's layout."""
    folder = tmp_path / "data/mnist"
    folder.mkdir(parents=True)
    chance = np.random.default_rng(0)
    for split, count in (("train", 130), ("test", 70)):
        rows = []
        for row in range(count):
            buffer = io.BytesIO()
            Image.fromarray(chance.integers(0, 255, (28, 28), dtype=np.uint8)).save(buffer, "PNG")
            rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": row % 10})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    return tmp_path / "data"


RECIPES = sorted({recipe.config for table in mnist.TABLES.values() for recipe in table.values() if recipe.config})


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_for_mnist_takes_two_steps(lit_llm, tiny_mnist, tmp_path, name):
    small = ["--data.path", tiny_mnist / "mnist", "--data.batch_size", "2", "--trainer.max_steps", "2"]
    few = ["--data.labels_per_class", "2"] if "fixmatch" in name else []
    words = ["--config", mnist.run_file(name), *small, *few, "--trainer.limit_val_batches", "1"]
    outcome = lit_llm("fit", *words, "--run_dir", tmp_path / "run", "--test_after_fit", "false")
    assert outcome.code == 0, outcome.err


@pytest.mark.filterwarnings("ignore:dropout2d")
def test_the_script_that_we_began_with_runs_and_its_network_is_our_cnn(tiny_mnist, tmp_path, capsys):
    seed.main(["--data", str(tiny_mnist), "--epochs", "2", "--out", str(tmp_path / "out.json")])
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Epoch: 0, Test loss: 0\.\d{4}, Accuracy: 0\.\d{4}", first)
    assert second.startswith("Epoch: 1, ")
    found = json.loads((tmp_path / "out.json").read_text())
    assert {name: len(values) for name, values in found.items()} == {"seconds": 2, "loss": 2, "accuracy": 2}
    theirs, ours = seed.Model().eval(), CNN(10).eval()
    ours.load_state_dict(theirs.state_dict())
    picture, label = seed.MNIST(tiny_mnist, train=False, transform=seed.ToTensor())[3]
    assert label == 3
    assert picture.shape == (1, 28, 28)
    assert 0.9 < picture.max() <= 1
    torch.testing.assert_close(ours(picture[None]).log_softmax(-1), theirs(picture[None]))


def test_recipes_are_held_against_the_script_of_the_same_seed(tmp_path):
    options = mnist.parsed(["recipes", "--data", str(tmp_path), "--seeds", "0,1"])
    found = {}
    for number in (0, 1):
        found[mnist.SEEDS_SCRIPT, number] = {"seconds": 400.0 + 100 * number, "accuracy": 0.985, "images": 600_000}
        found["their recipe", number] = {"seconds": 200.0, "accuracy": 0.984, "images": 570_000}
        found["our network", number] = {"seconds": 5.0, "accuracy": 0.9911, "images": 57_000}
    lines = mnist.table(found, options)
    assert lines[-3] == "| the seeds' script | 98.50 ± 0.00 |  | 450.0 ± 70.7 |  |  | 45.0 ± 7.1 |"
    assert lines[-2] == "| their recipe | 98.40 ± 0.00 |  | 200.0 ± 0.0 | 2.1 ± 0.3 | 1.7 met | 21.1 ± 0.0 |"
    assert lines[-1] == "| our network | 99.11 ± 0.00 | 99.0 met | 5.0 ± 0.0 | 90.0 ± 14.1 | 80.0 met | 5.3 ± 0.0 |"
    text = (REPOSITORY / "experiments/mnist/README.md").read_text(encoding="utf-8")
    for name in mnist.TABLES:
        assert text.count(f"<!-- {name} -->") == text.count(f"<!-- /{name} -->") == 1


def test_plans_are_compared_with_runs_and_judged_where_they_did_not_calibrate():
    def found(flops: float, moved: float, seconds: float, peak: float) -> list[dict]:
        step = {"flops": flops, "moved": moved, "weights": 10, "optimizer": 20, "passes": 70, "stepping": 5}
        return [{"steps": {"as configured": step}, "probe": {"peak": peak, "seconds_per_step": seconds}}]

    options = planning.parsed(["--rounds", "1"])
    runs = [found(1e9, 1e9, 3.0, 100), found(2e9, 1e9, 4.4, 105), found(4e9, 1e9, 6.0, 100)]
    lines = planning.table(list(zip(planning.TINY, runs, strict=True)), options)
    assert "1e+09 operations/s and 5e+08 bytes/s" in lines[0]
    assert lines[-1] == "memory: at most 4.8% off, goal 10%: met; time: at most 9.1% off, goal 15%: met."
    assert sum("calibrates" in line for line in lines) == 2
    text = (REPOSITORY / "experiments/planning/README.md").read_text(encoding="utf-8")
    assert text.count("<!-- planning -->") == text.count("<!-- /planning -->") == 1


def test_a_setting_of_the_grid_is_planned_and_probed_by_the_command_line(lit_llm, tmp_path, texts):
    words = planning.plan_words(planning.TINY[0], tmp_path / "plan.json", "32-true")[3:]
    few = ["--data.path", texts, "--data.tokenizer", "bytes", "--data.validation_fraction", "0.1"]
    outcome = lit_llm(*words, *few)
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "plan.json").read_text())
    assert planning.costs(found)[0] > 0
    assert planning.measured_of([found])[1] > 0


@pytest.mark.slow
def test_ways_to_compress_are_measured_by_the_command_line(lit_llm, texts, tmp_path, monkeypatch):
    def inside(words, log, options):
        outcome = lit_llm(*words)
        assert outcome.code == 0, outcome.err

    monkeypatch.setattr(compression, "run", inside)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- language_model --><!-- /language_model -->")
    few = ["--data.path", str(texts), "--data.tokenizer", "bytes", "--data.seq_len", "32", "--data.batch_size", "4"]
    few += ["--data.validation_fraction", "0.1", "--data.test_fraction", "0.1"]
    few += ["--trainer.max_steps", "4", "--trainer.val_check_interval", "4", "--trainer.precision", "32-true"]
    words = ["language_model", "--seeds", "0", "--work", str(tmp_path / "work"), "--readme", str(readme), *few]
    words += ["--chains", "wanda,structured"]
    compression.main(words)
    lines = readme.read_text().splitlines()
    chains = compression.LANGUAGE_MODEL.chains
    stages = {stage["name"] for stage in [*chains["wanda"], *chains["structured"]]}
    assert all(any(line.startswith(f"| {name} |") for line in lines) for name in {*stages, "original"})
    assert sum(line.endswith(("| met |", "| **missed** |")) for line in lines) == 1  # of half the blocks' parameters
    half = next(line for line in lines if line.startswith("| Wanda 50 % |")).split("|")
    assert int(half[3]) == 100  # parameters
    assert 50 <= int(half[4]) < 80  # not zero: matrices inside blocks by half
    compression.main(words)  # all is there: nothing is trained again
    assert readme.read_text().splitlines() == lines


def test_a_goal_of_compression_is_judged_by_the_mean_of_its_seeds():
    def row(score: float) -> dict:
        one = {"metric": score, "parameters": 10, "nonzero": 10, "times_smaller": 1.0, "times_faster": 1.0}
        return one

    options, _ = compression.parsed(["images", "--seeds", "0,1"])
    rows = {"original": {0: row(0.990), 1: row(0.990)}, "int8": {0: row(0.991), 1: row(0.984)}}
    lines = compression.lines(compression.IMAGES, rows, options)
    assert "| int8 | 0.9875 ± 0.0049 | 100 ± 0 | 100 ± 0 | 1.00 ± 0.00 | 1.00 ± 0.00 |" in lines
    assert lines[-1] == "| int8: points won | -0.20 | -0.250 ± 0.495 | **missed** |"
    text = (REPOSITORY / "experiments/compression/README.md").read_text(encoding="utf-8")
    for name in compression.TABLES:
        assert text.count(f"<!-- {name} -->") == text.count(f"<!-- /{name} -->") == 1


STAGES = [
    "clean",
    "tokenise",
    "pre-train",
    "fine-tune",
    "evaluate",
    "distil",
    "prune",
    "quantise",
    "export",
    "generate",
]


@pytest.mark.slow
def test_the_lifecycle_leads_from_files_to_answers_and_takes_no_stage_twice(tmp_path):
    words = [sys.executable, "-m", "experiments.lifecycle.run", "--size", "tiny", "--threads", "1", "--no_table"]

    def run():
        done = subprocess.run([*words, "--work", tmp_path], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith(("|", "In all"))]

    lines = run()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:-1]]
    assert [row[0] for row in rows if row[0]] == STAGES
    assert all(int(row[4].replace(",", "")) > 0 for row in rows)
    distilled, pruned, recovered, int4, int8 = (int(row[4].replace(",", "")) for row in rows[6:11])
    assert distilled > pruned == recovered > 3 * int4 > 3 * int8
    assert (tmp_path / "tiny/generated.txt").read_text().count("-->") == 3
    assert (tmp_path / "tiny/exported/config.json").is_file()
    picture = tmp_path / "tiny/lifecycle.png"
    assert picture.stat().st_size > 5000
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path != picture}
    assert run() == lines
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_the_lifecycles_readme_has_a_place_for_what_it_writes():
    text = (REPOSITORY / "experiments/lifecycle/README.md").read_text(encoding="utf-8")
    for name in ("lifecycle", "generated"):
        assert text.count(f"<!-- {name} -->") == text.count(f"<!-- /{name} -->") == 1


def test_a_scaling_law_is_found_again_in_losses_made_by_it_and_has_no_floor_below_zero():
    sizes = [1e5, 3e5, 1e6, 3e6, 1e7]
    for made in (scaling.Law(1.2, 30.0, 0.3), scaling.Law(0.0, 8.0, 0.1)):
        law = scaling.fitted(sizes, [made.loss(n) for n in sizes])
        assert law.exponent == pytest.approx(made.exponent, rel=0.01)
        assert law.loss(1e8) == pytest.approx(made.loss(1e8), rel=0.01)
    falling_ever_faster = scaling.fitted(sizes, [5.0, 4.9, 4.5, 3.5, 1.0])
    assert falling_ever_faster.floor == 0
    assert scaling.fitted(sizes, [1.0, 2.0, 3.0, 4.0, 5.0]).scale == 0
    options = scaling.parsed(["--seeds", "0,1"])
    law, small = scaling.Law(1.0, 4.0, 0.5), [scaling.Trained(32, 4, [3.0, 3.2]), scaling.Trained(64, 16, [2.0, 2.0])]
    lines = scaling.table(small, law, scaling.Trained(96, 64, [1.6, 1.7]), options)
    assert "| 96 | 64 | 1.6000 | 1.7000 | 1.6500 | 1.5000 (predicted) |" in lines
    assert "The last came out +0.1500 from what was predicted, 9.09%; seeds of one width differ by 0.0707" in lines[-1]
    text = (REPOSITORY / "experiments/scaling/README.md").read_text(encoding="utf-8")
    assert text.count("<!-- scaling -->") == text.count("<!-- /scaling -->") == 1


@pytest.mark.slow
def test_networks_of_several_widths_are_trained_once_and_the_next_is_predicted(tmp_path, capsys):
    words = ["--size", "tiny", "--seeds", "0", "--threads", "1", "--work", str(tmp_path), "--no_table"]
    scaling.main(words)
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["32", "64", "96", "128"]
    assert table[-1].endswith("(predicted) |")
    assert (tmp_path / "tiny/scaling.png").stat().st_size > 5000
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    assert len(before) == 4
    scaling.main(words)
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.slow
def test_the_time_that_saving_takes_is_seen_in_runs_of_the_command_line(lit_llm, texts, tmp_path):
    options = checkpoints.parsed(["--size", "tiny", "--saves", "2", "--every", "2", "--rounds", "1", "--no_table"])
    few = ["--data.path", texts, "--data.tokenizer", "bytes", "--data.validation_fraction", "0.1"]
    found = {}
    for variant in checkpoints.VARIANTS:
        out = tmp_path / f"{variant}.json"
        outcome = lit_llm(*checkpoints.fit_words(variant, out, options)[3:], *few)
        assert outcome.code == 0, outcome.err
        found[variant] = json.loads(out.read_text())
        assert len(found[variant]["saves"]) == (0 if variant == "never" else 2)
        assert sum(found[variant]["saves"]) < found[variant]["seconds"]


def test_saves_of_either_kind_are_compared(tmp_path):
    def run(seconds: float, *saves: float) -> list[dict]:
        return [{"seconds": seconds, "saves": list(saves), "bytes": 2**21, "others": 0.1}]

    found = {"never": run(10.0), "sync": run(11.2, 0.5, 0.6), "async": run(10.3, 0.1, 0.1)}
    lines = checkpoints.table(found, checkpoints.parsed(["--rounds", "1"]))
    assert lines[-2].startswith("| written at once | 550 ms [500–600] | 100% |  | 600 ms [")
    assert lines[-1].startswith("| written while training goes on | 100 ms [100–100] | 18% | 20% met | 150 ms [")
    text = (REPOSITORY / "experiments/checkpoints/README.md").read_text(encoding="utf-8")
    assert text.count("<!-- stall -->") == text.count("<!-- /stall -->") == 1
