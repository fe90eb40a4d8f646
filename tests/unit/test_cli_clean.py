"""`clean` shows what nothing needs any more, and moves that only to the trash, with --yes."""

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from commands import write_commands
from typer.testing import CliRunner

import run_stage
from pipeline import attempts, manifest, runfile
from pipeline.run_root import MARKER
from pipeline.spec import ConfigError, StageRun
from slurm.shared.queue import list_job_names
from stages.commands.clean import NeededPaths, clean_run_root
from stages.commands.reproduction import all_runs
from stages.commands.trash import Trash

OLD = 1e9
Clean = Callable[..., str]


@cache
def cached_runs(name: str) -> list[StageRun]:
    """The runs of a reproduction: planning all bundled ones takes seconds."""
    return all_runs(name)


@pytest.fixture(autouse=True)
def plan_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan each reproduction once for all tests."""
    monkeypatch.setattr(
        "stages.commands.clean.all_runs",
        lambda name, overrides=None, seeds=None: (
            all_runs(name, overrides, seeds) if overrides or seeds else [*cached_runs(name)]
        ),
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run root with a finished and a begun run of mini, one nobody asks for, and leftovers;
    all of it old.
    """
    root = tmp_path / "runs"
    runs = {run.name: run for run in cached_runs("mini")}
    done, begun = runs["pretrain"], runs["digits"]
    for step in (10, 20, 30):
        place(done.run_dir(root) / "checkpoints" / f"step_{step:08d}" / "x.safetensors")
    place(done.run_dir(root) / "checkpoints/bad_step_00000005/x.safetensors")
    finish(root, done.run_id, done.name, place(done.run_dir(root) / "weights/teacher.safetensors"))
    place(begun.run_dir(root) / "train.beton")
    place(begun.run_dir(root) / ".train.beton.01234567.tmp")
    for run in (done, begun):
        runfile.write_run_file(root, run)
    begin(root / "pretrain/mine-0123456789ab")
    place(root / "pretrain/mine-0123456789ab/weights.bin")
    finish(
        root,
        "ba9876543210",
        "custom",
        place(root / "pretrain/custom-ba9876543210/teacher.safetensors"),
    )
    place(root / "manifest/.0123456789ab.json.01234567.tmp")
    place(root / f"code-{os.geteuid()}/.0123456789ab.01234567.tmp/pipeline/x.py")
    place(root / "notes/of-0123456789ab/mine.txt")
    for path in (*root.rglob("*"), root):
        os.utime(path, (OLD, OLD))
    return root


def begin(folder: Path) -> None:
    """Write the head of the file that makes a folder a run, which nobody asks for."""
    name, _, run_id = folder.name.rpartition("-")
    folder.mkdir(parents=True, exist_ok=True)
    text = f"stage: {folder.parent.name}\nname: {name}\nrun_id: {run_id}\n"
    (folder / runfile.FILE_NAME).write_text(text)


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

    def call(*arguments: str, root: Path = root) -> str:
        result = CliRunner().invoke(
            run_stage.app, ["clean", "mini", "--run-root", str(root), *arguments]
        )
        assert result.exit_code == 0, result.exception
        return result.output

    return call


def files(root: Path) -> set[str]:
    """All files outside the trash."""
    found = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if not path.parts[0].startswith(".trash")}


def done_key() -> str:
    """Folder name of the finished pretraining."""
    (key,) = (run.key for run in cached_runs("mini") if run.name == "pretrain")
    return key


def test_what_nothing_needs_is_shown_and_with_yes_moved_to_the_trash(
    clean: Clean, root: Path
) -> None:
    before = files(root)
    shown = clean()
    assert files(root) == before
    size = 1000 + (root / "pretrain/mine-0123456789ab/config.yaml").stat().st_size
    assert f"{6000 + size} bytes in 7 places; --yes moves them" in shown, shown
    assert (
        "mine-0123456789ab: no reproduction asks for it" in shown
        and "step_00000020: its run is done" in shown
    )
    said = clean("--yes", "--checkpoints", done_key())
    assert f"{6000 + size} bytes moved to the trash" in said
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
        ".0123456789ab.json.01234567.tmp",
        "x.py",
        "weights.bin",
        "config.yaml",
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


