"""A small version of the campaign on clocks that are a day off."""

from pathlib import Path

import pytest
from campaign_clocks import KINDS, Case, play
from outcome import Outcome


def test_clocks_a_day_off_block_nothing_and_double_nothing(tmp_path: Path) -> None:
    outcome = Outcome("clocks")
    play(outcome, tmp_path, 5 * len(KINDS))
    assert outcome.trials == 30 and outcome.complaints == []


def test_a_clock_that_is_believed_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The clock of this host instead of the file server's.
    for module in ("pipeline.files", "mugs.checkpoint.repair", "stages.commands.clean"):
        monkeypatch.setattr(f"{module}.read_server_time", lambda folder: __import__("time").time())
    monkeypatch.setattr(Case, "choose_lead", lambda case: case.rng.choice([-1, 1]) * 86400.0)
    outcome = Outcome("clocks")
    play(outcome, tmp_path, 8 * len(KINDS))
    found = " ".join(outcome.complaints)
    assert all(name in found for name in ("sign_of_life", "clean", "repair"))
