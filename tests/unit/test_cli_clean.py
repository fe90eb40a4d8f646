"""`clean` shows what nothing needs any more, and removes that only, with --yes."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import write_commands
from typer.testing import CliRunner

import run_stage
from pipeline import attempts, manifest
from stages.commands.reproduction import all_runs

OLD = 1e9
Clean = Callable[..., str]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run root with a finished and a begun run of mini, one nobody asks for, and leftovers;
    all of it old.
    """
    root = tmp_path / "runs"
    runs = {run.name: run for run in all_runs("mini")}
    done, begun = runs["pretrain"], runs["digits"]
    for step in (10, 20, 30):
        place(done.run_dir(root) / "checkpoints" / f"step_{step:08d}" / "x.safetensors")
    place(done.run_dir(root) / "checkpoints/bad_step_00000005/x.safetensors")
    finish(root, done.run_id, done.name, place(done.run_dir(root) / "weights/teacher.safetensors"))
    place(begun.run_dir(root) / "train.beton")
    place(begun.run_dir(root) / ".train.beton.01234567.tmp")
    place(root / "pretrain/mine-0123456789ab/checkpoints/step_00000010/x.safetensors")
    finish(
        root,
        "ba9876543210",
        "custom",
        place(root / "pretrain/custom-ba9876543210/teacher.safetensors"),
    )
    place(root / "manifest" / f".x.json.{'0' * 32}")
    place(root / "notes/of-0123456789ab/mine.txt")
    for path in (*root.rglob("*"), root):
        os.utime(path, (OLD, OLD))
    return root


