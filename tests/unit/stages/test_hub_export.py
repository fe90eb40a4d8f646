"""`export --format hub`: timm loads the folder from disk, and the Hub reads the card."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from bundle_cases import finish_runs
from huggingface_hub import ModelCard

from mugs.models.config import ViTConfig
from mugs.models.vit import ViT, build_vit
from mugs.weights.backbone_file import load_backbone, write_backbone_file
from mugs.weights.hub_export import describe_for_timm, write_hub_files
from pipeline.files import OverwriteError
from pipeline.spec import ConfigError
from results.card import render_card
from stages.commands.finished_results import collect_finished
from stages.commands.weights import choose_format, export_to_hub, find_evaluated_sizes

SHAPE = ViTConfig(embed_dim=48, depth=2, num_heads=3, patch_size=8, image_size=32)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run root with a pretraining of a small network, and its k-NN."""
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    vit = build_vit(SHAPE)
    path = folder / "teacher.safetensors"
    write_backbone_file(path, dict(vit.state_dict()), {"arch": asdict(SHAPE)})
    return finish_runs(folder, teacher=path.read_bytes()).root


@pytest.fixture(scope="module")
def exported(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for the Hub."""
    folder = tmp_path_factory.mktemp("out") / "hub"
    export_to_hub("pretrain", folder, root, co2=400.0)
    return folder


def load_teacher(root: Path) -> ViT:
    (path,) = root.glob("pretrain/*/teacher.safetensors")
    return load_backbone(path).eval()


@torch.no_grad()
def test_timm_loads_the_folder_and_gives_the_same_features(root: Path, exported: Path) -> None:
    model = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(images), load_teacher(root).cls_feature(images))
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 32, 32)
    assert data["mean"] == [0.485, 0.456, 0.406]
    assert data["crop_pct"] == 224 / 256


def test_the_hub_reads_results_with_verdicts(exported: Path) -> None:
    card = ModelCard.load(exported / "README.md")
    assert card.data.library_name == "timm"
    (found,) = card.data.eval_results
    assert (found.dataset_type, found.metric_type, found.metric_value) == (
        "imagenet1k",
        "accuracy",
        72.3,
    )
    assert found.metric_args == {
        "protocol": "knn",
        "setting": "cls, k=20, T=0.07",
        "paper": 72.3,
        "verdict": "reproduced",
    }
    assert "72.3 | 72.3 | reproduced |" in card.text
    assert "2 kWh of its GPUs (0.8 kg CO2 at 400 g/kWh)" in card.text


@pytest.mark.parametrize(
    ("weights", "title", "words"),
    [
        ("teacher", ", 100 epochs\n", "was pretrained without labels. It turns"),
        ("student", ", 100 epochs, student\n", "The student of"),
        ("initial", ", not trained\n", "**before** its pretraining"),
    ],
)
def test_a_card_says_which_network_it_is_of(
    root: Path, weights: str, title: str, words: str
) -> None:
    collection = collect_finished(root)
    (run,) = (run for run in collection.runs.values() if run.stage == "pretrain")
    card = render_card(run, weights, collection, mark="mark", sizes=(256, 224))
    assert f"# Mugs ViT-S/16{title}" in card and words in card
    # Only the teacher has a result, and with it columns of the paper.
    assert ("| paper | verdict |" in card) == (weights == "teacher")


def test_a_card_without_printed_numbers_has_no_columns_for_them(root: Path) -> None:
    collection = collect_finished(root)
    (run,) = (run for run in collection.runs.values() if run.stage == "pretrain")
    other = [
        replace(result, row=replace(result.row, dataset="sklearn_digits"))
        for result in collection.results
    ]
    card = render_card(
        run, "teacher", replace(collection, results=tuple(other)), mark="mark", sizes=(256, 224)
    )
    assert "| metric | here |\n|---|---|---|---|---:|\n" in card
    assert "verdict" not in card and "Reproduced:" not in card


def test_a_card_holds_nothing_private_and_no_markup_of_others(root: Path, exported: Path) -> None:
    text = (exported / "README.md").read_text()
    assert str(root) not in text
    assert "secret-host" not in text
    assert yaml.safe_load(text.split("---\n")[1])["tags"][0] == "mugs-repro-export"


def test_the_same_run_gives_the_same_bytes_and_others_stay(root: Path, exported: Path) -> None:
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    assert sorted(before) == ["README.md", "config.json", "model.safetensors"]
    export_to_hub("pretrain", exported, root, co2=400.0)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    other = exported.parent / "mine"
    other.mkdir()
    (other / "README.md").write_text("mine")
    with pytest.raises(OverwriteError, match=r"README\.md"):
        export_to_hub("pretrain", other, root)
    assert [path.name for path in other.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    ("evaluations", "expected"),
    [
        ([{"resize": 32, "crop": 32}], (32, 32)),
        ([{"resize": 32, "crop": 32}, {"resize": 32, "crop": 32, "weights": "teacher"}], (32, 32)),
        ([{"resize": 40, "crop": 32}, {"resize": 32, "crop": 32, "weights": "initial"}], (40, 32)),
        ([{"resize": 32, "crop": 32}, {"resize": 48, "crop": 32}], None),
        ([{"k": 10}], None),
        ([], None),
    ],
)
def test_images_are_shown_as_they_were_evaluated(
    root: Path, evaluations: list[dict[str, Any]], expected: tuple[int, int] | None
) -> None:
    runs = collect_finished(root).runs.values()
    (trained,) = (run for run in runs if run.stage == "pretrain")
    (knn,) = (run for run in runs if run.stage == "knn")
    above = {"weights": trained.run_id}
    users = [replace(knn, config=config, upstream=above) for config in evaluations]
    # An evaluation of something else does not count.
    users.append(replace(knn, config={"resize": 9, "crop": 9}, upstream={"weights": "other"}))
    assert find_evaluated_sizes(trained.run_id, "teacher", users) == expected
    sizes = expected or (256, 224)
    assert describe_for_timm(SHAPE, sizes)["pretrained_cfg"]["crop_pct"] == sizes[1] / sizes[0]


def test_timm_transforms_images_as_the_evaluation_did(tmp_path: Path) -> None:
    """32 pixels, all of them taken: not the 36 of which timm's usual share leaves 32."""
    torch.manual_seed(0)
    write_hub_files(tmp_path, build_vit(SHAPE), (32, 32))
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    steps = timm.data.create_transform(**data, is_training=False).transforms
    assert [step.size for step in steps[:2]] in ([32, (32, 32)], [(32, 32), (32, 32)])


def test_what_has_no_card_is_refused(root: Path, tmp_path: Path) -> None:
    (weights,) = root.glob("pretrain/*/teacher.safetensors")
    with pytest.raises(ConfigError, match="for --format hub name a run"):
        export_to_hub(str(weights), tmp_path / "x", root)
    with pytest.raises(ConfigError, match=r"has no weights 'student' .*such weights: none"):
        export_to_hub("pretrain", tmp_path / "x", root, weights="student")
    with pytest.raises(ConfigError, match=r"with such weights: pretrain-[0-9a-f]{12}\)"):
        export_to_hub("knn", tmp_path / "x", root)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "format", "expected"),
    [
        ("a.safetensors", None, "safetensors"),
        ("a.pth", None, "timm"),
        ("a.bin", None, "timm"),
        ("a.bin", "safetensors", "safetensors"),
        ("a.safetensors", "timm", None),
        ("a.pth", "safetensors", None),
    ],
)
def test_the_suffix_tells_the_format(name: str, format: Any, expected: str | None) -> None:
    if expected is None:
        with pytest.raises(ConfigError, match="is not the suffix of --format"):
            choose_format(Path(name), format)
    else:
        assert choose_format(Path(name), format) == expected
