"""Records made to do harm, with checksums that fit: of checkpoints, of finished runs,
of runs to do; and YAML.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from checkpoint_cases import save
from malice import Case, Place

from mugs.checkpoint.save_load import load_latest
from pipeline import config, manifest, runfile
from pipeline.files import hash_json, with_checksum, write_atomic
from slurm.submission.profile import load_profile
from stages import STAGES


def with_record(place: Place, change: Callable[[dict[str, Any]], None]) -> Callable[[], object]:
    """A checkpoint whose record was changed, with a checksum that fits."""
    folder = save(place.folder / "checkpoints", 3)
    content = json.loads((folder / "state.json").read_text())
    content.pop("sha256")
    change(content)
    (folder / "state.json").write_text(json.dumps({**content, "sha256": hash_json(content)}))
    return lambda: load_latest(folder.parent)


def in_place_of(name: str, make: Callable[[Place, Path], object]) -> Case:
    """A checkpoint one of whose files is replaced."""

    def case(place: Place) -> Callable[[], object]:
        folder = save(place.folder / "checkpoints", 3)
        (folder / name).unlink()
        make(place, folder / name)
        return lambda: load_latest(folder.parent)

    return case


def renamed(name: Callable[[Place], str]) -> Case:
    """A record that calls its file of tensors by another name."""
    return lambda place: with_record(
        place, lambda c: c["files"].update({name(place): c["files"].pop(INSIDE)})
    )


def linked_folder(place: Place) -> Callable[[], object]:
    """A checkpoint that is a link outside."""
    (place.folder / "checkpoints").mkdir()
    (place.folder / "checkpoints" / place.secret.name).symlink_to(place.secret)
    return lambda: load_latest(place.folder / "checkpoints")


def sparse(path: Path) -> None:
    """A file of a terabyte that takes no room."""
    path.touch()
    os.truncate(path, 1 << 40)


INSIDE = "student.safetensors"
CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "files is a list": lambda c: c.update(files=[INSIDE]),
    "size is a text": lambda c: c["files"][INSIDE].update(size="1"),
    "more facts": lambda c: c["files"][INSIDE].update(path="/etc/passwd"),
    "step is a path": lambda c: c.update(step="../../outside/step_00000007"),
    "format of the future": lambda c: c.update(format=99),
}
# Checkpoint records that point elsewhere, or are not what they should be.
RECORDS: dict[str, Case] = {
    "record, ../ in a name": renamed(lambda place: f"../../../../outside/step_00000007/{INSIDE}"),
    "record, absolute name": renamed(lambda place: str(place.secret / INSIDE)),
    "record, name with a zero byte": renamed(lambda place: f"x\0.safetensors/{INSIDE}"),
    **{
        f"record, {name}": lambda place, change=change: with_record(place, change)
        for name, change in CHANGES.items()
    },
    "tensors are a link outside": in_place_of(
        INSIDE, lambda place, path: path.symlink_to(place.secret / INSIDE)
    ),
    "record is a link outside": in_place_of(
        "state.json", lambda place, path: path.symlink_to(place.secret / "state.json")
    ),
    "record is a pipe": in_place_of("state.json", lambda place, path: os.mkfifo(path)),
    "record of a terabyte": in_place_of("state.json", lambda place, path: sparse(path)),
    "record nested deeply": in_place_of(
        "state.json", lambda place, path: path.write_text("[" * 1_000_000)
    ),
    "checkpoint is a link outside": linked_folder,
}


def refused_entry(place: Place) -> Callable[[], object]:
    """Ask for the run's entry; None is how the manifest refuses: the run counts as not done."""

    def find() -> None:
        if manifest.find_done(place.root, place.run.run_id) is None:
            raise ValueError("not done")

    return find


def entry(**changes: Any) -> Case:
    """A manifest entry with these fields and a checksum that fits."""

    def case(place: Place) -> Callable[[], object]:
        (place.folder / "link").symlink_to(place.outside)
        known = {"stage": "tiny", "name": "tiny", "run_id": place.run.run_id, "rows": None}
        text = (
            json.dumps(known | changes)
            .replace("INSIDE", place.folder.relative_to(place.root).as_posix())
            .replace("OUTSIDE", str(place.outside))
        )
        write_atomic(
            manifest.entry_path(place.root, place.run.run_id),
            json.dumps(with_checksum(json.loads(text))),
        )
        return refused_entry(place)

    return case


def huge(place: Place) -> Callable[[], object]:
    """An entry of a terabyte."""
    path = manifest.entry_path(place.root, place.run.run_id)
    path.parent.mkdir()
    sparse(path)
    return refused_entry(place)


def deep(place: Place) -> Callable[[], object]:
    """An entry nested deeply."""
    write_atomic(manifest.entry_path(place.root, place.run.run_id), '{"x":' * 100_000)
    return refused_entry(place)


