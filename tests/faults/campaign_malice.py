"""Files made to do harm: each is refused at once, runs no code, and leads to no file outside the run root."""

import json
import logging
import os
import pickle
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from checkpoint_cases import save
from outcome import Outcome
from tiny_stage import tiny_run

from mugs.engine.checkpoint import CheckpointError, load_latest
from mugs.storage import record
from mugs.weights import WeightsError, load_backbone, read_checkpoint
from pipeline import config, manifest, runfile
from pipeline.atomic import write_text_atomic
from pipeline.checksum import sealed
from pipeline.spec import ConfigError
from slurm.cluster import load_profile
from stages import STAGES

NAME = "5_malicious_files"
LIMIT_S = 1.0
REFUSALS = (CheckpointError, WeightsError, ConfigError, ValueError)


class Watch:
    """Opened files and started programs while it is on; an audit hook cannot be taken away again."""

    def __init__(self) -> None:
        self.on, self.opened, self.started = False, list[str](), list[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            self.opened.append(str(arguments[0]))
        elif event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "shutil.rmtree"):
            self.started.append(event)


WATCH = Watch()


class Bomb:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class Place:
    """A run root, and beside it a folder that nothing may touch: `secret` holds good files, `fuse` is never made."""

    def __init__(self, folder: Path) -> None:
        self.root, self.outside, self.fuse = folder / "root", folder / "outside", folder / "fuse"
        self.outside.mkdir(parents=True)
        (self.outside / "secret.txt").write_text("secret")
        save(self.outside, 7)
        self.secret = self.outside / "step_00000007"
        self.run = tiny_run()
        self.folder = self.run.run_dir(self.root)
        self.folder.mkdir(parents=True)


Case = Callable[[Place], Callable[[], object]]
"""Prepares a place and returns what a user then does, which must be refused or come to nothing."""


def bombs() -> Iterator[tuple[str, Case]]:
    """Pickles that call something when loaded carelessly."""
    calls: dict[str, Callable[[str], Bomb]] = {
        "os.system": lambda fuse: Bomb(os.system, f"touch {fuse}"),
        "eval": lambda fuse: Bomb(eval, f"open({fuse!r}, 'w')"),
        "exec": lambda fuse: Bomb(exec, f"open({fuse!r}, 'w')"),
        "open": lambda fuse: Bomb(open, fuse, "w"),
        "nested": lambda fuse: Bomb(dict, [("x", Bomb(os.mkdir, fuse))]),
        "getattr": lambda fuse: Bomb(getattr, Bomb(__import__, "os"), "system"),
    }
    for name, make in calls.items():
        for form, write in {"zip": torch.save, "legacy": legacy, "raw": raw, "late": late}.items():

            def case(place: Place, make: Any = make, write: Any = write) -> Callable[[], object]:
                path = place.root / "weights.pth"
                write({"teacher": {"x": torch.ones(2)}, "epoch": make(str(place.fuse))}, path)
                return lambda: read_checkpoint(path)

            yield f"pickle, {name}, {form}", case

            def as_safetensors(place: Place, make: Any = make, write: Any = write) -> Callable[[], object]:
                path = place.root / "weights.safetensors"
                write({"x": make(str(place.fuse))}, path)
                return lambda: load_backbone(path)

            yield f"pickle as safetensors, {name}, {form}", as_safetensors


def legacy(content: object, path: Path) -> None:
    """torch's format before zip files."""
    torch.save(content, path, _use_new_zipfile_serialization=False)


def raw(content: object, path: Path) -> None:
    """A plain pickle."""
    path.write_bytes(pickle.dumps(content))


