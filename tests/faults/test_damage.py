"""A small version of the campaign on damaged files."""

import random
from pathlib import Path

import pytest
from campaign_damage import Finished, damage
from outcome import Outcome


def test_random_damage_is_noticed_and_named(tmp_path: Path) -> None:
    outcome = Outcome("damage")
    damage(outcome, tmp_path, 200)
    assert outcome.trials == 200 and outcome.complaints == []


def test_damage_that_goes_unnoticed_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = Finished(tmp_path)
    monkeypatch.setattr("mugs.checkpoint.record.hash_file", lambda path: "0" * 64)
    for module in ("pipeline.manifest", "pipeline.runfile"):
        monkeypatch.setattr(
            f"{module}.verify_checksum",
            lambda content: {k: v for k, v in content.items() if k != "sha256"},
        )
    for kind in (finished.checkpoint, finished.manifest_entry, finished.config):
        found = []
        for seed in range(30):
            try:
                found.append(kind(random.Random(seed)))
            except Exception as error:
                found.append(str(error))
        assert any(found), kind.__name__
