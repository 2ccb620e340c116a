import os
import pickle
import random
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lit_llm.async_checkpoints import AsyncCheckpointIO, snapshot
from lit_llm.checkpoint_files import (
    AtomicCheckpointIO,
    Shares,
    read_checkpoint,
    write_sealed,
)
from lit_llm.checkpoints import load_model
from lit_llm.files import replacing
from tests.writing import exactly

CHECKPOINT = {"step": 3, "state_dict": {"weight": torch.arange(50.0)}, "names": ["a", "b"]}
ONE_LINE = r"\Ackpt_path must [^\n]+, but [^\n]+\Z"


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, path)
    return path


# Replacing.


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("there_before", [False, True])
def test_what_was_written_takes_the_place_of_the_old(tmp_path: Path, kind: str, there_before: bool) -> None:
    path = tmp_path / "deep" / "place"

    def write(text: str) -> None:
        with replacing(path) as new:
            if kind == "folder":
                new.mkdir()
                (new / text).write_text(text)
            else:
                new.write_text(text)

    if there_before:
        write("old")
    write("new")
    assert content(path.parent) == {"place/new" if kind == "folder" else "place": b"new"}
    assert [p.name for p in path.parent.iterdir()] == ["place"]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", ["writing", "replacing"])
def test_on_an_error_the_old_is_untouched_and_nothing_is_left(tmp_path, monkeypatch, kind, error, moment) -> None:
    path = tmp_path / "place"
    inside = path / "file" if kind == "folder" else path
    inside.parent.mkdir(exist_ok=True)
    inside.write_text("old")

    def fail(*args: object) -> None:
        raise error

    def write() -> None:
        with replacing(path) as new:
            if kind == "folder":
                new.mkdir()
            (new / "file" if kind == "folder" else new).write_text("new")
            if moment == "writing":
                fail()
            monkeypatch.setattr(os, "replace", fail)

    with pytest.raises(error):
        write()
    assert inside.is_file()
    assert inside.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["place"]


# Checkpoint files.


def test_a_checkpoint_is_read_as_it_was_saved(saved: Path) -> None:
    assert same(AtomicCheckpointIO().load_checkpoint(saved), CHECKPOINT)
    assert [p.name for p in saved.parent.iterdir()] == ["last.ckpt"]


def test_a_save_that_fails_leaves_the_old_checkpoint_and_no_litter(saved: Path, monkeypatch) -> None:
    before = saved.read_bytes()

    def write_half(checkpoint: Any, path: Path) -> None:
        Path(path).write_bytes(before[: len(before) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"step": 4}, saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99, "all but one byte"])
def test_a_truncated_checkpoint_is_refused(saved: Path, kept: float | str) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: -1 if isinstance(kept, str) else int(kept * len(whole))])
    with pytest.raises(ValueError, match=ONE_LINE) as caught:
        read_checkpoint(saved)
    assert str(caught.value).startswith(f"ckpt_path must be a whole checkpoint, but {saved} is ")


def test_a_flipped_bit_is_either_harmless_or_refused(saved: Path) -> None:
    whole, draw = saved.read_bytes(), random.Random(0)
    refused: list[str] = []
    for place in [*draw.sample(range(len(whole)), 250), *range(0, 64), *range(len(whole) - 400, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        saved.write_bytes(damaged)
        try:
            assert same(read_checkpoint(saved), CHECKPOINT), f"byte {place} changed what was read"
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert [line for line in refused if not re.match(ONE_LINE, line)] == []


def test_a_flipped_bit_in_the_weights_is_named(saved: Path) -> None:
    whole = bytearray(saved.read_bytes())
    place = whole.index(torch.arange(50.0).numpy().tobytes())
    whole[place + 17] ^= 4
    saved.write_bytes(whole)
    message = f"ckpt_path must be a whole checkpoint, but {saved} is damaged"
    with pytest.raises(ValueError, match=exactly(message)):
        read_checkpoint(saved)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "old zip", "plain pickle"])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(tmp_path: Path, form: str) -> None:
    path, trap = tmp_path / "bad.ckpt", tmp_path / "trap"
    if form == "plain pickle":
        path.write_bytes(pickle.dumps({"state_dict": Malicious(trap)}))
    else:
        torch.save({"state_dict": Malicious(trap)}, path, _use_new_zipfile_serialization=form == "zip")
    for read in (read_checkpoint, load_model, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(ValueError, match=ONE_LINE):
            read(path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Malicious(trap)))  # the trap works if unpickled
    assert trap.exists()


