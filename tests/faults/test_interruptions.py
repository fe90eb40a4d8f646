"""A few trials of the interruption campaign."""

import campaign_interruptions
import pytest


@pytest.mark.slow
def test_interrupted_runs_end_with_the_same_state() -> None:
    outcome = campaign_interruptions.run(6, seed=7, methods="mugs")
    assert (outcome.trials, outcome.complaints) == (6, [])
    assert "saved" in outcome.note and "lost steps" in outcome.note


@pytest.mark.long
def test_so_do_those_of_every_method() -> None:
    outcome = campaign_interruptions.run(16, seed=3)
    assert (outcome.trials, outcome.complaints) == (16, [])
