"""Damaged inputs through the command line: one line that names the file,
the traceback only in the log.
"""

import io
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from commands import call_command_line
from PIL import Image

from mugs.data.sources.beton import BetonSource

pytestmark = pytest.mark.slow
YAML = """
name: tiny
runs:
  photos:
    stage: convert
    dataset: photos
    train_dir: {images}
    val_dir: {images}
    resources: {{gpu: false}}
  pretrain:
    stage: pretrain
    needs: {{data: photos}}
    arch: vit_mini
    epochs: 1
    batch_size: 4
    warmup_epochs: 0
    mugs: {{head_hidden: 16, predictor_hidden: 16, head_out: 8, group_bottleneck: 8,
           num_prototypes: 16, queue_size: 16, memory_size: 16}}
    views: {{large_size: 32, small_size: 16, num_small: 1}}
    checkpoint_steps: 1
    resources: {{gpu: false, ranks_per_node: 1}}
  knn:
    stage: knn
    needs: {{data: photos, weights: pretrain}}
    ks: [1]
    resize: 32
    crop: 32
    resources: {{gpu: false, ranks_per_node: 1}}
"""


class Place:
    """A folder with a reproduction of tiny stages, its images and its runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images, self.runs = folder, folder / "images", folder / "runs"

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command line, as a user calls it."""
        return call_command_line(*arguments, folder=self.folder)

    def fails(self, *arguments: str, error: str) -> str:
        """Run, and expect one failed run, told in one line here and in `status`;
        returns that line.
        """
        done = self.call("run", "tiny.yaml", *arguments)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        status = self.call("status", "tiny.yaml")
        assert status.returncode == 1
        for shown in (done.stdout, status.stdout):
            (line,) = (
                text
                for text in shown.splitlines()
                if re.match(rf"\w+ +\w+ +failed .*{error}: ", text)
            )
            (log,) = re.findall(r"^\w+ log: (.*)$", shown, re.M)
        text = Path(log).read_text()
        assert text.index(f": {error}: ") < text.index("Traceback")
        return line

    def path(self, pattern: str) -> Path:
        """The one file below the run root that fits a pattern."""
        (found,) = self.runs.glob(pattern)
        return found


def jpeg(seed: int, size: tuple[int, int] = (40, 36), bands: int = 3, fmt: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], bands), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(
        pixels.squeeze(-1) if bands == 1 else pixels, mode={1: "L", 3: "RGB", 4: "CMYK"}[bands]
    ).save(buffer, fmt)
    return buffer.getvalue()


def new_place(folder: Path) -> Place:
    """Two classes of four images; among them CMYK, a gray PNG and a single pixel."""
    place = Place(folder)
    for label in ("cat", "dog"):
        (place.images / label).mkdir(parents=True)
        for i in range(4):
            (place.images / label / f"{i}.jpg").write_bytes(jpeg(i))
    (place.images / "cat/1.jpg").write_bytes(jpeg(1, bands=4))
    (place.images / "cat/2.png").write_bytes(jpeg(2, bands=1, fmt="PNG"))
    (place.images / "dog/3.jpg").write_bytes(jpeg(3, size=(1, 1)))
    (folder / "tiny.yaml").write_text(YAML.format(images=place.images))
    return place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Images, and nothing run yet."""
    return new_place(tmp_path)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A reproduction whose runs are all done."""
    place = new_place(tmp_path_factory.mktemp("template"))
    done = place.call("run", "tiny.yaml")
    assert done.returncode == 0 and done.stdout.count("finished") == 3, done.stdout + done.stderr
    return place


@pytest.fixture
def done(template: Place, tmp_path: Path) -> Place:
    """A copy of it, to be damaged; a run root may be moved."""
    shutil.copytree(template.folder, tmp_path, dirs_exist_ok=True)
    return Place(tmp_path)


def overwrite(path: Path, at: int, size: int) -> None:
    """Zeros in the middle of a file, whose length stays."""
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(bytes(size))


def forget(done: Place, name: str) -> None:
    """As if a run had not finished."""
    run_id = done.path(f"*/{name}-*").name.removeprefix(f"{name}-")
    (done.runs / "manifest" / f"{run_id}.json").unlink()


def test_all_bad_images_are_named_at_once_and_can_be_left_out(place: Place) -> None:
    bad = {"cat/text.JPEG": b"this is no image", "dog/cut.jpg": jpeg(7)[:500], "dog/empty.jpg": b""}
    for name, content in bad.items():
        (place.images / name).write_bytes(content)
    (place.images / "dog/link.jpg").symlink_to("nowhere.jpg")
    line = place.fails("--only", "photos", error="SourceError")
    assert "4 of 13 files are not usable images" in line
    names = [*bad, "dog/link.jpg"]
    assert all(name in line for name in names)
    left_out = place.call(
        "run", "tiny.yaml", "--only", "photos", "--set", f"photos.allow_bad=[{', '.join(names)}]"
    )
    assert left_out.returncode == 0, left_out.stdout
    assert len(BetonSource(place.path("convert/*/train.beton"))) == 9


