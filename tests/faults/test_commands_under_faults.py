"""Small versions of the campaigns that call all commands: damaged records, a disk that stumbles,
and kills.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import campaign_kills
import campaign_records
import campaign_stumbles
import pytest
from called import call, fast_surroundings
from campaign_stumbles import find_lost, read_tree
from commands_of_users import Stage
from outcome import Outcome

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def fast() -> Iterator[None]:
    """Plan the bundled reproductions once."""
    with fast_surroundings():
        yield


def test_damaged_records_stop_no_command_and_change_no_other_run(tmp_path: Path) -> None:
    outcome = Outcome("records")
    campaign_records.play(outcome, tmp_path, 4, seed=3, draw=0)
    assert outcome.trials == 4 and outcome.complaints == []


def test_a_disk_that_stumbles_loses_nothing(tmp_path: Path) -> None:
    outcome = Outcome("stumbles")
    names = (
        "status --json",
        "verify",
        "verify --repair",
        "clean --yes",
        "tables --publish",
        "export",
    )
    campaign_stumbles.play(outcome, tmp_path, 1, seed=7, names=names)
    assert outcome.trials == len(names) and outcome.complaints == []


def test_a_killed_command_called_again_makes_the_same(tmp_path: Path) -> None:
    outcome = Outcome("kills")
    campaign_kills.play(outcome, tmp_path, 1, seed=5, draw=False)
    assert outcome.trials == 4 and outcome.complaints == []


def test_a_traceback_a_hang_and_a_loss_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("no such thing")

    def wait(*_: Any, **__: Any) -> None:
        while True:
            pass

    arguments = ("verify", stage.scene.reproduction, "--run-root", stage.scene.root)
    for function, words in ((fail, "no such thing"), (wait, "no answer in 0.2 s")):
        monkeypatch.setattr("stages.commands.verify.verify_runs", function)
        assert words in call(*arguments, limit_s=0.2).complaint
    monkeypatch.undo()
    with stage.copied() as scene:
        before = read_tree(scene.folder)
        lost = next(scene.root.glob("pretrain/later-*/config.yaml"))
        lost.unlink()
        assert find_lost(before, read_tree(scene.folder)) == [
            lost.relative_to(scene.folder).as_posix()
        ]


def test_another_run_that_changes_would_be_noticed(tmp_path: Path) -> None:
    campaign = campaign_records.Records(tmp_path)
    with campaign.stage.copied() as scene:
        next(scene.root.glob("manifest/" + scene.runs()["knn"].run_id + ".json")).unlink()
        after = campaign_records.Seen(scene)
        found = campaign_records.compare(scene, campaign.before, after, Path("pretrain/later-x"))
    assert any("the cell of knn changed" in line for line in found)
    assert any(line.startswith("status --json: ") for line in found)
