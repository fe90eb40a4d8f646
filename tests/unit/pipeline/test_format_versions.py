"""Records of other versions: what older code wrote is read, what newer code wrote is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import run_stage
from mugs.checkpoint.record import list_checkpoints
from mugs.checkpoint.repair import inspect_checkpoints
from mugs.checkpoint.save_load import load_latest, save_checkpoint
from pipeline import manifest
from pipeline.files import FormatVersionError, with_checksum
from results.store import read_results, write_rows
from stages.commands.finished_results import collect_finished
from stages.commands.reproduction import all_runs
from stages.commands.verify import verify_runs

NEWER = (
    "this code reads version 1; it was written by newer code: use that code, or another run root"
)


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a record and give it a checksum that fits."""
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    path.write_text(json.dumps(with_checksum(content)))


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    """The entry of a run that is done."""
    run = next(run for run in all_runs("mini") if not run.needs)
    facts = {"stage": run.stage, "name": run.name, "run_id": run.run_id}
    return manifest.record_entry(tmp_path, manifest.ManifestEntry(**facts))


def test_an_entry_without_a_version_is_read(tmp_path: Path, entry: Path) -> None:
    """As the first release wrote it."""
    rewrite(entry, lambda content: content.pop("format_version"))
    found = manifest.find_done(tmp_path, entry.stem)
    assert found is not None and found.format_version == 1


@pytest.mark.parametrize("version", [2, 99])
def test_a_newer_entry_stops_commands_and_is_left_alone(
    tmp_path: Path, entry: Path, version: int
) -> None:
    """As "not done", its run would be repeated, and the entry replaced."""

    def change(content: dict[str, Any]) -> None:
        content.update(format_version=version, something="new")

    rewrite(entry, change)
    line = f"{entry}: format version {version}, {NEWER}"
    with pytest.raises(FormatVersionError, match=f"format version {version}"):
        manifest.find_done(tmp_path, entry.stem)
    answer = CliRunner().invoke(run_stage.app, ["plan", "mini", "--run-root", str(tmp_path)])
    assert str(answer.exception) == line
    assert run_stage._find_code_of_user_error(answer.exception) == 2
    assert collect_finished(tmp_path).problems == (line,)
    (run,) = (run for run in all_runs("mini") if run.run_id == entry.stem)
    assert verify_runs([run], tmp_path).problems == [line]


@pytest.mark.parametrize("version", [0, "1", None, True])
def test_a_version_that_never_was(tmp_path: Path, entry: Path, version: object) -> None:
    rewrite(entry, lambda content: content.update(format_version=version))
    with pytest.raises(FormatVersionError, match="use the code that wrote it"):
        manifest.find_done(tmp_path, entry.stem)


def test_a_damaged_version_is_damage(tmp_path: Path, entry: Path) -> None:
    """Its checksum does not fit, so the run counts as not done."""
    entry.write_text(entry.read_text().replace('"format_version": 1', '"format_version": 2'))
    assert manifest.find_done(tmp_path, entry.stem) is None


def test_rows_of_a_newer_version(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, [])
    assert read_results(path) == ([], [])
    path.write_text(f"# format_version=1\n{path.read_text()}")
    assert read_results(path) == ([], [])
    path.write_text("# format_version=2\na,b\n1,2\n")
    assert read_results(path, "rows.csv") == ([], [f"rows.csv, line 1: format version 2, {NEWER}"])


def save(folder: Path, step: int) -> Path:
    return save_checkpoint(folder, step, {"student": {"weight": torch.zeros(2)}}, {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(format=3), "format version 3, .*written by newer code"),
        (lambda content: content.update(format=1), "format version 1, .*the code that wrote it"),
        (lambda content: content.pop("format"), "format version 1, .*the code that wrote it"),
    ],
)
def test_checkpoints_of_another_version(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    """Not passed over for an older one, nor set aside as bad: no work is lost in silence."""
    save(tmp_path, 1)
    other = save(tmp_path, 2)
    rewrite(other / "state.json", change)
    with pytest.raises(FormatVersionError, match=words):
        load_latest(tmp_path)
    with pytest.raises(FormatVersionError, match=words):
        save(tmp_path, 2)
    found = inspect_checkpoints(tmp_path, repair=True)
    assert found.good == 1 and len(found.problems) == 1
    assert other in list_checkpoints(tmp_path)
