"""`bundle` and `verify BUNDLE`: the same bytes each time, nothing private, changes are named."""

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundle_cases import (
    BundleRequest,
    Members,
    change_json,
    change_text,
    find_name,
    finish_runs,
    make_bundle,
    patch_bytes,
    read_members,
    seal,
    write_with_zipfile,
)

from pipeline import config
from pipeline.archive import LARGEST_ARCHIVE, ArchiveError, open_archive, write_archive
from pipeline.files import OverwriteError
from pipeline.spec import ConfigError
from stages.commands import bundle
from stages.commands.bundle import write_bundle
from stages.commands.bundle_content import format_reproduction, hide_paths
from stages.commands.reproduction import all_runs
from stages.commands.verify_bundle import is_bundle, verify_bundle


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HUB_TOKEN", "secret-token")
        return make_bundle(tmp_path_factory.mktemp("bundle"), patch)


@pytest.fixture(scope="module")
def members(made: Path) -> Members:
    """Its files."""
    return read_members(made)


def test_a_bundle_verifies_anywhere(made: Path) -> None:
    found = verify_bundle(made)
    assert found.problems == []
    assert found.about is not None
    assert found.about.not_done == ["linear"]
    assert found.tables == 42
    assert [name.split("/")[1] for name in found.weights] == ["pretrain"]


