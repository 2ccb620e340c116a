import json
from pathlib import Path

import pytest

from lit_llm.data.documents import open_corpus
from lit_llm.data.tables import open_table
from tests.writing import exactly


def read(path: Path) -> list[str]:
    return [document.text for document in open_corpus(str(path)).read()]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_lines_of_json_may_have_more_late(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": f"{number} " + "x" * 600, **({"src": "x"} if number > 20_000 else {})} for number in range(22_000)]
    path = tmp_path / f"late{suffix}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(path) == [row["text"] for row in rows]


def test_a_line_of_json_may_lack_the_column_that_others_have(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    path.write_text('{"id": 1}\n\n{"text": "x"}\n{"id": "two", "text": "\\ud83d\\ude00"}\n')
    assert read(path) == ["", "x", "😀"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_dates_are_text(tmp_path: Path, suffix: str) -> None:
    dates = [f"2024-01-{day:02}T00:00:00" for day in range(1, 29)]
    path = tmp_path / f"dates{suffix}"
    path.write_text("".join(json.dumps({"text": date}) + "\n" for date in dates))
    assert read(path) == dates


@pytest.mark.parametrize(
    "content", ['{"text":\n"a"}\n{"text": "b"}\n', '[{"text": "a"},\n{"text": "b"}]', '["a", "b"]']
)
def test_json_that_is_not_in_lines_is_read_too(tmp_path: Path, content: str) -> None:
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(content)
        assert read(tmp_path / name) == ["a", "b"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("before", [0, 3000])
def test_json_that_is_not_utf8_is_refused_in_one_line_wherever_it_is_read(tmp_path: Path, suffix, before) -> None:
    path = tmp_path / f"table{suffix}"
    path.write_bytes(b'{"text": "cafe"}\n' * before + '{"text": "café"}\n'.encode("cp1252"))
    message = (
        f"data.path must be a table that can be read, but {path} is not: JSON must be UTF-8 text, but {path.name} has "
        f"byte 0xe9 where it is not; convert it, for example with `iconv -f latin1 -t utf-8`"
    )
    for reading in (read, lambda path: open_table(str(path))):
        with pytest.raises(ValueError, match=exactly(message)):
            reading(path)
