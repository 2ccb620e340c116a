import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lit_llm.data.cleaning import Cleaning, content_hash
from lit_llm.data.corpora import Document
from lit_llm.data.documents import Corpus
from lit_llm.data.token_cache import (
    SPLITS,
    TokenCache,
    TokenSplit,
    build_cache,
    split_documents,
)
from lit_llm.data.tokenizer import byte_tokenizer, encode_documents, train_bpe
from tests.writing import prose

TEXTS = [prose(number) for number in range(30)]
SPLIT_OF = [SPLITS[number % 3] for number in range(30)]


def items(dropped: Counter[str]) -> Iterator[tuple[Document, int, str]]:
    for number, (text, split) in enumerate(zip(TEXTS, SPLIT_OF)):
        yield Document(f"doc/{number}", text), content_hash(text), split
    dropped["empty"] += 2


def build(folder: Path, documents=items, tokenizer=byte_tokenizer, said: list[str] | None = None) -> TokenCache:
    return build_cache(folder, documents, lambda texts: tokenizer(), {"corpus": "test"}, (said or []).append)


def texts_of(cache: TokenCache, name: str) -> list[str]:
    split = cache.split(name)
    starts = [*split.documents["start"].tolist(), len(split.tokens) - 1]
    return [cache.tokenizer.decode(split.tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(starts)]


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("tokenizer", [byte_tokenizer, lambda: train_bpe(TEXTS, 300)], ids=["bytes", "bpe"])
def test_the_tokens_are_the_tokenizers_own_between_boundaries(tmp_path: Path, tokenizer) -> None:
    cache = build(tmp_path / "cache", tokenizer=tokenizer)
    boundary = cache.tokenizer.eos_token_id
    for name in SPLITS:
        expected = [boundary]
        for ids in encode_documents(tokenizer(), [t for t, s in zip(TEXTS, SPLIT_OF) if s == name]):
            expected += [*ids, boundary]
        assert cache.split(name).tokens.tolist() == expected


def test_every_document_is_where_the_index_says(tmp_path: Path) -> None:
    cache = build(tmp_path / "cache")
    for name in SPLITS:
        texts = [t for t, s in zip(TEXTS, SPLIT_OF) if s == name]
        split = cache.split(name)
        assert texts_of(cache, name) == texts
        assert split.documents["num_bytes"].tolist() == [len(text.encode()) for text in texts]
        assert split.documents["content"].tolist() == [content_hash(text) for text in texts]
        assert split.ids == [f"doc/{n}" for n in range(30) if SPLIT_OF[n] == name]


def test_the_manifest_tells_what_was_made_and_what_was_dropped(tmp_path: Path) -> None:
    manifest = build(tmp_path / "cache").manifest
    assert manifest["corpus"] == "test"
    assert manifest["vocab_size"] == 257
    assert manifest["dropped"] == {"empty": 2}
    for name in SPLITS:
        texts = [t.encode() for t, s in zip(TEXTS, SPLIT_OF) if s == name]
        size = sum(map(len, texts))
        assert manifest["splits"][name] == {"documents": 10, "bytes": size, "tokens": size + 10}


def test_the_report_is_one_line_that_says_where(tmp_path: Path) -> None:
    said: list[str] = []
    build_cache(tmp_path / "cache", items, lambda texts: byte_tokenizer(), {}, said.append)
    [line] = said
    assert line.startswith("Tokenised 30 documents, ")
    assert line.endswith(f"; cached in {tmp_path / 'cache'}; dropped, empty: 2")


def test_the_tokenizer_learns_from_training_documents_alone(tmp_path: Path) -> None:
    seen: list[str] = []

    def learn(texts: Iterator[str]):
        seen.extend(texts)
        return byte_tokenizer()

    build_cache(tmp_path / "cache", items, learn, {}, lambda line: None)
    assert seen == [t for t, s in zip(TEXTS, SPLIT_OF) if s == "train"]


def test_a_large_vocabulary_has_room_for_its_tokens(tmp_path: Path) -> None:
    wide = byte_tokenizer()
    wide.add_tokens([f"<{n}>" for n in range(2**16 - 200)])
    cache = build(tmp_path / "cache", tokenizer=lambda: wide)
    assert cache.split("train").tokens.dtype == np.uint32
    assert build(tmp_path / "small").split("train").tokens.dtype == np.uint16


def test_what_was_built_is_opened(tmp_path: Path) -> None:
    built = build(tmp_path / "cache")
    opened = TokenCache.open(tmp_path / "cache")
    assert opened is not None
    assert opened.manifest == json.loads(json.dumps(built.manifest))
    assert opened.split("train").tokens.tolist() == built.split("train").tokens.tolist()
    assert opened.tokenizer.get_vocab() == built.tokenizer.get_vocab()


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "train.tokens", "validation.ids", "test.documents.npy", "tokenizer/tokenizer.json"],
)
@pytest.mark.parametrize("damage", ["missing", "truncated", "emptied"])
def test_a_cache_that_is_not_whole_is_refused_and_can_be_built_again(tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "cache"
    build(folder)
    whole = files(folder)
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(whole[name][: len(whole[name]) // 2] if damage == "truncated" else b"")
    assert TokenCache.open(folder) is None
    build(folder)
    assert files(folder) == whole


@pytest.mark.parametrize("manifest", [b"{}", b"[]", b"\xff"])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, manifest: bytes) -> None:
    build(tmp_path / "cache")
    (tmp_path / "cache/manifest.json").write_bytes(manifest)
    assert TokenCache.open(tmp_path / "cache") is None


def test_an_empty_or_missing_folder_is_no_cache(tmp_path: Path) -> None:
    assert TokenCache.open(tmp_path) is None
    assert TokenCache.open(tmp_path / "nothing") is None


@pytest.mark.parametrize("documents_read", [0, 1, 29])
def test_a_crash_while_building_leaves_nothing(tmp_path: Path, documents_read: int) -> None:
    passes: list[int] = []

    def crash(dropped: Counter[str]) -> Iterator[tuple[Document, int, str]]:
        passes.append(0)
        for number, item in enumerate(items(dropped)):
            if len(passes) == 2 and number == documents_read:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "cache", crash, lambda texts: sum(1 for _ in texts) and byte_tokenizer(), {}, print)
    assert list(tmp_path.iterdir()) == []


def test_a_power_cut_while_building_leaves_nothing_that_is_opened(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # no process cleans up

    def stop(*args: object) -> None:
        raise OSError("no power")

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(OSError, match="no power"):
        build(tmp_path / "cache")
    assert TokenCache.open(tmp_path / "cache") is None


def test_a_failed_rebuild_can_be_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "cache"

    def fail() -> None:
        raise RuntimeError("no tokeniser")

    with pytest.raises(RuntimeError, match="no tokeniser"):
        build(folder, tokenizer=fail)
    assert TokenCache.open(folder) is None
    build(folder)
    assert TokenCache.open(folder) is not None


def test_of_two_that_build_at_once_the_first_stays_where_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    inodes: list[int] = []

    def slower(dropped: Counter[str]) -> Iterator[tuple[Document, int, str]]:
        if not inodes:
            build(folder)  # another process was faster and is already training from its cache
            inodes.append((folder / "train.tokens").stat().st_ino)
        yield from items(dropped)

    cache = build(folder, documents=slower)
    assert (folder / "train.tokens").stat().st_ino == inodes[0]
    assert texts_of(cache, "train") == [t for t, s in zip(TEXTS, SPLIT_OF) if s == "train"]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_bytes_of_rows_sum_to_the_bytes_of_the_split_whatever_the_row_length(tmp_path: Path) -> None:
    split = build(tmp_path / "cache", tokenizer=lambda: train_bpe(TEXTS, 300)).split("train")
    for seq_len in (1, 7, 64, 10_000):
        edges = np.arange(0, len(split.tokens) - 1 + seq_len, seq_len)
        sizes = np.diff(split.bytes_before(edges))
        assert (sizes >= 0).all()
        assert sizes.sum() == pytest.approx(split.documents["num_bytes"].sum(), rel=1e-12)


def test_bytes_before_a_documents_boundary_are_those_of_the_documents_before_it(tmp_path: Path) -> None:
    split = build(tmp_path / "cache").split("validation")
    before = np.concatenate([[0], np.cumsum(split.documents["num_bytes"])])[:-1]
    assert split.bytes_before(split.documents["start"].astype(np.int64)) == pytest.approx(before)


def test_bytes_of_a_document_are_spread_evenly_over_its_labels() -> None:
    index = np.array([(0, 6, 0), (3, 10, 0)], dtype=[("start", "<u8"), ("num_bytes", "<u8"), ("content", "<u8")])
    split = TokenSplit(np.zeros(9, dtype=np.uint16), index, Path(), "train")  # b x x b y y y y b
    assert split.bytes_before(np.arange(11)).tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16, 16, 16]


def test_a_split_without_documents_has_no_bytes(tmp_path: Path) -> None:
    def training_only(dropped: Counter[str]) -> Iterator[tuple[Document, int, str]]:
        return ((document, content, "train") for document, content, _ in items(dropped))

    split = build(tmp_path / "cache", documents=training_only).split("test")
    assert split.ids == []
    assert split.bytes_before(np.array([0, 5])).tolist() == [0, 0]


@pytest.mark.parametrize("name", ["line\nend", "carriage\rreturn", "form\x0cfeed", "paragraph\u2029end", "\udcff"])
def test_any_name_of_a_document_is_one_line_of_the_ids(tmp_path: Path, name: str) -> None:
    def named(dropped: Counter[str]) -> Iterator[tuple[Document, int, str]]:
        yield Document(name, "text"), 1, "train"
        yield Document("second", "more"), 2, "train"

    ids = build(tmp_path / "cache", documents=named).split("train").ids
    assert len(ids) == 2
    assert ids[1] == "second"


# Splits.


def corpus(*documents: Document, **own: bool) -> Corpus:
    return Corpus("test", {}, lambda limit=None: iter(documents[:limit]), **own)


def test_a_split_that_the_source_has_is_kept_and_one_that_it_lacks_is_cut_from_training() -> None:
    documents = [Document(str(n), str(n), "train") for n in range(400)]
    documents += [Document(f"v{n}", f"v{n}", "validation") for n in range(9)]
    found = list(split_documents(corpus(*documents, has_validation=True), Cleaning(), 0.3, 0.3, Counter()))
    counts = Counter(split for _, _, split in found)
    assert counts["validation"] == 9
    assert counts["test"] == pytest.approx(120, abs=40)
    assert all(split != "validation" for document, _, split in found if document.split == "train")


def test_a_text_in_two_splits_of_the_source_stays_in_the_one_read_first() -> None:
    documents = [Document("a", "same", "test"), Document("b", "same", "train"), Document("c", "own", "train")]
    found = split_documents(corpus(*documents, has_test=True), Cleaning(), 0.0, 0.0, Counter())
    assert [(document.id, split) for document, _, split in found] == [("a", "test"), ("c", "train")]
