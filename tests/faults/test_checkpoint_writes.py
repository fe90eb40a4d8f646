"""Small versions of the campaign on cut-short writes; `make chaos` runs it at full size."""

import errno
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from campaign_writes import NEW, OLD, WAYS, boundaries, calls_of_a_save, kills, prepared
from checkpoint_cases import loaded_step, names, only, save
from outcome import Outcome
from shim import Crash, dead_after, intercepted

from mugs.checkpoint import record
from mugs.checkpoint.record import checkpoint_name
from mugs.checkpoint.repair import inspect_checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_save_cut_short_after_any_call_leaves_old_or_new(tmp_path: Path, way: str) -> None:
    outcome = Outcome(way)
    boundaries(outcome, tmp_path, way)
    assert outcome.trials > 30 and outcome.complaints == []


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    outcome = Outcome("kills")
    kills(outcome, tmp_path, 20)
    assert outcome.trials == 20 and outcome.complaints == []


def test_a_save_without_its_rename_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Instead of beside it and renamed, the new file is written where it is read.
    monkeypatch.setattr(
        "mugs.checkpoint.save_load.replace_atomically", lambda path, *_: nullcontext(path)
    )
    outcome = Outcome("in place")
    boundaries(outcome, tmp_path, "raise")
    assert outcome.complaints


def test_everything_is_flushed_before_it_gets_its_name(tmp_path: Path) -> None:
    calls = [name for name, _ in calls_of_a_save(tmp_path)]
    renamed = calls.index("replace")
    writes = [i for i, name in enumerate(calls) if name == "write"]
    opens = [i for i, name in enumerate(calls[:renamed]) if name == "open"][
        1:
    ]  # after the check for room
    assert max(writes) < renamed and calls[renamed + 1] == "fsync", (
        "the parent folder, after the rename"
    )
    for first, last in zip(opens, [*opens[1:], renamed], strict=True):
        assert "fsync" in calls[first:last], "each file, before the next"
    assert calls[renamed - 1] == "fsync", "the folder itself, last"
    assert calls.index("rename") > renamed, "an old one goes after the new one is there"


def test_a_dead_process_removes_nothing(tmp_path: Path) -> None:
    """The shim itself: after a crash no clean-up happens, so the leftover is there."""
    prepared(tmp_path)
    with pytest.raises(Crash), intercepted(dead_after(10)):
        save(tmp_path, NEW)
    assert loaded_step(tmp_path) == OLD
    assert [p.name for p in tmp_path.iterdir() if p.name not in only(2, OLD)] != []


def test_what_the_disk_could_not_read_is_not_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (OLD, NEW):
        save(tmp_path, step)
    plain = record.hash_file

    def stumble(path: Path) -> str:
        if path.parent.name == checkpoint_name(NEW):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return plain(path)

    monkeypatch.setattr(record, "hash_file", stumble)
    found = inspect_checkpoints(tmp_path, repair=True)
    assert (found.good, found.repaired) == (1, [])
    assert found.problems[0].endswith("may be good, so it stays"), found.problems
    monkeypatch.undo()
    assert loaded_step(tmp_path) == NEW and names(tmp_path) == only(OLD, NEW)
    (tmp_path / checkpoint_name(NEW) / "student.safetensors").write_bytes(b"damaged")
    assert len(inspect_checkpoints(tmp_path, repair=True).repaired) == 1
