"""Malicious files, one test each."""

from pathlib import Path

import pytest
from campaign_malice import CASES
from malice import harm


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused(tmp_path: Path, name: str) -> None:
    assert harm(CASES[name], tmp_path)[0] == ""


def test_code_that_runs_would_be_noticed(tmp_path: Path) -> None:
    assert "code ran" in harm(lambda place: lambda: place.fuse.touch(), tmp_path)[0]


def test_reading_outside_would_be_noticed(tmp_path: Path) -> None:
    assert (
        "opened"
        in harm(lambda place: lambda: (place.outside / "secret.txt").read_text(), tmp_path)[0]
    )