def test_reading_cannot_be_talked_into_unpickling(tmp_path: Path) -> None:
    path, trap = tmp_path / "bad.ckpt", tmp_path / "trap"
    torch.save({"state_dict": Malicious(trap)}, path)
    with pytest.raises(ValueError, match=ONE_LINE):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not trap.exists()


def test_an_object_of_any_class_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.save({"network": nn.Linear(2, 2)}, tmp_path / "object.ckpt")
    with pytest.raises(ValueError, match=ONE_LINE) as caught:
        read_checkpoint(tmp_path / "object.ckpt")
    assert "must hold plain values and tensors only" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "a NoneType"),
        (torch.zeros(3), "a Tensor"),
        ([1, 2], "a list"),
        ({"0.weight": torch.zeros(3)}, "a dict without one"),
        ({"state_dict": 3}, "a dict without one"),
    ],
)
def test_a_file_of_anything_but_a_checkpoint_is_refused(tmp_path: Path, content: Any, found: str) -> None:
    path = tmp_path / "other.ckpt"
    torch.save(content, path)
    message = f"ckpt_path must hold a checkpoint, with its state_dict, but {path} holds {found}"
    for read in (read_checkpoint, load_model):
        with pytest.raises(ValueError, match=exactly(message)):
            read(path)


@pytest.mark.parametrize("shares", ["abc", ["abc", 10**9], ["abc", "2"], [3, 2], None])
def test_a_checkpoint_that_names_no_shares_there_could_be_is_refused_at_once(tmp_path: Path, shares: Any) -> None:
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {}, "shares": shares}, path)
    message = f"shares must be a folder's name and a number of processes, but in {path} they are {shares}"
    with pytest.raises(ValueError, match=exactly(message)):
        read_checkpoint(path)


def test_a_damaged_checkpoint_is_said_with_those_beside_it(saved: Path) -> None:
    (saved.parent / "best.ckpt").write_bytes(saved.read_bytes())
    saved.write_bytes(b"")
    message = f"ckpt_path must be a whole checkpoint, but {saved} is not: File is not a zip file"
    with pytest.raises(ValueError, match=exactly(f"{message}; {saved.parent} also holds best.ckpt")):
        read_checkpoint(saved)


@pytest.mark.parametrize(
    ("name", "lacks"), [("no.ckpt", "does not exist"), ("", "is a folder; name a file in it, last or best")]
)
def test_what_is_no_file_is_no_checkpoint(tmp_path: Path, name: str, lacks: str) -> None:
    message = f"ckpt_path must be a checkpoint file, but is {tmp_path / name}, which {lacks}"
    with pytest.raises(FileNotFoundError, match=exactly(message)):
        read_checkpoint(tmp_path / name)


# Asynchronous writing.


@pytest.fixture
def go(monkeypatch) -> threading.Event:
    """Checkpoints are written only after this event is set."""
    event, write = threading.Event(), AtomicCheckpointIO.save_checkpoint

    def wait(*saved: Any) -> None:
        assert event.wait(30)
        write(*saved)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", wait)
    return event


