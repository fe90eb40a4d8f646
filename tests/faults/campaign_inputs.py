"""Campaign: hostile inputs of every kind. Each is used or refused by an error of ours; none hangs,
crashes the process, or fills the memory.

Each is read in a process of its own, with limits of time and memory.
"""

# ruff: noqa: E402

import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

# A forked process has none of the threads that torch computes with, and would wait for them.
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
sys.path[:0] = map(str, (ROOT, TESTS, TESTS / "unit/data", TESTS / "unit/transfer"))

import coco_cases
import numpy as np
import processes
import test_public
import torch
from campaign_damage import DAMAGES
from campaign_records import THINGS, change_a_field
from forked import answer, in_own_process
from malice import REFUSALS
from outcome import Outcome
from PIL import Image
from scene import YAML

from mugs.data.dense.coco import CocoSplit
from mugs.data.dense.label_maps import read_map
from mugs.data.sources.base import open_image
from mugs.data.sources.beton import (
    ALLOCATION,
    FIELD,
    HEADER,
    SAMPLE,
    BetonSource,
    sidecar_path,
)
from mugs.data.sources.convert import convert_to_beton, verify_beton
from mugs.data.sources.decode import decode_rgb
from mugs.data.sources.folder import FolderSource
from mugs.data.sources.listing import from_list
from mugs.data.sources.public import open_public
from mugs.models.vit import build_vit
from mugs.weights.backbone_file import load_backbone, write_backbone_file
from mugs.weights.pickle_file import read_released_checkpoint
from pipeline import config
from pipeline.plan import build_plan
from slurm.submission.profile import load_profile
from stages import STAGES

NAME = "9b_hostile_inputs"
MORE_BYTES = 3 << 30
COMPUTING_S = 10
Rng = random.Random
Read = Callable[[], object]
TEXTS = (
    "=1+1", "$(touch x)", "`touch x`", "a\nb", "a\0b", "\x1b[31m", "../../x", "/etc/passwd", "-x",
    ".x", "x²", "", " ", "x" * 5000, "{", "[" * 500, "&a [*a]", "!!python/name:os.system", "1:1:1",
    "1e999", "0x" + "f" * 500, "null", "~", "true", "\ud800", "\u202e", "9" * 5000, "*", "? x", "%",
)  # fmt: skip