def test_what_is_in_the_trash_comes_back_with_a_move_and_is_deleted_when_old(
    clean: Clean, root: Path
) -> None:
    clean("--yes")
    (moved,) = root.glob(".trash-*/*")
    assert (moved / "pretrain/mine-0123456789ab/weights.bin").stat().st_size == 1000
    assert moved.stat().st_mode & 0o077 == 0, "nobody else reads or changes it"
    assert "in the trash" not in clean("--yes") and moved.exists()
    os.utime(moved, (OLD, OLD))
    assert "in the trash for more than 7 days" in clean() and moved.exists()
    assert "; deleted" in clean("--yes") and not moved.exists()


def test_the_trash_can_be_emptied_at_once(clean: Clean, root: Path) -> None:
    clean("--yes", "--empty-trash")
    assert not list(root.glob(".trash-*/*"))
    assert not (root / "pretrain/mine-0123456789ab").exists()


def test_checkpoints_go_only_if_their_run_is_named(clean: Clean, root: Path) -> None:
    begin(root / "pretrain/other-aaaaaaaaaaaa")
    place(root / "pretrain/other-aaaaaaaaaaaa/checkpoints/step_00000010/x.safetensors")
    for path in (root / "pretrain/other-aaaaaaaaaaaa").rglob("*"):
        os.utime(path, (OLD, OLD))
    os.utime(root / "pretrain/other-aaaaaaaaaaaa", (OLD, OLD))
    said = clean("--yes")
    assert "--checkpoints other-aaaaaaaaaaaa removes them" in said
    assert (root / "pretrain/other-aaaaaaaaaaaa/checkpoints/step_00000010").exists()
    assert len(list(root.glob(f"pretrain/{done_key()}/checkpoints/*"))) == 4
    clean("--yes", "--checkpoints", "other-aaaaaaaaaaaa")
    assert not (root / "pretrain/other-aaaaaaaaaaaa").exists()
    assert len(list(root.glob(f"pretrain/{done_key()}/checkpoints/*"))) == 4


def test_a_name_that_holds_no_unneeded_checkpoints_is_refused(root: Path) -> None:
    call = ["clean", "mini", "--run-root", str(root), "--yes", "--checkpoints", "digits"]
    result = CliRunner().invoke(run_stage.app, call)
    assert result.exit_code != 0
    assert "expected the folder name of a run" in str(result.exception)
    assert (root / "pretrain/mine-0123456789ab").exists()


# Folders that nobody made a run root, as people have them: files, and links (name -> target).
UUID = "0b5d9f0e-7c3a-4d8f-9f3e-0123456789ab"
RUN = "knn/a-0123456789ab"
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "empty": (),
    "home": (".bashrc", ".cache/pip/x", ".ssh/id", "convert/notes.txt", f"mugs-runs/{RUN}/x"),
    "root of the system": ("etc/passwd", "usr/bin/sh", "tmp/.x.01234567.tmp", f"home/me/{RUN}/x"),
    "features": (f"features/{UUID}/x.bin",),
    "photographs": ("import/photos-20240131abcd/1.jpg", "import/photos-20240131abcd/2.jpg"),
    "backup": (".backup.tmp", f".cache.{'0' * 32}"),
    "data": ("train/n01/1.jpg", "val/n01/1.jpg", f"{RUN}/labels.csv"),
    "temporary": (".x.01234567.tmp", "manifest/.x.json.01234567.tmp", "code/.y.01234567.tmp"),
    "checkout": ("stages/knn.py", "pipeline/files.py", ".git/HEAD", "results/published/a/rows.csv"),
    "environment": ("bin/python", "lib/python3.11/site-packages/x.py", "pyvenv.cfg"),
    "another program": (f"pretrain/resnet-0123456789ab/checkpoints/step_{1:08d}/x.pt", "x.log"),
    "logs": ("slurm-12.out", "job.json", "submission.sh", "logs/attempt_0001_rank0.log"),
    "published": ("rows.csv", "runs.json", "tables/table1.md"),
    "configurations": (f"{RUN}/config.yaml", "knn/config.yaml", "config.yaml"),
    "manifest of another program": ("manifest/0123456789ab.json", "manifest/a.json"),
    "copies": (f"copy/{RUN}/config.yaml", "copy/.mugs-run-root", "copy/manifest/x.json"),
    "trash": (".Trash-1000/files/x", ".trash/20200101T000000-01234567/pretrain/x/w.bin"),
    "links": ("pretrain -> RUNS/pretrain", "manifest -> RUNS/manifest", "all -> RUNS"),
    "links to itself": ("pretrain -> .", "knn -> knn", "linear/a-0123456789ab -> ../.."),
    "links to runs": ("pretrain/x -> x", "pretrain/mine-0123456789ab -> RUNS/MINE"),
    "a marker that is a folder": (f"{MARKER}/x", f"{RUN}/x"),
    "a marker that leads nowhere": (f"{MARKER} -> nowhere", f"{RUN}/x"),
}
MARKS_ITSELF = [name for name in ELSEWHERE if "marker" in name]


