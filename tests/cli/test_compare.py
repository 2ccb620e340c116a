from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from lit_llm.cli.compare import draw_curves, grouped
from lit_llm.cli.finished_run import Finished, read_run


@pytest.fixture
def run(tmp_path):
    """Writes the files of a finished run that a comparison reads."""

    def call(
        name,
        value,
        lr=0.01,
        seed=1,
        path="texts/",
        results=None,
        steps=(1, 2),
        model="x.CausalLM",
        order=0,
        trainer=None,
        hidden=None,
        **data,
    ):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = {
            "seed_everything": seed,
            "trainer": {"max_steps": 2, "logger": {"init_args": {"save_dir": name}}} | (trainer or {}),
            "model": {"class_path": model, "init_args": {"optimizer": {"init_args": {"lr": lr}}} | (hidden or {})},
            "data": {
                "class_path": "x.TextData",
                "init_args": {"path": path, "tokenizer": "bytes", "seed": order} | data,
            },
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        found = results or {"best/val/bits_per_byte": value, "monitor": "val/loss", "mode": "min", "seconds": 3.0}
        (folder / "results.json").write_text(json.dumps(found))
        lines = [f"{step},{value + 1 / step}" for step in steps]
        (folder / "metrics.csv").write_text("\n".join(["step,val/bits_per_byte", *lines]))
        return folder

    return call


def test_runs_are_grouped_by_all_but_the_seed_and_tested_in_pairs(lit_llm, run, tmp_path):
    slow, fast = [2.0, 2.2, 2.1], [1.8, 1.9, 1.95]
    folders = [run(f"{lr}/{n}", v, lr, n) for lr, vs in ((0.01, slow), (0.02, fast)) for n, v in enumerate(vs)]
    outcome = lit_llm("compare", *folders, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    p = ttest_rel(fast, slow).pvalue
    table = (tmp_path / "out/compare.md").read_text()
    assert "| lr=0.01 | 3 | 2.1000 ± 0.1000 | 3 | – | – |" in table
    assert f"| lr=0.02 | 3 | 1.8833 ± 0.0764 | 3 | -0.2167 | {p:.2g} |" in table
    assert f"Made by `lit-llm compare {folders[0]}" in table
    assert (tmp_path / "out/learning_curves.png").stat().st_size > 5000
    with (tmp_path / "out/compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["compared val/bits_per_byte"] for row in rows] == [str(value) for value in slow + fast]
    assert [row["seed"] for row in rows] == ["0", "1", "2"] * 2


def test_pairs_are_of_the_seeds_that_both_have(lit_llm, run, tmp_path):
    folders = [run("a1", 2.0, 0.01, 1), run("a2", 3.0, 0.01, 2), run("b2", 2.5, 0.02, 2), run("b3", 9.0, 0.02, 3)]
    outcome = lit_llm("compare", *folders, "--out", tmp_path / "out")
    assert "| lr=0.02 | 2 | 5.7500 ± 4.5962 | 3 | -0.5000 | – |" in outcome.out


def test_a_curve_is_the_mean_of_its_seeds_at_each_step(run):
    from lit_llm.cli.compare import curves, grouped
    from lit_llm.cli.finished_run import read_run

    folders = [run("a", 1.0, seed=1), run("b", 2.0, seed=2, steps=(2, 4))]
    [group] = grouped(read_run(folder) for folder in folders)
    assert curves(group, "val/bits_per_byte") == [
        (1, 2.0, 0.0),
        (2, 2.0, pytest.approx(0.5**0.5)),
        (4, 2.25, 0.0),
    ]


def test_of_a_sweep_only_what_came_to_its_end_counts_and_the_best_is_first(lit_llm, run, tmp_path):
    run("sweep/trials/000", 2.0, 0.01)
    run("sweep/trials/001", 9.0, 0.02)
    run("sweep/trials/002", 1.0, 0.03)
    (tmp_path / "sweep/trials.csv").write_text("trial,state\n0,complete\n1,pruned\n2,complete\n")
    outcome = lit_llm("compare", tmp_path / "sweep", "--out", tmp_path / "out")
    lines = [line for line in outcome.out.splitlines() if line.startswith("| lr")]
    assert lines == ["| lr=0.03 | 1 | 1.0000 | 3 | – | – |", "| lr=0.01 | 1 | 2.0000 | 3 | +1.0000 | – |"]
    assert "seed that chose" not in outcome.out


def test_the_seed_that_chose_a_trial_does_not_count_where_it_has_others(lit_llm, run, tmp_path):
    for number, value in enumerate((1.0, 1.1, 2.0)):
        run(f"sweep/trials/{number:03d}", value, 0.01 * (number + 1))
    for number, values in enumerate(((1.5, 1.7), (1.2, 1.3))):
        for seed, value in enumerate(values, start=5):
            run(f"sweep/seeds/{number:03d}_seed{seed}", value, 0.01 * (number + 1), seed=seed)
    (tmp_path / "sweep/trials.csv").write_text("trial,state\n0,complete\n1,complete\n2,complete\n")
    outcome = lit_llm("compare", tmp_path / "sweep", "--out", tmp_path / "out")
    said = (
        "| lr=0.02 | 2 | 1.2500 ± 0.0707 | 3 | – | – |\n"
        "| lr=0.01 | 2 | 1.6000 ± 0.1414 | 3 | +0.3500 | 0.09 |\n"
        "| lr=0.03 | 1 | 2.0000 | 3 | – | – |\n\n"
        "Of a trial that has other seeds, those alone count: the seed that chose it flatters the best.\n"
    )
    assert said in outcome.out
    assert said in (tmp_path / "out/compare.md").read_text()


def test_a_sweep_is_compared_by_what_judged_it(lit_llm, run, tmp_path):
    both = {"monitor": "val/accuracy", "mode": "max"}
    run("sweep/trials/000", 2.0, 0.01, results=both | {"best/val/loss": 1.0, "best/val/accuracy": 0.8})
    run("sweep/trials/001", 2.0, 0.02, results=both | {"best/val/loss": 2.0, "best/val/accuracy": 0.9})
    (tmp_path / "sweep/trials.csv").write_text("trial,state,val/loss,x\n0,complete,1.0,0\n1,complete,2.0,0\n")
    first = [
        lit_llm("compare", tmp_path / "sweep", "--out", tmp_path / "out", *more).out.splitlines()[2]
        for more in ([], ["--metric", "val/accuracy"])
    ]
    assert [line.split("|")[1:4] for line in first] == [
        [" lr=0.01 ", " 1 ", " 1.0000 "],
        [" lr=0.02 ", " 1 ", " 0.9000 "],
    ]


def test_the_order_of_the_data_is_a_seed_too(lit_llm, run, tmp_path):
    folders = [run(f"{lr}-{n}", lr + 0.1 * n**2, lr, n, order=n) for lr in (1.0, 2.0) for n in (0, 1, 2)]
    outcome = lit_llm("compare", *folders, "--out", tmp_path / "out")
    assert [line.split("|")[1:3] for line in outcome.out.splitlines()[2:4]] == [[" lr=1 ", " 3 "], [" lr=2 ", " 3 "]]


def error(outcome):
    assert outcome.code == 2
    return outcome.last_line.removeprefix("lit-llm: error: ")


def test_runs_of_different_tasks_are_refused_in_one_line(lit_llm, run, tmp_path):
    one, other = run("one", 1.0), run("other", 1.0, path="images/")
    assert error(lit_llm("compare", one, other, "--out", tmp_path / "out")) == (
        f"runs must be of one task, but data.path is texts/ in {one} and images/ in {other}"
    )
    third = run("third", 1.0, results={"best/val/accuracy": 0.5, "monitor": "val/accuracy", "mode": "max"})
    assert error(lit_llm("compare", one, third, "--out", tmp_path / "out")) == (
        f"runs must be of one task, but {one} is judged by val/loss, and {third} by val/accuracy; name one that all "
        f"have with --metric"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"trainer": {"limit_val_batches": 2}}, "trainer.limit_val_batches is all batches"),
        ({"trainer": {"limit_test_batches": 1}}, "trainer.limit_test_batches is all batches"),
        ({"test_fraction": 0.5}, "data.test_fraction is None"),
        ({"tokenizer": "bert-uncased-bpe-300"}, "data.tokenizer is bytes"),
        ({"cleaning": {"near_duplicates": False}}, "data.cleaning.near_duplicates is True"),
    ],
)
def test_runs_that_were_validated_on_other_data_are_refused(lit_llm, run, tmp_path, other, name):
    folders = (
        run("a", 1.0, cleaning={"near_duplicates": True}),
        run("b", 2.0, **{"cleaning": {"near_duplicates": True}} | other),
    )
    line = lit_llm("compare", *folders, "--out", tmp_path / "out").last_line
    assert line.startswith(f"lit-llm: error: runs must be of one task, but {name} in ")


