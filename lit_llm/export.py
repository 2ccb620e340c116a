"""A network as one file that a server runs without this package: ONNX, or torch's own exported program."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from lit_llm.checkpoints import IMAGE_PROCESSOR, Model, read_image_processor, read_model
from lit_llm.export_card import card
from lit_llm.export_inputs import Served, ServedTexts, dynamic_shapes, reader, served_of
from lit_llm.export_layers import exportable, rounding_inputs
from lit_llm.files import replacing
from lit_llm.wording import first_line

FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
"""File name of each format."""

TOLERANCE = 1e-3
"""Largest difference of a logit of the file from the network's, in standard deviations of the logits."""

MAX_PROTOBUF = 1_800_000_000
"""Bytes of weights up to which they are inside the ONNX file; larger ones are in a file beside it."""

REPEATS = 20
Answer = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Exported:
    """The exported file, and how it compares with the network.

    Attributes:
        file: The network's file.
        num_bytes: Size of it, with that of a file of weights beside it.
        difference: Largest difference of a logit of the file from the network's, over inputs of several shapes.
        spread: Standard deviation of the network's logits.
        milliseconds: Median time of the file for one row, on this CPU.
        network_milliseconds: Median time of the network in torch for the same row.
    """

    file: Path
    num_bytes: int
    difference: float
    spread: float
    milliseconds: float
    network_milliseconds: float


def export(source: str | Path, folder: str | Path, form: str = "onnx") -> Exported:
    """Writes a network as one file, with what a server needs beside it, and checks the file against the network.

    The file takes any number of rows, and texts up to the network's maximum length.

    Args:
        source: The model, as in `checkpoints.load_model`.
        folder: A new or empty folder; it is created only once the file has been run and gives the network's logits.
        form: `onnx` or `torch`.

    Raises:
        FileNotFoundError: When there is no model.
        ModuleNotFoundError: When a package that writes or runs the format is not installed.
        ValueError: When the folder is not empty, the network is an encoder-decoder or cannot be exported, or the file's
            logits differ from the network's.
    """
    folder = Path(folder)
    _require_room(folder, form)
    model = read_model(source)
    if hasattr(model.network, "generate"):
        raise ValueError(
            f"model must answer in one pass to be exported, but {source} is an encoder-decoder, which writes step by "
            f"step; serve its model directory with transformers"
        )
    return export_model(model, folder, form, read_image_processor(source), str(source))


def export_model(
    model: Model,
    folder: Path,
    form: str = "onnx",
    processor: dict[str, Any] | None = None,
    name: str = "a network",
) -> Exported:
    """Exports a loaded model as `export` does; moves its network to the CPU in float32, without gradients, in place.

    Args:
        model: The model, from `checkpoints.read_model`.
        folder: As in `export`.
        form: As in `export`.
        processor: The network's image preprocessing.
        name: Name of the model in its README.

    Raises:
        ModuleNotFoundError: As in `export`.
        ValueError: As in `export`.
    """
    _require_room(folder, form)
    if methods := rounding_inputs(model.network):
        raise ValueError(
            f"model must have no more than weights rounded to be exported, but {methods[0][1:]} rounds what layers "
            f"read, too; compress with Int8WeightOnly or Int4WeightOnly"
        )
    network = model.network.float().cpu().eval().requires_grad_(False)
    served, read = served_of(network, model.tokenizer), reader(network, model.tokenizer, processor)
    with torch.no_grad(), replacing(folder) as new:
        new.mkdir()
        with _quietly():
            served, program = _programmed(served, read)
            _write(program, new / FILES[form], form, dynamic_shapes(served))
            answer = _open(new / FILES[form], form, served.names)
            difference, spread = _compared(answer, served, read)
            here, there = _medians(answer, served, read(1, 128))
        num_bytes = sum(file.stat().st_size for file in new.iterdir())
        exported = Exported(folder / FILES[form], num_bytes, difference, spread, here, there)
        _write_surroundings(model, processor, new)
        text = card(exported, form, served.names, network, model.tokenizer, processor, name)
        (new / "README.md").write_text(text, encoding="utf-8")
    return exported


def _require_room(folder: Path, form: str) -> None:
    if form not in FILES:
        raise ValueError(f"format must be one of {', '.join(FILES)}, but is {form}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out must be a new or empty folder, but is {folder}, where there is something")
    for name in ("onnx", "onnxscript", "onnxruntime") if form == "onnx" else ():
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"package {name} must be installed to export ONNX, but is not; pip install 'lit-llm[export]', or give "
                f"--format torch"
            )


# Writing and checking the file.


