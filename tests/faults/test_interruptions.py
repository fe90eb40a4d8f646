"""A few trials of the interruption campaign."""

import campaign_interruptions
import pytest

from mugs.methods.config import METHODS


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_interrupted_runs_end_with_the_same_state() -> None:
    """One run of each method; with this seed some are warned and some killed, on 1 and 2 ranks."""
    outcome = campaign_interruptions.run(len(METHODS), seed=7)
    assert (outcome.trials, outcome.complaints) == (len(METHODS), [])
    assert "saved" in outcome.note and "lost steps" in outcome.note
    assert [name for name in METHODS if f" of {name}" not in outcome.note] == []


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_so_do_more_of_every_method() -> None:
    outcome = campaign_interruptions.run(4 * len(METHODS), seed=3)
    assert (outcome.trials, outcome.complaints) == (4 * len(METHODS), [])