def test_empty_class_folders_are_named(place: Place) -> None:
    for name in ("emu", "yak"):
        (place.images / name).mkdir()
    assert "emu, yak" in place.fails("--only", "photos", error="SourceError")


def test_beton_cut_short_is_named_and_converted_again(done: Place) -> None:
    path = done.path("convert/*/train.beton")
    os.truncate(path, path.stat().st_size // 2)
    forget(done, "knn")
    refused = done.call("run", "tiny.yaml", "--only", "knn")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert str(path) in refused.stderr and "error: knn: its input 'data'" in refused.stderr
    repaired = done.call("run", "tiny.yaml", "--only", "photos")
    assert repaired.returncode == 0 and "finished" in repaired.stdout
    assert done.call("verify", "tiny.yaml", "--deep").stdout.endswith("0 problems\n")


def test_damage_inside_a_beton_is_found(done: Place) -> None:
    path = done.path("convert/*/val.beton")
    overwrite(path, int(BetonSource(path).samples["image"]["data_ptr"][5]), 100)
    forget(done, "knn")
    assert f"{path}: sample 5 (dog/0.jpg)" in done.fails("--only", "knn", error="DecodeError")
    plain, deep = done.call("verify", "tiny.yaml"), done.call("verify", "tiny.yaml", "--deep")
    assert plain.returncode == deep.returncode == 1
    assert f"{path}: output 'val' differs" in plain.stderr
    assert f"{path}: sample 5 (dog/0.jpg) is damaged" in deep.stderr
    assert "sample" not in done.call("verify", "tiny.yaml", "--deep", "--every", "2").stderr


def test_checkpoints_cut_short_are_named(done: Place) -> None:
    forget(done, "pretrain")
    files = sorted(done.runs.glob("pretrain/*/checkpoints/*/student.safetensors"))
    for file in files:
        os.truncate(file, 1000)
    line = done.fails("--only", "pretrain", error="CheckpointError")
    assert files and all(str(file) in line for file in files)


def test_verify_looks_through_checkpoints_and_repairs_them(done: Place) -> None:
    folder = done.path("pretrain/*/checkpoints")
    older, newer = sorted(folder.iterdir())
    os.truncate(newer / "student.safetensors", 1000)
    (folder / ".step_00000001.abc.tmp").mkdir()
    (folder / ".step_00000002.abc.tmp").mkdir()
    os.utime(folder / ".step_00000001.abc.tmp", (1e9, 1e9))  # the other may be a write in progress
    found = done.call("verify", "tiny.yaml", "--only", "pretrain")
    assert found.returncode == 1 and f"{newer}/student.safetensors: 1000 bytes" in found.stderr
    assert found.stderr.count("\n") == 2 and "1 good checkpoints, 2 problems" in found.stdout
    repaired = done.call("verify", "tiny.yaml", "--only", "pretrain", "--repair")
    assert repaired.returncode == 0 and "2 repaired, 0 problems" in repaired.stdout, repaired.stderr
    left = {".step_00000002.abc.tmp", f"bad_{newer.name}", older.name}
    assert {path.name for path in folder.iterdir()} == left
    assert done.call("verify", "tiny.yaml").stdout.endswith("1 good checkpoints, 0 problems\n")
    os.truncate(older / "state.json", 10)
    last = done.call("verify", "tiny.yaml", "--repair")
    assert last.returncode == 1 and "no good one to resume from" in last.stderr
    assert {path.name for path in folder.iterdir()} == left, "nothing set aside where none is good"


def test_damaged_weights_are_named(done: Place) -> None:
    forget(done, "knn")
    path = done.path("pretrain/*/weights/teacher.safetensors")
    whole = path.read_bytes()
    overwrite(path, 8, 64)
    assert str(path) in done.fails("--only", "knn", error="WeightsError")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert str(path) in done.fails("--only", "knn", error="DamagedError")


def test_half_written_manifest_entry_is_named_and_its_run_done_again(done: Place) -> None:
    run_id = done.path("knn/*").name.removeprefix("knn-")
    path = done.runs / "manifest" / f"{run_id}.json"
    os.truncate(path, path.stat().st_size // 2)
    checked = done.call("verify", "tiny.yaml")
    assert checked.returncode == 1 and f"{path}: not a readable manifest entry" in checked.stderr
    assert "Traceback" not in checked.stderr
    assert done.call("tables").returncode == 0
    again = done.call("run", "tiny.yaml", "--only", "knn")
    assert again.returncode == 0 and str(path) in again.stderr


def test_damaged_rows_are_named(done: Place) -> None:
    path = done.path("knn/*/rows.csv")
    os.truncate(path, path.stat().st_size - 20)
    shown = done.call("tables")
    name = path.relative_to(done.runs)
    assert shown.returncode == 1, shown.stderr
    assert shown.stderr.count(f"left out: {name}: differs from the SHA-256") == 1, shown.stderr
    again = done.call("run", "tiny.yaml", "--only", "knn")
    assert again.returncode == 0 and f"{path}: result rows differ" in again.stderr
    assert done.call("tables").returncode == 0