def _programmed(served: Served, read: Callable[[int, int], dict[str, Tensor]]) -> tuple[Served, ExportedProgram]:
    """Exports the network; without the input `token_type_ids` if the network does not use it."""
    kind = getattr(served.network, "model", served.network)
    example = {name: tensor for name, tensor in read(3, 11).items() if name in served.names}
    try:
        with exportable(served.network):
            program = torch.export.export(served, (), example, dynamic_shapes=dynamic_shapes(served))
    except Exception as error:  # of dozens of types
        raise ValueError(
            f"network must be one that torch.export takes with any number of rows and tokens, but a "
            f"{type(kind).__name__} is not: {_reason(error)}; serve its model directory instead"
        ) from error
    unread = [node.name for node in program.graph.nodes if node.op == "placeholder" and not node.users]
    if "token_type_ids" in unread:
        return _programmed(ServedTexts(served.network).eval(), read)
    return served, program


def _write(program: ExportedProgram, file: Path, form: str, dynamic: dict[str, dict[int, Any]]) -> None:
    if form == "torch":
        for graph in program.graph_module.modules():
            for node in graph.graph.nodes if isinstance(graph, GraphModule) else ():
                node.meta.pop("stack_trace", None)  # source lines with local paths
        torch.export.save(program, whole := io.BytesIO())  # saving straight to a full disk would abort the process
        file.write_bytes(whole.getbuffer())
        return
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    try:
        found = torch.onnx.export(
            program,
            (),
            dynamo=True,
            dynamic_shapes=dynamic,
            output_names=["logits"],
            optimize=not any("weight_qdata" in name for name in program.state_dict),  # would store float weights
            verbose=False,
        )
        for node in found.model.graph.all_nodes():
            node.metadata_props.clear()  # source lines with local paths
        found.save(file, external_data=size > MAX_PROTOBUF)
    except OSError:  # from the disk
        raise
    except Exception as error:  # of a type that depends on the operation
        raise ValueError(
            f"network must be made of operations that ONNX has, but is not: {_reason(error)}; give --format torch"
        ) from error


def _open(file: Path, form: str, names: tuple[str, ...]) -> Answer:
    if form == "torch":
        module = torch.export.load(file).module()
        return lambda inputs: module(**{name: inputs[name] for name in names})
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own types share no base class
        raise ValueError(
            f"network must be made of operations that ONNX Runtime runs, but is not: {_reason(error)}; give "
            f"--format torch"
        ) from error

    def answer(inputs: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {name: inputs[name].numpy() for name in names})[0])

    return answer


def _compared(answer: Answer, served: Served, read: Callable[[int, int], dict[str, Tensor]]) -> tuple[float, float]:
    """The largest difference of logits, and the standard deviation of the network's; padding is left out."""
    differences, logits = [], []
    for shape in ((1, 1), (1, 7), (2, 5), (5, 33)):
        inputs = read(*shape)
        expected = _answer(served, inputs)
        try:
            found = answer(inputs)
        except Exception as error:
            raise ValueError(
                f"file must take any number of rows and tokens, but of {shape[0]} x {shape[1]} it says: "
                f"{_reason(error)}; serve the model directory instead"
            ) from error
        if expected.shape != found.shape:
            raise ValueError(
                f"logits of the file must have the shape of the network's, {tuple(expected.shape)}, but have "
                f"{tuple(found.shape)}"
            )
        if expected.ndim == 3:
            inside = inputs["attention_mask"].bool()
            expected, found = expected[inside], found[inside]
        differences.append((expected - found).abs().max())
        logits.append(expected.flatten())
    difference, spread = float(torch.stack(differences).max()), float(torch.cat(logits).std())
    if not difference <= TOLERANCE * spread:
        raise ValueError(
            f"logits of the file must be the network's within {TOLERANCE:g} of their spread, {spread:.3g}, but differ "
            f"by {difference:.3g}; serve the model directory instead"
        )
    return difference, spread


def _answer(served: Served, inputs: dict[str, Tensor]) -> Tensor:
    return served(**{name: inputs[name] for name in served.names})


def _medians(answer: Answer, served: Served, inputs: dict[str, Tensor]) -> tuple[float, float]:
    """Median milliseconds of the file and of the network, run alternately."""
    taken: list[list[float]] = [[], []]
    asked = (answer, lambda inputs: _answer(served, inputs))
    for _ in range(REPEATS + 2):
        for times, ask in zip(taken, asked, strict=True):
            started = time.perf_counter()
            ask(inputs)
            times.append(1000 * (time.perf_counter() - started))
    here, there = (statistics.median(times[2:]) for times in taken)
    return here, there


def _write_surroundings(model: Model, processor: dict[str, Any] | None, folder: Path) -> None:
    """Writes a model directory's other files: config, which names the classes, tokeniser and image preprocessing."""
    if model.folder is not None:
        shutil.copyfile(model.folder / "config.json", folder / "config.json")
    elif hasattr(model.network, "to_hf_config"):
        (folder / "config.json").write_text(json.dumps(model.network.to_hf_config(), indent=2) + "\n")
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    if processor is not None:
        (folder / IMAGE_PROCESSOR).write_text(json.dumps(processor, indent=2) + "\n")


@contextmanager
def _quietly() -> Iterator[None]:
    """Suppresses the exporters' warnings: what they warn about is known here, or checked by running the file."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _reason(error: BaseException) -> str:
    """The first line of an error's root cause, at most 200 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)[:200]
