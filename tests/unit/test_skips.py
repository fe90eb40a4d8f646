"""Which skipped tests fail the suite where no skip may be unexpected."""

import os
from pathlib import Path
from typing import Any

import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"


@pytest.mark.parametrize(
    ("reasons", "unexpected"),
    [
        ([], 0),
        (["Skipped: needs a GPU"] * 11 + ["Skipped: needs the extra wandb"] * 3, 0),
        (["Skipped: needs a GPU"] * 12, 1),
        (["Skipped: needs the extra x"] * 5, 2),
        (["no Chromium on PATH", "Skipped: needs a GPU"], 1),
        (["ffcv is not installed"], 1),
        (["Skipped: needs root"] * 3, 3 if os.geteuid() == 0 else 0),
    ],
)
def test_unexpected_skips(
    request: pytest.FixtureRequest, reasons: list[str], unexpected: int
) -> None:
    plugins = request.config.pluginmanager.get_plugins()
    conftest: Any = next(p for p in plugins if getattr(p, "__file__", None) == str(CONFTEST))
    found = conftest.find_unexpected_skips([(f"t{i}", each) for i, each in enumerate(reasons)])
    assert len(found) == unexpected
