"""The stage `convert`: what `status` shows of it, and what other ranks do."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from mugs.engine import progress as engine_progress
from pipeline.files import hash_file
from pipeline.stage import StageContext
from slurm.status import _describe_progress
from stages import convert
from stages.shared.image_data import ConvertConfig

DIGITS = {"dataset": "digits", "train_dir": "builtin:sklearn_digits"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that a test sets; `clock.now` are seconds."""
    clock = SimpleNamespace(now=0.0)
    fake = SimpleNamespace(
        monotonic=lambda: clock.now, time=lambda: time.time() + 10, perf_counter=time.perf_counter
    )
    monkeypatch.setattr(engine_progress, "time", fake)
    monkeypatch.setattr(convert, "time", fake)
    return clock


def test_the_time_left_is_that_of_all_phases_of_all_splits(
    tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 100 images a second of 1 MB each, and a checksum of 200 MB a second: 120 + 60 seconds
    # in all, for 10,000 training and 2,000 validation images.
    monkeypatch.setattr(convert, "measure_hash_seconds", lambda: 1e-6 / 200)
    progress = convert.ConversionProgress(
        tmp_path / "progress.json", {"train": 10_000, "val": 2000}
    )
    total_s = 120 + 60
    began = 0.0
    seen = set()
    for split, images in (("train", 10_000), ("val", 2000)):
        for phase, seconds, total in (
            ("convert", images / 100, images),
            ("checksum", images / 200, images * 10**6),
        ):
            for tenth in range(1, 11):
                clock.now = began + seconds * tenth / 10
                done = total * tenth // 10
                size = images * 10**6 if phase == "checksum" else done * 10**6
                progress.update(split, phase, done, total, size)  # type: ignore[arg-type]
                if tenth > 1:
                    note = json.loads((tmp_path / "progress.json").read_text())
                    assert note["eta_s"] == pytest.approx(total_s - clock.now, abs=0.1)
                    assert note["rate"] == pytest.approx(100 if phase == "convert" else 200)
                    assert note["phase"] == f"{phase} {split}"
                    seen.add(note["phase"])
                    assert _describe_progress(tmp_path).startswith(f"{phase} {split}: ")
            began = clock.now
        progress.finish(split)
    assert seen == {"convert train", "checksum train", "convert val", "checksum val"}
    assert progress.current is not None
    assert progress.current.done == progress.current.total


def test_a_resumed_conversion_shows_its_own_rate(tmp_path: Path, clock: SimpleNamespace) -> None:
    progress = convert.ConversionProgress(tmp_path / "progress.json", {"train": 100_000})
    for second in range(1, 200):
        clock.now = float(second)
        # 500 images a second for 100 seconds, then 50.
        done = 50_000 + 500 * min(second, 100) // 4 + 50 * max(0, second - 100)
        progress.update("train", "convert", done, 100_000, done * 1000)
    note = json.loads((tmp_path / "progress.json").read_text())
    assert note["rate"] == pytest.approx(50, rel=0.02)
    assert note["eta_s"] == pytest.approx((100_000 - done) / 50, rel=0.05)


def make_context(folder: Path) -> StageContext:
    return StageContext("convert", "digits", "0" * 12, folder, {}, attempt=1)


def test_only_rank_0_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = ConvertConfig(**DIGITS, val_dir="builtin:sklearn_digits")  # type: ignore[arg-type]
    monkeypatch.setenv("RANK", "1")
    assert convert.run(make_context(tmp_path), cfg).outputs == {}
    assert list(tmp_path.iterdir()) == []


def test_a_finished_conversion_leaves_its_outputs_only(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "1.png")
    folder = tmp_path / "run"
    images = str(tmp_path / "images")
    cfg = ConvertConfig(dataset="own", num_classes=2, num_val_images=0, train_dir=images)
    output = convert.run(make_context(folder), cfg)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["progress.json", "train.beton", "train.beton.json"]
    assert output.checksums == {"train": hash_file(folder / "train.beton")}