def make_elsewhere(folder: Path, name: str, runs: Path) -> None:
    """Make such a folder, all of it old."""
    folder.mkdir()
    for text in ELSEWHERE[name]:
        file, _, target = text.partition(" -> ")
        if target:
            path = folder / file
            path.parent.mkdir(exist_ok=True, parents=True)
            path.symlink_to(
                target.replace("RUNS", str(runs)).replace("MINE", "pretrain/mine-0123456789ab")
            )
        else:
            place(folder / file)


def make_old(folder: Path) -> None:
    """Let all in a folder have changed long ago."""
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (OLD, OLD), follow_symlinks=False)


def tree(folder: Path) -> dict[str, str | bytes]:
    """Files with their contents, and links with what they lead to."""
    found: dict[str, str | bytes] = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file():
            found[str(path)] = path.read_bytes()
    return found


def clean_all(folder: Path, **options: bool) -> list[str]:
    """What the command says, called for no reproduction: none of the runs would be kept."""
    return list(clean_run_root(folder, set(), lambda folders: {}, **options))


@pytest.mark.parametrize("name", ELSEWHERE)
def test_nothing_is_removed_where_no_run_root_is(root: Path, tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    make_elsewhere(elsewhere, name, root)
    make_old(elsewhere)
    before = tree(tmp_path)
    for options in ({"yes": False}, {"yes": True}, {"yes": True, "empty_trash": True}):
        with pytest.raises(ConfigError, match=f"{elsewhere}: is not a run root, nothing is remov"):
            clean_all(elsewhere, **options)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", [name for name in ELSEWHERE if name not in MARKS_ITSELF])
def test_what_was_never_a_run_stays_also_in_a_run_root(
    root: Path, tmp_path: Path, name: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    make_elsewhere(elsewhere, name, root)
    (elsewhere / MARKER).touch()  # by a `run` in it, say
    make_old(elsewhere)
    before = tree(tmp_path)
    said = clean_all(elsewhere, yes=True)
    assert tree(tmp_path) == before
    assert "0 bytes moved to the trash" in said[-1]
    for line in said[:-1]:
        assert line.startswith("stays: ") and "is no run: it has no config.yaml of this" in line


@pytest.mark.parametrize(
    "place_", ["{root}/pretrain", "{root}/manifest", "{root}/..", "{root}/nothing", "{file}"]
)
def test_neither_is_a_part_of_a_run_root_one_nor_what_is_around_it(
    root: Path, tmp_path: Path, place_: str
) -> None:
    file = place(tmp_path / "file")
    before = tree(tmp_path)
    path = Path(place_.format(root=root, file=file))
    with pytest.raises(ConfigError, match="is not a run root, nothing is removed"):
        clean_all(path, yes=True)
    assert tree(tmp_path) == before


def test_the_run_file_of_another_run_makes_no_run(clean: Clean, root: Path) -> None:
    begin(root / "pretrain/mine-0123456789ab")
    (root / "pretrain/mine-0123456789ab").rename(root / "pretrain/copy-0123456789ab")
    assert "copy-0123456789ab: is no run: it has no config.yaml" in clean("--yes")
    assert (root / "pretrain/copy-0123456789ab").exists()


def test_what_is_asked_for_by_another_reproduction_stays(
    clean: Clean, root: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("name: o\nruns:\n  mine: {stage: convert, dataset: mine, num_classes: 2}\n")
    (run,) = all_runs(str(other))
    path = place(run.run_dir(root) / "train.beton")
    for each in (path, runfile.write_run_file(root, run) / runfile.FILE_NAME, path.parent):
        os.utime(each, (OLD, OLD))
    assert run.run_id in clean() and run.run_id not in clean("--also", str(other), "--yes")
    assert path.exists()


def test_what_changed_lately_stays(clean: Clean, root: Path) -> None:
    place(root / "pretrain/mine-0123456789ab/logs/new.log")
    assert "stays: " in clean("--yes")
    assert (root / "pretrain/mine-0123456789ab/weights.bin").exists()


def test_what_may_be_queued_or_is_stays(
    clean: Clean, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root / "pretrain/mine-0123456789ab"
    submit(folder, "12")
    assert "may be job 12 of a cluster" in clean("--yes")
    commands = {"sbatch": "exit 1", "squeue": f"cat {tmp_path}/queue"}
    monkeypatch.setenv("PATH", write_commands(tmp_path / "bin", **commands))
    for name in list_job_names(folder):
        (tmp_path / "queue").write_text(
            f"12|{name}|PENDING|Priority|(null)|{os.geteuid()}|(null)|(null)\n"
        )
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
        begin(folder)
        submit(folder, job)
    (done,) = (run.run_dir(root) for run in cached_runs("mini") if run.name == "pretrain")
    submit(done, "11")
    said = clean("--yes", "--checkpoints", done.name)
    assert (
        f"stays: {sent}: may be job 12 of a cluster: "
        "cannot ask for the queue: squeue: error: no cluster here" in said
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
    run = next(run for run in cached_runs("mini") if run.name == "pretrain")
    entry = manifest.read_entry(root, run.run_id)
    manifest.record_entry(root, entry.model_copy(update={"config": {"keep_every_epochs": 1}}))
    assert "its run is done" not in clean()


def test_links_are_not_followed(clean: Clean, root: Path, tmp_path: Path) -> None:
    outside = place(tmp_path / "outside/x.bin")
    (root / "pretrain/link-abcdefabcdef").symlink_to(outside.parent)
    (root / "pretrain/mine-0123456789ab/data").symlink_to(outside.parent)
    os.utime(root / "pretrain/mine-0123456789ab/data", (OLD, OLD), follow_symlinks=False)
    os.utime(root / "pretrain/mine-0123456789ab", (OLD, OLD))
    clean("--yes", "--empty-trash")
    assert outside.exists() and (root / "pretrain/link-abcdefabcdef").is_symlink()
    assert not (root / "pretrain/mine-0123456789ab").exists()


def test_a_link_instead_of_a_folder_leads_nowhere(clean: Clean, root: Path, tmp_path: Path) -> None:
    """The runs of another run root, and the checkpoints of a training elsewhere, stay."""
    other = tmp_path / "other"
    (root / "pretrain").rename(other)
    (root / "pretrain").symlink_to(other)
    before = files(other)
    said = clean("--yes")
    assert files(other) == before and str(root / "pretrain") not in said
    (root / "pretrain").unlink()
    (root / "pretrain").mkdir()
    (root / "pretrain" / done_key()).symlink_to(other / done_key())
    assert "its run is done" not in clean("--yes") and files(other) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives files to another user")
@pytest.mark.parametrize("whose", ["", "config.yaml"])
def test_what_is_another_users_stays(clean: Clean, root: Path, whose: str) -> None:
    os.chown(root / "pretrain/mine-0123456789ab" / whose, 4321, 4321)
    os.chown(root / "manifest/.0123456789ab.json.01234567.tmp", 4321, 4321)
    os.chown(root / "pretrain" / done_key(), 4321, 4321)
    before = files(root)
    said = clean("--yes")
    ours = (".train.beton.01234567.tmp", "x.py")
    assert files(root) == {name for name in before if not name.endswith(ours)}
    assert "belongs to user 4321" in said and "its run is done" not in said


def test_removing_does_not_follow_a_link_that_came_meanwhile(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (root / "pretrain").rename(outside)
    (root / "pretrain").symlink_to(outside)
    with pytest.raises(OSError, match="pretrain"):
        Trash(root).move(root / "pretrain/mine-0123456789ab")
    assert (outside / "mine-0123456789ab").is_dir()


def test_thousands_of_finished_runs_are_not_compared_in_pairs() -> None:
    outputs = [Path(f"/runs/features/a{number}-0123456789ab/x") for number in range(300)]
    needed = NeededPaths(outputs)
    assert all(needed.overlap(path.parent) and needed.overlap(path / "y") for path in outputs)
    assert not any(needed.overlap(path.parent / "z") for path in outputs)
