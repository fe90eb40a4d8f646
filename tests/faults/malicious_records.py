"""Records made to do harm, with checksums that fit: of checkpoints, of finished runs,
of runs to do; and YAML.
"""

import json
import os
from collections.abc import Callable, Iterator
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


def records() -> Iterator[tuple[str, Case]]:
    """Checkpoint records that point elsewhere, or are not what they should be."""
    inside = "student.safetensors"

    def renamed(name: Callable[[Place], str]) -> Case:
        def case(place: Place) -> Callable[[], object]:
            return with_record(
                place, lambda c: c["files"].update({name(place): c["files"].pop(inside)})
            )

        return case

    yield (
        "record, ../ in a name",
        renamed(lambda place: f"../../../../outside/step_00000007/{inside}"),
    )
    yield "record, absolute name", renamed(lambda place: str(place.secret / inside))
    yield "record, name with a zero byte", renamed(lambda place: f"x\0.safetensors/{inside}")
    changes: dict[str, Callable[[dict[str, Any]], None]] = {
        "files is a list": lambda c: c.update(files=[inside]),
        "size is a text": lambda c: c["files"][inside].update(size="1"),
        "more facts": lambda c: c["files"][inside].update(path="/etc/passwd"),
        "step is a path": lambda c: c.update(step="../../outside/step_00000007"),
        "format of the future": lambda c: c.update(format=99),
    }
    for name, change in changes.items():
        yield f"record, {name}", lambda place, change=change: with_record(place, change)

    def in_place_of(make: Callable[[Place, Path], object], name: str) -> Case:
        def case(place: Place) -> Callable[[], object]:
            folder = save(place.folder / "checkpoints", 3)
            (folder / name).unlink()
            make(place, folder / name)
            return lambda: load_latest(folder.parent)

        return case

    yield (
        "tensors are a link outside",
        in_place_of(lambda place, path: path.symlink_to(place.secret / inside), inside),
    )
    yield (
        "record is a link outside",
        in_place_of(lambda place, path: path.symlink_to(place.secret / "state.json"), "state.json"),
    )
    yield "record is a pipe", in_place_of(lambda place, path: os.mkfifo(path), "state.json")
    yield "record of a terabyte", in_place_of(lambda place, path: sparse(path), "state.json")
    yield (
        "record nested deeply",
        in_place_of(lambda place, path: path.write_text("[" * 1_000_000), "state.json"),
    )

    def linked_folder(place: Place) -> Callable[[], object]:
        (place.folder / "checkpoints").mkdir()
        (place.folder / "checkpoints" / place.secret.name).symlink_to(place.secret)
        return lambda: load_latest(place.folder / "checkpoints")

    yield "checkpoint is a link outside", linked_folder


def sparse(path: Path) -> None:
    """A file of a terabyte that takes no room."""
    path.touch()
    os.truncate(path, 1 << 40)


def entries() -> Iterator[tuple[str, Case]]:
    """Manifest entries that lead outside, with a checksum that fits."""

    def entry(**changes: Any) -> Case:
        def case(place: Place) -> Callable[[], object]:
            (place.folder / "link").symlink_to(place.outside)
            inside = place.folder.relative_to(place.root).as_posix()
            known = {"stage": "tiny", "name": "tiny", "run_id": place.run.run_id, "rows": None}
            text = (
                json.dumps(known | changes)
                .replace("INSIDE", inside)
                .replace("OUTSIDE", str(place.outside))
            )
            write_atomic(
                manifest.entry_path(place.root, place.run.run_id),
                json.dumps(with_checksum(json.loads(text))),
            )
            return lambda: refuse_none(manifest.find_done(place.root, place.run.run_id))

        return case

    def output(path: str) -> dict[str, Any]:
        return {"outputs": {"x": {"path": path, "size": 6, "sha256": "0" * 64}}}

    paths = {
        "../": "../outside/secret.txt",
        "../ inside": "INSIDE/../../../outside/secret.txt",
        "absolute": "OUTSIDE/secret.txt",
        "link": "INSIDE/link/secret.txt",
        "folder with a link": "INSIDE",
    }
    for name, path in paths.items():
        yield f"entry, output {name}", entry(**output(path))
        yield f"entry, rows {name}", entry(rows=path)
    for key in ("stage", "name", "run_id"):
        yield f"entry, {key} ../", entry(**{key: "../../outside"})
        yield f"entry, {key} absolute", entry(**{key: "OUTSIDE"})

    def huge(place: Place) -> Callable[[], object]:
        path = manifest.entry_path(place.root, place.run.run_id)
        path.parent.mkdir()
        sparse(path)
        return lambda: refuse_none(manifest.find_done(place.root, place.run.run_id))

    def deep(place: Place) -> Callable[[], object]:
        write_atomic(manifest.entry_path(place.root, place.run.run_id), '{"x":' * 100_000)
        return lambda: refuse_none(manifest.find_done(place.root, place.run.run_id))

    yield "entry of a terabyte", huge
    yield "entry nested deeply", deep
    yield (
        "run id ../",
        lambda place: lambda: manifest.read_entry(place.root, "../../outside/secret"),
    )


