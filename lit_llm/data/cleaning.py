"""Cleaning of documents, and their split by a hash of their content."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lit_llm.data.corpora import Document

LINE_END = re.compile("\r\n?")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Unicode's category Cc without tab and line feed."""

OTHER = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
"""Those of `CONTROL` that are no white space."""

BREAK = re.compile("(?<=\\S)[\x0b\x0c\x1c-\x1f\x85]+(?=\\S)")
"""Control characters that are white space (form feed, vertical tab, separators) and alone separate two words."""

CLEANING_FORMAT = 2
"""Version of the cleaning, raised whenever it changes texts, so that no older cache is used."""


@dataclass(frozen=True)
class Cleaning:
    """The cleaning steps to apply, in this order.

    Attributes:
        strip_control: Remove control characters other than tab and line feed; every line end becomes a line feed, as
            does a form feed, a vertical tab or a separator between two words.
        unicode_nfc: Compose characters (Unicode normal form C), so that equivalent spellings become equal.
        drop_empty: Drop documents that contain only white space.
        drop_duplicates: Drop documents whose text has occurred before; the first one stays.
    """

    strip_control: bool = True
    unicode_nfc: bool = True
    drop_empty: bool = True
    drop_duplicates: bool = True

    def text(self, text: str) -> str:
        """Cleans one text.

        Example:
            >>> Cleaning().text("cafe\\u0301\\x00\\r\\n")
            'café\\n'
        """
        if self.strip_control:
            text = LINE_END.sub("\n", text)
            if CONTROL.search(text):
                text = CONTROL.sub("", BREAK.sub("\n", OTHER.sub("", text)))
        if self.unicode_nfc and not text.isascii():
            text = unicodedata.normalize("NFC", text)
        return text

    def documents(self, documents: Iterable[Document], dropped: Counter[str]) -> Iterator[tuple[Document, int]]:
        """Cleans a corpus in one pass, remembering a hash of each document (about 100 bytes).

        Args:
            documents: The corpus.
            dropped: Number of dropped documents by reason; updated in place.

        Yields:
            Each document that is kept, cleaned, and its content hash.
        """
        seen: set[int] = set()
        for document in documents:
            text = self.text(document.text)
            if self.drop_empty and not text.strip():
                dropped["empty"] += 1
                continue
            content = content_hash(text)
            if self.drop_duplicates:
                if content in seen:
                    dropped["duplicate"] += 1
                    continue
                seen.add(content)
            yield document._replace(text=text), content


def content_hash(text: str) -> int:
    """A 64-bit hash of the text, the same in every run."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def split_of(content: int, validation_fraction: float, test_fraction: float) -> str:
    """The split of a document, from its content hash alone.

    Equal texts are therefore never in two splits, and a document keeps its split when the corpus grows.

    Example:
        >>> [split_of(x << 62, validation_fraction=0.25, test_fraction=0.25) for x in range(4)]
        ['test', 'validation', 'train', 'train']
    """
    place = content / 2**64
    if place < test_fraction:
        return "test"
    return "validation" if place < test_fraction + validation_fraction else "train"
