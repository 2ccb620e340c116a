import pytest

from lit_llm import export as exporting
from lit_llm.checkpoints import save_model
from lit_llm.models.mlp import MLP


@pytest.fixture
def saved(tmp_path):
    save_model(tmp_path / "run" / "model", MLP(3, class_names=["cat", "dog", "hen"]))
    return tmp_path / "run"


def test_a_run_folder_goes_out_with_what_a_server_needs_and_one_line(lit_llm, saved, tmp_path):
    outcome = lit_llm("export", "--model", saved, "--out", tmp_path / "out", "--format", "torch")
    assert outcome.code == 0, outcome.err
    (line,) = outcome.out.splitlines()
    assert line.startswith(f"{tmp_path}/out/model.pt2: 1.")
    assert "logits differ by at most" in line
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "config.json", "model.pt2"]
    assert '"hen"' in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.slow
def test_the_default_is_onnx(lit_llm, saved, tmp_path):
    pytest.importorskip("onnxscript")
    outcome = lit_llm("export", "--model", saved, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "out" / "model.onnx").is_file()


@pytest.mark.parametrize("form", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_full_disk_is_said_to_be_full_and_nothing_is_left(lit_llm, saved, tmp_path, monkeypatch, form):
    if form == "onnx":
        pytest.importorskip("onnxscript")
    monkeypatch.setitem(exporting.FILES, form, "/dev/full")
    outcome = lit_llm("export", "--model", saved, "--out", tmp_path / "out", "--format", form)
    assert outcome.code == 2, outcome.err
    assert outcome.last_line == (
        "lit-llm: error: disk must have room to write, but is full; free some; earlier checkpoints are whole"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_mistake_is_one_line(lit_llm, saved, tmp_path, monkeypatch):
    def line(*words: object) -> str:
        outcome = lit_llm("export", *words)
        assert outcome.code == 2
        assert outcome.out == ""
        assert len(outcome.err.strip().splitlines()) == 1
        return outcome.last_line.removeprefix("lit-llm: error: ")

    out = tmp_path / "out"
    assert line("--model", tmp_path / "none", "--out", out, "--format", "torch").startswith("model must be a model dir")
    assert "onnx" in line("--model", saved, "--out", out, "--format", "tflite")
    assert line("--model", saved) == "the following arguments are required: --out; see lit-llm export --help"
    assert line("--model", saved, "--out", saved, "--format", "torch") == (
        f"out must be a new or empty folder, but is {saved}, where there is something"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert line("--model", saved, "--out", out) == (
        "package onnx must be installed to export ONNX, but is not; pip install 'lit-llm[export]', or give "
        "--format torch"
    )
    assert not out.exists()
