from __future__ import annotations

import pytest
import yaml

from lit_llm.cli.chain_file import Stage, read_chain
from tests.writing import REPOSITORY, exactly

RUN = str(REPOSITORY / "configs/pretraining/llama_stdlib.yaml")
MAGNITUDE = {"class_path": "lit_llm.compression.sparsity.Magnitude"}


@pytest.fixture
def read(tmp_path):
    def call(**content):
        path = tmp_path / "chain.yaml"
        path.write_text(yaml.safe_dump({"evaluate": RUN, "stages": [MAGNITUDE]} | content))
        return read_chain(path)

    return call


def test_a_stage_is_a_method_or_a_training_and_takes_the_chains_floor_and_the_name_of_its_class(read):
    recover = {"name": "recovered", "fit": [RUN, RUN], "options": {"model.weights": "{previous}"}, "floor": 0.5}
    chain = read(floor=0.9, repeats=3, stages=[MAGNITUDE | {"init_args": {"sparsity": 0.5}}, recover])
    assert chain.stages == [
        Stage("magnitude", MAGNITUDE | {"init_args": {"sparsity": 0.5}}, [], {}, 0.9),
        Stage("recovered", None, [RUN, RUN], {"model.weights": "{previous}"}, 0.5),
    ]
    assert (chain.evaluate, chain.split, chain.metric, chain.repeats) == ([RUN], "validate", None, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibration_batches": -1}, "calibration_batches must be a whole number of at least 0, but is -1 in {}"),
        ({"calibration_batches": "many"}, "calibration_batches must be a whole number of at least 0, but is 'many' in {}"),
        ({"repeats": 0}, "repeats must be a whole number of at least 1, but is 0 in {}"),
        ({"compiled": "yes"}, "compiled must be true or false, but is 'yes' in {}"),
        ({"metric": 3}, "metric must be the name of a metric, but is 3 in {}"),
        ({"evaluate": 3}, "evaluate must name run files, but is 3 in {}"),
        ({"stages": ["prune"]}, "stage 1 of {} must have either class_path or fit, but is 'prune'"),
        ({"stages": {"fit": RUN}}, f"stages must be a list, but is {{'fit': '{RUN}'}} in {{}}; begin each stage with a dash"),
        ({"stages": [{"fit": 3}]}, "fit must name run files, but is 3 in {}"),
        ({"stages": [{"fit": RUN, "options": "hello"}]}, "options must be values by dotted flag, but is 'hello' in stage 1 of {}"),
        ({"stages": [MAGNITUDE | {"init_args": 0.5}]}, "init_args must be arguments by name, but is 0.5 in stage 1 of {}"),
        ({"stages": [{"class_path": 3}]}, "class_path must be the path of a class, but is 3 in stage 1 of {}"),
        ({"stages": [MAGNITUDE | {"fit": RUN}]}, "stage 1 of {} must have either class_path or fit, but has class_path, fit"),
        ({"stages": [MAGNITUDE | {"flor": 0.9}]}, "stage 1 of {} must have keys of name, class_path, init_args, fit, options, floor, but has flor; did you mean floor?"),
        ({"stages": [MAGNITUDE | {"floor": 95}]}, "floor must be part of the original's score, in [0, 1], but is 95"),
        ({"stages": [MAGNITUDE, MAGNITUDE]}, "name of a stage must be a word that no other has, but is 'magnitude' in {}"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused(read, tmp_path, settings, message):
    with pytest.raises(ValueError, match=exactly(message.replace("{}", str(tmp_path / "chain.yaml")))):
        read(**settings)


def test_a_run_file_that_is_not_there_is_named(read, tmp_path):
    message = f"{tmp_path / 'chain.yaml'} must name run files, but {tmp_path / 'nowhere.yaml'} does not exist"
    with pytest.raises(FileNotFoundError, match=exactly(message)):
        read(stages=[{"fit": "nowhere.yaml"}])


def test_a_file_that_is_not_utf_8_is_refused_with_the_byte(tmp_path):
    (tmp_path / "chain.yaml").write_bytes(b"stages: # caf\xe9")
    with pytest.raises(
        ValueError, match=r"must be UTF-8 text, but .*chain.yaml has byte 0xe9 at offset 13; convert it"
    ):
        read_chain(tmp_path / "chain.yaml")


def test_a_file_that_is_no_yaml_is_refused(tmp_path):
    path = tmp_path / "chain.yaml"
    path.write_text("evaluate: [a: b: c")
    with pytest.raises(ValueError, match=rf"^--config must be YAML, but {path} is not: .+$"):
        read_chain(path)
