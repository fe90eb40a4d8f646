"""`import` and `export`: released weights to ours to timm with the same features;
wrong ones write nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from click.testing import Result
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import run_stage
from mugs.data.loading.evaluation import iter_eval_batches
from mugs.data.sources.open import open_source
from mugs.evaluation.feature_store import FeatureStore
from mugs.models.vit import build_vit
from mugs.weights.backbone_file import read_backbone_file
from pipeline import manifest
from pipeline.reading import validate_model
from pipeline.spec import ConfigError
from pipeline.stage import StageContext
from stages import STAGES, convert, features, import_weights


def cli(*arguments: object) -> Result:
    """The command line in this process."""
    return CliRunner().invoke(run_stage.app, [str(each) for each in arguments])


def refused(*arguments: object) -> str:
    """What `main` would print of a command that fails."""
    result = cli(*arguments)
    assert isinstance(result.exception, ConfigError), (result.output, result.exception)
    return str(result.exception)


def released(path: Path, arch: str) -> Path:
    """A full checkpoint in the released layout, with random weights."""
    torch.manual_seed(0)
    vit = build_vit(arch, relation_depth=1)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    teacher = {f"backbone.{key}": value for key, value in vit.state_dict().items()}
    student = {f"module.{key}": -value for key, value in teacher.items()}
    torch.save(
        {"teacher": {**teacher, "group_head.0.weight": torch.zeros(2, 2)}, "student": student}, path
    )
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of two images."""
    for label, color in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(2):
            shade = tuple(c + 20 * index for c in color)
            Image.new("RGB", (240, 230), shade).save(tmp_path / "images" / label / f"{index}.jpg")
    return tmp_path / "images"


def finish(
    root: Path, module: ModuleType, inputs: Mapping[str, manifest.ManifestEntry], **values: Any
) -> manifest.ManifestEntry:
    """Run a stage in this process, and record it."""
    stage = {convert: "convert", import_weights: "import", features: "features"}[module]
    folder = root / stage / f"{stage}-{stage}0"
    folder.mkdir(parents=True)
    config = validate_model(STAGES[stage].config, values, "x.yaml")
    made = module.run(StageContext(stage, stage, f"{stage}0", folder, inputs, 1), config)
    outputs = {label: manifest.describe_output(root, path) for label, path in made.outputs.items()}
    entry = manifest.ManifestEntry(
        stage=stage, name=stage, run_id=f"{stage}0", outputs=outputs, info=dict(made.info)
    )
    manifest.record_entry(root, entry)
    return entry.at(root)


@pytest.mark.parametrize(
    ("arch", "format", "crop"),
    [pytest.param("vit_s16", "timm", 224, marks=pytest.mark.slow), ("vit_mini", "safetensors", 32)],
)
def test_import_features_export_timm(
    tmp_path: Path, images: Path, arch: str, format: str, crop: int
) -> None:
    root, ours, plain = tmp_path / "runs", tmp_path / "ours.safetensors", tmp_path / "plain"
    done = cli("import", released(tmp_path / "released.pth", arch), "--arch", arch, "--out", ours)
    assert done.exit_code == 0, done.exception
    assert (
        "left out: group_head.0.weight" in done.output
        and "left out: backbone.relation_blocks" in done.output
    )
    data = finish(root, convert, {}, dataset="colors", train_dir=str(images), val_dir=str(images))
    weights = finish(root, import_weights, {}, source="ours", arch=arch, epochs=800, file=str(ours))
    stored = finish(
        root, features, {"data": data, "weights": weights}, blocks=1, resize=crop + 16, crop=crop
    )
    done = cli("export", "import0", "--run-root", root, "--out", plain, "--format", format)
    assert done.exit_code == 0, done.exception
    (call,) = (line for line in done.output.splitlines() if line.startswith("model = "))
    model = eval(call.removeprefix("model = "), {"timm": timm}).eval()
    state = torch.load(plain, weights_only=True) if format == "timm" else load_file(plain)
    model.load_state_dict(state, strict=True)
    batches = iter_eval_batches(open_source(data.output("val")), resize=crop + 16, crop=crop)
    with torch.no_grad():
        theirs = torch.cat([model(batch[0]) for batch in batches])
    wanted, _ = FeatureStore(stored.output("features")).load("val", "cls")
    assert (theirs - wanted).abs().max() < 1e-5 and theirs.std() > 0.01


