"""The stage of attention maps on a tiny network: pictures, a caption, and what is refused."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from mugs.models.config import ViTConfig
from mugs.models.vit import build_vit
from mugs.weights.backbone_file import write_backbone_file
from pipeline.manifest import ManifestEntry, Output, hash_path
from pipeline.reading import validate_model
from pipeline.stage import StageContext
from stages.attention import AttentionConfig, run

TINY = ViTConfig(embed_dim=16, depth=1, num_heads=2, patch_size=8, image_size=16)


def entry(root: Path, outputs: dict[str, Path], info: dict[str, object]) -> ManifestEntry:
    files = {
        n: Output(path=str(p.relative_to(root)), size=1, sha256=hash_path(p))
        for n, p in outputs.items()
    }
    return ManifestEntry(stage="s", name="n", run_id="aaa", outputs=files, info=info).at(root)


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    """Five validation images and a backbone."""
    (tmp_path / "val/a").mkdir(parents=True)
    for index in range(5):
        Image.new("RGB", (30, 24), (50 * index, 0, 0)).save(tmp_path / f"val/a/{index}.png")
    write_backbone_file(
        tmp_path / "w.safetensors", build_vit(TINY).state_dict(), {"arch": asdict(TINY)}
    )
    facts: dict[str, object] = {"method": "mugs", "arch": "vit_tiny", "epochs": 3, "seed": 5}
    weights = entry(tmp_path, {"teacher": tmp_path / "w.safetensors"}, facts)
    data = entry(tmp_path, {"val": tmp_path / "val"}, {"dataset": "reds", "num_classes": 1})
    (tmp_path / "run").mkdir()
    return StageContext(
        "attention", "n", "bbb", tmp_path / "run", {"weights": weights, "data": data}, 1
    )


def test_pictures_of_images_spread_over_the_data_set(
    context: StageContext, meetings: list[set[Path]]
) -> None:
    out = run(context, AttentionConfig(resize=16, crop=16, num_images=2))
    names = sorted(path.name for path in out.outputs["pictures"].iterdir())
    assert names == ["image_000000.png", "image_000002.png"] and not out.rows
    assert out.info["dataset"] == "reds" and out.info["weights"] == "teacher"
    assert set(out.outputs["pictures"].iterdir()) <= meetings[-1]
    caption = out.info["captions"]["pictures"]
    assert "60% of a head's attention" in caption and "2 heads" in caption
    run(context, AttentionConfig(resize=16, crop=16, images=(4,)))
    assert (context.run_dir / "pictures/image_000004.png").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_images": 6}, "num_images 6: the data set has 5 validation images"),
        ({"images": (0, 5)}, "images 5: the data set has validation images 0 to 4"),
        ({"crop": 20}, "crop 20: expected a multiple of the patch size 8"),
    ],
)
def test_what_there_is_not_is_refused(
    context: StageContext, fields: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        run(
            context, validate_model(AttentionConfig, {"resize": 16, "crop": 16, **fields}, "x.yaml")
        )


def test_a_data_set_without_validation_images(context: StageContext) -> None:
    data = replace(
        context, inputs={**context.inputs, "data": entry(Path("/"), {}, {"dataset": "reds"})}
    )
    with pytest.raises(ValueError, match="'reds' has no validation images"):
        run(data, AttentionConfig())
