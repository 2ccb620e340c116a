from __future__ import annotations

import pytest

from lit_llm.ranges import INTERVALS, require_at_least, require_range


@pytest.mark.parametrize("interval", INTERVALS)
def test_an_interval_has_the_ends_that_its_brackets_say(interval: str) -> None:
    least, *most = interval.removeprefix("in ").replace("above 0", "(0").split(", ")
    inside = {0.0: least == "[0", 0.5: True, 1.0: most != ["1)"], 2.0: not most, -0.5: False}
    for value, fits in inside.items():
        if fits:
            require_range(interval, share=value)
        else:
            with pytest.raises(ValueError, match="share must be") as error:
                require_range(interval, share=value)
            assert str(error.value) == f"share must be {interval}, but is {value}"


def test_the_first_value_below_the_least_is_named_with_its_owner_and_none_passes() -> None:
    require_at_least(2, width=2, depth=None)
    require_range("in (0, 1)", share=None)
    with pytest.raises(ValueError, match=r"^model\.depth must be at least 2, but is 1$"):
        require_at_least(2, "model.", width=2, depth=1, height=0)
