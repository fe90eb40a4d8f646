"""An image folder of ImageNet's true counts: what commands take, and a conversion killed at random.

The files are hard links to a few hundred small images, so they take little space and time. The
conversion can be made smaller: MUGS_CHAOS_IMAGES is how many images of 1,331,167 it gets.
"""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from outcome import Outcome
from PIL import Image

from mugs.data.sources import beton
from mugs.data.sources.beton import SAMPLE
from pipeline import config, runfile
from pipeline.plan import build_plan
from stages import STAGES

NAME = "9_imagenet_size"
ROOT = Path(__file__).resolve().parents[2]
COUNTS = {"train": 1_281_167, "val": 50_000}
CLASSES = 1000
POOL = 256
# Of a command, the second time that it sees the data.
MAX_CPU_S = 2.0
MAX_BYTES = 500e6
# Of all kills together.
MAX_LOST_S = 180.0


def scale_counts(images: int) -> dict[str, int]:
    """Return the counts of both splits for about so many images."""
    share = images / sum(COUNTS.values())
    return {split: max(CLASSES, round(share * count)) for split, count in COUNTS.items()}


def write_pool(root: Path) -> list[Path]:
    """Write the images that all files are links to, in turn."""
    rng = np.random.default_rng(0)
    pool = [root / f"{number}.jpg" for number in range(POOL)]
    root.mkdir(parents=True)
    for path in pool:
        side = int(rng.integers(8, 24))
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(path)
    return pool


def write_folders(root: Path, counts: dict[str, int], pool: Sequence[Path]) -> None:
    """Write both splits as image folders, an hour old."""
    for split, count in counts.items():
        for label in range(CLASSES):
            (root / split / f"n{label:08d}").mkdir(parents=True)
        for index, (folder, name) in enumerate(iter_names(count)):
            os.link(pool[index % POOL], root / split / folder / name)
    # What was written just now might change again, and would not be trusted.
    then = time.time() - 3600
    for split in counts:
        for path in (*(root / split).iterdir(), root / split):
            os.utime(path, (then, then))


def iter_names(count: int) -> Iterator[tuple[str, str]]:
    """Yield class and file name of each image, in the order of the data set."""
    for label in range(CLASSES):
        members = count // CLASSES + (label < count % CLASSES)
        for number in range(members):
            yield f"n{label:08d}", f"{number:07d}.JPEG"


def hash_expected(pool: Sequence[Path], count: int) -> str:
    """Return the SHA-256 of the `.beton` file of a split that nothing interrupted."""
    images = [path.read_bytes() for path in pool]
    widths = []
    for path in pool:
        with Image.open(path) as image:
            widths.append(image.width)
    samples = np.zeros(count, SAMPLE)
    chosen = np.arange(count) % POOL
    sizes = np.array([len(image) for image in images])[chosen]
    samples["image"]["width"] = samples["image"]["height"] = np.array(widths)[chosen]
    samples["label"] = [int(folder[1:]) for folder, _ in iter_names(count)]
    with tempfile.TemporaryFile() as stream:
        position = beton.find_first_page(count)
        for index, size in enumerate(sizes.tolist()):
            position = beton.place_image(position, size)
            samples["image"]["data_ptr"][index] = position
            stream.seek(position)
            stream.write(images[index % POOL])
            position += size
        beton.write_tables(stream, samples, sizes, position)
        stream.seek(0)
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class Ended:
    """A process that has ended; its CPU seconds are also of processes that it waited for."""

    code: int
    cpu_s: float
    peak_bytes: int


def wait_for(process: "subprocess.Popen[bytes]") -> Ended:
    """Wait for a process."""
    peak = 0
    while not has_ended(process):
        peak = read_peak_bytes(process.pid) or peak
        time.sleep(0.05)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Ended(process.returncode, used.ru_utime + used.ru_stime, peak)