def test_what_changes_while_a_checkpoint_is_written_is_not_in_it(tmp_path: Path, go: threading.Event) -> None:
    io, path = AsyncCheckpointIO(), tmp_path / "last.ckpt"
    training = {"step": 3, "state_dict": {"weight": torch.arange(50.0)}, "names": ["a", "b"]}
    io.save_checkpoint(training, path)
    training["state_dict"]["weight"].zero_()
    training["names"].append("c")
    training["step"] = 4
    assert not path.exists()
    go.set()
    assert same(io.load_checkpoint(path), CHECKPOINT)


def test_the_next_save_waits_for_the_last_one(tmp_path: Path, go: threading.Event) -> None:
    io = AsyncCheckpointIO()
    io.save_checkpoint({"step": 1, "state_dict": {}}, tmp_path / "one.ckpt")
    threading.Timer(0.2, go.set).start()
    io.save_checkpoint({"step": 2, "state_dict": {}}, tmp_path / "two.ckpt")
    assert read_checkpoint(tmp_path / "one.ckpt")["step"] == 1
    io.teardown()
    assert read_checkpoint(tmp_path / "two.ckpt")["step"] == 2


@pytest.mark.parametrize("then", ["save_checkpoint", "load_checkpoint", "remove_checkpoint", "teardown"])
def test_a_write_that_failed_is_heard_of_once_and_spares_the_last_one(saved: Path, monkeypatch, then: str) -> None:
    io = AsyncCheckpointIO()

    def full(*given: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        io.save_checkpoint({"step": 4}, saved)
        given = {"save_checkpoint": ({"step": 5}, saved), "teardown": ()}.get(then, (saved,))
        with pytest.raises(
            OSError, match=r"^disk must have room to write [^\n]+, but writing failed: [^\n]+ is whole$"
        ):
            getattr(io, then)(*given)
    io.teardown()
    assert same(read_checkpoint(saved), CHECKPOINT)
    assert [p.name for p in saved.parent.iterdir()] == ["last.ckpt"]


def test_a_copy_keeps_what_a_state_dict_knows_beside_its_tensors() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = network.state_dict()
    copied = snapshot({"state_dict": state, "transposed": state["0.weight"].t(), "none": torch.empty(0)})
    assert copied["state_dict"]._metadata == state._metadata
    assert same(copied["state_dict"], state)
    assert torch.equal(copied["transposed"], state["0.weight"].t())
    pointers = {t.data_ptr() for t in state.values()}
    assert pointers.isdisjoint(t.data_ptr() for t in copied["state_dict"].values())


# Sharded writing.

COMMON = {"step": 3, "state_dict": {"weight": torch.empty(50, device="meta")}, "names": ["a", "b"]}
WEIGHT = "['state_dict']['weight']"
WRITERS = [AtomicCheckpointIO, AsyncCheckpointIO]


@pytest.fixture(params=WRITERS)
def save(request, monkeypatch) -> Iterator[Callable[..., None]]:
    """Saves from two simulated processes, rank 0 last; `failed` is the error that rank 1 reports."""

    def by_both(
        path: Path,
        name: str = "one",
        weight: torch.Tensor = CHECKPOINT["state_dict"]["weight"],
        failed: str | None = None,
    ):
        def gather(said: list[Any], own: str | None, group: Any) -> None:
            said[:] = [own, failed]

        monkeypatch.setattr(dist, "all_gather_object", gather)
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
        for rank, (start, end) in ((1, (30, 50)), (0, (0, 30))):
            monkeypatch.setattr(dist, "get_rank", lambda group=None, rank=rank: rank)
            io = request.param()
            shares = Shares({WEIGHT: ([start], weight[start:end])}, name, None)
            try:
                io.save_checkpoint(COMMON if rank == 0 else {}, path, storage_options=shares)
                io.teardown()
            except OSError:
                if rank == 0:
                    raise

    return by_both


def test_what_several_processes_have_written_is_read_as_a_whole_or_in_part(tmp_path: Path, save) -> None:
    path = tmp_path / "run" / "last.ckpt"
    save(path)
    assert sorted(content(path.parent)) == [
        "last.ckpt",
        "last.shares/one/00000-of-00002.pt",
        "last.shares/one/00001-of-00002.pt",
    ]
    assert (path.parent / "last.shares/one/00001-of-00002.pt").stat().st_size < 2000
    assert same(read_checkpoint(path), CHECKPOINT)
    assert same(AtomicCheckpointIO().load_checkpoint(path), CHECKPOINT)
    weight = read_checkpoint(path, in_pieces=True)["state_dict"]["weight"]
    assert weight.shape == (50,)
    assert torch.equal(weight.part([(25, 10)]), torch.arange(25.0, 35.0))
    assert weight.part([(25, 0)]).shape == (0,)


def test_the_shares_of_earlier_saves_go_when_the_new_one_is_there(tmp_path: Path, save) -> None:
    path = tmp_path / "last.ckpt"
    save(path)
    save(path, name="two", weight=torch.zeros(50))
    assert [p.name for p in (tmp_path / "last.shares").iterdir()] == ["two"]
    assert not read_checkpoint(path)["state_dict"]["weight"].any()
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, path)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    save(path)
    AtomicCheckpointIO().remove_checkpoint(path)
    assert list(tmp_path.iterdir()) == []


