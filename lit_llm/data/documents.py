"""Reads documents from embedded corpora, files, folders, tables and hub data sets."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from lit_llm.data.cache import stamps
from lit_llm.data.corpora import EMBEDDED, Document, stdlib_files
from lit_llm.data.delimited import layout
from lit_llm.data.json_lines import is_in_lines, json_lines, with_all_columns
from lit_llm.data.table_files import (
    HUB_NAME,
    PACKED,
    TABLE_FORMATS,
    in_hub_layout,
    is_packed_table,
    is_table,
    names_split,
    refuse_saved,
    split_kind,
    split_tables,
    split_texts,
    why_unreadable,
)
from lit_llm.wording import first_line, wrong_byte

log = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".md", ".py")
PIECE_CHARACTERS = 8192


class Rows(ABC):
    """How rows of a table become texts. Subclasses are frozen dataclasses, whose fields are part of identities."""

    embedded: ClassVar[dict[str, Callable[[], Iterator[Document]]]]
    """Embedded corpora of this kind, by name."""

    text_files: ClassVar[bool]
    """Whether plain text files are accepted too."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Columns of CSV and TSV files that are read as text, even if they contain numbers or `NA`."""

    @abstractmethod
    def text(self, row: dict[str, Any], number: int, path: str) -> str:
        """The text of a row's document; `number` and `path` locate the row in errors."""