def refuse_none(found: object) -> None:
    """None is how the manifest refuses: the run counts as not done."""
    if found is None:
        raise ValueError("not done")


TAGS = {
    "apply": "!!python/object/apply:os.system ['touch FUSE']",
    "new": "!!python/object/new:os.mkdir ['FUSE']",
    "object": "!!python/object:subprocess.Popen {args: [touch, FUSE]}",
    "name": "!!python/name:os.system",
    "module": "!!python/module:this",
    "short": "!<tag:yaml.org,2002:python/object/apply:os.mkdir> ['FUSE']",
    "exec": "!!python/object/apply:builtins.exec [\"open('FUSE', 'w')\"]",
    "nested deeply": "[" * 20_000,
}


def yamls() -> Iterator[tuple[str, Case]]:
    """YAML tags wherever YAML is read, and run files that lead outside."""
    for name, tag in TAGS.items():

        def run_file(place: Place, tag: str = tag) -> Callable[[], object]:
            text = f"stage: tiny\nconfig: {tag.replace('FUSE', str(place.fuse))}\n"
            (place.folder / runfile.FILE_NAME).write_text(text)
            return lambda: runfile.read_run_file(place.folder)

        def reproduction(place: Place, tag: str = tag) -> Callable[[], object]:
            path = place.root / "mine.yaml"
            path.write_text(
                f"runs:\n  x: {{stage: knn, ks: {tag.replace('FUSE', str(place.fuse))}}}\n"
            )
            return lambda: config.load_reproduction(str(path), STAGES)

        def profile(place: Place, tag: str = tag) -> Callable[[], object]:
            path = place.root / "cluster.yaml"
            path.write_text(f"run_root: {tag.replace('FUSE', str(place.fuse))}\n")
            return lambda: load_profile(str(path))

        def option(place: Place, tag: str = tag) -> Callable[[], object]:
            text = tag.replace("FUSE", str(place.fuse))
            return lambda: config.load_reproduction("mini", STAGES, [f"pretrain.epochs={text}"])

        yield f"YAML, {name}, run file", run_file
        yield f"YAML, {name}, reproduction", reproduction
        yield f"YAML, {name}, profile", profile
        yield f"YAML, {name}, --set", option

    def changed(**changes: Any) -> Case:
        def case(place: Place) -> Callable[[], object]:
            path = runfile.write_run_file(place.root, place.run) / runfile.FILE_NAME
            content = yaml.safe_load(path.read_text())
            content.pop("sha256")
            path.write_text(yaml.safe_dump(with_checksum(content | changes)))
            return lambda: runfile.read_run_file(place.folder)

        return case

    for key in ("stage", "name", "run_id"):
        yield f"run file, {key} ../", changed(**{key: "../../outside"})


def inputs(place: Place) -> Callable[[], object]:
    """A run whose input is said to lie outside; asked whether that is done, as a job does."""
    path = runfile.write_run_file(place.root, place.run) / runfile.FILE_NAME
    content = yaml.safe_load(path.read_text())
    content.pop("sha256")
    path.write_text(
        yaml.safe_dump(with_checksum(content | {"needs": {"data": "../../outside/secret"}}))
    )
    return lambda: [
        manifest.find_done(place.root, need)
        for need in runfile.read_run_file(place.folder).needs.values()
    ]
