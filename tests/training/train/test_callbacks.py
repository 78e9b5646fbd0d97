"""Loss spikes and fp16's skipped steps: reported, and an error only past a limit."""

from __future__ import annotations

from typing import Any

import pytest

from forge.training.system.errors import DivergedError


@pytest.fixture
def callbacks() -> Any:
    """Imported here: the module imports torch, and collecting tests must not."""
    from forge.training.train import callbacks

    return callbacks


def test_a_loss_of_more_than_twice_the_median_is_a_spike_and_ends_nothing_by_itself(callbacks: Any) -> None:
    detector = callbacks.SpikeDetector([2.0] * callbacks.FEWEST_STEPS, limit=None)
    assert detector.watch(9, 4.0) is None
    assert "step 10: loss 4.1000 is 2.0 times the median" in (detector.watch(10, 4.1) or "")
    assert all(detector.watch(step, 9.0) for step in range(11, 200))  # it stays a spike however long it stays up


def test_the_first_steps_of_a_run_are_no_spikes(callbacks: Any) -> None:
    detector = callbacks.SpikeDetector([], limit=1)
    losses = [1.0, 30.0] * (callbacks.FEWEST_STEPS // 2)
    assert all(detector.watch(step, loss) is None for step, loss in enumerate(losses))


def test_so_many_spikes_in_a_row_end_the_run_and_a_sound_step_forgives(callbacks: Any) -> None:
    detector = callbacks.SpikeDetector([2.0] * callbacks.FEWEST_STEPS, limit=3)
    for loss in (9.0, 9.0, 2.0, 9.0, 9.0):
        detector.watch(9, loss)
    with pytest.raises(DivergedError, match=r"3 such steps in a row, and training\.spike_limit is 3") as caught:
        detector.watch(14, 9.0)
    assert caught.value.exit_code == 7


def test_spikes_before_a_resume_count(callbacks: Any) -> None:
    with pytest.raises(DivergedError):
        callbacks.SpikeDetector([*[2.0] * callbacks.FEWEST_STEPS, 9.0, 9.0], limit=3).watch(11, 9.0)


def test_a_falling_loss_is_judged_by_what_it_has_come_to(callbacks: Any) -> None:
    detector = callbacks.SpikeDetector([], limit=None)
    for step in range(100):
        assert detector.watch(step, 10.0 * 0.95**step) is None
    assert detector.watch(100, 0.5) is not None


def test_skipped_steps_are_no_error_until_no_scale_can_be_the_reason(callbacks: Any) -> None:
    skipped = callbacks.SkippedSteps()
    for _ in range(3):
        for step in range(callbacks.MOST_SKIPPED):
            skipped.note(step, is_finite=False)
        skipped.note(callbacks.MOST_SKIPPED, is_finite=True)
    for step in range(callbacks.MOST_SKIPPED):
        skipped.note(step, is_finite=False)
    with pytest.raises(DivergedError, match="at any loss scale"):
        skipped.note(callbacks.MOST_SKIPPED, is_finite=False)
