"""Campaign: planted and damaged records of a run root under all commands. None hangs or ends with
a traceback, and what is said of other runs stays as it was.
"""

import csv
import io
import json
import os
import random
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from called import Called, fast_surroundings
from campaign_damage import DAMAGES
from commands_of_users import (
    CHANGING,
    COMPARED,
    DRAWING,
    READING,
    WRITING,
    Command,
    Stage,
    run_command,
)
from outcome import Outcome
from scene import Scene

from pipeline.files import with_checksum

NAME = "9a_records"
Rng = random.Random

# What no field of any record should be.
WRONG_VALUES: list[Any] = [
    None, True, -1, 0, 10**30, 1e300, float("nan"), float("inf"), "", "text", "12", "1e999",
    "a\0b", "\x1b[31m", "a\nb", "../../../etc/passwd", "/etc/passwd", "\ud800", "x" * 5000,
    [], [1], [[]], {}, {"a": 1}, {"": None}, {"a": {"b": [{}]}},
]  # fmt: skip


def change_a_field(content: Any, rng: Rng) -> Any:
    """The same content with one value, somewhere in it, replaced by a wrong one, or one more."""
    inner = [content]
    for value in inner:
        if isinstance(value, dict | list):
            below = value.values() if isinstance(value, dict) else value
            inner += [each for each in below if isinstance(each, dict | list) and each]
    place = rng.choice(inner)
    wrong = rng.choice(WRONG_VALUES)
    if isinstance(place, dict):
        key = rng.choice([*place, *place, *place, "unknown", "format_version"])
        if rng.random() < 0.1:
            place.pop(key, None)
        else:
            place[key] = wrong
    else:
        place[rng.randrange(len(place))] = wrong
    return content


def damage_a_field(path: Path, rng: Rng) -> str:
    """Change a field of a JSON or YAML record, with a checksum that fits; else some bytes."""
    try:
        is_yaml = path.suffix == ".yaml"
        content = yaml.safe_load(path.read_text()) if is_yaml else json.loads(path.read_text())
    except ValueError:
        return damage_bytes(path, rng)
    if not isinstance(content, dict):
        return damage_bytes(path, rng)
    sealed = content.pop("sha256", None) is not None
    changed = change_a_field(content, rng)
    if sealed:
        changed = with_checksum(changed)
    path.write_text(yaml.safe_dump(changed) if is_yaml else json.dumps(changed))
    return "a field"


def damage_bytes(path: Path, rng: Rng) -> str:
    """Damage some bytes, or remove the file."""
    content = path.read_bytes() or b"\n"
    changed = rng.choice(DAMAGES)(content, rng)
    path.unlink()
    if changed is not None:
        path.write_bytes(changed)
    return "bytes"


def _socket(path: Path) -> None:
    short = Path(tempfile.mkdtemp()) / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(short))
    shutil.move(short, path)
    short.parent.rmdir()


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


# What can stand where a file should be.
THINGS: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a socket": _socket,
    "a folder": Path.mkdir,
    "a folder with a file": lambda path: (path.mkdir(), (path / "x.json").touch()),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link to the folder above": lambda path: path.symlink_to(".."),
    "a terabyte": _sparse,
    "nothing": Path.touch,
    "deep brackets": lambda path: path.write_text("[" * 100_000),
    "deep braces": lambda path: path.write_text('{"a":' * 100_000),
    "a number of a million digits": lambda path: path.write_text('{"time": ' + "1" * 10**6 + "}"),
    "one word": lambda path: path.write_text('"word"'),
    "a list": lambda path: path.write_text("[1, 2]"),
    "bytes that are no text": lambda path: path.write_bytes(bytes(range(256))),
    "control characters": lambda path: path.write_text("\x1b]0;x\x07\x00\u202e\r\n" * 9),
    "a line of 9 MB": lambda path: path.write_bytes(b"x" * 9_000_000),
}