@dataclass(frozen=True)
class TextColumn(Rows):
    """Rows with their text in one column."""

    column: str = "text"
    embedded = EMBEDDED
    text_files = True

    @property
    def columns(self) -> tuple[str, ...]:
        """The text's column."""
        return (self.column,)

    def text(self, row: dict[str, Any], number: int, path: str) -> str:
        """The column's value; empty if it is null.

        Raises:
            ValueError: When there is no such column.
            TypeError: When the value is not text.
        """
        if self.column not in row:
            raise ValueError(f"data.column must be one of {', '.join(row)} in {path}, but is {self.column!r}")
        text = "" if row[self.column] is None else row[self.column]
        if not isinstance(text, str):
            raise TypeError(
                f"data.column must hold text, but {self.column!r} holds {type(text).__name__} in row {number} of {path}"
            )
        return text


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read repeatedly, always in the same order.

    Attributes:
        name: Path or name as the user wrote it.
        identity: Everything that determines the content, ready to be hashed: names, sizes and times, not the texts.
        read: Starts a pass over the documents; takes the maximum number of documents per split of the source, or
            `None` for all.
        has_validation: Whether the source has a validation split of its own.
        has_test: Whether the source has a test split of its own.
        sources: Corpora of a mixture, by name; otherwise empty.
    """

    name: str
    identity: dict[str, Any]
    read: Callable[[int | None], Iterator[Document]]
    has_validation: bool = False
    has_test: bool = False
    sources: dict[str, Corpus] = field(default_factory=dict)

    def source_of(self, document: Document) -> Corpus:
        """The corpus of a mixture that a document comes from; this corpus if it is no mixture."""
        return self if document.source is None else self.sources[document.source]

    def head(self, max_documents: int) -> Corpus:
        """The corpus limited to the first documents of each split and, in a mixture, of each source."""
        known = min(max_documents, self.identity.get("max_documents", max_documents))
        return replace(
            self,
            identity={**self.identity, "max_documents": known},
            read=lambda limit=None: self.read(min(limit or max_documents, max_documents)),
        )


def open_corpus(
    path: str,
    subset: str | None = None,
    column: str | Rows = "text",
    streaming: bool = False,
    in_pieces: bool = True,
) -> Corpus:
    """Opens the corpus at `path`, whatever its format.

    Args:
        path: The name of an embedded corpus (`stdlib`, `stdlib-code`, `stdlib-prose`), a file (`.txt`, `.md`, `.py`,
            `.jsonl`, `.json`, `.parquet`, `.csv`, `.tsv`), a folder of such files, or a data set on the hub. In a
            folder of tables, all are for training except those whose names end in another split's (`validation`,
            `wiki_test`); a folder of texts has splits if the names of all of them, or of their folders, end in one's.
        subset: Configuration of a hub data set, or of a folder in its layout.
        column: Column of the text in a table, or another way to make texts of its rows.
        streaming: Read a hub data set while it downloads, without storing all of it first.
        in_pieces: Cut a single text file into documents of about 8,192 characters; otherwise it is one document.

    Raises:
        FileNotFoundError: When there is nothing at `path`.
        ValueError: When `path` exists but holds no text that can be read.
    """
    rows: Rows = TextColumn(column) if isinstance(column, str) else column
    if path in rows.embedded:
        identity = {"embedded": path, "python": sys.version.split()[0], "files": stamps(stdlib_files())}
        return Corpus(path, identity, lambda limit=None: itertools.islice(rows.embedded[path](), limit))
    where = Path(path).expanduser()
    if where.is_file():
        if where.suffix.lower() in TABLE_FORMATS:
            return _tables(path, {"train": [where]}, rows)
        if where.suffix.lower() in PACKED:
            raise ValueError(f"data.path must be plain text or a table, but {path} is packed; unpack it")
        if not rows.text_files:
            raise ValueError(f"data.path must be a table ({', '.join(TABLE_FORMATS)}), but is {path}")
        documents = _pieces if in_pieces else lambda file, root: _whole(root, [file])
        identity = {"text": stamps([where])}
        return Corpus(path, identity, lambda limit=None: itertools.islice(documents(where, where.parent), limit))
    if where.is_dir():
        files = _visible_files(where)
        texts = [p for p in files if p.suffix.lower() in TEXT_SUFFIXES]
        tables = list(filter(is_table, files))
        refuse_saved(where, path)
        if tables and (not rows.text_files or all(p.name == "README.md" for p in texts)):
            if subset is not None or in_hub_layout(where):
                return _hub(path, subset, rows, streaming, {"files": stamps(files)}, tables)  # the card included
            if packed := next(filter(is_packed_table, files), None):
                raise ValueError(f"data.path must hold text or tables, but {packed} is packed; unpack it")
            return _tables(path, split_tables(tables, where), rows)
        if texts and rows.text_files:
            if others := sorted(set(files) - set(texts)):
                more = f" and {len(others) - 1} more" if len(others) > 1 else ""
                log.info(f"Reading {len(texts)} text files of {path}; ignoring {others[0].name}{more}")
            if splits := split_texts(texts, where):
                return _split_texts(path, splits, in_pieces)
            return Corpus(path, {"text": stamps(texts)}, lambda limit=None: _whole(where, texts[:limit]))
        if packed := next((file for file in files if file.suffix.lower() in PACKED), None):
            raise ValueError(f"data.path must hold text or tables, but {packed} is packed; unpack it")
        known = ", ".join([*(TEXT_SUFFIXES if rows.text_files else ()), *TABLE_FORMATS])
        raise ValueError(f"data.path must hold files of text ({known}), but is {path} with {len(files)} other files")
    if where.is_absolute() or where.suffix.lower() in (*TEXT_SUFFIXES, *TABLE_FORMATS) or not HUB_NAME.fullmatch(path):
        raise FileNotFoundError(
            f"data.path must be a file, a folder, a hub data set or one of {', '.join(rows.embedded)}, "
            f"but is {path}, which does not exist"
        )
    return _hub(path, subset, rows, streaming, {"hub": path})


def corpus_name(path: str | Mapping[str, Any]) -> str:
    """The name of the corpus of one path, or of a mixture of several.

    Example:
        >>> corpus_name("texts/"), corpus_name({"stdlib-code": 3, "texts/": 1})
        ('texts/', 'stdlib-code + texts/')
    """
    return " + ".join(path) if isinstance(path, Mapping) else path


def mixture(sources: dict[str, Corpus]) -> Corpus:
    """Joins corpora, one after another; each document's id is prefixed with the name of its source.

    Example:
        >>> corpus = mixture({"a/": Corpus("a/", {}, lambda limit: iter([Document("x.txt", "text")]))})
        >>> list(corpus.read(None))
        [Document(id='a/:x.txt', text='text', split=None, source='a/')]
    """

    def read(limit: int | None = None) -> Iterator[Document]:
        for name, corpus in sources.items():
            for document in corpus.read(limit):
                yield document._replace(id=f"{name}:{document.id}", source=name)

    identity = {"sources": [[name, corpus.identity] for name, corpus in sources.items()]}  # the order matters
    return Corpus(corpus_name(sources), identity, read, sources=sources)


def _utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"at offset {error.start}"
        raise ValueError(f"data.path must hold UTF-8 text, but {path} {wrong_byte(error, place)}") from None


def _whole(root: Path, files: list[Path]) -> Iterator[Document]:
    for path in files:
        yield Document(path.relative_to(root).as_posix(), _utf8(path))


def _split_texts(path: str, splits: dict[str, list[Path]], in_pieces: bool) -> Corpus:
    """The corpus of a folder of texts whose names assign them to splits.

    A file that is itself named after a split, such as `train.txt`, is cut as a single file is.
    """
    root = Path(path).expanduser()

    def documents(file: Path) -> Iterator[Document]:
        return _pieces(file, root) if in_pieces and names_split(file, root) else _whole(root, [file])

    def read(limit: int | None = None) -> Iterator[Document]:
        for split, files in splits.items():
            found = itertools.chain.from_iterable(map(documents, files))
            yield from (document._replace(split=split) for document in itertools.islice(found, limit))

    identity = {"texts": {split: stamps(files) for split, files in splits.items()}}
    return Corpus(path, identity, read, has_validation="validation" in splits, has_test="test" in splits)


def _pieces(path: Path, root: Path) -> Iterator[Document]:
    """Cuts one file into documents of about 8,192 characters, so that it can be divided into splits.

    It is cut at blank lines or, if none follows within another 8,192 characters, at a line end.
    """
    text = _utf8(path).replace("\r\n", "\n").replace("\r", "\n")
    start = number = 0
    while start < len(text):
        least = start + PIECE_CHARACTERS
        ends = text.find("\n\n", least, least + PIECE_CHARACTERS), text.find("\n", least)
        end = ends[0] + 2 if ends[0] >= 0 else ends[1] + 1 if ends[1] >= 0 else len(text)
        yield Document(f"{path.relative_to(root).as_posix()}#{number}", text[start:end])
        start, number = end, number + 1


def _visible_files(folder: Path) -> list[Path]:
    """The files beneath a folder, sorted, without hidden ones; links are followed, but no folder is entered twice."""
    files, entered, ways = [], set(), [folder]
    for way in ways:  # real folders first, then links, which may lead to more
        for place, folders, names in os.walk(way):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if (real := Path(place).resolve()) in entered:
                folders.clear()
            else:
                entered.add(real)
                ways += [link for name in folders if (link := Path(place) / name).is_symlink()]
                files += [Path(place) / name for name in names if not name.startswith(".")]
    return sorted(file for file in files if file.is_file())


def _tables(path: str, splits: dict[str, list[Path]], rows: Rows) -> Corpus:
    """The corpus of one table, or of the tables of a folder, each read in its own format."""
    where = Path(path).expanduser()

    def documents(file: Path, split: str) -> Iterator[Document]:
        name, prefix = (path, file.name) if file == where else (str(file), file.relative_to(where).as_posix())
        return _documents(functools.partial(_load, file, rows), rows, name, prefix, split, [file])

    def read(limit: int | None = None) -> Iterator[Document]:
        for split, files in splits.items():
            found = itertools.chain.from_iterable(documents(file, split) for file in files)
            yield from itertools.islice(found, limit)

    identity = {"tables": {split: stamps(files) for split, files in splits.items()}, **asdict(rows)}
    return Corpus(path, identity, read, has_validation="validation" in splits, has_test="test" in splits)


def _load(file: Path, rows: Rows) -> Iterable[dict[str, Any]]:
    """The rows of a table.

    JSON lines are read without `datasets`, which gives each column one type, parses text that looks like dates, and
    refuses columns that first occur after 10 MB.
    """
    if TABLE_FORMATS[file.suffix.lower()] == "json" and is_in_lines(file):
        return with_all_columns(json_lines(file))
    from datasets import load_dataset  # 85 MB that a run with cached tokens does not need
    from datasets.utils.logging import set_verbosity

    set_verbosity(logging.CRITICAL)  # errors are reported once, as exceptions
    kind, options = TABLE_FORMATS[file.suffix.lower()], _reading([file], rows)
    return load_dataset(kind, data_files=[str(file)], split="train", streaming=True, **options)


def _reading(files: Sequence[Path], rows: Rows) -> dict[str, Any]:
    """Options of pandas for CSV and TSV files, so that text columns stay text even if they contain numbers or `NA`."""
    separated = [file for file in files if file.suffix.lower() in (".csv", ".tsv")]
    if not separated or len(separated) < len(files):
        return {}
    _, options = layout(list(files))
    return options | {"converters": dict.fromkeys(rows.columns, str), "keep_default_na": False}


def _hub(
    path: str,
    subset: str | None,
    rows: Rows,
    streaming: bool,
    identity: dict[str, Any],
    tables: Sequence[Path] = (),
) -> Corpus:
    from datasets import get_dataset_split_names, load_dataset, load_dataset_builder
    from datasets.utils.logging import set_verbosity

    set_verbosity(logging.CRITICAL)
    local, place = Path(path).expanduser().is_dir(), str(Path(path).expanduser())
    try:
        splits = get_dataset_split_names(place, subset)
        if not local:  # the commit on the hub or, offline, the one loaded last
            identity = {**identity, "revision": load_dataset_builder(place, subset).hash}
    except Exception as error:  # the library raises dozens of kinds
        raise FileNotFoundError(
            f"data.path must be a file, a folder, a hub data set or one of {', '.join(rows.embedded)}, "
            f"but is {path!r} (subset {subset!r}): {first_line(error)}"
        ) from error

    def load_split(split: str, stream: bool) -> Any:
        return load_dataset(place, subset, split=split, streaming=stream, **_reading(tables, rows))

    def read(limit: int | None = None) -> Iterator[Document]:
        # Evaluation first, so that a text that occurs in two splits is dropped from training.
        for split in sorted(splits, key=lambda s: split_kind(s) not in ("validation", "test")):
            load = functools.partial(load_split, split, streaming or local or limit is not None)
            yield from itertools.islice(_documents(load, rows, path, split, split_kind(split) or "train"), limit)

    return Corpus(
        path,
        {**identity, "subset": subset, **asdict(rows)},
        read,
        has_validation="validation" in map(split_kind, splits),
        has_test="test" in map(split_kind, splits),
    )


def _documents(
    load: Callable[[], Any], rows: Rows, path: str, prefix: str, split: str | None, files: Sequence[Path] = ()
) -> Iterator[Document]:
    remaining: Iterator[Any] | None = None
    while True:
        try:
            remaining = remaining or enumerate(load())
            number, row = next(remaining)
        except StopIteration:
            return
        except Exception as error:  # each format's reader raises its own kinds
            reason = why_unreadable(error, files)
            raise ValueError(f"data.path must be a table that can be read, but {path} is not: {reason}") from error
        yield Document(f"{prefix}/{number}", rows.text(row, number, path), split)