PATHS = {
    "../": "../outside/secret.txt",
    "../ inside": "INSIDE/../../../outside/secret.txt",
    "absolute": "OUTSIDE/secret.txt",
    "link": "INSIDE/link/secret.txt",
    "folder with a link": "INSIDE",
}
KEYS = ("stage", "name", "run_id")
# Manifest entries that lead outside.
ENTRIES: dict[str, Case] = {
    **{
        f"entry, output {name}": entry(outputs={"x": {"path": path, "size": 6, "sha256": "0" * 64}})
        for name, path in PATHS.items()
    },
    **{f"entry, rows {name}": entry(rows=path) for name, path in PATHS.items()},
    **{f"entry, {key} ../": entry(**{key: "../../outside"}) for key in KEYS},
    **{f"entry, {key} absolute": entry(**{key: "OUTSIDE"}) for key in KEYS},
    "entry of a terabyte": huge,
    "entry nested deeply": deep,
    "run id ../": lambda place: lambda: manifest.read_entry(place.root, "../../outside/secret"),
}


def written(path: Path, text: str, read: Callable[[], object]) -> Callable[[], object]:
    """Write a file; what then reads it."""
    path.write_text(text)
    return read


def bomb(empty: str, level: str) -> str:
    """A mapping of few bytes whose last value has 9 to the 13th values, each an alias of others."""
    levels = [f"a{i}: &a{i} " + level % ", ".join([f"*a{i - 1}"] * 9) for i in range(1, 14)]
    return "{" + ", ".join([f"a0: &a0 {empty}", *levels]) + "}"


TAGS = {
    "apply": "!!python/object/apply:os.system ['touch FUSE']",
    "new": "!!python/object/new:os.mkdir ['FUSE']",
    "object": "!!python/object:subprocess.Popen {args: [touch, FUSE]}",
    "name": "!!python/name:os.system",
    "module": "!!python/module:this",
    "short": "!<tag:yaml.org,2002:python/object/apply:os.mkdir> ['FUSE']",
    "exec": "!!python/object/apply:builtins.exec [\"open('FUSE', 'w')\"]",
    "nested deeply": "[" * 20_000,
    "merge bomb": bomb("{x: 1}", "{<<: [%s]}"),
    "alias bomb": bomb("[x]", "[%s]"),
    "contains itself": "&a [*a, *a]",
    "number of base 60": "1" + ":1" * 50_000,
}
READERS: dict[str, Callable[[Place, str], Callable[[], object]]] = {
    "run file": lambda place, tag: written(
        place.folder / runfile.FILE_NAME,
        f"stage: tiny\nconfig: {tag}\n",
        lambda: runfile.read_run_file(place.folder),
    ),
    "reproduction": lambda place, tag: written(
        place.root / "mine.yaml",
        f"runs:\n  x: {{stage: knn, ks: {tag}}}\n",
        lambda: config.load_reproduction(str(place.root / "mine.yaml"), STAGES),
    ),
    "profile": lambda place, tag: written(
        place.root / "cluster.yaml",
        f"run_root: {tag}\n",
        lambda: load_profile(str(place.root / "cluster.yaml")),
    ),
    "--set": lambda place, tag: (
        lambda: config.load_reproduction("mini", STAGES, [f"pretrain.epochs={tag}"])
    ),
}


def change_run_file(place: Place, **changes: Any) -> None:
    """Write the run file with some fields changed, and a checksum that fits."""
    path = runfile.write_run_file(place.root, place.run) / runfile.FILE_NAME
    content = yaml.safe_load(path.read_text())
    content.pop("sha256")
    path.write_text(yaml.safe_dump(with_checksum(content | changes)))


def run_file(**changes: Any) -> Case:
    """A run file with some fields changed, which is read."""

    def case(place: Place) -> Callable[[], object]:
        change_run_file(place, **changes)
        return lambda: runfile.read_run_file(place.folder)

    return case


def inputs(place: Place) -> Callable[[], object]:
    """A run whose input is said to lie outside; asked whether that is done, as a job does."""
    change_run_file(place, needs={"data": "../../outside/secret"})
    return lambda: [
        manifest.find_done(place.root, need)
        for need in runfile.read_run_file(place.folder).needs.values()
    ]


# YAML tags wherever YAML is read, and run files that lead outside.
YAMLS: dict[str, Case] = {
    **{
        f"YAML, {name}, {where}": lambda place, tag=tag, read=read: read(
            place, tag.replace("FUSE", str(place.fuse))
        )
        for name, tag in TAGS.items()
        for where, read in READERS.items()
    },
    **{f"run file, {key} ../": run_file(**{key: "../../outside"}) for key in KEYS},
    "run file, input ../": inputs,
}
