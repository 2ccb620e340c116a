"""What a command's options owe to the checkpoint that it reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lit_llm.checkpoint_files import own_checkpoint, read_checkpoint
from lit_llm.checkpoints import unpacked
from lit_llm.data.tokenizer import training_of

NOT_OF_TEXTS = {"batch_size", "seq_len", "mask_documents"}
"""What of data has no part in the texts that a tokeniser is learnt from."""


def starts_from_weights(config: Any) -> bool:
    """Whether an evaluation means no checkpoint: where a model directory outside of a run is evaluated.

    A run has a config even where its checkpoints are gone: what it began with is not what it came to, but its own
    model is.
    """
    weights = (config["model"].get("init_args") or {}).get("weights")
    folder = config.get("run_dir") or config["trainer"].get("default_root_dir")
    if not (weights and folder):
        return bool(weights)
    if own_checkpoint(Path(folder)).is_file():
        return False
    own = Path(weights).resolve().is_relative_to(Path(folder).resolve())
    return own or not (Path(folder) / "config.yaml").is_file()


@contextmanager
def completed(config: Any, run: Path | None, fits: bool) -> Iterator[tuple[dict[str, Any], bool]]:
    """Completes a command's options from its checkpoint, in place, for what is made of them.

    Args:
        config: All options of the command.
        run: The folder of the run that is evaluated.
        fits: Whether training goes on.

    Yields:
        The checkpoint, empty where none is read, and whether what the model starts from gives way to it.

    Raises:
        ValueError: When it cannot be read for this command, or is of another network.
    """
    options = config["model"].get("init_args") or {}
    network = getattr(options.get("network"), "init_args", None) or {}
    weights, path, told = options.get("weights"), network.get("path"), network.get("config")
    checkpoint = read_checkpoint(Path(config["ckpt_path"]), in_pieces=True) if config.get("ckpt_path") else {}
    if checkpoint:
        require_written_by_trainer(checkpoint, Path(config["ckpt_path"]), fits)
    if checkpoint and fits:
        require_later(config["trainer"].get("max_steps"), checkpoint)
    require_same_network(getattr(options.get("network"), "class_path", None), checkpoint)
    complete_network(network, checkpoint, fits)
    if not fits:
        complete_tokenizer(config["data"].get("init_args") or {}, run, checkpoint)
        complete_images(config["data"].get("init_args") or {}, checkpoint)
    gives_way = bool(checkpoint and (weights or network.get("path") != path))
    if gives_way:
        options["weights"] = config["ckpt_path"]
    yield checkpoint, gives_way
    if weights:
        options["weights"] = weights  # as the run's config says it
    if fits and "config" in network:
        network["config"] = told


def require_written_by_trainer(checkpoint: dict[str, Any], path: Path, fits: bool) -> None:
    """Refuses a file of weights that no trainer has written; to train on, also one without the optimiser's state.

    Raises:
        ValueError: When it is one.
    """
    if "pytorch-lightning_version" not in checkpoint:
        raise ValueError(
            f"ckpt_path must be a checkpoint that Lightning wrote, but {path} does not say of which version"
        )
    if fits and "optimizer_states" not in checkpoint:
        raise ValueError(
            f"ckpt_path must hold the optimiser's state to train on, but {path} holds none; a new run takes its "
            f"weights with --model.weights {path}"
        )


def require_later(max_steps: int | None, checkpoint: dict[str, Any]) -> None:
    """Refuses to go on to a step that is past: the run's config would say it ended there.

    Raises:
        ValueError: When it is.
    """
    done = checkpoint.get("global_step", 0)
    if max_steps not in (None, -1) and max_steps < done:
        raise ValueError(
            f"trainer.max_steps must be at least the checkpoint's step, {done}, to go on from it, but is {max_steps}"
        )


def require_own_start(model: Any, run: Path, checkpoint: Path, words: list[str], fits: bool) -> None:
    """Refuses to read a run's checkpoint where the command line names another model.

    Args:
        model: What the model is told.
        run: The folder of the run, whose config says what it started from.
        checkpoint: What is evaluated or gone on from.
        words: The command line.
        fits: Whether training goes on.

    Raises:
        ValueError: When it does.
    """
    config = run / "config.yaml"
    if not config.is_file():
        return
    own = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]
    for names in (("weights",), ("network", "path"), ("network", "config")):
        here, there = (_argument(of, names) for of in (model, own))
        flag = r"--model\.(init_args\.)?" + r"\.(init_args\.)?".join(names) + r"([.=]|$)"
        is_path = isinstance(here, str)
        if here in (None, there) or (
            is_path and any(_is_same(here, place) for place in (there, run, run / "model", checkpoint))
        ):
            continue
        if any(re.match(flag, word) for word in words):
            anew = f"--config {config} --model.network null --model.weights {here if is_path else 'DIR'}"
            taken, remedy = (
                ("gone on from", "start from that, take another --run_dir, and no --ckpt_path")
                if fits
                else ("evaluated", f"evaluate that, take {anew} and another --run_dir")
            )
            own_value, other = (f", {there},", here) if is_path else ("", "another")
            raise ValueError(
                f"model.{'.'.join(names)} must be as in {config}{own_value} where that run's checkpoint is {taken}, "
                f"but is {other}; to {remedy}"
            )


def _is_same(path: Any, other: Any) -> bool:
    """Whether a path is another one, however it is spelt."""
    return isinstance(other, str | Path) and Path(path).resolve() == Path(other).resolve()


def _argument(of: Any, names: tuple[str, ...]) -> Any:
    """An argument of a class, or of one among its arguments."""
    for name in names:
        of = ((of or {}).get("init_args") or {}).get(name)
    return of


def require_same_network(class_path: str | None, checkpoint: dict[str, Any]) -> None:
    """Refuses a checkpoint of another class of network, wherever it may be imported from.

    Args:
        class_path: Of the network that is told; `None` where none is.
        checkpoint: What is read; empty where nothing is.

    Raises:
        ValueError: When it is of another.
    """
    there = (checkpoint.get("network") or {}).get("class_path")
    if None not in (class_path, there) and class_path.rpartition(".")[2] != there.rpartition(".")[2]:
        raise ValueError(f"model.network must be that of the checkpoint, {there}, but is {class_path}")


def complete_network(options: Any, checkpoint: dict[str, Any], fits: bool) -> None:
    """Gives a network the form that data had given it when a checkpoint was made, in place.

    Args:
        options: The network's arguments.
        checkpoint: What is read; empty where nothing is.
        fits: Whether training goes on, which looks at what the network was made from again.
    """
    stored = (checkpoint.get("network") or {}).get("init_args", {})
    if stored.get("config") is not None and options.get("path") is not None and not fits:
        options["path"], options["config"] = None, stored["config"]
    elif stored.get("config") is not None and options.get("config") is not None:
        options["config"] = stored["config"]
    for name in ("channels", "image_size") if not fits else ():
        if name in options and options[name] is None:
            options[name] = stored.get(name)


def complete_images(options: Any, checkpoint: dict[str, Any]) -> None:
    """Has images to evaluate read as the network wants them, where the data's options do not say how, in place."""
    channels, height, width = checkpoint.get("image_shape") or (None, None, None)
    for name, value in {"channels": channels, "image_size": height if height == width else None}.items():
        if name in options and options[name] is None:
            options[name] = value


def complete_tokenizer(options: Any, run: Path, checkpoint: dict[str, Any]) -> None:
    """Has data that are evaluated read with the run's tokeniser, instead of one learnt from them, in place.

    The run's own table may have changed since; a corpus of its own, whose tokens are cached, stays as it is.

    Args:
        options: The data's arguments.
        run: The folder of the run, whose config says what its own are.
        checkpoint: What is read.
    """
    states = (of for of in checkpoint.values() if isinstance(of, dict) and isinstance(of.get("tokenizer"), dict))
    state = next((of for of in states if "tokenizer.json" in of["tokenizer"]), {})
    files = state.get("tokenizer")
    config = run / "config.yaml"
    if not files or "tokenizer" not in options or not config.is_file():
        return
    own = yaml.safe_load(config.read_text(encoding="utf-8"))["data"].get("init_args") or {}
    told, spec = options.as_dict(), options["tokenizer"]
    shared = (told.keys() & own.keys()) - NOT_OF_TEXTS
    here, there = ({name: of[name] for name in shared} for of in (told, own))
    own_corpus = here == there and "trained_on" not in state
    if own_corpus or spec != own.get("tokenizer") or not (spec is None or training_of(spec)):
        return
    options["tokenizer"] = str(unpacked(files))
