"""Small versions of the campaign on disks that are full, stumble or are read-only."""

from pathlib import Path

import pytest
from campaign_disk import disturbed, injected, real, repaired
from outcome import Outcome
from tiny_stage import tiny_run

from pipeline import runfile


@pytest.mark.slow
def test_a_run_survives_any_call_that_fails(tmp_path: Path) -> None:
    outcome = Outcome("calls")
    injected(outcome, tmp_path, stride=29)
    assert outcome.trials >= 12 and outcome.complaints == []


def test_a_run_survives_a_disk_that_is_too_small(tmp_path: Path) -> None:
    outcome = Outcome("disks")
    try:
        real(outcome, tmp_path, range(28 << 10, 64 << 10, 12 << 10))
    except OSError as error:
        pytest.skip(f"no file system may be mounted here: {error}")
    assert outcome.trials == 4 and outcome.complaints == []


def test_harm_would_be_noticed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    folder = runfile.write_run_file(root, tiny_run())
    outcome = Outcome("harm")
    repaired(outcome, root, "first")
    assert outcome.complaints == []
    (folder / "weights" / "sum.safetensors").write_bytes(b"")
    for path in (folder / "checkpoints").glob("*/state.safetensors"):
        path.write_bytes(b"")
    disturbed(outcome, root, "then", 28, None)
    assert len(outcome.complaints) >= 2
