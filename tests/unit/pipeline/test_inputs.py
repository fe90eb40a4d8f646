"""A finished run remembers what it read; another file or folder in its place is told."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline import folder_content, inputs
from pipeline.inputs import (
    InputChangedError,
    check_unchanged,
    find_changed_inputs,
    find_mixed_inputs,
    note_earlier_inputs,
    record_inputs,
)
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
    (tmp_path / "data/cat").mkdir(parents=True)
    (tmp_path / "data/cat/a.jpg").write_text("a")
    (tmp_path / "data/labels.json").write_text("[1]")
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


def copy_folder(tmp_path: Path) -> str:
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    return str(tmp_path / "copy")


def change_folder(tmp_path: Path, how: str) -> Reader:
    """The same path, with something done to what it holds."""
    data = tmp_path / "data"
    image = data / "cat/a.jpg"
    if how == "touch":
        os.utime(image, (1, 1))
    elif how == "hide":
        (data / "cat/.DS_Store").touch()
        (data / "cat/@eaDir").mkdir()
        (data / "cat/@eaDir/a.jpg").touch()
    elif how == "remove all":
        shutil.rmtree(data)
    elif how == "add":
        (data / "cat/b.jpg").touch()
    elif how == "rename":
        image.rename(data / "cat/c.jpg")
    elif how == "hidden image":
        (data / "cat/.b.jpg").touch()
    elif how == "same size":
        image.write_text("b")
        os.utime(image, (1, 1))
    elif how == "longer":
        image.write_text("longer")
    else:
        (data / "labels.json").write_text("[2]")
    return Reader(folder=str(data))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: Reader(), ()),
        (lambda folder: Reader(folder=f"{folder}/./data/../data/"), ()),
        (lambda folder: Reader(folder=str(folder / "data")), ()),
        (lambda folder: Reader(folder=str(folder)), ("folder: ", "4 files instead of 2")),
        (lambda folder: Reader(folder=str(folder / "no")), ("folder: is ", "cannot be read here")),
        (lambda folder: Reader(folder=copy_folder(folder)), ()),
        (lambda folder: change_folder(folder, "touch"), ()),
        (lambda folder: change_folder(folder, "hide"), ()),
        (lambda folder: change_folder(folder, "remove all"), ()),
        (lambda folder: change_folder(folder, "add"), ("folder: ", "3 files instead of 2")),
        (lambda folder: change_folder(folder, "rename"), ("folder: ", "files of other names")),
        (lambda folder: change_folder(folder, "longer"), ("folder: ", "files of other sizes")),
        (lambda folder: change_folder(folder, "hidden image"), ("3 files instead of 2",)),
        (lambda folder: change_folder(folder, "same size"), ("files of another content",)),
        (lambda folder: change_folder(folder, "list"), ("folder: ", "lists or annotations of")),
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


def test_a_folder_of_many_files_is_not_listed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless one of its folders, lists or sampled files was touched."""
    monkeypatch.setattr(folder_content, "_FEW", 10)
    monkeypatch.setattr(folder_content, "_NUM_SAMPLED", 5)
    for number in range(40):
        path = tmp_path / f"{number % 4}" / f"{number:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "0/deep").mkdir()
    (tmp_path / "0/deep/names.txt").write_text("a")
    facts = folder_content.describe_folder(tmp_path)
    assert facts["files"] == 41 and len(facts["sample"]) == 6
    assert "0/deep/names.txt" in facts["sample"]

    def refuse(root: Path) -> list[str]:
        raise AssertionError("listed")

    with monkeypatch.context() as patched:
        patched.setattr(folder_content, "_list_files", refuse)
        assert folder_content.compare_folder(tmp_path, facts) == ""
    (tmp_path / "0/deep/names.txt").write_text("b")
    assert folder_content.compare_folder(tmp_path, facts).startswith("lists or annotations")
    (tmp_path / "0/deep/names.txt").write_text("a")
    assert folder_content.compare_folder(tmp_path, facts) == ""
    (tmp_path / facts["sample"][0]).unlink()
    assert folder_content.compare_folder(tmp_path, facts) == "40 files instead of 41"


def test_links_in_a_circle_and_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "a/lost.jpg").symlink_to(tmp_path / "nowhere")
    assert folder_content.describe_folder(tmp_path)["files"] == 1


def test_what_changes_while_a_run_reads_it_is_refused(reader: Reader, tmp_path: Path) -> None:
    inputs = record_inputs(reader)
    check_unchanged(inputs, "start again")
    rewrite(tmp_path)
    with pytest.raises(InputChangedError, match=r"file: .* has another content .*; start again"):
        check_unchanged(inputs, "start again")


def test_a_run_that_went_on_with_another_content_says_so(reader: Reader, tmp_path: Path) -> None:
    earlier = record_inputs(reader)
    same = note_earlier_inputs(record_inputs(reader), earlier, 1)
    assert same == earlier
    change_list(tmp_path)
    noted = note_earlier_inputs(record_inputs(reader), earlier, 1)
    assert [name for name, facts in noted.items() if "earlier" in facts] == ["part.list_file"]
    entry = ManifestEntry(stage="x", name="x", run_id="x", provenance={"inputs": noted})
    assert find_changed_inputs(reader, entry) == []
    (line,) = find_mixed_inputs(entry)
    assert line == "part.list_file: attempt 1 of the run read another content"
    # The third attempt knows it from the second.
    third = note_earlier_inputs(record_inputs(reader), noted, 2)
    assert third == noted


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


def test_of_a_large_file_some_parts_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "_LARGE_BYTES", 10_000)
    path = tmp_path / "train.tar"
    content = bytes(range(256)) * 5000
    path.write_bytes(content)
    entry = done(Reader(file=str(path)))
    facts = entry.provenance["inputs"]["file"]
    assert "sha256" not in facts
    assert len(facts["sampled"]) == 64
    (tmp_path / "moved.tar").write_bytes(content)
    assert find_changed_inputs(Reader(file=str(tmp_path / "moved.tar")), entry) == []
    for change in (content[:-1] + b"x", content + b"x", b"x" + content[1:]):
        path.write_bytes(change)
        os.utime(path, ns=(1, 1))
        (line,) = find_changed_inputs(Reader(file=str(path)), entry)
        assert line.startswith(f"file: {path} has another content than the file that")
        with pytest.raises(InputChangedError, match="another content"):
            check_unchanged(entry.provenance["inputs"], "do it again")


def test_an_empty_or_short_file_can_be_sampled(tmp_path: Path) -> None:
    for content in (b"", b"x", b"x" * 5000):
        (tmp_path / "x").write_bytes(content)
        assert len(inputs._hash_content(tmp_path / "x", "sampled")) == 64


def test_names_that_are_no_text_are_part_of_the_content(tmp_path: Path) -> None:
    """The conversion names such a file; what describes its folder must not end it before."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "caf\udce9.jpg").write_bytes(b"one")
    before = folder_content.describe_folder(tmp_path)
    (tmp_path / "a" / "caf\udce9.jpg").rename(tmp_path / "a" / "caf\udce8.jpg")
    assert before["content"] and folder_content.describe_folder(tmp_path) != before
