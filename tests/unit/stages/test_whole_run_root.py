"""What `status` without a name remembers of a run root, and when it reads a file again."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import config, runfile
from pipeline.plan import build_plan
from pipeline.spec import StageRun
from stages import STAGES
from stages.commands import whole_run_root
from stages.commands.whole_run_root import UnreadConfig, list_namesakes, load_all_runs


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[StageRun]:
    """The runs of a reproduction, whose files were written an hour ago."""
    monkeypatch.setenv("MUGS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(whole_run_root, "SETTLED_NS", -(10**12))
    planned = build_plan(config.load_reproduction("mini", STAGES, ["pretrain.epochs=3"]))[:4]
    for run in planned:
        runfile.write_run_file(tmp_path / "root", run)
    return planned


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of the files that were read, from now on."""
    seen: list[str] = []
    before = runfile.read_run_file

    def note(folder: Path) -> runfile.RunFile:
        seen.append(folder.name)
        return before(folder)

    monkeypatch.setattr(whole_run_root.runfile, "read_run_file", note)
    return seen


def test_files_are_read_once(runs: list[StageRun], read: list[str], tmp_path: Path) -> None:
    first = load_all_runs(tmp_path / "root", ())
    assert sorted(read) == sorted(run.key for run in runs)
    read.clear()
    second = load_all_runs(tmp_path / "root", ())
    assert read == []
    assert second == first
    found, lines, problems = second
    assert problems == []
    assert {run.key: (run.needs, run.resources, run.entrypoint) for run in found} == {
        run.key: (run.needs, run.resources, run.entrypoint) for run in runs
    }
    assert any("epochs=3" in line for line in lines)


def test_settings_that_were_not_read_have_no_values(runs: list[StageRun], tmp_path: Path) -> None:
    found, _, _ = load_all_runs(tmp_path / "root", ["pretrain"])
    assert [type(run.config) for run in found] == [UnreadConfig]
    with pytest.raises(AttributeError, match="epochs"):
        found[0].config.epochs  # type: ignore[attr-defined]  # noqa: B018


def rewrite(folder: Path, run: StageRun) -> None:
    runfile.write_run_file(folder / "root", replace(run, needs={**run.needs, "more": "0" * 12}))


def damage(folder: Path, run: StageRun) -> None:
    os.truncate(run.run_dir(folder / "root") / "config.yaml", 50)


def touch(folder: Path, run: StageRun) -> None:
    os.utime(run.run_dir(folder / "root") / "config.yaml", (1e9, 1e9))


def remove(folder: Path, run: StageRun) -> None:
    (run.run_dir(folder / "root") / "config.yaml").unlink()


@pytest.mark.parametrize(
    ("change", "again", "problems"),
    [(rewrite, 1, 0), (damage, 1, 1), (touch, 1, 0), (remove, 0, 1)],
)
def test_a_changed_file_is_read_again(
    change: Callable[[Path, StageRun], None],
    again: int,
    problems: int,
    runs: list[StageRun],
    read: list[str],
    tmp_path: Path,
) -> None:
    load_all_runs(tmp_path / "root", ())
    read.clear()
    change(tmp_path, runs[1])
    found, lines, unreadable = load_all_runs(tmp_path / "root", ())
    assert read == [runs[1].key] * again
    assert len(found) == len(lines) == len(runs) - problems
    assert len(unreadable) == problems
    if change is rewrite:
        assert {"more": "0" * 12}.items() <= dict(
            next(run.needs for run in found if run.key == runs[1].key)
        ).items()


def use_other_defaults(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_run_root, "_hash_defaults", lambda: "others")


def damage_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = (folder / "cache/run_roots").iterdir()
    os.truncate(path, path.stat().st_size // 2)


def use_another_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUGS_CACHE_DIR", str(folder / "other"))


@pytest.mark.parametrize("change", [use_other_defaults, damage_memory, use_another_folder])
def test_a_memory_that_does_not_count(
    change: Callable[[Path, pytest.MonkeyPatch], None],
    runs: list[StageRun],
    read: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = load_all_runs(tmp_path / "root", ())
    read.clear()
    change(tmp_path, monkeypatch)
    assert load_all_runs(tmp_path / "root", ()) == first
    assert len(read) == len(runs)


def test_a_file_that_may_still_change_is_not_remembered(
    runs: list[StageRun], read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_run_root, "SETTLED_NS", 10**9 * 3600)
    for _ in range(2):
        load_all_runs(tmp_path / "root", ())
    assert len(read) == 2 * len(runs)


def test_what_was_submitted_need_not_be_read(
    runs: list[StageRun], read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    whole_run_root.remember_runs(root, runs[:3])
    # Nor a moment later, when files that are read would not be remembered yet.
    monkeypatch.setattr(whole_run_root, "SETTLED_NS", 10**9 * 3600)
    for _ in range(2):
        load_all_runs(root, ())
    assert read == [runs[3].key] * 2
    remembered = load_all_runs(root, ())
    monkeypatch.setattr(whole_run_root, "_hash_defaults", lambda: "others")
    assert load_all_runs(root, ()) == remembered
    assert sorted(read[-4:]) == sorted(run.key for run in runs)


def test_a_file_written_again_after_its_submission_is_read(
    runs: list[StageRun], read: list[str], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    whole_run_root.remember_runs(root, runs)
    path = runs[0].run_dir(root) / runfile.FILE_NAME
    before = path.stat()
    runfile.write_run_file(root, runs[0])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    load_all_runs(root, ())
    assert read == [runs[0].key]


def test_defaults_have_the_same_hash_in_every_process() -> None:
    assert "0x" not in repr(whole_run_root._list_defaults())


def test_a_forgotten_setting_is_named(runs: list[StageRun], tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert list_namesakes(runs, root) == []
    others = build_plan(config.load_reproduction("mini", STAGES))
    (line,) = list_namesakes(others[:4], root)
    ids = {run.run_id for run in runs}
    changed = [other.name for other in others[:4] if other.run_id not in ids]
    assert changed and line.startswith(f"note: {', '.join(changed)} not begun with these settings")
    assert list_namesakes(others, tmp_path / "none") == []
