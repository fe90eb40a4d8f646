"""Random damage to the files of a finished run: noticed before any of it is used, and named."""

import json
import logging
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import processes
import tiny_stage
import yaml
from outcome import Outcome

from mugs.checkpoint.record import CheckpointError, list_checkpoints, verify_checkpoint
from mugs.checkpoint.save_load import load_latest
from pipeline import manifest, runfile
from pipeline.spec import ConfigError
from results.store import read_results

NAME = "4_damage"


@contextmanager
def logged() -> Iterator[list[str]]:
    """The messages of all loggers, which go nowhere else."""
    texts: list[str] = []
    handler, root = logging.Handler(), logging.getLogger()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    before, root.handlers = root.handlers, [handler]
    try:
        yield texts
    finally:
        root.handlers = before


def flip(content: bytes, rng: random.Random) -> bytes:
    """One to three bits turned."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def blank(content: bytes, rng: random.Random) -> bytes:
    """A stretch of zeros."""
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice([1, 16, 512]))
    return content[:start] + bytes(end - start) + content[end:]


DAMAGES: list[Callable[[bytes, random.Random], bytes | None]] = [
    flip,
    flip,
    flip,
    lambda content, rng: content[: rng.randrange(len(content))],
    blank,
    lambda content, rng: content + rng.randbytes(rng.randint(1, 20)),
    lambda content, rng: None,
]
"""Damage half of the time a flip; None: the file is gone."""


@contextmanager
def damaged(path: Path, rng: random.Random) -> Iterator[bool]:
    """The file is damaged within the block; whether it really differs."""
    content = path.read_bytes()
    changed = rng.choice(DAMAGES)(content, rng)
    path.unlink()
    if changed is not None:
        path.write_bytes(changed)
    try:
        yield changed != content
    finally:
        path.write_bytes(content)


def parsed(path: Path, parse: Callable[[bytes], object]) -> object:
    """Content of a record however it is spelled; the error where it has none."""
    try:
        return parse(path.read_bytes())
    except Exception as error:
        return error


def error_of(call: Callable[[], object], *refusals: type[Exception]) -> str:
    """What a call refuses with; nothing where it does not."""
    try:
        call()
    except refusals as error:
        return str(error)
    return ""


class Finished:
    """A finished run, whose checkpoints are those of steps 4 and 6."""

    def __init__(self, root: Path) -> None:
        self.root, self.run = root, tiny_stage.tiny_run()
        assert processes.run(lambda: tiny_stage.finish(root) and None) == 0
        self.folder = self.run.run_dir(root)
        self.older, self.newer = list_checkpoints(self.folder / "checkpoints")
        self.entry_path = manifest.entry_path(root, self.run.run_id)
        self.entry = manifest.find_done(root, self.run.run_id)
        self.rows_path = self.entry.rows_path
        self.config_path = self.folder / runfile.FILE_NAME

    def checkpoint(self, rng: random.Random) -> str:
        """Damage to the newer checkpoint: the older one is taken."""
        path = rng.choice(sorted(self.newer.iterdir()))
        before = parsed(path, json.loads)
        with damaged(path, rng) as differs, logged() as said:
            found = load_latest(self.folder / "checkpoints")
            step = found[0] if found else None
            if not differs or (path.suffix == ".json" and parsed(path, json.loads) == before):
                return "" if step == 6 else f"{path}: step {step} from the same content"
            return "" if step == 4 and str(path) in said[0] else f"{path}: step {step}, said {said}"

    def all_checkpoints(self, rng: random.Random) -> str:
        """Damage to both: refused, both named."""
        paths = [folder / "state.safetensors" for folder in (self.older, self.newer)]
        with damaged(paths[0], rng) as one, damaged(paths[1], rng) as other, logged():
            error = error_of(lambda: load_latest(self.folder / "checkpoints"), CheckpointError)
        if not error:
            return "loads" if one and other else ""
        return "" if all(str(path) in error for path in paths) else f"names not both: {error}"

    def older_checkpoint(self, rng: random.Random) -> str:
        """Damage to the older one: a check names the file, the newer one still loads."""
        path = self.older / "more.safetensors"
        with damaged(path, rng) as differs, logged():
            if (found := load_latest(self.folder / "checkpoints")) is None or found[0] != 6:
                return "the newer one does not load"
            error = error_of(lambda: verify_checkpoint(self.older), CheckpointError)
        if not error:
            return f"{path}: not noticed" if differs else ""
        return "" if str(path) in error else f"{path}: {error}"

    def manifest_entry(self, rng: random.Random) -> str:
        """Damage to the entry: the run is not done."""
        before = parsed(self.entry_path, json.loads)
        with damaged(self.entry_path, rng), logged() as said:
            found = manifest.find_done(self.root, self.run.run_id)
            if not self.entry_path.exists():
                return "done without an entry" if found else ""
            if parsed(self.entry_path, json.loads) == before:
                return "" if found else "same content is not done"
            named = any(str(self.entry_path) in text for text in said)
            return "" if found is None and named else f"counts as done or is not named: {said}"

    def rows(self, rng: random.Random) -> str:
        """Damage to the rows: the run is not done, and reading them is refused."""
        with damaged(self.rows_path, rng) as differs, logged() as said:
            done = manifest.find_done(self.root, self.run.run_id) is not None
            _, refused = read_results(self.rows_path, sha256=self.entry.rows_sha256)
            error = "\n".join(refused)
        if not differs:
            return "" if done and not error else error
        named = all(str(self.rows_path) in text for text in (error, " ".join(said)))
        return "" if not done and named else f"done: {done}, {error}, {said}"

    def config(self, rng: random.Random) -> str:
        """Damage to the run file: a job does not start."""
        before = parsed(self.config_path, yaml.safe_load)
        with damaged(self.config_path, rng):
            error = error_of(lambda: runfile.read_run_file(self.folder), ConfigError)
            if self.config_path.exists() and parsed(self.config_path, yaml.safe_load) == before:
                return ""
            return "" if str(self.config_path) in error else f"not noticed or not named: {error}"

    def output(self, rng: random.Random) -> str:
        """Damage to the weights: not done, or refused before they are used."""
        path = self.entry.output("sum")
        with damaged(path, rng) as differs, logged() as said:
            done = manifest.find_done(self.root, self.run.run_id) is not None
            error = " ".join(said)
            if done:
                error += error_of(
                    lambda: manifest.check_intact(self.entry, "sum"), manifest.DamagedError
                )
            return "" if str(path) in error or not differs else f"not noticed: {error}"

    def kinds(self) -> list[Callable[[random.Random], str]]:
        """All of these, checkpoints more often."""
        return [
            *[self.checkpoint] * 3,
            self.all_checkpoints,
            self.older_checkpoint,
            self.manifest_entry,
            self.rows,
            self.config,
            self.output,
        ]


def damage(outcome: Outcome, root: Path, trials: int, seed: int = 0) -> None:
    """Random damage to random files, one at a time, of one finished run."""
    rng, finished = random.Random(seed), Finished(root)
    for trial in range(trials):
        kind = rng.choice(finished.kinds())
        try:
            complaint = kind(rng)
        except Exception as error:
            complaint = f"{type(error).__name__}: {error}"
        outcome.trials += 1
        outcome.expect(not complaint, f"trial {trial}, {kind.__name__}: {complaint}")


def run(trials: int = 10_000) -> Outcome:
    """All of it, in a temporary folder."""
    outcome = Outcome(
        NAME,
        note="flips, cuts, zeros, additions, removals: "
        "checkpoints, entries, rows, configs, weights",
    )
    with tempfile.TemporaryDirectory() as root:
        damage(outcome, Path(root), trials)
    return outcome
