"""Each user error gives one line on the terminal, exit code 2, no traceback, and no loss of data."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from lit_llm import cli
from tests.writing import REPOSITORY


def said(outcome) -> str:
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.last_line.startswith("lit-llm: error: ")
    return outcome.last_line.removeprefix("lit-llm: error: ")


FLAGS = {
    "missing path": (
        ["--data.path", "/nowhere/x.txt"],
        "data.path must be a file, a folder, a hub data set or one of stdlib, stdlib-code, stdlib-prose, but is "
        "/nowhere/x.txt, which does not exist",
    ),
    "vocabulary too small": (
        ["--model.vocab_size", "100"],
        "model.vocab_size must be at least what the data has, 257, but is 100",
    ),
    "heads that do not divide": (
        ["--model.network.num_heads", "3"],
        "num_heads must divide d_model, but is 3 with d_model 16",
    ),
    "unknown key at the top": (
        ["--trainer.max_stepz", "3"],
        "trainer.max_stepz must be an option, but is none; did you mean trainer.max_steps?",
    ),
    "unknown key inside a network": (
        ["--model.network.d_modl", "3"],
        "model.network.d_modl must be an option, but is none; did you mean d_model?",
    ),
    "wrong type": (["--trainer.max_steps", "abc"], "trainer.max_steps must be a whole number, but is abc"),
    "wrong type inside": (["--data.batch_size", "1.5"], "data.batch_size must be a whole number, but is 1.5"),
    "wrong choice": (
        ["--trainer.precision", "bf17"],
        "trainer.precision must be one of auto, transformer-engine, transformer-engine-float16, 16-true, 16-mixed, "
        "bf16-true, bf16-mixed, 32-true, 64-true, 64, 32, 16, bf16, but is bf17",
    ),
    "value out of range": (
        ["--model.schedule.warmup_steps", "-1"],
        "warmup_steps must be at least 0, but is -1",
    ),
    "seed below 0": (["--seed_everything", "-1"], "seed_everything must be in [0, 4294967295], but is -1"),
    "seed of the data below 0": (["--data.seed", "-1"], "data.seed must be at least 0, but is -1"),
    "clipping that turns round": (
        ["--trainer.gradient_clip_val", "-1"],
        "trainer.gradient_clip_val must be at least 0, but is -1",
    ),
    "steps of nothing": (
        ["--trainer.accumulate_grad_batches", "0"],
        "trainer.accumulate_grad_batches must be at least 1, but is 0",
    ),
    "reports never": (["--trainer.log_every_n_steps", "0"], "trainer.log_every_n_steps must be at least 1, but is 0"),
    "validations never": (
        ["--trainer.val_check_interval", "0"],
        "trainer.val_check_interval must be a number of batches, at least 1, or a part of an epoch in (0, 1], but is 0",
    ),
    "part of an epoch where steps count": (
        ["--trainer.val_check_interval", "0.5"],
        "trainer.val_check_interval must be a number of steps where trainer.check_val_every_n_epoch is null, but is "
        "0.5; set one of them",
    ),
    "validations after more batches than an epoch has": (
        ["--trainer.check_val_every_n_epoch", "1", "--trainer.val_check_interval", "1000"],
        re.compile(
            r"trainer.val_check_interval must be at most the batches of an epoch, \d+, but is 1000; "
            r"--trainer.check_val_every_n_epoch null counts them from one epoch into the next"
        ),
    ),
    "no device": (["--trainer.devices", "0"], "trainer.devices must be at least 1, auto or a list, but is 0"),
    "device that is no number": (
        ["--trainer.accelerator", "cpu", "--trainer.devices", "one"],
        "trainer must be given what Lightning takes, but is not: `devices` selected with `CPUAccelerator` should be an "
        "int > 0.",
    ),
    "accelerator of no name": (
        ["--trainer.accelerator", "gpuu"],
        re.compile(
            "trainer must be given what Lightning takes, but is not: You selected an invalid accelerator name: "
            "`accelerator='gpuu'`. Available names are: .*"
        ),
    ),
    "trainer of nothing but steps": (
        ["--trainer.barebones", "true"],
        "trainer.barebones must be false, but is true; a run logs, and keeps checkpoints",
    ),
    "the same batches over and over": (
        ["--trainer.overfit_batches", "2"],
        "trainer.overfit_batches must be 0, but is 2; give data of a few rows, as with data.max_examples or "
        "data.max_documents",
    ),
    "loaders made anew": (
        ["--trainer.reload_dataloaders_every_n_epochs", "1"],
        "trainer.reload_dataloaders_every_n_epochs must be 0, but is 1; each epoch has an order of its own without it",
    ),
    "learning rate below 0": (
        ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "-0.1"],
        "model.optimizer must be given what it takes, but is not: Invalid learning rate: -0.1",
    ),
    "epochs of a stream": (
        ["--data.streaming", "true", "--trainer.max_steps", "-1", "--trainer.max_epochs", "1"],
        "trainer.max_steps must be given where data.streaming is true, since a stream's epoch has no end, but is -1; "
        "set it, or trainer.max_epochs with trainer.limit_train_batches, the batches of an epoch",
    ),
    "epochs of a stream without a number": (
        ["--data.streaming", "true", "--trainer.max_steps", "-1", "--trainer.limit_train_batches", "4"],
        "trainer.max_steps must be given where data.streaming is true, since a stream's epoch has no end, but is -1; "
        "set it, or trainer.max_epochs with trainer.limit_train_batches, the batches of an epoch",
    ),
    "stopping early on a stream that is never validated": (
        [
            *("--data.streaming", "true", "--trainer.max_steps", "-1", "--trainer.check_val_every_n_epoch", "1"),
            *("--trainer.val_check_interval", "1.0"),
            *("--trainer.callbacks+", "lit_llm.callbacks.early_stopping.EarlyStopping"),
        ],
        "trainer.max_steps must be given where data.streaming is true, since a stream's epoch has no end, but is -1; "
        "set it, or trainer.max_epochs with trainer.limit_train_batches, the batches of an epoch",
    ),
    "validation by the part of a stream": (
        ["--data.streaming", "true", "--trainer.check_val_every_n_epoch", "1", "--trainer.val_check_interval", "0.5"],
        "trainer.val_check_interval must be a number of batches where data.streaming is true, since a stream's epoch "
        "has no end, but is 0.5",
    ),
    "Muon of torch": (
        ["--model.optimizer", "torch.optim.Muon"],
        "model.optimizer must be given what it takes, but is not: Muon only supports 2D parameters whereas we found a "
        "parameter with size: torch.Size([16]); lit_llm.optimizers.Muon leaves the others to AdamW",
    ),
    "optimiser without groups": (
        ["--model.optimizer", "torch.optim.LBFGS"],
        "model.optimizer must be given what it takes, but is not: LBFGS doesn't support per-parameter options "
        "(parameter groups)",
    ),
    "optimiser of sparse gradients": (
        ["--model.optimizer", "torch.optim.SparseAdam"],
        "model.optimizer must take dense gradients, but is SparseAdam; take torch.optim.Adam",
    ),
    "network of no length": (["--model.network.max_seq_len", "0"], "max_seq_len must be at least 1, but is 0"),
    "feed-forward of no width": (["--model.network.d_ff", "-3"], "d_ff must be at least 1, but is -3"),
    "machine without TPU": (
        ["--trainer.accelerator", "tpu"],
        "trainer.accelerator must be one that this machine has, but needs torch_xla, which is not installed",
    ),
    "no such class": (
        ["--model.optimizer", "Nope"],
        "model.optimizer must be a class path or a YAML file, but is Nope, which is neither",
    ),
    "objective that is not written whole": (
        ["--model", "lit_llm.objectives.objective.Objective"],
        "model must be a class path or a YAML file, but is lit_llm.objectives.objective.Objective, which does not "
        "write loss",
    ),
    "rows longer than the network reads": (
        ["--data.seq_len", "1024", "--data.batch_size", "1"],
        re.compile(r"data.seq_len must be at most the network's max_seq_len, \d+, but is 1024"),
    ),
    "empty validation split": (
        ["--data.validation_fraction", "0.000001"],
        re.compile(
            r"data.validation_fraction must leave a document to validate on, but is 1e-06, which takes none of the 80 "
            r"of .*; raise it, set data.split_by to position, or set it to 0 to go without"
        ),
    ),
    "monitor that nothing logs": (
        ["--checkpoint.monitor", "val/nope"],
        "checkpoint.monitor must be a metric of the validation (val/bits_per_byte, val/loss, val/perplexity), but is "
        "val/nope",
    ),
    "no such config": (
        ["--config", "/nowhere.yaml"],
        "config must be a file, but is /nowhere.yaml, which does not exist",
    ),
    "no such checkpoint": (
        ["--ckpt_path", "nowhere.ckpt"],
        "ckpt_path must be last, best or a checkpoint file, but is nowhere.ckpt, which does not exist",
    ),
    "folder that cannot be": (
        ["--run_dir", "/proc/nowhere"],
        "run_dir must be a folder that can be written to, but is /proc/nowhere: No such file or directory",
    ),
}


@pytest.mark.parametrize("case", FLAGS)
def test_a_wrong_flag(lit_llm, tiny, tmp_path, case):
    flags, wanted = FLAGS[case]
    words = ["fit", *tiny, "--run_dir", tmp_path / "run", *flags]
    line = said(lit_llm(*words))
    assert re.fullmatch(wanted, line) if isinstance(wanted, re.Pattern) else line == wanted


MODULES = {
    "broken_import": (
        "from torch import nn\nimport no_such_package\n",
        "ModuleNotFoundError: No module named 'no_such_package'",
    ),
    "broken_syntax": ("from torch import nn\nclass Net(nn.Module)\n", "SyntaxError: expected ':'"),
    "broken_name": ("from torch import nn\nsize = undefined\n", "NameError: name 'undefined' is not defined"),
    "broken_attribute": (
        "from torch import nn\nlayer = nn.Lineer\n",
        "AttributeError: module 'torch.nn' has no attribute 'Lineer'",
    ),
    "broken_package.inside": (
        "from torch import nn\nimport no_such_package\n",
        "ModuleNotFoundError: No module named 'no_such_package'",
    ),
    "broken_in_a_library": (
        "import json\njson.loads('')\n",
        "JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
    ),
}


@pytest.mark.parametrize("module", MODULES)
def test_a_class_whose_module_cannot_be_imported(lit_llm, tiny, tmp_path, monkeypatch, module):
    code, why = MODULES[module]
    file = (tmp_path / module.replace(".", "/")).with_suffix(".py")
    file.parent.mkdir(exist_ok=True)
    file.write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    overlay, kind = tmp_path / "overlay.yaml", {"class_path": f"{module}.Net"}
    for key, content in (
        ("model.network", None),
        ("data", None),
        ("network", {"model": {"init_args": {"network": kind}}}),
        ("trainer.callbacks", {"trainer": {"callbacks": [kind]}}),
    ):
        overlay.write_text(json.dumps(content), encoding="utf-8")
        flags = ["--config", overlay] if content else [f"--{key}", f"{module}.Net"]
        assert said(lit_llm("fit", *tiny, "--run_dir", tmp_path / "run", *flags)) == (
            f"{key} must be a class path, but {module} cannot be imported: {why} ({file}, line 2)"
        )


FILES = {
    "empty file": ("empty.txt", b"", "data.path must hold text, but {path} has none (no documents)"),
    "only white space": ("blank.txt", b"  \n ", "data.path must hold text, but {path} has none (1 empty)"),
    "shorter than a row": (
        "short.txt",
        b"hello",
        "data.seq_len must leave at least one row to train on, but is 32 where the training split of {path} has 7 "
        "tokens; lower it or give more text",
    ),
    "invalid UTF-8": (
        "latin.txt",
        b"caf\xe9 " * 9,
        "data.path must hold UTF-8 text, but {path} has byte 0xe9 at offset 3; convert it, for example with `iconv -f "
        "latin1 -t utf-8`",
    ),
    "no such column": (
        "table.jsonl",
        b'{"body": "a"}\n' * 9,
        "data.column must be one of body in {path}, but is 'text'",
    ),
    "column of numbers": (
        "numbers.jsonl",
        b'{"text": 1}\n' * 9,
        "data.column must hold text, but 'text' holds int in row 0 of {path}",
    ),
    "broken table": (
        "broken.jsonl",
        b'{"text": "a"}\n{"text": \n',
        "data.path must be a table that can be read, but {path} is not: a line must be JSON, but line 2 of broken.jsonl is not (Expecting value at character 11)",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file(lit_llm, tiny, tmp_path, case):
    name, content, wanted = FILES[case]
    path = tmp_path / name
    path.write_bytes(content)
    flags = ["--data.path", path, "--data.validation_fraction", "0", "--data.test_fraction", "0"]
    assert said(lit_llm("fit", *tiny, *flags, "--run_dir", tmp_path / "run")) == wanted.format(path=path)


RUN_FILES = {
    "no options": (b"# trainer:\n#   max_steps: 3\n", "config must hold options by their names, but {file} holds none"),
    "a list": (b"- trainer\n", "config must hold options by their names, but {file} holds a list"),
    "invalid UTF-8": (
        b"# caf\xe9\ntrainer:\n  max_steps: 3\n",
        "config must be UTF-8 text, but {file} has byte 0xe9 at offset 5; convert it, for example with `iconv -f latin1 "
        "-t utf-8`",
    ),
    "all of a group commented out": (
        b"trainer:\n#  max_steps: 3\n",
        "trainer must have options, but is null; leave the word out where none is set below it",
    ),
    "the same of checkpoints": (
        b"checkpoint:\n#  every_n_steps: 3\n",
        "checkpoint must have options, but is null; leave the word out where none is set below it",
    ),
    "no such network": (
        b"model:\n  init_args:\n    network: ../models/typo.yaml\n",
        "model.network must be a class path or a YAML file, but is ../models/typo.yaml, which does not exist in {folder}",
    ),
    "no such data": (
        b"data: ../x/typo.yaml\n",
        "data must be a class path or a YAML file, but is ../x/typo.yaml, which does not exist in {folder}",
    ),
}


@pytest.mark.parametrize("case", RUN_FILES)
def test_a_wrong_run_file(lit_llm, tiny, tmp_path, case):
    content, wanted = RUN_FILES[case]
    file = tmp_path / "overlay.yaml"
    file.write_bytes(content)
    line = said(lit_llm("fit", *tiny, "--config", file, "--run_dir", tmp_path / "run"))
    assert line == wanted.format(file=file, folder=tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(lit_llm, tiny, tmp_path):
    run = tmp_path / "run"
    words = [*tiny, "--run_dir", run, "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr"]
    assert lit_llm("fit", *words, "0.01").code == 0
    line = said(
        lit_llm(
            "fit",
            *words,
            "1e38",
            "--trainer.gradient_clip_val",
            "1e30",
            "--ckpt_path",
            "last",
            "--trainer.max_steps",
            "20",
            "--checkpoint.every_n_steps",
            "1",
            "--trainer.log_every_n_steps",
            "5",
        )
    )
    assert re.match(
        r"(train/loss|val/loss|the norm of the weights) must be finite, but is (nan|inf) at step \d+; lower the learning rate",
        line,
    )
    stored = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert stored["global_step"] >= 6
    assert all(p.isfinite().all() for p in stored["state_dict"].values())


@pytest.fixture
def run(lit_llm, tiny, tmp_path):
    folder = tmp_path / "run"
    assert lit_llm("fit", *tiny, "--run_dir", folder).code == 0
    return folder


def test_a_truncated_checkpoint_is_refused_and_the_other_one_named(lit_llm, run):
    last = run / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    line = said(lit_llm("fit", "--run_dir", run, "--ckpt_path", "last", "--trainer.max_steps", "9"))
    assert line == (
        f"ckpt_path must be a whole checkpoint, but {last} is not: File is not a zip file; {last.parent} also holds "
        f"best.ckpt"
    )
    assert lit_llm("fit", "--run_dir", run, "--ckpt_path", "best", "--trainer.max_steps", "9").code == 0


@pytest.mark.slow
def test_a_checkpoint_of_another_architecture_is_refused(lit_llm, run):
    words = ["--run_dir", run, "--ckpt_path", "last", "--trainer.max_steps", "9"]
    line = said(lit_llm("fit", *words, "--model.network.d_model", "32"))
    assert line == (
        "ckpt_path must be a checkpoint of this network, but its network.embed_tokens.weight is (257, 16) where the "
        "network's is (257, 32)"
    )


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_run_folder_that_is_none_is_refused(lit_llm, tmp_path, command):
    more = ["--ckpt_path", "last"] if command == "fit" else []
    nowhere, small = tmp_path / "nowhere", tmp_path / "small"
    (small / "model").mkdir(parents=True)
    assert said(lit_llm(command, "--run_dir", nowhere, *more)) == (
        f"run_dir must be a run folder, but is {nowhere}, which does not exist"
    )
    assert said(lit_llm(command, "--run_dir", small, *more)) == (
        f"run_dir must be a run folder, but is {small}, which holds no config.yaml; name a run file with --config, and "
        f"its model as --model.weights {small}/model"
    )
    assert said(lit_llm(command, "--ckpt_path", nowhere / "checkpoints" / "last.ckpt")) == (
        f"the folder of ckpt_path must be a run folder, but is {nowhere}, which does not exist"
    )


def test_a_run_folder_or_a_checkpoint_below_the_home_folder_is_looked_for_there(lit_llm, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for words in (["--run_dir=~/no"], ["--run_dir", "~/no"], ["--ckpt_path=~/no/checkpoints/best.ckpt"]):
        assert said(lit_llm("test", *words)).endswith(
            f"must be a run folder, but is {tmp_path}/no, which does not exist"
        )


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_of_another_tokeniser_is_refused(lit_llm, run, texts, command):
    words = [command, "--run_dir", run, "--ckpt_path", "last", "--data.tokenizer"]
    assert said(lit_llm(*words, "bpe-257")) == (
        f"data.tokenizer must be the checkpoint's, but is bpe-257 of {texts}, which differs"
    )
    assert said(lit_llm(*words, "bpe-300")) == (
        "model.vocab_size must be that of the checkpoint, 257, but is 300; take the data it was trained on"
    )


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_size_that_is_too_small_for_the_data_is_refused_whatever_the_checkpoint_says(lit_llm, run, command):
    smaller = [command, "--run_dir", run, "--ckpt_path", "last", "--model.vocab_size", "100"]
    assert said(lit_llm(*smaller)) == "model.vocab_size must be at least what the data has, 257, but is 100"


def test_a_model_directory_with_a_larger_tokeniser_is_refused(lit_llm, run, texts, tmp_path):
    assert lit_llm("tokenizer", "--path", texts, "--vocab_size", "300", "--out", tmp_path / "made").code == 0
    for file in (tmp_path / "made").iterdir():
        shutil.copy(file, run / "model")
    line = said(lit_llm("generate", "--model", run, "--prompt", "the cat sat on a mat"))
    assert re.fullmatch("tokenizer must be the network's, of 257 tokens, but makes token 2[5-9][0-9]", line)


@pytest.mark.parametrize(
    "overlay",
    [[], pytest.param(["--config", REPOSITORY / "configs/strategy/async_checkpoints.yaml"], marks=pytest.mark.slow)],
)
def test_a_full_disk_while_saving_spares_the_last_checkpoint(lit_llm, run, monkeypatch, overlay):
    last = run / "checkpoints/last.ckpt"
    good = last.read_bytes()

    def full(checkpoint, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(torch, "save", full)
    line = said(
        lit_llm(
            "fit",
            *(["--config", run / "config.yaml", *overlay] if overlay else []),
            "--run_dir",
            run,
            "--ckpt_path",
            "last",
            "--trainer.max_steps",
            "9",
            "--checkpoint.every_n_steps",
            "1",
        )
    )
    assert re.fullmatch(
        r"disk must have room to write, but is full at .*; free some; earlier checkpoints are whole", line
    )
    assert last.read_bytes() == good
    assert {path.name for path in last.parent.iterdir()} == {"best.ckpt", "last.ckpt"}


def test_a_missing_model_to_generate_from(lit_llm, tmp_path):
    line = said(lit_llm("generate", "--model", tmp_path, "--prompt", "x"))
    assert line == (
        f"model must be a model directory, a run folder or a checkpoint file, but is {tmp_path}, which holds no config.json"
    )


def test_a_model_directory_with_a_missing_tensor(lit_llm, run):
    from safetensors.torch import load_file, save_file

    path = run / "model/model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)
    line = said(lit_llm("generate", "--model", run, "--prompt", "x"))
    assert line == (f"model must hold the network's tensors and no others, but {run / 'model'} lacks model.norm.weight")


def test_an_unknown_command_and_a_command_without_its_options(lit_llm):
    assert said(lit_llm("fitt")) == (
        "command must be one of fit, validate, test, predict, plan, generate, serve, evaluate, compress, export, sweep, compare, tokenizer, but is fitt; did you mean fit?"
    )
    assert "--model" in said(lit_llm("generate"))
    assert said(lit_llm("fit")) == (
        "data, model must be given, but are not; start from a run file, such as --config "
        "configs/pretraining/llama_stdlib.yaml"
    )


def test_an_error_of_ours_keeps_its_traceback(lit_llm, monkeypatch):
    import lit_llm.cli.tokenizer as tokenizer

    def broken(words):
        raise ValueError("unpacked too much")

    monkeypatch.setattr(tokenizer, "run", broken)
    with pytest.raises(ValueError, match="unpacked"):
        lit_llm("tokenizer", "--out", "x")


@pytest.mark.parametrize("where", ["libraries", "command"])
def test_ctrl_c_while_something_is_imported_ends_without_a_word(lit_llm, tmp_path, monkeypatch, where):
    def interrupted():
        raise KeyboardInterrupt

    if where == "libraries":
        monkeypatch.setattr(cli, "import_torchmetrics", interrupted)
    else:
        (tmp_path / "interrupted_import.py").write_text("raise KeyboardInterrupt")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(cli.COMMANDS, "fit", ("interrupted_import", ""))
    outcome = lit_llm("fit")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "")


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(word):
    code = f"import sys; from lit_llm.cli import main; main([{word!r}]); print(json.dumps([m for m in ('torch', 'lightning', 'numpy') if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", "import json; " + code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_a_half_broken_run_folder_can_be_used_again(lit_llm, tiny, tmp_path):
    assert lit_llm("fit", *tiny, "--run_dir", tmp_path / "run", "--data.path", "/nowhere.txt").code == 2
    assert lit_llm("fit", *tiny, "--run_dir", tmp_path / "run").code == 0
    shutil.rmtree(tmp_path / "run")
