"""Figures: what they take from results and files, and that they are the same bytes each time."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from safetensors.numpy import load_file, save_file

from pipeline.files import OverwriteError, check_overwrite, write_atomic
from results.figures import tsne
from results.figures.curves import average_in_bins, draw_training_curves, read_curves
from results.figures.figure2 import draw_figure2
from results.figures.gallery import collect_galleries, is_wide, shrink_picture
from results.figures.knn import draw_knn_during_pretraining, draw_knn_over_epochs
from results.figures.style import (
    DARK,
    LIGHT,
    MARK,
    Drawing,
    Format,
    render_image,
    write_figures,
)
from results.runs import FinishedRun
from results.schema import Result
from results.spec import OptionError

Make = Callable[..., list[Result]]
ROOT = Path(__file__).resolve().parents[3]
LINES = [
    {"step": 0, "epoch": 0, "loss": 9.0, "loss_instance": 9.0, "lr": 0.1, "images_per_second": 5.0},
    {"step": 1, "epoch": 0, "loss": 8.0, "loss_instance": 8.0, "lr": 0.2, "images_per_second": 5.0},
    {
        "step": 1,
        "epoch": 0,
        "calibration": {"ours": {"total": 8.5}, "target": {"total": 8.6}, "partial": False},
    },
    {"step": 1, "epoch": 0, "loss": 7.5, "loss_instance": 7.0, "lr": 0.2, "images_per_second": 5.0},
    {"step": 3, "epoch": 1, "loss": 7.0, "loss_instance": 6.0, "lr": 0.1, "images_per_second": 5.0},
]


@pytest.fixture
def pretraining_run(tmp_path: Path) -> tuple[FinishedRun, Path]:
    """A run whose metrics.jsonl has a step twice, a comparison, and a line cut short."""
    run = FinishedRun("pre", "pretrain", "p")
    folder = tmp_path / run.folder
    folder.mkdir(parents=True)
    text = "\n".join(json.dumps(line) for line in LINES)
    (folder / "metrics.jsonl").write_text(text + '\n{"step": 4, "ep')
    return run, tmp_path


def test_figure_2_holds_our_points(results: Make) -> None:
    ours = results({"stage": "linear", "setting": "best epoch", "value": 78.5})
    from matplotlib.figure import Figure

    drawn: Figure = draw_figure2(ours).draw(LIGHT)
    left, right = drawn.axes
    for axes, x in ((left, 21), (right, 800)):
        (points,) = [line for line in axes.get_lines() if line.get_marker() == "*"]
        assert list(points.get_xydata()[0]) == [x, 78.5]
    facts = [
        (axes.get_title("left"), axes.get_xlabel(), axes.get_xscale(), list(axes.get_xticks()))
        for axes in (left, right)
    ]
    assert facts == [
        ("By model size", "Parameters (millions)", "log", [21, 85, 307]),
        ("ViT-S/16, by epochs", "Pretraining epochs", "log", [100, 300, 800]),
    ]
    assert left.get_ylabel() == "Linear probing, top-1 (%)"
    a, b = (
        {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
        for axes in (left, right)
    )
    assert a["Mugs (paper)"] == [[21.0, 78.9], [85.0, 80.6], [307.0, 82.1]]
    assert a["MoCo-v3 (paper)"] == [[21.0, 73.4], [85.0, 76.7], [307.0, 77.7]]
    assert b["Mugs (paper)"] == [[100.0, 76.4], [300.0, 78.2], [800.0, 78.9]]
    assert b["MST (paper)"] == [[100.0, 75.0], [300.0, 76.8]]
    assert not any(
        line.get_marker() == "*"
        for axes in draw_figure2([]).draw(LIGHT).axes
        for line in axes.get_lines()
    )


def test_k_nn_over_epochs_needs_two_points(results: Make) -> None:
    assert draw_knn_over_epochs(results({})) is None
    drawing = draw_knn_over_epochs(results({}, {"epochs": 100, "value": 70.0}))
    assert drawing is not None and "Dashed" in drawing.caption
    (ours,) = [
        line for line in drawing.draw(LIGHT).axes[0].get_lines() if line.get_label() == "_nolegend_"
    ][:1]
    assert ours.get_xydata().tolist() == [[100.0, 70.0], [800.0, 75.1]]
    assert ours.axes.get_xlabel() and ours.axes.get_ylabel() == "k-NN, top-1 (%)"


def test_pretrainings_of_different_kinds_do_not_share_a_line(results: Make) -> None:
    main, short = results({}, {"epochs": 100, "value": 70.0})
    weak = replace(
        short, row=replace(short.row, run_id="weak", value=60.0), variant="weak augmentation"
    )
    dino = replace(short, row=replace(short.row, run_id="dino", method="dino", value=65.0))
    drawing = draw_knn_over_epochs([main, short, weak, dino])
    assert drawing is not None
    labels = drawing.draw(LIGHT).axes[0].get_legend_handles_labels()[1]
    assert [label.split(" on ")[0] for label in labels if "paper" not in label] == [
        "DINO ViT-S/16",
        "Mugs ViT-S/16",
        "Mugs weak augmentation ViT-S/16",
    ]


def test_as_many_series_as_there_are_get_a_colour() -> None:
    for theme in (LIGHT, DARK):
        colors = [theme.one_of(number) for number in range(len(theme.series) + 1)]
        assert len(set(colors)) == len(theme.series) and colors[0] == colors[-1] == theme.ours


def test_k_nn_during_pretraining_is_a_line_per_run(results: Make) -> None:
    assert draw_knn_during_pretraining(results({})) is None
    points = [
        ("a", 0, 10, 5.0),
        ("a", 0, 20, 6.0),
        ("a", 9, 10, 50.0),
        ("a", 9, 20, 40.0),
        ("b", 3, 20, 30.0),
    ]
    rows = [
        {
            "run_id": run,
            "stage": "knn_curve",
            "setting": f"epoch={epoch}, cls, k={k}, T=0.07",
            "value": value,
        }
        for run, epoch, k, value in points
    ]
    drawing = draw_knn_during_pretraining(results(*rows))
    assert drawing is not None
    (axes,) = drawing.draw(LIGHT).axes
    assert [line.get_xydata().tolist() for line in axes.get_lines()] == [
        [[0, 5.0], [9, 50.0]],
        [[3, 30.0]],
    ]
    assert (
        "k=10" in axes.get_lines()[0].get_label() and "ViT-S/16" in axes.get_lines()[0].get_label()
    )


def test_a_name_is_no_formula(results: Make) -> None:
    rows = [
        {
            "run_id": name,
            "arch": name,
            "stage": "knn_curve",
            "setting": f"epoch={epoch}, cls, k=20, T=0.07",
        }
        for name in ("$\\frac{$", "a$b$c")
        for epoch in (1, 2)
    ]
    drawing = draw_knn_during_pretraining(results(*rows))
    assert drawing is not None
    assert b"<svg" in render_image(drawing, LIGHT, "svg")


def test_seeds_of_a_watched_pretraining_are_a_line_with_a_band(results: Make) -> None:
    points = [(0, 0, 5.0), (0, 9, 50.0), (1, 0, 7.0), (1, 9, 54.0)]
    rows = [
        {
            "run_id": f"seed{seed}",
            "seed": seed,
            "stage": "knn_curve",
            "setting": f"epoch={epoch}, cls, k=20, T=0.07",
            "value": value,
        }
        for seed, epoch, value in points
    ]
    # Watched at other epochs, so a mean would jump.
    other = {**rows[0], "run_id": "seed2", "seed": 2, "setting": "epoch=3, cls, k=20, T=0.07"}
    drawing = draw_knn_during_pretraining(results(*rows, other))
    assert drawing is not None
    (axes,) = drawing.draw(LIGHT).axes
    together, alone = axes.get_lines()
    assert together.get_xydata().tolist() == [[0, 6.0], [9, 52.0]]
    assert together.get_label().endswith("2 seeds") and alone.get_label().endswith("seed 2")
    (band,) = axes.collections
    edges = band.get_paths()[0].vertices
    assert edges[:, 1].min() == pytest.approx(6 - 2**0.5)
    assert edges[:, 1].max() == pytest.approx(52 + 8**0.5)


def test_the_caption_names_the_dashed_line_only_where_it_is(results: Make) -> None:
    rows = (
        {"arch": "vit_mini", "epochs": n, "value": 60.0, "dataset": "sklearn_digits"}
        for n in (12, 24)
    )
    drawing = draw_knn_over_epochs(results(*rows))
    assert drawing is not None and "Dashed" not in drawing.caption


def test_curves_take_the_later_of_a_step_written_twice(
    pretraining_run: tuple[FinishedRun, Path],
) -> None:
    run, root = pretraining_run
    curves = read_curves(root / run.folder / "metrics.jsonl")
    assert curves is not None and curves.steps_per_epoch == 2
    assert [line["loss"] for line in curves.steps] == [9.0, 7.5, 7.0]
    assert [line["epoch"] for line in curves.epochs] == [0]
    assert read_curves(root / "nothing.jsonl") is None
    path = root / run.folder / "metrics.jsonl"
    path.write_text(path.read_text() + "[" * 100_000 + "\n7\n")
    assert read_curves(path) == curves


def test_the_band_is_around_the_released_run(pretraining_run: tuple[FinishedRun, Path]) -> None:
    drawing = draw_training_curves(*pretraining_run)
    assert drawing is not None and "± 2%" in drawing.caption
    (band,) = drawing.draw(LIGHT).axes[0].collections
    low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()
    assert (low, high) == (pytest.approx(8.6 * 0.98), pytest.approx(8.6 * 1.02))


@pytest.fixture
def features(tmp_path: Path) -> tuple[FinishedRun, FinishedRun, Path]:
    """Stored features of 90 images of three classes, in two shards, and their data set."""
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    cls = rng.normal(size=(90, 2, 8)) * 0.1 + np.eye(8)[labels][:, None]
    folder = tmp_path / "features/f-feat/features/val"
    folder.mkdir(parents=True)
    for shard, part in enumerate((slice(0, 60), slice(60, 90))):
        tensors = {"cls": cls[part].astype(np.float32), "labels": labels[part].astype(np.int64)}
        save_file(tensors, folder / f"shard_{shard:05d}.safetensors")
    (tmp_path / "side.json").write_text(json.dumps({"classes": ["tench", "goldfish", "shark"]}))
    run = FinishedRun(
        "feat",
        "features",
        "f",
        {"weights": "pre"},
        outputs={"features": "features/f-feat/features"},
    )
    return run, FinishedRun("data", "convert", "d", outputs={"val_sidecar": "side.json"}), tmp_path


def test_t_sne_shows_the_chosen_classes_by_name(
    features: tuple[FinishedRun, FinishedRun, Path],
) -> None:
    run, data, root = features
    chosen = tsne.choose_features(
        root / run.outputs["features"] / "val", ["tench", "goldfish", "shark"], [0, 2]
    )
    assert chosen.names == {0: "tench", 2: "shark"} and len(chosen.features) == 60
    assert np.allclose(np.linalg.norm(chosen.features, axis=1), 1)
    drawing = tsne.draw_tsne(run, root, data)
    assert (
        drawing is not None
        and "tench, goldfish, shark" in drawing.caption
        and "seed 0" in drawing.caption
    )
    assert len(drawing.draw(DARK).axes[0].collections) == 3
    with pytest.raises(OptionError, match=r"--classes: .*no class 7 \(classes: 0 to 2\)"):
        tsne.draw_tsne(run, root, data, [7])


def store_features(root: Path, name: str, method: str, arch: str, epochs: int) -> FinishedRun:
    """A finished run of the stage `features` with 60 images of three classes."""
    rng = np.random.default_rng(epochs)
    labels = np.arange(60) % 3
    folder = root / f"features/{name}/val"
    folder.mkdir(parents=True)
    values = {
        "cls": rng.normal(size=(60, 1, 8)).astype(np.float32),
        "patch_mean": rng.normal(size=(60, 8)).astype(np.float32),
        "labels": labels.astype(np.int64),
    }
    save_file(values, folder / "shard_00000.safetensors")
    info = {"method": method, "arch": arch, "epochs": epochs, "weights": "teacher"}
    if method == "mgc":
        info["trained_feature"] = "patch_mean"
    needs = {"data": "data", "weights": f"w{name}"}
    outputs = {"features": f"features/{name}"}
    return FinishedRun(name, "features", name, needs, info=info, outputs=outputs)


def test_t_sne_of_methods_stand_side_by_side(tmp_path: Path) -> None:
    """Of each method the longest pretraining, embedded on what the method trains."""
    runs = [
        store_features(tmp_path, "moco", "mocov3", "vit_b16_sincos", 300),
        store_features(tmp_path, "short", "mugs", "vit_b16", 100),
        store_features(tmp_path, "long", "mugs", "vit_b16", 400),
        store_features(tmp_path, "mgc", "mgc", "vit_b16", 800),
    ]
    drawing = tsne.draw_methods(runs, tmp_path, None)
    assert drawing is not None and drawing.name == "tsne_methods_vit_b16_data"
    axes = [each for each in drawing.draw(LIGHT).axes if each.get_title()]
    titles = [each.get_title() for each in axes]
    assert titles == ["MoCo-v3, 300 epochs", "Mugs, 400 epochs", "MGC, 800 epochs"]
    assert "mugs: class tokens of run long" in drawing.caption
    assert "mgc: mean patch tokens of run mgc" in drawing.caption
    folder = tmp_path / "features/mgc/val"
    stored = load_file(folder / "shard_00000.safetensors")["patch_mean"]
    shown = tsne.embed_features(stored / np.linalg.norm(stored, axis=1, keepdims=True))
    points = np.concatenate([part.get_offsets() for part in axes[2].collections])
    assert np.allclose(np.sort(points, axis=0), np.sort(shown, axis=0), atol=1e-3)
    assert tsne.draw_methods(runs[1:3], tmp_path, None) is None, "one method"
    assert {tsne.size_of(run) for run in runs} == {"vit_b16"}


def test_pictures_of_stages_are_found_and_made_small(tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    for name, width in (("b", 1800), ("a", 100)):
        Image.new("RGB", (width, 60), "red").save(tmp_path / f"scenes/{name}.png")
        outputs = {"figure_scenes": "scenes", "weights": "w", "figure_x": "gone.png"}
    info = {
        "dataset": "ade20k",
        "captions": {"figure_scenes": "Left, right."},
        "colours": {"figure_scenes": {"a": "#000000"}},
    }
    run = FinishedRun("seg", "ade20k_segmentation", "s", outputs=outputs, info=info)
    (found,) = collect_galleries([run], tmp_path)
    assert [path.name for path in found.paths] == ["a.png", "b.png"] and [
        is_wide(p) for p in found.paths
    ] == [False, True]
    assert found.title == "Semantic segmentation (s), scenes" and found.colors == {"a": "#000000"}
    assert found.caption == "Data: ADE20K; run seg. Left, right."
    content, fmt = shrink_picture(found.paths[1])
    (tmp_path / "out").write_bytes(content)
    assert fmt == "jpeg" and Image.open(tmp_path / "out").size == (900, 30)
    assert shrink_picture(found.paths[0]) == (found.paths[0].read_bytes(), "png")
    noise = np.random.default_rng(0).integers(0, 255, (900, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    assert len(shrink_picture(tmp_path / "noise.png")[0]) < 400_000


def test_every_run_has_its_share_of_the_pictures(tmp_path: Path) -> None:
    """What is left out is said, and no run crowds out another."""
    runs = []
    for run_id, count in (("a", 30), ("b", 30), ("c", 1), ("d", 30), ("e", 0)):
        (tmp_path / run_id).mkdir()
        for index in range(count):
            Image.new("RGB", (2, 2)).save(tmp_path / f"{run_id}/{index:02d}.png")
        runs.append(FinishedRun(run_id, "coco_detection", "d", outputs={"pictures": run_id}))
    found = collect_galleries(runs, tmp_path)
    assert [(g.run.run_id, len(g.paths), g.left_out) for g in found] == [
        ("a", 10, 20),
        ("b", 10, 20),
        ("c", 1, 0),
        ("d", 10, 20),
    ]
    assert found[0].caption == "Run a. 20 more in a." and found[2].caption == "Run c."
    assert len(collect_galleries(runs[:1], tmp_path)[0].paths) == 12


def test_long_curves_are_thinned_to_means() -> None:
    lines = [{"step": step, "loss": float(step % 2)} for step in range(10_000)]
    thin = average_in_bins(lines, 100)
    assert len(thin) == 100 and {line["loss"] for line in thin} == {0.5}
    assert [line["step"] for line in thin[:2]] == [99, 199]
    assert average_in_bins(lines[:3], 100) == lines[:3]


@pytest.mark.slow
def test_the_same_bytes_in_another_process(pretraining_run: tuple[FinishedRun, Path]) -> None:
    _, root = pretraining_run
    code = (
        "import hashlib, pathlib, sys\n"
        "from results.figures.curves import draw_training_curves\n"
        "from results.figures.figure2 import draw_figure2\n"
        "from results.figures.style import LIGHT, render_image\n"
        "from results.runs import FinishedRun\n"
        f"run, root = FinishedRun('pre', 'pretrain', 'p'), pathlib.Path({str(root)!r})\n"
        "drawings = [draw_figure2([]), draw_training_curves(run, root)]\n"
        "for d in drawings:\n    for f in ('svg', 'png'):\n"
        "        print(hashlib.sha256(render_image(d, LIGHT, f)).hexdigest())\n"
    )
    seen = set()
    for seed, place in (("1", "UTC"), ("2", "Asia/Tokyo")):
        env = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
        env |= {"PYTHONHASHSEED": seed, "TZ": place}
        seen.add(
            subprocess.run(
                [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
            ).stdout
        )
    assert len(seen) == 1 and len(seen.pop().splitlines()) == 4
    assert b"<dc:date>" not in render_image(draw_figure2([]), LIGHT, "svg")


@pytest.mark.parametrize("date", ["0", "yesterday"])
def test_a_date_in_the_environment_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, date: str
) -> None:
    """Matplotlib would read it, and fail on what is no number."""
    drawing = Drawing("figure2", "", "", lambda theme: Figure(figsize=(1, 1)))
    plain = render_image(drawing, LIGHT, "svg")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", date)
    assert render_image(drawing, LIGHT, "svg") == plain


def test_nothing_is_drawn_without_material(tmp_path: Path) -> None:
    assert draw_training_curves(FinishedRun("x", "pretrain", "p"), tmp_path) is None
    assert tsne.draw_tsne(FinishedRun("x", "features", "f"), tmp_path, None) is None


@pytest.mark.parametrize("fmt", ["png", "svg"])
def test_a_figure_replaces_only_a_figure(tmp_path: Path, fmt: Format) -> None:
    drawing = Drawing("figure2", "", "", lambda theme: Figure(figsize=(1, 1)))
    ours = write_atomic(tmp_path / "a", render_image(drawing, LIGHT, fmt))
    check_overwrite(ours, MARK, force=False)
    (tmp_path / f"figure2.{fmt}").write_text("my notes")
    with pytest.raises(OverwriteError, match=f"figure2.{fmt}: was not written by this command"):
        write_figures([drawing], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", f"figure2.{fmt}"]
    assert write_figures([drawing], tmp_path, force=True)[0] == tmp_path / "figure2.png"
    assert len(write_figures([drawing], tmp_path)) == 2