def late(content: object, path: Path) -> None:
    """A zip file whose pickle is appended a second time, as a bomb."""
    torch.save({"x": torch.ones(1)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        first = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{first}/data.pkl", pickle.dumps(content, protocol=2))


def tensor_file(header: bytes, length: int | None = None, data: bytes = b"\0" * 8) -> bytes:
    """A safetensors file with this header, and this length of it written in front."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def one(**facts: Any) -> bytes:
    """A header of one tensor."""
    return json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **facts}}).encode()


HEADERS = {
    "length of the header 2**63": tensor_file(one(), 2**63),
    "length of the header beyond the file": tensor_file(one(), 1 << 20),
    "length of the header 99 MB": tensor_file(one(), 99_000_000),
    "no header": b"",
    "shape that overflows": tensor_file(one(shape=[2**40, 2**40])),
    "shape of terabytes": tensor_file(one(shape=[2**40])),
    "offsets of terabytes": tensor_file(one(shape=[2**40], data_offsets=[0, 2**42])),
    "offsets backwards": tensor_file(one(data_offsets=[8, 0])),
    "negative shape": tensor_file(one(shape=[-2])),
    "unknown dtype": tensor_file(one(dtype="PICKLE")),
    "nested deeply": tensor_file(b"[" * 1_000_000),
    "no JSON": tensor_file(b"\xff\xfe" * 100),
    "overlap": tensor_file(
        json.dumps({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}).encode()
    ),
}


def headers() -> Iterator[tuple[str, Case]]:
    """Weights and checkpoints whose safetensors header lies; the checkpoint's record agrees with it."""
    for name, content in HEADERS.items():

        def weights(place: Place, content: bytes = content) -> Callable[[], object]:
            path = place.root / "weights.safetensors"
            path.write_bytes(content)
            return lambda: load_backbone(path)

        def checkpoint(place: Place, content: bytes = content) -> Callable[[], object]:
            folder = place.folder / "checkpoints" / "step_00000003"
            folder.mkdir(parents=True)
            (folder / "x.safetensors").write_bytes(content)
            stored = record.StoredFile(len(content), record.sha256(folder / "x.safetensors"))
            record.write_record(folder, record.Record(3, {}, {"x.safetensors": stored}))
            return lambda: load_latest(folder.parent)

        yield f"weights, {name}", weights
        yield f"checkpoint, {name}", checkpoint


def with_record(place: Place, change: Callable[[dict[str, Any]], None]) -> Callable[[], object]:
    """A checkpoint whose record was changed, with a checksum that fits."""
    folder = save(place.folder / "checkpoints", 3)
    content = json.loads((folder / "state.json").read_text())
    content.pop("sha256")
    change(content)
    (folder / "state.json").write_text(json.dumps({**content, "sha256": record.digest(content)}))
    return lambda: load_latest(folder.parent)


def records() -> Iterator[tuple[str, Case]]:
    """Checkpoint records that point elsewhere, or are not what they should be."""
    inside = "student.safetensors"

    def renamed(name: Callable[[Place], str]) -> Case:
        def case(place: Place) -> Callable[[], object]:
            return with_record(place, lambda c: c["files"].update({name(place): c["files"].pop(inside)}))

        return case

    yield "record, ../ in a name", renamed(lambda place: f"../../../../outside/step_00000007/{inside}")
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

    def in_place_of(make: Callable[[Place, Path], None], name: str) -> Case:
        def case(place: Place) -> Callable[[], object]:
            folder = save(place.folder / "checkpoints", 3)
            (folder / name).unlink()
            make(place, folder / name)
            return lambda: load_latest(folder.parent)

        return case

    yield "tensors are a link outside", in_place_of(lambda place, path: path.symlink_to(place.secret / inside), inside)
    yield (
        "record is a link outside",
        in_place_of(lambda place, path: path.symlink_to(place.secret / "state.json"), "state.json"),
    )
    yield "record is a pipe", in_place_of(lambda place, path: os.mkfifo(path), "state.json")
    yield "record of a terabyte", in_place_of(lambda place, path: sparse(path), "state.json")
    yield "record nested deeply", in_place_of(lambda place, path: void(path.write_text("[" * 1_000_000)), "state.json")

    def linked_folder(place: Place) -> Callable[[], object]:
        (place.folder / "checkpoints").mkdir()
        (place.folder / "checkpoints" / place.secret.name).symlink_to(place.secret)
        return lambda: load_latest(place.folder / "checkpoints")

    yield "checkpoint is a link outside", linked_folder


def void(_: object) -> None:
    """Nothing."""


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
            text = json.dumps(known | changes).replace("INSIDE", inside).replace("OUTSIDE", str(place.outside))
            write_text_atomic(manifest.entry_path(place.root, place.run.run_id), json.dumps(sealed(json.loads(text))))
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
        write_text_atomic(manifest.entry_path(place.root, place.run.run_id), '{"x":' * 100_000)
        return lambda: refuse_none(manifest.find_done(place.root, place.run.run_id))

    yield "entry of a terabyte", huge
    yield "entry nested deeply", deep
    yield "run id ../", lambda place: lambda: manifest.read(place.root, "../../outside/secret")


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
            return lambda: runfile.read(place.folder)

        def reproduction(place: Place, tag: str = tag) -> Callable[[], object]:
            path = place.root / "mine.yaml"
            path.write_text(f"runs:\n  x: {{stage: knn, ks: {tag.replace('FUSE', str(place.fuse))}}}\n")
            return lambda: config.load(str(path), STAGES)

        def profile(place: Place, tag: str = tag) -> Callable[[], object]:
            path = place.root / "cluster.yaml"
            path.write_text(f"run_root: {tag.replace('FUSE', str(place.fuse))}\n")
            return lambda: load_profile(str(path))

        def option(place: Place, tag: str = tag) -> Callable[[], object]:
            text = tag.replace("FUSE", str(place.fuse))
            return lambda: config.load("mini", STAGES, [f"pretrain.epochs={text}"])

        yield f"YAML, {name}, run file", run_file
        yield f"YAML, {name}, reproduction", reproduction
        yield f"YAML, {name}, profile", profile
        yield f"YAML, {name}, --set", option

    def changed(**changes: Any) -> Case:
        def case(place: Place) -> Callable[[], object]:
            path = runfile.write(place.root, place.run) / runfile.FILE_NAME
            content = yaml.safe_load(path.read_text())
            content.pop("sha256")
            path.write_text(yaml.safe_dump(sealed(content | changes)))
            return lambda: runfile.read(place.folder)

        return case

    for key in ("stage", "name", "run_id"):
        yield f"run file, {key} ../", changed(**{key: "../../outside"})


def inputs(place: Place) -> Callable[[], object]:
    """A run whose input is said to lie outside; asked whether that is done, as a job does."""
    path = runfile.write(place.root, place.run) / runfile.FILE_NAME
    content = yaml.safe_load(path.read_text())
    content.pop("sha256")
    path.write_text(yaml.safe_dump(sealed(content | {"needs": {"data": "../../outside/secret"}})))
    return lambda: [manifest.find_done(place.root, need) for need in runfile.read(place.folder).needs.values()]


def cases() -> dict[str, Case]:
    """All of them by name."""
    return dict([*bombs(), *headers(), *records(), *entries(), *yamls(), ("run file, input ../", inputs)])


@contextmanager
def watched() -> Iterator[Watch]:
    """Note what is opened and started within the block."""
    WATCH.opened, WATCH.started = [], []
    WATCH.on = True
    try:
        yield WATCH
    finally:
        WATCH.on = False


def contents(folder: Path) -> Mapping[str, bytes]:
    """All files of a folder."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def harm(case: Case, folder: Path) -> tuple[str, float]:
    """What a malicious file did; nothing, when it was refused. And the seconds that took."""
    place = Place(folder)
    act = case(place)
    before, found = contents(place.outside), ""
    with watched() as watch:
        began = time.perf_counter()
        try:
            act()
            found = "not refused"
        except REFUSALS:
            pass
        except BaseException as error:
            found = f"not refused but failed: {type(error).__name__}: {error}"
        seconds = time.perf_counter() - began
    outside = [path for path in watch.opened if path.startswith(str(place.outside))]
    if place.fuse.exists() or watch.started:
        found = f"code ran: {watch.started}"
    elif outside:
        found = f"opened {outside}"
    elif contents(place.outside) != before:
        found = "files outside changed"
    return found, seconds


def run() -> Outcome:
    """Every case, in a folder of its own."""
    outcome, slowest = Outcome(NAME), 0.0
    logging.getLogger().addHandler(logging.NullHandler())
    for name, case in cases().items():
        with tempfile.TemporaryDirectory() as folder:
            found, seconds = harm(case, Path(folder))
        outcome.trials += 1
        slowest = max(slowest, seconds)
        outcome.expect(not found, f"{name}: {found}")
        outcome.expect(seconds < LIMIT_S, f"{name}: took {seconds:.1f} s")
    outcome.note = f"pickles, safetensors headers, records, entries, YAML; slowest refusal {slowest:.2f} s"
    return outcome