def has_ended(process: "subprocess.Popen[bytes]") -> bool:
    """Return whether a process has ended; whoever waits for it still learns what it has used."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def read_peak_bytes(process: int) -> int:
    """Return the most memory that a process has had so far; 0 once it has ended.

    The `ru_maxrss` of a process begins with the memory of the one that started it.
    """
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


class Folders:
    """The folder of a campaign, the settings that lead to its images, and a Slurm for them."""

    def __init__(self, folder: Path, images: Path, counts: dict[str, int]) -> None:
        self.folder = folder
        self.root = folder / "root"
        self.settings = [f"imagenet.{split}_dir={images}/{split}" for split in counts]
        self.settings += [f"imagenet.num_{split}_images={n}" for split, n in counts.items()]
        self.log = folder / "log"
        (folder / "bin").mkdir(parents=True)
        for name, text in (("sbatch", "echo 7"), ("squeue", ""), ("scontrol", "exit 1")):
            (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / "bin" / name).chmod(0o755)
        (folder / "cluster.yaml").write_text(f"run_root: {self.root}\n")

    def start(self, *command: str, **more: str) -> "subprocess.Popen[bytes]":
        """Start a Python command in the checkout; it has a cache of its own."""
        environment = {
            **os.environ,
            **more,
            "MUGS_CACHE_DIR": str(self.folder / "cache"),
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
        }
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=log
            )

    def call(self, command: str, *more: str) -> Ended:
        """Run a command of the command line on these images."""
        options = [option for setting in self.settings for option in ("--set", setting)]
        return wait_for(self.start("run_stage.py", command, "mugs_vit_s16_ep100", *options, *more))


def check_commands(outcome: Outcome, place: Folders) -> None:
    """`plan`, `doctor` and `submit` look at the files once."""
    root = ("--run-root", str(place.root))
    first = place.call("doctor", *root)
    # Its own memory: torch and FFCV are imported in another process, once a day.
    outcome.note += f"first doctor {first.cpu_s:.0f} s of CPU, {first.peak_bytes / 1e6:.0f} MB"
    outcome.expect(first.peak_bytes < MAX_BYTES, f"doctor: {first.peak_bytes / 1e6:.0f} MB")
    for command, more in (
        ("plan", root),
        ("doctor", root),
        ("submit", ("--cluster", f"{place.folder}/cluster.yaml", "--only", "imagenet")),
    ):
        outcome.trials += 1
        ended = place.call(command, *more)
        said = place.log.read_text(errors="replace")
        outcome.note += f"; {command} {ended.cpu_s:.2f} s, {ended.peak_bytes / 1e6:.0f} MB"
        outcome.expect(ended.cpu_s < MAX_CPU_S, f"{command}: {ended.cpu_s:.1f} s of CPU")
        outcome.expect(ended.peak_bytes < MAX_BYTES, f"{command}: {ended.peak_bytes / 1e6:.0f} MB")
        fine = ended.code == 0 and "to do:" not in said
        outcome.expect(fine, f"{command}: exit code {ended.code}: {said[-500:]}")


def convert_with_kills(
    outcome: Outcome, place: Folders, counts: dict[str, int], kills: int, seed: int
) -> Path:
    """Kill the job of a conversion at random images, then let it end; return its folder."""
    runs = build_plan(config.load_reproduction("mugs_vit_s16_ep100", STAGES, place.settings))
    run = next(run for run in runs if run.name == "imagenet")
    run_dir = runfile.write_run_file(place.root, run)
    total = sum(counts.values())
    rng = random.Random(seed)
    ends = sorted(rng.uniform(0.05, 0.95) * total for _ in range(kills))
    lost_s = peak = 0.0
    saved = 0
    costs = []
    began = time.monotonic()
    for number, end in enumerate([*ends, float("inf")]):
        outcome.trials += 1
        process = place.start("-m", "slurm.node.job", str(run_dir), MUGS_LAUNCH=f"launch{number}")
        note, start_peak = wait_until(process, run_dir, end)
        peak = max(peak, start_peak)
        if note is not None:
            process.send_signal(signal.SIGKILL)
        ended = wait_for(process)
        before = saved
        done = note["done"] if note else total
        if note:
            saved = count_saved(run_dir, counts)
            lost_s += max(0.0, done - saved) / max(note["rate"], 1e-9)
        else:
            said = place.log.read_text(errors="replace")
            last = end == float("inf")
            outcome.expect(last and ended.code == 0, f"exit code {ended.code}: {said[-500:]}")
        costs.append(f"{1000 * ended.cpu_s / max(1, done - before):.2f}")
    took = time.monotonic() - began
    outcome.note += (
        f"; conversion of {total:,} images with {kills} kills: {took:.0f} s, of it "
        f"{lost_s:.0f} s twice, {peak / 1e6:.0f} MB, ms of a core per image from start to start: "
        f"{', '.join(costs)}"
    )
    outcome.expect(lost_s < MAX_LOST_S, f"{lost_s:.0f} s were lost")
    outcome.expect(peak < MAX_BYTES, f"the conversion took {peak / 1e6:.0f} MB")
    return run_dir


def wait_until(
    process: "subprocess.Popen[bytes]", run_dir: Path, end: float
) -> tuple[dict[str, float] | None, float]:
    """Wait until a conversion is at an image; return its progress, or None if it ended before.

    Also returns the most memory that it has had so far: a process that has ended no longer tells.
    """
    peak = 0
    while not has_ended(process):
        peak = read_peak_bytes(process.pid) or peak
        time.sleep(0.05)
        path = run_dir / "progress.json"
        note = json.loads(path.read_text()) if path.exists() else {}
        if note.get("unit") == "images" and note["done"] >= end and note["rate"]:
            return dict(note), peak
    return None, peak


def count_saved(run_dir: Path, counts: dict[str, int]) -> int:
    """Return the images that the next start does not convert again."""
    saved = 0
    for split, count in counts.items():
        if (run_dir / f"{split}.beton.json").exists():
            saved += count
        for path in run_dir.glob(f"{split}.beton.parts/*.npz"):
            saved += len(np.load(path)["rows"])
    return saved


def run(
    images: int = int(os.environ.get("MUGS_CHAOS_IMAGES") or sum(COUNTS.values())),
    command_images: int = sum(COUNTS.values()),
    kills: int = 3,
    seed: int = 0,
) -> Outcome:
    """Do it all in a temporary folder: commands at the true counts, the conversion at `images`."""
    outcome = Outcome(NAME)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pool = write_pool(folder / "pool")
        for name, count in (("commands", command_images), ("conversion", images)):
            counts = scale_counts(count)
            if name == "commands" or images != command_images:
                source = folder / name / "images"
                write_folders(source, counts, pool)
            place = Folders(folder / name / "place", source, counts)
            if name == "commands":
                check_commands(outcome, place)
        run_dir = convert_with_kills(outcome, place, counts, kills, seed)
        for split, count in counts.items():
            path = run_dir / f"{split}.beton"
            if not path.exists():
                outcome.expect(False, f"{path.name} was not written")
                continue
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            outcome.expect(found == hash_expected(pool, count), f"{split}.beton has other bytes")
        left = [path.name for path in run_dir.iterdir() if path.name.endswith((".parts", ".tmp"))]
        outcome.expect(not left, f"left over: {', '.join(left)}")
    return outcome