def damage_text(text: str, rng: Rng) -> str:
    """A text with a part cut out, doubled, or replaced by something hostile."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice([0, 1, 5, 40]))
        new = rng.choice([rng.choice(TEXTS), text[start:end] * 2, "", ": ", "\n  - ", "}", "<<: "])
        text = text[:start] + new + text[end:]
    return text


def damage_bytes(content: bytes, rng: Rng) -> bytes:
    """Bytes with damage, mostly where a header may be."""
    for _ in range(rng.randint(1, 4)):
        if content and rng.random() < 0.3:
            content = rng.choice(DAMAGES)(content, rng) or b""
        if content:
            changed = bytearray(content)
            start = rng.randrange(min(len(content), rng.choice([16, 64, 512, 1 << 20])))
            value = rng.choice([b"\xff" * 8, b"\0" * 8, b"\x7f\xff\xff\xff", rng.randbytes(4)])
            changed[start : start + len(value)] = value
            content = bytes(changed)
    return content


def spoil(path: Path, rng: Rng) -> None:
    """Damage a file, or put something else in its place."""
    if rng.random() < 0.2:
        path.unlink()
        THINGS[rng.choice(sorted(THINGS))](path)
    else:
        path.write_bytes(damage_bytes(path.read_bytes(), rng))


def save_bytes(path: Path, text: str) -> Path:
    """Write a text, whatever it holds."""
    path.write_bytes(text.encode(errors="surrogatepass"))
    return path


class Samples:
    """Good inputs, made once; each trial gets a copy to spoil."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        images = folder / "images"
        for number in range(6):
            test_public.picture(images / "ab"[number % 2] / f"{number}.jpg", 30 * number)
        pack = folder / "beton"
        pack.mkdir()
        convert_to_beton(FolderSource(images), pack / "x.beton", threads=1)
        weights = folder / "weights"
        weights.mkdir()
        vit = build_vit("vit_mini")
        meta = {"arch": asdict(vit.config)}
        write_backbone_file(weights / "x.safetensors", dict(vit.state_dict()), meta)
        state = {"teacher": {"x": torch.ones(3)}, "student": {"x": torch.ones(3)}, "epoch": 3}
        torch.save(state, weights / "x.pth")
        test_public.cifar10(folder / "cifar10")
        test_public.inat(folder / "inat19", 2019)
        test_public.cars(folder / "cars")
        objects = [coco_cases.entry(1, 1), coco_cases.entry(2, 2)]
        coco_cases.write_coco(folder / "coco", objects)
        pictures = folder / "pictures"
        pictures.mkdir()
        for fmt in ("jpeg", "png", "tiff", "bmp", "webp", "ppm", "gif"):
            pixels = np.random.default_rng(1).integers(0, 255, (16, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(pictures / f"x.{fmt}", fmt)

    def copy(self, name: str, to: Path) -> Path:
        """A copy of one of the folders."""
        return Path(shutil.copytree(self.folder / name, to / name))


def yaml_file(samples: Samples, place: Path, rng: Rng) -> Read:
    """A reproduction."""
    bundled = "mini", "mini_methods", "paper"
    sources = [ROOT / f"pipeline/configs/{name}.yaml" for name in bundled]
    text = rng.choice([YAML, *(path.read_text() for path in sources)])
    path = save_bytes(place / "x.yaml", damage_text(text, rng))
    return lambda: build_plan(config.load_reproduction(str(path), STAGES))


def override(samples: Samples, place: Path, rng: Rng) -> Read:
    """A value of --set."""
    key = rng.choice(["pretrain.epochs", "digits.dataset", "knn.ks", "pretrain.mugs", "x.y", ""])
    text = f"{key}={rng.choice(TEXTS)}{rng.choice(['', *TEXTS])}"
    return lambda: build_plan(config.load_reproduction("mini", STAGES, [text]))


def run_name(samples: Samples, place: Path, rng: Rng) -> Read:
    """The name of a run, of its data set, or of an input."""
    name = rng.choice(TEXTS) + rng.choice(["", "a"])
    runs: dict[str, Any] = {"a": {"stage": "convert", "dataset": "a", "num_classes": 2}}
    kind = rng.randrange(3)
    if kind == 0:
        runs[name] = runs["a"]
    elif kind == 1:
        runs["a"]["dataset"] = name
    else:
        runs["b"] = {"stage": "knn", "needs": {"data": name, "weights": "a"}}
    with suppress(UnicodeEncodeError):
        text = json.dumps({"name": "x", "runs": runs}, ensure_ascii=rng.random() < 0.5)
        (place / "x.yaml").write_text(text)
    return lambda: build_plan(config.load_reproduction(str(place / "x.yaml"), STAGES))


def profile(samples: Samples, place: Path, rng: Rng) -> Read:
    """A cluster profile."""
    text = (ROOT / "slurm/profiles/a100_8x80g.yaml").read_text()
    if rng.random() < 0.5:
        key = rng.choice(
            ["partition", "account", "run_root", "gpu_type", "env", "sbatch", "stages"]
        )
        value = rng.choice([*TEXTS, {"x": rng.choice(TEXTS)}, {rng.choice(TEXTS): "x"}, 1, [1]])
        path = save_bytes(place / "x.yaml", json.dumps({"run_root": "/x", key: value}))
    else:
        path = save_bytes(place / "x.yaml", damage_text(text, rng))
    return lambda: load_profile(str(path))


def weights(samples: Samples, place: Path, rng: Rng) -> Read:
    """Weights: a .pth or a safetensors file."""
    path = samples.copy("weights", place) / rng.choice(["x.pth", "x.safetensors"])
    spoil(path, rng)
    read = read_released_checkpoint if path.suffix == ".pth" else load_backbone
    return lambda: read(path)  # type: ignore[operator]


def data_set(samples: Samples, place: Path, rng: Rng) -> Read:
    """A public data set: CIFAR's pickles, annotations of iNaturalist, MATLAB's files of Cars."""
    name = rng.choice(["cifar10", "cifar10", "inat19", "cars"])
    root = samples.copy(name, place)
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.suffix != ".jpg"]
    path = rng.choice(files)
    if path.suffix == ".json" and rng.random() < 0.7:
        path.write_text(json.dumps(change_a_field(json.loads(path.read_text()), rng)))
    else:
        spoil(path, rng)

    def read() -> None:
        for split in ("train", "val"):
            source = open_public(name, root, split)
            for index in range(len(source)):
                decode_rgb(source.read(index), source.describe(index))

    return read


def picture(samples: Samples, place: Path, rng: Rng) -> Read:
    """An image, or a map of labels."""
    path = rng.choice(sorted(samples.copy("pictures", place).iterdir()))
    spoil(path, rng)

    def read() -> None:
        with open_image(path) as image:
            size = image.size
        if size[0] * size[1] < 1 << 26:  # as large as images are that people use
            decode_rgb(path.read_bytes(), path.name)

    return read if rng.random() < 0.8 else lambda: read_map(path)


def coco(samples: Samples, place: Path, rng: Rng) -> Read:
    """Annotations of COCO."""
    root = samples.copy("coco", place)
    path = root / "annotations/instances_val2017.json"
    if rng.random() < 0.7:
        path.write_text(json.dumps(change_a_field(json.loads(path.read_text()), rng)))
    else:
        spoil(path, rng)

    def read() -> None:
        split = CocoSplit(root, "val")
        for index in range(len(split)):
            split.find_problem(index)

    return read


def image_list(samples: Samples, place: Path, rng: Rng) -> Read:
    """A list of images."""
    root = samples.copy("images", place)
    lines = [f"{path.relative_to(root)} {path.parent.name}" for path in root.rglob("*.jpg")]
    path = save_bytes(place / "list.txt", damage_text("\n".join(lines), rng))
    if rng.random() < 0.2:
        spoil(path, rng)
    return lambda: from_list(root, path)


def converted(samples: Samples, place: Path, rng: Rng) -> Read:
    """A converted file: its header, its tables, or its sidecar, whose checks of size all fit."""
    path = samples.copy("beton", place) / "x.beton"
    sidecar = json.loads(sidecar_path(path).read_text())
    content = bytearray(path.read_bytes())
    num = len(sidecar["names"])
    value = rng.choice([0, 1, 1 << 31, (1 << 63) - 1, (1 << 64) - 24 * num, len(content) - 3])
    kind = rng.randrange(5)
    if kind == 0:
        header = np.frombuffer(content, HEADER, 1)
        key = rng.choice(HEADER.names)
        header[key] = np.uint64(value).astype(header[key].dtype)
    elif kind == 1:
        offset = HEADER.itemsize + 2 * FIELD.itemsize
        table = np.frombuffer(
            content, ALLOCATION, num, int(np.frombuffer(content, HEADER, 1)[0][4])
        )
        samples_at = np.frombuffer(content, SAMPLE, num, offset)
        samples_at["image"]["data_ptr"][rng.randrange(num)] = value
        table["ptr"] = samples_at["image"]["data_ptr"]
    elif kind == 2:
        content = bytearray(damage_bytes(bytes(content), rng))
    else:
        sidecar = change_a_field(sidecar, rng)
    path.write_bytes(content)
    if isinstance(sidecar, dict) and kind != 3:
        sidecar["file_size"] = len(content)
    sidecar_path(path).write_text(json.dumps(sidecar))
    if kind == 4 and rng.random() < 0.3:
        spoil(sidecar_path(path), rng)

    def read() -> None:
        source = BetonSource(path)
        verify_beton(path)
        for index in range(len(source)):
            with suppress(*REFUSALS):
                decode_rgb(source.read(index), source.describe(index))
        _read_with_ffcv(source)

    return read


def _read_with_ffcv(source: BetonSource) -> None:
    """Let FFCV look at all images, if it is installed: only what passes its check."""
    with suppress(ImportError):
        from ffcv.reader import Reader

        from mugs.data.loading.ffcv_loader import check_image_table

        reader = Reader(str(source.path))
        check_image_table(source, reader)
        mapped = np.memmap(source.path, np.uint8, "r")
        for place, size in zip(reader.alloc_table["ptr"], reader.alloc_table["size"], strict=True):
            assert len(mapped[int(place) : int(place) + int(size)]) == size


KINDS: dict[str, Callable[[Samples, Path, Rng], Read]] = {
    "YAML": yaml_file,
    "--set": override,
    "name": run_name,
    "profile": profile,
    "weights": weights,
    "data set": data_set,
    "image": picture,
    "COCO": coco,
    "list": image_list,
    "converted file": converted,
}


def read_in_a_process(read: Read, said: Path) -> int:
    """Read in a process of its own; how it ended. What went wrong is written into a file."""

    def work() -> int:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, COMPUTING_S)
        signal.alarm(12 * COMPUTING_S)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MORE_BYTES,) * 2)
        sys.stdout = sys.stderr = io.StringIO()
        try:
            read()
        except (*REFUSALS, OSError):
            return 0
        except BaseException as error:
            said.write_text(f"{type(error).__name__}: {error}"[:500], errors="replace")
            return 1
        return 0

    return processes.run(work)


def play(outcome: Outcome, folder: Path, trials: int, seed: int = 0) -> None:
    """Trials of all kinds in turn."""
    (folder / "samples").mkdir()
    samples = Samples(folder / "samples")
    for trial in range(trials):
        name = list(KINDS)[trial % len(KINDS)]
        place = folder / "trial"
        place.mkdir()
        read = KINDS[name](samples, place, Rng(seed + trial))
        said = place / "said"
        code = read_in_a_process(read, said)
        outcome.trials += 1
        why = said.read_text() if said.is_file() else f"ended by {code}"
        outcome.expect(code == 0, f"{name}, seed {seed + trial}: {why}")
        shutil.rmtree(place)


def run(trials: int = 500, seed: int = 0) -> Outcome:
    """The campaign at full size."""
    return in_own_process(__file__, trials, seed)


if __name__ == "__main__":
    outcome = Outcome(NAME)
    with tempfile.TemporaryDirectory() as folder:
        play(outcome, Path(folder), int(sys.argv[2]), int(sys.argv[3]))
    outcome.note = f"{', '.join(KINDS)}; each in a process with limits of time and memory"
    answer(outcome)