def test_the_same_runs_give_the_same_bytes(made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        again = make_bundle(tmp_path, monkeypatch)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert again.read_bytes() == made.read_bytes()


def test_a_bundle_does_not_tell_the_folder_of_the_run_root(
    tmp_path: Path, monkeypatch: Any
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(bundle, "render_report", lambda *_, **k: given.update(k) or "<p></p>")
    write_bundle(finish_runs(tmp_path), BundleRequest("small", tmp_path / "b.zip"), [])
    assert given["title"] == "small"


def test_any_program_reads_a_bundle(made: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(made) as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path)
    for line in (tmp_path / "checksums.sha256").read_text().splitlines():
        digest, _, name = line.partition("  ")
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    crate = json.loads((tmp_path / "ro-crate-metadata.json").read_text())["@graph"]
    listed = {part["@id"] for part in crate[1]["hasPart"]}
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files - listed == {"ro-crate-metadata.json", "checksums.sha256"}


def test_a_bundle_holds_nothing_private(made: Path) -> None:
    data = made.read_bytes()
    for private in (b"secret", os.path.expanduser("~").encode() + b"/", str(made.parent).encode()):
        assert private not in data


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/data/imagenet/train", ".../train"),
        ("cannot read '/home/ann/x y': gone", "cannot read '.../x y': gone"),
        ("~/runs/a.csv and ~ann/b", ".../a.csv and .../b"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("k/v and 3/4, pretrain/a-1/rows.csv", "k/v and 3/4, pretrain/a-1/rows.csv"),
        ("builtin:sklearn_digits", "builtin:sklearn_digits"),
        ("/my runs/here/a", ".../a"),
    ],
)
def test_of_a_path_only_its_name_is_left(text: str, shown: str) -> None:
    assert hide_paths({"x": [text, 1, None]}, ["/my runs/here"]) == {"x": [shown, 1, None]}


@pytest.mark.parametrize("name", config.list_bundled())
def test_the_reproduction_of_a_bundle_gives_the_same_runs(name: str, tmp_path: Path) -> None:
    runs = all_runs(name)
    path = tmp_path / "reproduction.yaml"
    path.write_bytes(format_reproduction(name, runs))
    again = all_runs(str(path))
    assert [(run.name, run.run_id, run.needs) for run in again] == [
        (run.name, run.run_id, run.needs) for run in runs
    ]


def test_only_a_bundle_is_overwritten(made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    path = make_bundle(tmp_path, monkeypatch)
    (tmp_path / "mine.zip").write_text("mine")
    (tmp_path / "other").mkdir()
    selection = finish_runs(tmp_path / "other")
    with pytest.raises(OverwriteError, match="has backbones, which the new bundle would not have"):
        write_bundle(selection, BundleRequest("small", path), [])
    write_bundle(selection, BundleRequest("small", path, weights=True), [])
    write_bundle(selection, BundleRequest("small", path, force=True), [])
    with pytest.raises(OverwriteError, match=r"mine\.zip"):
        write_bundle(selection, BundleRequest("small", tmp_path / "mine.zip"), [])
    write_bundle(selection, BundleRequest("small", tmp_path / "mine.zip", force=True), [])
    assert verify_bundle(tmp_path / "mine.zip").problems == []


def test_a_bundle_is_known_by_its_content_or_its_name(made: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "b.tar"
    renamed.write_bytes(made.read_bytes())
    assert is_bundle(str(renamed)) and is_bundle("missing.zip") and not is_bundle("mini")
    with pytest.raises(ConfigError, match="there is no such file"):
        verify_bundle(tmp_path / "missing.zip")
    selection = finish_runs(tmp_path / "runs")
    with pytest.raises(ConfigError, match=r"expected a name that ends in \.zip"):
        write_bundle(selection, BundleRequest("small", tmp_path / "c.tar"), [])


def test_a_link_in_a_run_folder_is_not_followed(tmp_path: Path, monkeypatch: Any) -> None:
    selection = finish_runs(tmp_path)
    (metrics,) = selection.root.glob("pretrain/*/metrics.jsonl")
    (tmp_path / "private").write_text("key")
    metrics.unlink()
    metrics.symlink_to(tmp_path / "private")
    with pytest.raises(ConfigError, match="leads out"):
        write_bundle(selection, BundleRequest("small", tmp_path / "b.zip"), [])
    assert not (tmp_path / "b.zip").exists()


def test_damaged_weights_and_an_empty_run_root_are_refused(tmp_path: Path) -> None:
    selection = finish_runs(tmp_path)
    (weights,) = selection.root.glob("pretrain/*/teacher.safetensors")
    weights.write_bytes(weights.read_bytes().replace(b"not", b"Not"))
    with pytest.raises(ConfigError, match="differs from the SHA-256"):
        write_bundle(selection, BundleRequest("small", tmp_path / "b.zip", weights=True), [])
    (tmp_path / "empty").mkdir()
    selection = finish_runs(tmp_path / "empty", leave_out=("linear", "knn", "pretrain", "imagenet"))
    with pytest.raises(ConfigError, match="nothing to bundle"):
        write_bundle(selection, BundleRequest("small"), [])


Content = Callable[[Members], Members]


def drop(*parts: str) -> Content:
    return lambda members: {k: v for k, v in members.items() if k != find_name(members, *parts)}


def add(name: str, data: bytes = b"x") -> Content:
    return lambda members: members | {name: data}


def replaced(data: bytes, *parts: str) -> Content:
    return lambda members: members | {find_name(members, *parts): data}


def appended(data: bytes, *parts: str) -> Content:
    def apply(members: Members) -> Members:
        name = find_name(members, *parts)
        return members | {name: members[name] + data}

    return apply


PRETRAIN = ("records/pretrain", "entry.json")
KNN = ("records/knn", "entry.json")

# Whoever changes a file and leaves the list of checksums as it was.
CARELESS: dict[str, tuple[Content, str]] = {
    "a value": (change_text("72.3", "75.3", "rows.csv"), "rows.csv differs from its SHA-256"),
    "a table": (appended(b"\n", "tables/table1.md"), "table1.md differs from its SHA-256"),
    "the report": (appended(b" ", "report.html"), "report.html differs from its SHA-256"),
    "weights": (appended(b" ", "weights/"), "teacher.safetensors differs from its SHA-256"),
    "metrics": (appended(b"{}\n", "metrics.jsonl"), "metrics.jsonl differs from its SHA-256"),
    "a missing table": (drop("tables/table2.csv"), "table2.csv' is in checksums.sha256, but miss"),
    "a missing report": (drop("report.html"), "report.html is missing"),
    "a missing list": (drop("checksums.sha256"), "checksums.sha256 is missing"),
    "one more table": (add("tables/mine.md"), "tables/mine.md is not in checksums.sha256"),
    "a program": (add("setup.py"), "setup.py is no file of a bundle"),
    "a list that says more": (
        appended(b"00  tables/x.md\n", "checksums.sha256"),
        "'tables/x.md' is in checksums.sha256, but missing",
    ),
    "a list in another order": (
        lambda members: (
            members
            | {
                "checksums.sha256": b"".join(
                    reversed(members["checksums.sha256"].splitlines(keepends=True))
                )
            }
        ),
        "checksums.sha256 is not as bundle writes it",
    ),
}

# Whoever makes all checksums fit.
CAREFUL: dict[str, tuple[Content, str]] = {
    "a value in the rows": (
        change_text("72.3", "75.3", "rows.csv"),
        "rows.csv has other rows than the records",
    ),
    "a value in the record": (
        lambda members: (
            members
            | {
                find_name(members, "records/knn", "rows.csv"): members[
                    find_name(members, "records/knn", "rows.csv")
                ].replace(b"72.3", b"75.3")
            }
        ),
        "rows.csv: is not what its run wrote",
    ),
    "a table": (appended(b"\n", "tables/table1.md"), "table1.md differs from the table that"),
    "one more table": (add("tables/mine.md"), "tables/mine.md: no such table"),
    "a missing table": (drop("tables/table2.csv"), "tables/table2.csv: is missing"),
    "weights": (appended(b" ", "weights/"), "teacher.safetensors: is not what its run wrote"),
    "weights of no run": (
        add("weights/pretrain/x-1/teacher.safetensors"),
        "weights/pretrain/x-1/teacher.safetensors: no run has written it",
    ),
    "a setting": (
        change_json("runs.json", change=lambda v: v["runs"][0]["config"].update(dataset="other")),
        "runs.json says something else",
    ),
    "GPU-hours": (
        change_json("runs.json", change=lambda v: v["runs"][0].update(gpu_hours=1)),
        "runs.json says something else",
    ),
    "the variant": (
        change_json(
            "runs.json", change=lambda v: [f.update(variant="w/o") for f in v["results"].values()]
        ),
        "differs from the table that the rows give",
    ),
    "a foreign key of a run": (
        change_json(*PRETRAIN, change=lambda v: v.update(evil=1), record=True),
        "entry.json is no record of a run",
    ),
    "a foreign key of the bundle": (
        change_json("bundle.json", change=lambda v: v.update(evil=1)),
        "bundle.json: evil: Extra inputs are not permitted",
    ),
    "a foreign key of an attempt": (
        change_json("records/knn", "attempts.json", change=lambda v: v[0].update(evil=1)),
        "attempts.json: 0.evil: Extra inputs",
    ),
    "a record with another checksum": (
        change_json(*PRETRAIN, change=lambda v: v.update(seconds=1)),
        "entry.json is no record of a run",
    ),
    "a run under another name": (
        change_json(*KNN, change=lambda v: v.update(name="other"), record=True),
        "entry.json: is of another run than its folder",
    ),
    "another input": (
        change_json(*KNN, change=lambda v: v["upstream"].update(data="0123"), record=True),
        "runs.json says something else",
    ),
    "a path out of the run root": (
        change_json(
            *PRETRAIN,
            change=lambda v: v["outputs"]["teacher"].update(path="../../x"),
            record=True,
        ),
        "entry.json is no record of a run: outputs.teacher.path",
    ),
    "a record of another type": (
        change_json(*PRETRAIN, change=lambda v: v["info"].update(notes="x"), record=True),
        "records: info.notes: unexpected str",
    ),
    "another setting in record and runs": (
        lambda members: change_json(
            "runs.json",
            change=lambda v: [
                r["config"].update(epochs=99) for r in v["runs"] if "seed" in r["config"]
            ],
        )(
            change_json(*PRETRAIN, change=lambda v: v["config"].update(epochs=99), record=True)(
                members
            )
        ),
        "reproduction.yaml has other settings of this run",
    ),
    "another setting in the reproduction": (
        change_text("epochs: 100", "epochs: 300", "reproduction.yaml"),
        "reproduction.yaml has no run of this id",
    ),
    "a setting that there is none of": (
        change_text("epochs: 100", "evil: 100", "reproduction.yaml"),
        "unknown key 'evil'",
    ),
    "a reproduction that repeats itself": (
        replaced(b"a: &a [x]\nb: [*a, *a]\nruns: 1\n", "reproduction.yaml"),
        "reproduction.yaml",
    ),
    "a missing run": (
        change_json("bundle.json", change=lambda v: v["runs"].pop()),
        "and bundle.json do not agree about this run",
    ),
    "runs that are not done": (
        change_json("bundle.json", change=lambda v: v.update(not_done=[])),
        "do not agree which runs are not done",
    ),
    "rows that are missing": (
        drop("records/knn", "rows.csv"),
        "do not agree whether there are rows",
    ),
    "a newer format": (
        change_json("bundle.json", change=lambda v: v.update(format_version=9)),
        "format version 9",
    ),
    "no JSON": (replaced(b"{", "bundle.json"), "bundle.json is not JSON"),
    "lists in lists": (replaced(b"[" * 10**6, "bundle.json"), "bundle.json is not JSON"),
    "a number of many digits": (replaced(b"9" * 10**6, "bundle.json"), "bundle.json is not JSON"),
    "no text": (replaced(b"\xff\xfe\n", "records/knn", "rows.csv"), "is not what its run wrote"),
    "a file of 20 MB": (
        replaced(b" " * (20 << 20), "runs.json"),
        "runs.json has more than",
    ),
}


def check_named(path: Path, expected: str) -> None:
    """Check that a problem says so, and that each is one line."""
    found = verify_bundle(path)
    assert found.problems, "not found"
    assert any(expected in line for line in found.problems), found.problems
    assert all(line.startswith(str(path)) and line.isprintable() for line in found.problems)


@pytest.mark.parametrize("case", CARELESS)
def test_a_changed_file_is_named(case: str, members: Members, tmp_path: Path) -> None:
    change, expected = CARELESS[case]
    write_archive(tmp_path / "b.zip", change(members))
    check_named(tmp_path / "b.zip", expected)


@pytest.mark.parametrize("case", CAREFUL)
def test_a_change_with_fitting_checksums_is_named(
    case: str, members: Members, tmp_path: Path
) -> None:
    change, expected = CAREFUL[case]
    write_archive(tmp_path / "b.zip", seal(change(members)))
    check_named(tmp_path / "b.zip", expected)


def describe_member(name: str, **fields: Any) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o100644 << 16
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def renamed(new: str) -> Callable[[Path, Members], None]:
    """Write a bundle with a file more, under a name that `write_archive` refuses."""

    def apply(path: Path, members: Members) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name in sorted(members):
                archive.writestr(describe_member(name), members[name])
            archive.writestr(describe_member(new), "x")

    return apply


def with_info(**fields: Any) -> Callable[[Path, Members], None]:
    """Write a bundle with one member of another kind."""

    def apply(path: Path, members: Members) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name in sorted(members):
                changes = fields if name == "rows.csv" else {}
                archive.writestr(describe_member(name, **changes), members[name])

    return apply


def bomb(path: Path, members: Members) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bundle.json", b" " * (20 << 20), compresslevel=1)


def bytes_around(before: bytes, after: bytes) -> Callable[[Path, Members], None]:
    def apply(path: Path, members: Members) -> None:
        write_archive(path, members)
        path.write_bytes(before + path.read_bytes() + after)

    return apply


def twice(path: Path, members: Members) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(members):
            archive.writestr(describe_member(name), members[name])
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(describe_member("rows.csv"), members["rows.csv"])


def overlapping(path: Path, members: Members) -> None:
    """The headers of two members lead to the same bytes."""
    write_archive(path, members)
    with open_archive(path) as archive:
        first = archive.members["report.html"].offset
    data = path.read_bytes()
    place = data.rindex(b"rows.csv") - 4
    path.write_bytes(data[:place] + first.to_bytes(4, "little") + data[place + 4 :])


def cut(path: Path, members: Members) -> None:
    write_archive(path, members)
    path.write_bytes(path.read_bytes()[:-100])


def sparse(path: Path, members: Members) -> None:
    with path.open("wb") as stream:
        stream.truncate(LARGEST_ARCHIVE + 2)


HOSTILE: dict[str, tuple[Callable[[Path, Members], None], str]] = {
    "a path out of it": (renamed("../rows.csv"), "'../rows.csv': not a name of a bundle"),
    "a path out of a folder": (renamed("tables/../../x"), "not a name of a bundle"),
    "an absolute path": (renamed("/etc/passwd"), "'/etc/passwd': not a name of a bundle"),
    "a drive": (renamed("C:\\x"), "not a name of a bundle"),
    "a backslash": (renamed("tables\\x"), "not a name of a bundle"),
    "a hidden file": (renamed("tables/.git"), "not a name of a bundle"),
    "a control character": (renamed("tables/\x1b[2J.md"), "'tables/?[2J.md': not a name"),
    "a name of 600 characters": (renamed("t" * 600), "not a name of a bundle"),
    "another file system's twin": (renamed("ROWS.csv"), "is there twice"),
    "a file twice": (twice, "'rows.csv': is there twice"),
    "a link": (with_info(external_attr=0o120777 << 16), "'rows.csv': is a link"),
    "a folder": (with_info(external_attr=0o040755 << 16 | 16), "'rows.csv': is a link, a folder"),
    "a program": (with_info(external_attr=0o100755 << 16), "'rows.csv': is a link"),
    "a comment": (with_info(comment=b"x"), "'rows.csv': has a comment"),
    "extra fields": (with_info(extra=b"xx\x01\x00x"), "'rows.csv': has extra fields"),
    "compressed": (
        lambda path, members: write_with_zipfile(path, members, compression=zipfile.ZIP_DEFLATED),
        "is compressed",
    ),
    "a bomb": (bomb, "'bundle.json': is compressed"),
    "another date": (with_info(date_time=(2020, 1, 1, 0, 0, 0)), "its two headers differ"),
    "text before it": (bytes_around(b"#!/bin/sh\n", b""), "is not where it says"),
    "text behind it": (bytes_around(b"", b"x"), "does not end as a bundle does"),
    "another bundle behind it": (
        lambda path, members: (
            bytes_around(b"", path.read_bytes())(path, members)
            if path.exists()
            else bytes_around(b"PK\5\6" + bytes(18), b"")(path, members)
        ),
        "is not where it says",
    ),
    "overlapping": (overlapping, "does not begin where the one before it ends"),
    "encrypted": (patch_bytes(8, b"\x01\x08", central="rows.csv"), "'rows.csv': is encrypted"),
    "a zip64 member": (
        patch_bytes(20, b"\xff" * 8, central="rows.csv"),
        "'rows.csv': is a zip64 member",
    ),
    "another size": (
        patch_bytes(20, b"\x01\0\0\0\x01\0\0\0", central="rows.csv"),
        "its two headers differ",
    ),
    "another CRC": (patch_bytes(16, b"\0\0\0\0", central="rows.csv"), "its two headers differ"),
    "a list elsewhere": (patch_bytes(-6, b"\0\0\0\0"), "is not where it says"),
    "a million members": (patch_bytes(-12, b"\x00\x7d"), "says that it has"),
    "zip64": (patch_bytes(-12, b"\xff\xff"), "is a zip64 file"),
    "a comment of the whole": (patch_bytes(-2, b"\1\0"), "is not as bundle writes it"),
    "cut short": (cut, "cut short"),
    "empty": (lambda path, _: path.write_bytes(b""), "does not end as a bundle does"),
    "an empty zip": (lambda path, _: write_archive(path, {}), "bundle.json is missing"),
    "4 GiB": (sparse, "has 4 GiB or more"),
    "no zip": (lambda path, _: path.write_bytes(b"x" * 1000), "no zip file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_bundle_is_refused_by_name(case: str, members: Members, tmp_path: Path) -> None:
    write, expected = HOSTILE[case]
    write(tmp_path / "b.zip", members)
    began = time.process_time()
    check_named(tmp_path / "b.zip", expected)
    # It takes some ms.
    assert time.process_time() - began < 1


def read_all(path: Path) -> None:
    with open_archive(path) as archive:
        for name in archive.members:
            archive.read(name, 100)


def test_each_byte_of_the_headers_counts(members: Members, tmp_path: Path) -> None:
    """Whatever is changed outside the members, the form is another one."""
    small = {"bundle.json": b"{}", "rows.csv": b"x"}
    path = tmp_path / "b.zip"
    write_archive(path, small)
    data = path.read_bytes()
    with open_archive(path) as archive:
        inside = {
            member.data_offset + place
            for member in archive.members.values()
            for place in range(member.size)
        }
    for place in set(range(len(data))) - inside:
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ArchiveError):
            read_all(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "b.zip")
    with pytest.raises(OSError, match="not a regular file"):
        verify_bundle(tmp_path / "b.zip")
