from __future__ import annotations

import pytest

from lit_llm.wording import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no such place"), "no such place"),
        (ValueError("\n  no such place  \n\nTry another."), "no such place"),
        (ConnectionError(), "ConnectionError"),
        (AssertionError(" \n"), "AssertionError"),
    ],
)
def test_of_an_error_its_first_line_is_said_and_its_kind_where_it_has_no_text(error: Exception, line: str) -> None:
    assert first_line(error) == line
