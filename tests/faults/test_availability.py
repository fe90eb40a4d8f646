"""The simulated training of 42 days, a few times."""

import campaign_availability
import pytest


@pytest.mark.slow
def test_the_simulation_says_what_it_assumes() -> None:
    outcome = campaign_availability.run(2, sample_gb=0.05, times=1)
    assert outcome.trials == 2
    assert all(
        word in outcome.note
        for word in ("effective training time", "419 in 54 days", "measured here", "Daly")
    )
