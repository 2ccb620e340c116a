import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_llm.schedulers import Constant, Cosine, Linear, Schedule, WarmupStableDecay, step_at
from tests.writing import exactly

WARMUP, TOTAL = 10, 110


def factors(schedule: Schedule, total: int = TOTAL) -> list[float]:
    return [schedule.factor(step, total) for step in range(total + 1)]


@pytest.mark.parametrize("make", [Constant, Linear, Cosine, WarmupStableDecay])
def test_warmup_rises_in_equal_steps_to_one(make: type[Schedule]) -> None:
    assert factors(make(WARMUP))[:WARMUP] == pytest.approx([(step + 1) / WARMUP for step in range(WARMUP)])
    assert factors(make(WARMUP))[WARMUP] == 1
    assert factors(make(0))[0] == 1


CLOSED_FORMS = {
    "constant": (Constant(WARMUP), lambda p: 1.0),
    "linear": (Linear(WARMUP), lambda p: 1 - p),
    "linear to a tenth": (Linear(WARMUP, final=0.1), lambda p: 1 - 0.9 * p),
    "cosine": (Cosine(WARMUP), lambda p: math.cos(math.pi * p / 2) ** 2),
    "cosine to a tenth": (Cosine(WARMUP, final=0.1), lambda p: 0.1 + 0.9 * math.cos(math.pi * p / 2) ** 2),
    "stable": (WarmupStableDecay(WARMUP), lambda p: min(1.0, (1 - p) / 0.2)),
    "stable to a half": (WarmupStableDecay(WARMUP, 0.5, 0.4), lambda p: min(1.0, 0.5 + 0.5 * (1 - p) / 0.4)),
    "all decay": (WarmupStableDecay(WARMUP, 0.0, 1.0), lambda p: 1 - p),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_after_the_warmup_each_schedule_is_its_closed_form(name: str) -> None:
    schedule, expected = CLOSED_FORMS[name]
    progress = [(step - WARMUP) / (TOTAL - WARMUP) for step in range(WARMUP, TOTAL + 1)]
    assert factors(schedule)[WARMUP:] == pytest.approx([expected(p) for p in progress])


@pytest.mark.parametrize("final", [0.0, 0.25])
def test_cosine_is_torchs(final: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=final)
    for step in range(51):
        assert Cosine(final=final).factor(step, 50) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


@given(
    st.sampled_from([Constant, Linear, Cosine, WarmupStableDecay]),
    st.integers(0, 50),
    st.integers(0, 100),
    st.integers(0, 200),
)
def test_a_factor_is_between_nothing_and_one_wherever_it_is_asked_for(make, warmup, total, step) -> None:
    assert 0 <= make(warmup).factor(step, total) <= 1


@pytest.mark.parametrize("make", [Linear, Cosine, WarmupStableDecay])
def test_a_decaying_schedule_never_rises_after_the_warmup_and_stays_at_its_end(make) -> None:
    schedule = make(WARMUP, final=0.2)
    found = factors(schedule)[WARMUP:]
    assert found == sorted(found, reverse=True)
    assert schedule.factor(TOTAL, TOTAL) == pytest.approx(0.2)
    assert schedule.factor(10 * TOTAL, TOTAL) == pytest.approx(0.2)


def test_a_stable_run_can_be_prolonged_from_before_its_fall() -> None:
    schedule = WarmupStableDecay(WARMUP, decay_fraction=0.2)
    before_the_fall = WARMUP + round(0.8 * (TOTAL - WARMUP))
    assert factors(schedule)[:before_the_fall] == factors(schedule, 2 * TOTAL)[:before_the_fall]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(-1), "warmup_steps must be at least 0, but is -1"),
        (lambda: Cosine(-5), "warmup_steps must be at least 0, but is -5"),
        (lambda: Linear(final=1.5), "final must be in [0, 1], but is 1.5"),
        (lambda: Cosine(final=-0.1), "final must be in [0, 1], but is -0.1"),
        (lambda: WarmupStableDecay(decay_fraction=0.0), "decay_fraction must be in (0, 1], but is 0.0"),
        (lambda: WarmupStableDecay(decay_fraction=1.1), "decay_fraction must be in (0, 1], but is 1.1"),
    ],
)
def test_values_out_of_range_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        make()


def test_a_run_shorter_than_its_warmup_reaches_the_full_rate_halfway() -> None:
    schedule = Linear(100)
    assert [round(schedule.factor(step, 10), 2) for step in range(10)] == [0.2, 0.4, 0.6, 0.8, 1, 1, 0.8, 0.6, 0.4, 0.2]


def test_a_part_of_a_run_without_an_end_is_refused() -> None:
    assert step_at(0.0, math.inf) == 0
    with pytest.raises(ValueError, match=r"max_steps or .* must be given where something begins after 10% of the run"):
        step_at(0.1, math.inf)