def test_wrong_weights_stop_with_the_keys_and_nothing_is_written(tmp_path: Path) -> None:
    path, out = released(tmp_path / "r.pth", "vit_mini"), tmp_path / "o.safetensors"
    small, none = released(tmp_path / "s.pth", "vit_s16"), tmp_path / "none.pth"
    wider = refused("import", small, "--arch", "vit_b16", "--out", out)
    keys = tmp_path / "o.keys.txt"
    assert "cls_token is [1, 1, 384] and not [1, 1, 768]" in wider and "\n" not in wider
    assert "more)" in wider and str(keys) in wider and "blocks.9.norm2.weight" in keys.read_text()
    for words, *arguments in (
        ("missing (blocks.10", "import", path, "--arch", "vit_s16"),
        ("No such file", "import", none, "--arch", "vit_s16"),
        ("expected 00", "import", path, "--arch", "vit_mini", "--sha256", "0" * 64),
        ("ends in .safetensors", "import", path, "--arch", "vit_mini", "--out", tmp_path / "o.pth"),
        ("not a backbone file of ours", "export", path),
        ("has only one network", "export", path, "--weights", "student"),
    ):
        assert words in refused(arguments[0], "--out", out, *arguments[1:]), words
    assert not out.exists()


def test_a_timm_file_and_the_student(tmp_path: Path) -> None:
    plain, out = tmp_path / "tiny.pth", tmp_path / "o.safetensors"
    name = "vit_tiny_patch16_224.augreg_in21k"
    torch.save(timm.create_model(name, pretrained=False).state_dict(), plain)
    assert cli("import", plain, "--arch", name, "--source", "timm", "--out", out).exit_code == 0
    path = released(tmp_path / "r.pth", "vit_mini")
    for network in ("teacher", "student"):
        to = ("--out", tmp_path / f"{network}.safetensors")
        assert cli("import", path, "--arch", "vit_mini", "--network", network, *to).exit_code == 0
    teacher, student = (
        read_backbone_file(tmp_path / f"{n}.safetensors")[0] for n in ("teacher", "student")
    )
    assert torch.equal(student["norm.weight"], -teacher["norm.weight"])


def test_a_run_to_export_is_found_or_named(tmp_path: Path, images: Path) -> None:
    root, out = tmp_path / "runs", tmp_path / "plain.pth"
    path = released(tmp_path / "r.pth", "vit_mini")
    entry = finish(root, import_weights, {}, arch="vit_mini", epochs=1, file=str(path))
    for run in ("import", "import-import0", entry.run_dir):
        assert cli("export", run, "--run-root", root, "--out", out).exit_code == 0
    known = refused("export", "knn", "--run-root", root, "--out", out)
    assert "neither a file nor a finished run" in known and "import-import0" in known
    given = ("export", "import", "--run-root", root, "--out", out)
    assert "no weights 'student' (it has: teacher)" in refused(*given, "--weights", "student")
    damaged = bytearray(entry.output("teacher").read_bytes())
    damaged[-1] ^= 1
    entry.output("teacher").write_bytes(damaged)
    assert "differs from the SHA-256" in refused(*given)


def test_another_architecture_than_the_file_of_ours_says(tmp_path: Path) -> None:
    ours, path = tmp_path / "ours.safetensors", released(tmp_path / "r.pth", "vit_mini")
    assert cli("import", path, "--arch", "vit_mini", "--out", ours).exit_code == 0
    given = ("--source", "ours", "--out", tmp_path / "again.safetensors")
    assert cli("import", ours, "--arch", "vit_mini", *given).exit_code == 0
    assert "vit_s16 is ViTConfig(" in refused("import", ours, "--arch", "vit_s16", *given)