def test_so_many_batches_are_of_one_size_or_not_the_same_data(lit_llm, run, tmp_path):
    few = {"limit_val_batches": 2}
    folders = run("a", 1.0, trainer=few, batch_size=8), run("b", 2.0, trainer=few, batch_size=4)
    line = lit_llm("compare", *folders, "--out", tmp_path / "out").last_line
    assert line.startswith(
        "lit-llm: error: runs must be of one task, but data.batch_size, in which their limits count, is 8 in "
    )
    whole = run("c", 1.0, trainer={"limit_val_batches": 1.0}, batch_size=8), run("d", 2.0, batch_size=4)
    assert lit_llm("compare", *whole, "--out", tmp_path / "out").code == 0


def test_how_often_a_run_logs_and_saves_is_no_setting(lit_llm, run, tmp_path):
    folders = [run(str(n), n, seed=n, trainer={"log_every_n_steps": n}) for n in (1, 2)]
    assert "| 2 | 1.5000 ± 0.7071 |" in lit_llm("compare", *folders, "--out", tmp_path / "out").out


def test_mixtures_of_the_same_corpora_compare_whatever_the_weights(lit_llm, run, tmp_path):
    one, other = (run(name, 1.0, path={"a.txt": 3, "b/": weight}) for name, weight in (("one", 1), ("other", 2.5)))
    outcome = lit_llm("compare", one, other, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "| path=a.txt: 3, b/: 1 | 1 |" in outcome.out
    assert "| path=a.txt: 3, b/: 2.5 | 1 |" in outcome.out
    third = run("third", 1.0, path={"a.txt": 3, "c/": 1})
    assert error(lit_llm("compare", one, third, "--out", tmp_path / "out")) == (
        f"runs must be of one task, but data.path is a.txt + b/ in {one} and a.txt + c/ in {third}"
    )


def test_a_loss_does_not_compare_over_tokenisers_but_bits_per_byte_do(lit_llm, run, tmp_path):
    found = {"best/val/loss": 1.0, "best/val/bits_per_byte": 2.0}
    one, other = run("one", 1.0, results=found), run("other", 1.0, tokenizer="bpe-300", results=found)
    assert lit_llm("compare", one, other, "--out", tmp_path / "out").code == 0
    assert error(lit_llm("compare", one, other, "--metric", "val/loss", "--out", tmp_path / "out")) == (
        f"runs must be of one task, but data.tokenizer is bytes in {one} and bpe-300 in {other}"
    )


def test_what_is_no_finished_run_is_named(lit_llm, run, tmp_path):
    assert error(lit_llm("compare", tmp_path, "--out", tmp_path / "out")) == (
        f"RUN must be the folder of a finished run, but {tmp_path} has no config.yaml"
    )
    one = run("one", 1.0)
    assert error(lit_llm("compare", one, "--metric", "val/f1", "--out", tmp_path / "out")).startswith(
        f"--metric must be one that all runs have, but {one} has no val/f1"
    )


def test_losses_of_objectives_that_mean_different_things_are_not_compared(lit_llm, run, tmp_path):
    module, found = "lit_llm.objectives", {"best/val/loss": 1.0}
    causal, taught, masked = (
        run(path, 1.0, results=found, model=f"{module}.{path}")
        for path in ("causal_lm.CausalLM", "distillation.CausalLMDistillation", "masked_lm.MaskedLM")
    )
    assert lit_llm("compare", causal, taught, "--metric", "val/loss", "--out", tmp_path / "out").code == 0
    outcome = lit_llm("compare", causal, masked, "--metric", "val/loss", "--out", tmp_path / "out")
    assert error(outcome) == (
        f"runs must be of one task, but model is a CausalLM in {causal} and a MaskedLM in {masked}"
    )


@pytest.mark.parametrize(("name", "there"), [("mask_ratio", 0.3), ("whole_words", True), ("mean_span", 5.0)])
def test_runs_that_were_evaluated_on_other_hidden_words_are_refused(lit_llm, run, tmp_path, name, there):
    options = {"mask_ratio": 0.15, "whole_words": False, "mean_span": 3.0}
    module, found = "lit_llm.objectives.masked_lm.MaskedLM", {"best/val/loss": 1.0}
    one, same = (run(folder, 1.0, results=found, model=module, hidden=options) for folder in ("one", "same"))
    other = run("other", 1.0, results=found, model=module, hidden=options | {name: there})
    words = ["--metric", "val/loss", "--out", tmp_path / "out"]
    assert lit_llm("compare", one, same, *words).code == 0
    assert error(lit_llm("compare", one, other, *words)) == (
        f"runs must be of one task, but model.{name} is {options[name]} in {one} and {there} in {other}"
    )


def test_settings_of_several_classes_are_named_by_what_does_not_follow_from_these(tmp_path):
    def finished(network: str, lr: float, **options: Any) -> Finished:
        settings = {"model.network": f"x.{network}", "model.optimizer.lr": lr}
        settings |= {f"model.network.{name}": value for name, value in options.items()}
        return Finished(tmp_path / f"{network}{lr}", settings, {})

    llama = {"d_model": 8, "num_layers": 1, "num_heads": 2, "d_ff": 32}
    runs = [finished("Llama", lr, **llama) for lr in (0.1, 0.2)]
    runs += [finished("LSTM", 0.1, d_model=16, num_layers=2, tied=True, skip=1)]
    names = [group.name for group in grouped(runs)]
    assert names == ["network=Llama lr=0.1", "network=Llama lr=0.2", "network=LSTM lr=0.1"]
    runs += [finished("LSTM", 0.1, d_model=16, num_layers=4, tied=True, skip=1)]
    assert [group.name for group in grouped(runs)][2:] == [
        "network=LSTM lr=0.1 num_layers=2",
        "network=LSTM lr=0.1 num_layers=4",
    ]
    few = [finished("Llama", 0.1, d_model=8), finished("LSTM", 0.1, d_model=16)]
    assert [group.name for group in grouped(few)] == ["network=Llama d_model=8", "network=LSTM d_model=16"]


def callback(name: str, **options: Any) -> dict[str, Any]:
    return {"class_path": f"lit_llm.callbacks.{name.lower()}.{name}", "init_args": options}


def pruning(sparsity: float) -> dict[str, Any]:
    method = {"class_path": "lit_llm.compression.sparsity.Magnitude", "init_args": {"sparsity": sparsity}}
    return callback("Pruning", method=method, start=0.1, end=0.6, layers=["q_proj", "k_proj", "v_proj", "o_proj"])


def test_of_callbacks_only_those_are_named_that_not_all_have(run, tmp_path):
    shared = [callback("Throughput", peak=1e12), callback("Samples", prompts=["a long prompt"] * 20)]
    lists = ([], [pruning(0.5)], [pruning(0.75)], [callback("LowRank", rank=2), pruning(0.5)])
    runs = [
        Finished(tmp_path / str(n), {"trainer.callbacks": [*shared, *more]}, {}) for n, more in enumerate(lists)
    ] + [Finished(tmp_path / "last", {"trainer.callbacks": shared[::-1]}, {})]
    assert [group.name for group in grouped(runs)] == [
        f"callbacks=none ({tmp_path / '0'})",
        "callbacks=Pruning(sparsity=0.5)",
        "callbacks=Pruning(sparsity=0.75)",
        "callbacks=LowRank+Pruning(sparsity=0.5)",
        f"callbacks=none ({tmp_path / 'last'})",
    ]
    assert [group.name for group in grouped(runs[:2])] == ["callbacks=none", "callbacks=Pruning"]
    other = [Finished(tmp_path / "other", {"trainer.callbacks": "none at all"}, {}), runs[1]]
    assert grouped(other)[0].name == "callbacks=none at all"
    bare = [Finished(tmp_path / "bare", {"trainer.callbacks": None}, {}), runs[1]]
    assert [group.name for group in grouped(bare)] == ["callbacks=none", "callbacks=Throughput+Samples+Pruning"]


def test_names_that_look_like_formulas_are_drawn_as_they_are(run, tmp_path):
    values = {"a": r"$\none$", "b": "$5"}
    groups = grouped(read_run(run(name, 1.0, trainer={"gradient_clip": value})) for name, value in values.items())
    draw_curves(tmp_path / "curves.png", groups, "val/bits_per_byte")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_long_names_are_beside_the_curves_in_short_lines(run, tmp_path, monkeypatch, recwarn):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **kw: (figures.append(figure), Path(path).touch()))
    values = {"a": "a", "b": "long, " * 60}
    groups = grouped(read_run(run(name, 1.0, trainer={"gradient_clip": value})) for name, value in values.items())
    draw_curves(tmp_path / "curves.png", groups, "val/bits_per_byte")
    [axes] = figures[0].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [label[:15] for label in labels] == ["gradient_clip=a", "gradient_clip=l"]
    assert labels[1].endswith("… (1)")
    assert max(len(line) for label in labels for line in label.splitlines()) <= 64
    figures[0].draw_without_rendering()
    assert axes.get_legend().get_window_extent().x0 > axes.get_window_extent().x1
    assert not [warning for warning in recwarn if "constrained" in str(warning.message)]


def test_what_was_cut_off_is_one_line(lit_llm, run, tmp_path):
    one = run("one", 1.0)
    (one / "results.json").write_text('{"best/val')
    assert error(lit_llm("compare", one, "--out", tmp_path / "out")) == (
        f"RUN must be the folder of a finished run, but files of {one} are not whole"
    )
    cut = run("cut", 1.0, results={"best/val/bits_per_byte": 1.0, "step": 7, "finished": False})
    assert error(lit_llm("compare", cut, "--out", tmp_path / "out")) == (
        f"RUN must be the folder of a finished run, but {cut} was cut short at step 7; go on with lit-llm fit "
        f"--run_dir {cut} --ckpt_path last"
    )
    (tmp_path / "trials.csv").write_text("trial,state,val/loss\n0,fail,\n")
    assert error(lit_llm("compare", tmp_path, "--out", tmp_path / "out")) == (
        f"RUN must hold trials that came to their end, but {tmp_path} has none"
    )
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/study.db").touch()
    assert error(lit_llm("compare", tmp_path / "killed", "--out", tmp_path / "out")) == (
        f"RUN must hold trials that came to their end, but {tmp_path / 'killed'} has none"
    )
