"""A round of the submission campaign."""

import campaign_submissions
import pytest


@pytest.mark.slow
def test_many_submissions_at_once_queue_each_run_once() -> None:
    assert campaign_submissions.run(1, seed=5, submissions=30).complaints == []