def place(path: Path) -> Path:
    """A file of 1000 bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(1000))
    return path


def finish(root: Path, run_id: str, name: str, output: Path) -> None:
    """Record a pretraining with one output."""
    manifest.record_entry(
        root,
        manifest.ManifestEntry(
            stage="pretrain",
            name=name,
            run_id=run_id,
            outputs={"teacher": manifest.describe_output(root, output)},
        ),
    )


@pytest.fixture
def clean(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clean:
    """The command, on a machine without Slurm."""
    monkeypatch.setenv("PATH", "/nowhere")

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(
            run_stage.app, ["clean", "mini", "--run-root", str(root), *arguments]
        )
        assert result.exit_code == 0, result.exception
        return result.output

    return call


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_what_nothing_needs_is_shown_and_with_yes_removed(clean: Clean, root: Path) -> None:
    before = files(root)
    shown = clean()
    assert files(root) == before
    assert "6000 bytes in 6 places; --yes removes them" in shown, shown
    assert (
        "mine-0123456789ab: no reproduction asks for it" in shown
        and "step_00000020: its run is done" in shown
    )
    assert "6000 bytes removed" in clean("--yes")
    kept = files(root)
    assert kept <= before
    gone = {
        name.split("/")[-2] if "step_" in name else name.split("/")[-1] for name in before - kept
    }
    assert gone == {
        "step_00000010",
        "step_00000020",
        "bad_step_00000005",
        ".train.beton.01234567.tmp",
        f".x.json.{'0' * 32}",
    }
    assert "0 bytes in 0 places" in clean()
    for word in (
        "step_00000030",
        "teacher.safetensors",
        "train.beton",
        "custom-ba9876543210",
        "notes/of",
    ):
        assert any(word in name for name in kept), word


def test_what_is_asked_for_by_another_reproduction_stays(
    clean: Clean, root: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("name: o\nruns:\n  mine: {stage: convert, dataset: mine, num_classes: 2}\n")
    (run,) = all_runs(str(other))
    path = place(run.run_dir(root) / "train.beton")
    for each in (path, path.parent):
        os.utime(each, (OLD, OLD))
    assert run.run_id in clean() and run.run_id not in clean("--also", str(other), "--yes")
    assert path.exists()


def test_what_changed_lately_stays(clean: Clean, root: Path) -> None:
    place(root / "pretrain/mine-0123456789ab/logs/new.log")
    assert "stays: " in clean("--yes")
    assert (root / "pretrain/mine-0123456789ab/checkpoints/step_00000010").exists()


def test_what_may_be_queued_or_is_stays(
    clean: Clean, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root / "pretrain/mine-0123456789ab"
    submit(folder, "12")
    assert "may be job 12 of a cluster" in clean("--yes")
    commands = {"sbatch": "exit 1", "squeue": f"cat {tmp_path}/queue"}
    monkeypatch.setenv("PATH", write_commands(tmp_path / "bin", **commands))
    (tmp_path / "queue").write_text("12|mugs-0123456789ab|PENDING|Priority|(null)|(null)\n")
    assert "is job 12, PENDING" in clean("--yes")
    assert folder.exists()
    (tmp_path / "queue").write_text("")
    clean("--yes")
    assert not folder.exists()


def submit(folder: Path, job: str | None = None) -> None:
    """What a submission leaves in a run's folder, long ago;
    without a job one that died after it called sbatch.
    """
    (folder / "submission.sh").touch()
    if job:
        (folder / "job.json").write_text(json.dumps({"job_id": job}))
    for each in (*folder.rglob("*"), folder):
        os.utime(each, (OLD, OLD))


def test_where_slurm_gives_no_answer_only_what_was_submitted_stays(
    clean: Clean, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = {"sbatch": "exit 1", "squeue": "echo 'squeue: error: no cluster here' >&2; exit 1"}
    monkeypatch.setenv("PATH", write_commands(tmp_path / "bin", **commands))
    sent, died = root / "pretrain/sent-aaaaaaaaaaaa", root / "pretrain/died-bbbbbbbbbbbb"
    for folder, job in ((sent, "12"), (died, None)):
        place(folder / "x.bin")
        submit(folder, job)
    (done,) = (run.run_dir(root) for run in all_runs("mini") if run.name == "pretrain")
    submit(done, "11")
    said = clean("--yes")
    assert (
        f"stays: {sent}: may be job 12 of a cluster: "
        "cannot ask the queue: squeue: error: no cluster here" in said
    )
    assert f"stays: {died}: may be job ? of a cluster" in said and sent.exists() and died.exists()
    assert not (root / "pretrain/mine-0123456789ab").exists(), "it was never submitted"
    assert not (done / "checkpoints/step_00000020").exists(), "its run is done"


@pytest.mark.parametrize(("job", "stays"), [("12", False), ("13", True), (None, True)])
def test_only_the_last_job_can_give_a_run_up(
    clean: Clean, root: Path, job: str | None, stays: bool
) -> None:
    folder = root / "pretrain/mine-0123456789ab"
    attempts.record_failure(
        folder, attempts.start_attempt(folder, job_id="12"), error="no luck", log=folder / "log"
    )
    attempts.record_no_retry(folder, 1, "3 attempts failed")
    submit(folder, job)
    clean("--yes")
    assert folder.exists() == stays


def test_an_entry_that_cannot_be_read_protects_its_run(clean: Clean, root: Path) -> None:
    manifest.entry_path(root, "ba9876543210").write_text("{")
    clean("--yes")
    assert (root / "pretrain/custom-ba9876543210/teacher.safetensors").exists()


def test_checkpoints_that_are_kept_for_good_stay(clean: Clean, root: Path) -> None:
    run = next(run for run in all_runs("mini") if run.name == "pretrain")
    entry = manifest.read_entry(root, run.run_id)
    manifest.record_entry(root, entry.model_copy(update={"config": {"keep_every_epochs": 1}}))
    clean("--yes")
    assert len(list((run.run_dir(root) / "checkpoints").iterdir())) == 4


def test_links_are_not_followed(clean: Clean, root: Path, tmp_path: Path) -> None:
    outside = place(tmp_path / "outside/x.bin")
    (root / "pretrain/link-abcdefabcdef").symlink_to(outside.parent)
    (root / "pretrain/mine-0123456789ab/data").symlink_to(outside.parent)
    os.utime(root / "pretrain/mine-0123456789ab/data", (OLD, OLD), follow_symlinks=False)
    os.utime(root / "pretrain/mine-0123456789ab", (OLD, OLD))
    clean("--yes")
    assert outside.exists() and (root / "pretrain/link-abcdefabcdef").is_symlink()
    assert not (root / "pretrain/mine-0123456789ab").exists()
