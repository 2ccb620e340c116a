"""The commands of the READMEs run on a small corpus, and their links and figures are right."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lit_llm.cli import trial_run
from lit_llm.serving import endpoint_of
from tests.cli.test_sweep import Inside
from tests.test_configs import SPLITS, TOKENIZERS
from tests.writing import REPOSITORY

READMES = ["README.md", "README.zh-CN.md"]


EXAMPLES = ["--data.tokenizer", "bert-bpe-300", "--data.batch_size", "4", "--trainer.max_steps", "4"]


def data_of(config: Path) -> str:
    """Text of the data file that a run file names; empty if it names none."""
    data = yaml.safe_load(config.read_text()).get("data")
    return (config.parent / data).read_text() if isinstance(data, str) else ""


def commands(text: str) -> list[list[str]]:
    """The `lit-llm` commands of all shell blocks."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["lit-llm"]:
                found.append(words[1:])
    return found


def test_both_languages_show_the_same_commands_files_and_figures():
    english, chinese = ((REPOSITORY / name).read_text(encoding="utf-8") for name in READMES)
    assert commands(english) == commands(chinese)
    links = [[x for x in re.findall(r"\]\((\S+?)\)", text) if x not in READMES] for text in (english, chinese)]
    assert links[0] == links[1]
    assert sorted(re.findall(r"\d+\.\d+", english)) == sorted(re.findall(r"\d+\.\d+", chinese))
    assert english.count("\n## ") == chinese.count("\n## ")


@pytest.mark.parametrize("name", READMES)
def test_every_file_that_is_linked_exists(name):
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)(\S+?)\)", text):
        assert (REPOSITORY / target.split("#")[0]).exists(), target
    for config in re.findall(r"configs/\S+?\.yaml", text):
        assert (REPOSITORY / config).exists(), config


@pytest.mark.parametrize("name", READMES)
def test_what_is_said_of_peers_is_what_was_measured(name):
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    measured = (REPOSITORY / "experiments/throughput/README.md").read_text()
    measured = measured.split("**baby, vocabulary 50,304, bf16")[1].split("**baby")[0]
    said = re.findall(r"^\| [^|]+ \| ([\d,]+) \| ([\d,]+) \|$", text, re.MULTILINE)
    assert len(said) == 4
    for speed, memory in said:
        assert re.search(rf"^\| \S+ \| {speed} \[.*\| {memory}(?: met| \*\*missed\*\*)? \|", measured, re.MULTILINE), (
            speed
        )


def test_the_index_has_every_experiment_and_each_has_a_verdict():
    folder = REPOSITORY / "experiments"
    rows = [row.split(" | ") for row in (folder / "README.md").read_text().splitlines() if row.startswith("| [")]
    assert {row[0].strip("| []").split("]")[0] for row in rows} == {p.parent.name for p in folder.glob("*/README.md")}
    assert {row[2] for row in rows} <= {"kept", "dropped", "open"}
    assert all("**Verdict**" in path.read_text() for path in folder.glob("*/README.md"))


@pytest.mark.slow
def test_every_command_runs(lit_llm, tiny, texts, chats, tmp_path, monkeypatch):
    """Runs them in order in one folder, with further flags that make training small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "my_texts").symlink_to(texts)
    rows = [f"{row} {'good' if row % 2 else 'bad'},{'yes' if row % 2 else 'no'}" for row in range(60)]
    (tmp_path / "my_table.csv").write_text("\n".join(["text,label", *rows]))
    shrink = tiny[2:]
    found = commands((REPOSITORY / "README.md").read_text(encoding="utf-8"))
    assert len(found) >= 8
    for words in found:
        extra: list[str] = []
        if words[0] == "compress":  # tests/test_configs.py runs the shipped chains whole
            assert Path(words[words.index("--config") + 1]).is_file()
            continue
        if words[0] == "serve":  # tests/cli/test_serve.py starts and queries a server
            assert endpoint_of(words[words.index("--model") + 1]).path == "/v1/completions"
            continue
        if "--trainer.devices" in words:  # tests/cli/test_strategies.py runs it in several processes
            continue
        if words[0] == "fit" and "--print_config" not in words and "--help" not in words:
            given = {word.split("=")[0] for word in words if word.startswith("--")}
            extra = [
                w
                for flag, value in zip(shrink[::2], shrink[1::2], strict=True)
                for w in (flag, value)
                if flag not in given or flag == "--trainer.max_steps"
            ]
            config = Path(words[words.index("--config") + 1]) if "--config" in words else None
            if config is not None and "GLUEData" in config.read_text() + data_of(config):
                extra = [*EXAMPLES, *([] if "--data.path" in given else ["--data.path", "my_table.csv"])]
                assert lit_llm(*words, *extra).code == 0, words
                continue
            content = config.read_text() if config is not None else ""
            of_kind = next((spec for kind, spec in TOKENIZERS.items() if f".{kind}\n" in content), None)
            if of_kind is not None:
                extra = ["--trainer.max_steps", "4", "--data.batch_size", "4", *SPLITS, "--data.path"]
                of_pairs = "Seq2SeqData" in content  # reads with the tokeniser of its initial weights
                extra += [chats] if of_pairs else [texts, "--data.seq_len", "64", "--data.tokenizer", of_kind]
                assert lit_llm(*words, *extra).code == 0, words
                continue
            from_weights = config is not None and "weights:" in config.read_text()
            if from_weights or "--model.network" in words:
                pairs = zip(extra[::2], extra[1::2], strict=True)
                extra = [w for flag, value in pairs for w in (flag, value) if not flag.startswith("--model.network.")]
            if from_weights:
                extra[extra.index("--data.tokenizer") + 1] = "runs/first/model"
            if config is not None and "InstructionData" in config.read_text():
                extra[extra.index("--data.path") + 1] = str(chats)
                extra[extra.index("--data.seq_len") + 1] = "128"
            if config is not None and config.name == "best.yaml":
                extra = []
            if "--ckpt_path" in words:
                extra = ["--trainer.max_steps", "8"]
        if words[0] == "sweep":
            monkeypatch.setattr(trial_run, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": Inside}))
            extra = [*shrink, "--test_after_fit", "false"]
        if words[0] == "generate":
            extra = ["--max_new_tokens", "8"]
        outcome = lit_llm(*words, *extra)
        assert outcome.code == 0, (words, outcome.err)
