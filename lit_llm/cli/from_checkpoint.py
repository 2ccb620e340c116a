"""Completes and checks a command's options by the checkpoint that it reads."""

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
"""Options of data modules that do not change the texts on which a tokeniser is trained."""


def starts_from_weights(config: Any, run: Path | None) -> bool:
    """Whether an evaluation without `ckpt_path` evaluates `model.weights` rather than the run's checkpoint.

    That is so if weights are given and the run folder has no checkpoint. If the folder has a `config.yaml`, its
    checkpoints were deleted: then only weights within the folder (its exported model) are evaluated, because others
    are what the run started from, not its result.

    Args:
        config: All options of the command.
        run: Folder of the run whose own config is evaluated; `None` if the config is not a run's.
    """
    weights = (config["model"].get("init_args") or {}).get("weights")
    folder = config.get("run_dir") or config["trainer"].get("default_root_dir") or run
    if not (weights and folder):
        return bool(weights)
    if own_checkpoint(Path(folder)).is_file():
        return False
    own = Path(weights).resolve().is_relative_to(Path(folder).resolve())
    return own or not (Path(folder) / "config.yaml").is_file()


@contextmanager
def completed(config: Any, run: Path | None, fits: bool) -> Iterator[tuple[dict[str, Any], bool]]:
    """Completes a command's options from its checkpoint, in place, while the classes are instantiated.

    On exit, options that `config.yaml` must state as the user gave them are restored.

    Args:
        config: All options of the command.
        run: The folder of the run that is evaluated.
        fits: Whether the command trains.

    Yields:
        The checkpoint (empty if none is read), and whether it replaces the weights or the path from which the model
        would start.

    Raises:
        ValueError: When the checkpoint is not usable for this command, or is of another network.
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
    """Refuses a checkpoint that no trainer has written or, to resume training, one without the optimiser's state."""
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
    """Refuses to resume with `max_steps` below the checkpoint's step: `config.yaml` would state a wrong last step."""
    done = checkpoint.get("global_step", 0)
    if max_steps not in (None, -1) and max_steps < done:
        raise ValueError(
            f"trainer.max_steps must be at least the checkpoint's step, {done}, to go on from it, but is {max_steps}"
        )


def require_own_start(model: Any, run: Path, checkpoint: Path, words: list[str], fits: bool) -> None:
    """Refuses to read a run's checkpoint if the command line names other weights or another pretrained network.

    Args:
        model: Options of the model.
        run: The run folder, whose config states what the run started from.
        checkpoint: The checkpoint that is evaluated or resumed from.
        words: The command line.
        fits: Whether the command trains.
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
    """Whether two paths are the same once resolved."""
    return isinstance(other, str | Path) and Path(path).resolve() == Path(other).resolve()


def _argument(of: Any, names: tuple[str, ...]) -> Any:
    """The value at a path of nested `init_args`; `None` if there is none."""
    for name in names:
        of = ((of or {}).get("init_args") or {}).get(name)
    return of


def require_same_network(class_path: str | None, checkpoint: dict[str, Any]) -> None:
    """Refuses a checkpoint of another class of network; only class names are compared, not modules.

    Args:
        class_path: Class path of the configured network; `None` if none is configured.
        checkpoint: The checkpoint; empty if none is read.
    """
    there = (checkpoint.get("network") or {}).get("class_path")
    if None not in (class_path, there) and class_path.rpartition(".")[2] != there.rpartition(".")[2]:
        raise ValueError(f"model.network must be that of the checkpoint, {there}, but is {class_path}")


def complete_network(options: Any, checkpoint: dict[str, Any], fits: bool) -> None:
    """Sets arguments of a network, in place, to those with which the checkpoint's network was built.

    These are the config of a pretrained network and, in evaluations, the channels and image size taken from the data.

    Args:
        options: The network's arguments.
        checkpoint: The checkpoint; empty if none is read.
        fits: Whether the command trains: then the network's `path` is kept.
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
    """Sets, in place, channels and image size of the data to the checkpoint's where the options leave them open."""
    channels, height, width = checkpoint.get("image_shape") or (None, None, None)
    for name, value in {"channels": channels, "image_size": height if height == width else None}.items():
        if name in options and options[name] is None:
            options[name] = value


def complete_tokenizer(options: Any, run: Path, checkpoint: dict[str, Any]) -> None:
    """Makes evaluated data use the checkpoint's tokeniser instead of training one on them, in place.

    This applies to other data than the run's, and to the run's own table, which may have changed. The run's own corpus,
    whose tokens are cached, keeps its options; so does a tokeniser that differs from the run's or is loaded.

    Args:
        options: Arguments of the data module.
        run: The run folder, whose config states the run's own arguments.
        checkpoint: The checkpoint.
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
