"""A finished run remembers what it read; another file or folder in its place is told."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.inputs import find_changed_inputs, record_inputs
from pipeline.manifest import ManifestEntry, record_entry
from pipeline.settings import InputPath, RequiredAtRun, Settings
from stages.commands.reproduction import list_changed_inputs, load_selection


@dataclass(frozen=True, kw_only=True)
class Part(Settings):
    list_file: InputPath[str | None] = None


@dataclass(frozen=True, kw_only=True)
class Reader(Settings):
    file: RequiredAtRun[str | None] = None
    folder: RequiredAtRun[str | None] = None
    part: Part = field(default_factory=Part)


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    (tmp_path / "data").mkdir()
    for name in ("w.pth", "list.txt"):
        (tmp_path / name).write_text(name)
    return Reader(
        file=str(tmp_path / "w.pth"),
        folder=str(tmp_path / "data"),
        part=Part(list_file=str(tmp_path / "list.txt")),
    )


def done(settings: Settings) -> ManifestEntry:
    provenance = {"inputs": record_inputs(settings)}
    return ManifestEntry(stage="x", name="x", run_id="x", provenance=provenance)


def rewrite(tmp_path: Path) -> Reader:
    """The same length at the same time, which a look at the file's facts alone would miss."""
    path = tmp_path / "w.pth"
    before = path.stat()
    path.write_text("W.PTH")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    return Reader(file=str(path))


def copy(tmp_path: Path) -> Reader:
    (tmp_path / "moved.pth").write_text("w.pth")
    return Reader(file=str(tmp_path / "moved.pth"))


def change_list(tmp_path: Path) -> Reader:
    (tmp_path / "list.txt").write_text("other")
    return Reader(part=Part(list_file=str(tmp_path / "list.txt")))


def remove(tmp_path: Path) -> Reader:
    (tmp_path / "w.pth").unlink()
    return Reader(file=str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: Reader(), ()),
        (lambda folder: Reader(folder=f"{folder}/./data/../data/"), ()),
        (lambda folder: Reader(folder=str(folder / "data")), ()),
        (lambda folder: Reader(folder=str(folder)), ("folder: is ", "the finished run read ")),
        (lambda folder: Reader(file=str(folder / "list.txt")), ("file: ", "another content")),
        (lambda folder: Reader(file=str(folder / "no.pth")), ("cannot be read here",)),
        (copy, ()),
        (remove, ()),
        (rewrite, ("file: ", "another content", "SHA-256")),
        (change_list, ("part.list_file: ", "another content")),
    ],
)
def test_another_input_is_told(
    reader: Reader, tmp_path: Path, change: Callable[[Path], Reader], words: tuple[str, ...]
) -> None:
    entry = done(reader)
    lines = find_changed_inputs(change(tmp_path), entry)
    assert len(lines) == (1 if words else 0), lines
    assert all(word in lines[0] for word in words)


def test_an_entry_of_before_says_nothing(reader: Reader) -> None:
    assert find_changed_inputs(reader, ManifestEntry(stage="x", name="x", run_id="x")) == []


def test_commands_tell_of_other_weights_and_images(tmp_path: Path) -> None:
    """Of a reproduction: weights by content, images by folder."""
    paths = {}
    for name in ("a.pth", "b.pth"):
        paths[name] = tmp_path / name
        paths[name].write_text(name)
    chosen = "evaluate_released"
    runs = load_selection(chosen, None, None, tmp_path).every
    weights = next(run.name for run in runs if run.stage == "import")
    for file in ("a.pth", "b.pth"):
        selection = load_selection(chosen, [f"{weights}.file={paths[file]}"], None, tmp_path)
        (run,) = [run for run in selection.every if run.name == weights]
        if file == "a.pth":
            record_entry(
                tmp_path,
                ManifestEntry(
                    stage=run.stage,
                    name=run.name,
                    run_id=run.run_id,
                    provenance={"inputs": record_inputs(run.config)},
                ),
            )
            assert list_changed_inputs(selection) == []
        else:
            (line,) = list_changed_inputs(selection)
            assert line.startswith(f"note: {weights} is done, but file: ") and "sha256" in line
