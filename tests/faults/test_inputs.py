"""A small version of the campaign on hostile inputs."""

import os
import signal
from pathlib import Path

import pytest
from campaign_inputs import KINDS, play, read_in_a_process
from outcome import Outcome


@pytest.mark.slow
def test_hostile_inputs_are_used_or_refused(tmp_path: Path) -> None:
    outcome = Outcome("inputs")
    play(outcome, tmp_path, 2 * len(KINDS), seed=11)
    assert outcome.trials == 20 and outcome.complaints == []


def test_a_crash_and_too_much_memory_would_be_noticed(tmp_path: Path) -> None:
    said = tmp_path / "said"

    assert read_in_a_process(lambda: os.kill(os.getpid(), signal.SIGKILL), said) == -9
    assert read_in_a_process(lambda: bytearray(1 << 40), said) == 1
    assert "MemoryError" in said.read_text()