def test_where_one_process_cannot_write_the_last_checkpoint_stays(tmp_path: Path, save) -> None:
    path = tmp_path / "last.ckpt"
    save(path)
    message = "checkpoint must be written by all processes, but process 1 could not: its disk is full"
    with pytest.raises(OSError, match=exactly(message)):
        save(path, name="two", failed="its disk is full")
    assert same(read_checkpoint(path), CHECKPOINT)
    assert not (tmp_path / "last.shares/two").exists()


@pytest.fixture
def share(tmp_path: Path, save) -> Path:
    save(tmp_path / "last.ckpt")
    return tmp_path / "last.shares/one/00001-of-00002.pt"


def refused(share: Path) -> str:
    path = share.parents[2] / "last.ckpt"
    with pytest.raises(ValueError, match=ONE_LINE) as caught:
        read_checkpoint(path)
    return str(caught.value).replace(str(share), "SHARE").replace(str(path), "PATH")


def test_a_checkpoint_that_lacks_a_share_is_refused(share: Path) -> None:
    share.unlink()
    assert refused(share) == "ckpt_path must be a whole checkpoint, but PATH lacks its share SHARE"


def test_a_damaged_share_is_refused_where_it_is_read(share: Path) -> None:
    whole = bytearray(share.read_bytes())
    whole[whole.index(torch.arange(30.0, 50.0).numpy().tobytes()) + 7] ^= 4
    share.write_bytes(whole)
    assert refused(share) == "ckpt_path must be a whole checkpoint, but SHARE is damaged"
    weight = read_checkpoint(share.parents[2] / "last.ckpt", in_pieces=True)["state_dict"]["weight"]
    assert torch.equal(weight.part([(0, 30)]), torch.arange(30.0))
    with pytest.raises(ValueError, match=r"is damaged$"):
        weight.part([(29, 2)])
    share.write_bytes(share.read_bytes()[:500])
    assert refused(share).startswith("ckpt_path must be a whole checkpoint, but SHARE is ")


def test_shares_that_do_not_make_a_whole_are_refused(share: Path) -> None:
    write_sealed({WEIGHT: [[31], torch.arange(31.0, 50.0)]}, share)
    assert refused(share) == f"ckpt_path must hold all of {WEIGHT}, but holds 49 of 50 values"


def test_a_share_that_would_run_code_is_refused_and_does_not(share: Path) -> None:
    trap = share.parent / "trap"
    torch.save({WEIGHT: Malicious(trap)}, share)
    assert refused(share).startswith("ckpt_path must hold plain values and tensors only, but SHARE does not: ")
    assert not trap.exists()