def put_a_thing(path: Path, rng: Rng) -> str:
    """Put something else in the place of a file, or of a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = rng.choice(sorted(THINGS))
    THINGS[name](path)
    return name


# Files and folders that are not there, or not as files. NUMBER and RUN are filled in.
PLANTED = (
    "attempts/NUMBER.json", "attempts/NUMBER.failed.json", "attempts/NUMBER.saved.json",
    "attempts/NUMBER.interrupted.json", "attempts/NUMBER.provenance.json",
    "attempts/9999999999.json", "attempts/-1.json", "claims/NUMBER.json",
    "claims/NUMBER.released.json", "canceled.json", "cancel.json", "progress.json",
    "logs/attempt_NUMBER_rank0.log", "logs/7_0.err", "logs/rank0.err", "metrics.jsonl",
    "checkpoints/step_00000009", "checkpoints/step_00000009/state.json",
    "checkpoints/bad_step_00000001", "checkpoints/step_x", "rows.csv", "figure.png",
    "attempts", "claims", "logs", "checkpoints", "weights",
)  # fmt: skip


def choose_a_place(scene: Scene, rng: Rng) -> Path:
    """A path of the run root: a file that is there, or one that is planted."""
    folders = [run.run_dir(scene.root) for run in scene.runs().values()]
    planted = rng.choice(PLANTED).replace("NUMBER", f"{rng.choice([1, 2, 99]):04d}")
    places = [
        *(scene.root / path for path in rng.choices(scene.files(), k=4)),
        rng.choice(folders) / planted,
        rng.choice(folders),
        scene.root / "manifest" / f"{rng.getrandbits(48):012x}.json",
        scene.root / "manifest" / rng.choice(["x", ".x.json", "a b.json", "é.json", "..json"]),
        scene.root / "pretrain" / f"{rng.choice(['odd', 'é', '-'])}-{rng.getrandbits(48):012x}",
        scene.root / rng.choice(["pretrain", "knn", "features", ".mugs-run-root", "report.html"]),
        scene.root / rng.choice(["code", f"code/{os.geteuid()}", f".trash-{os.geteuid()}"]),
    ]
    return rng.choice(places)


def disturb(scene: Scene, rng: Rng) -> tuple[Path, str]:
    """Damage or plant one thing; its path below the run root, and what was done."""
    path = choose_a_place(scene, rng)
    is_file = path.is_file() and not path.is_symlink()
    how = rng.choice([damage_a_field, damage_a_field, damage_bytes] if is_file else [put_a_thing])
    if rng.random() < 0.25:
        how = put_a_thing
    done = how(path, rng)
    return path.relative_to(scene.root), done


def read_states(called: Called) -> dict[str, dict[str, Any]]:
    """What `status --json` says of each run, without the place of its log."""
    rows = json.loads(called.out) if called.out.strip() else []
    return {row["run_id"]: {key: row[key] for key in row if key != "log"} for row in rows}


def read_cells(called: Called) -> dict[str, list[str]]:
    """Cells of ours in `tables --format csv`, by the runs that they come from."""
    cells: dict[str, list[str]] = {}
    for row in csv.DictReader(io.StringIO(called.out)):
        if row["run_ids"]:
            cells.setdefault(row["run_ids"], []).append(row["ours"])
    return cells


def read_leftovers(called: Called, scene: Scene) -> set[str]:
    """Paths below the run root that `clean` lists."""
    found = re.findall(rf"^ *[\d.]+ \w+  {re.escape(str(scene.root))}/([^:]*): ", called.out, re.M)
    return set(found)


class Seen:
    """What the commands say of the runs of a scene."""

    def __init__(self, scene: Scene) -> None:
        self.calls = {name: run_command(scene, command) for name, command in COMPARED.items()}

    def complaints(self) -> list[str]:
        """What is wrong with how they ended."""
        return [f"{name}: {made.complaint}" for name, made in self.calls.items() if made.complaint]

    def states(self, name: str) -> dict[str, dict[str, Any]]:
        """What a `status` says of each run."""
        return read_states(self.calls[name])


def find_affected(scene: Scene, path: Path) -> set[str] | None:
    """Ids of the runs that a change of this path may affect; None if that may be all."""
    runs = scene.runs().values()
    struck = {run.run_id for run in runs if run.run_id in str(path)}
    if len(path.parts) < 2 and not struck:
        return None
    while True:  # and those that need them
        more = {run.run_id for run in runs if struck & set(run.needs.values())} - struck
        if not more:
            return struck
        struck |= more


def compare(scene: Scene, before: Seen, after: Seen, path: Path) -> list[str]:
    """What the commands say else than before of runs that the change does not concern."""
    affected = find_affected(scene, path)
    if affected is None:
        return []
    complaints = []
    for name in ("status --json", "status --json of all"):
        now = after.states(name)
        for run_id, state in before.states(name).items():
            if run_id not in affected and now.get(run_id) != state:
                complaints.append(f"{name}: {run_id}: {now.get(run_id, 'gone')}")
    knn = scene.runs()["knn"].run_id
    if knn not in affected and read_cells(after.calls["tables --format csv"]) != read_cells(
        before.calls["tables --format csv"]
    ):
        complaints.append("tables: the cell of knn changed")
    known = read_leftovers(before.calls["clean"], scene)
    for listed in read_leftovers(after.calls["clean"], scene) - known:
        if not listed.startswith(str(path)) and path.parts[0] not in listed:
            complaints.append(f"clean: lists {listed}")
    return complaints


class Records:
    """The campaign: a scene, and what the commands say of it while it is whole."""

    def __init__(self, folder: Path) -> None:
        self.stage = Stage(folder)
        self.before = Seen(self.stage.scene)
        assert not self.before.complaints(), self.before.complaints()

    def play(self, seed: int, more: Mapping[str, Command]) -> tuple[str, list[str]]:
        """One trial: what was done, and what was wrong with what the commands did then."""
        rng = random.Random(seed)
        with self.stage.copied() as scene:
            path, done = disturb(scene, rng)
            after = Seen(scene)
            complaints = after.complaints() or compare(scene, self.before, after, path)
            for name, command in {**READING, **WRITING, **more, **CHANGING}.items():
                made = run_command(scene, command)
                if made.complaint:
                    complaints.append(f"{name}: {made.complaint}")
        return f"seed {seed}, {path}: {done}", complaints


def play(outcome: Outcome, folder: Path, trials: int, seed: int = 0, *, draw: int = 4) -> None:
    """Trials with seeds from `seed` on; every `draw`-th has the commands that draw."""
    with fast_surroundings():
        campaign = Records(folder)
        for number in range(trials):
            more = DRAWING if draw and number % draw == draw - 1 else {}
            what, complaints = campaign.play(seed + number, more)
            outcome.trials += 1
            outcome.expect(not complaints, f"{what}: {'; '.join(complaints)}")


def run(trials: int = 300) -> Outcome:
    """The campaign at full size."""
    outcome = Outcome(NAME)
    with tempfile.TemporaryDirectory() as folder:
        play(outcome, Path(folder), trials)
    outcome.note = (
        "a field, bytes, or something else in the place of a record, "
        f"under {len({**COMPARED, **READING, **WRITING, **CHANGING})} commands, "
        f"{len(DRAWING)} more for every fourth"
    )
    return outcome
