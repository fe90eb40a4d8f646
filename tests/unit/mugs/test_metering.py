"""What a run measures of itself: counted operations, known peaks, a trace, epoch means beside the
released ones.
"""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from step_cases import SMALLEST, Case, build, write_out_attention
from torch.utils.flop_counter import FlopCounterMode

from mugs.data.sources.folder import FolderSource
from mugs.data.views.config import ViewRecipe
from mugs.engine import metering
from mugs.engine.calibration import EpochMeans
from mugs.engine.peaks import device_peak_tflops
from mugs.engine.step import StepResult
from mugs.finetune.classifier import ImageClassifier
from mugs.methods.calibration import load_calibration_targets
from mugs.methods.mugs import Mugs
from mugs.models.flops import count_image_flops
from mugs.models.vit import build_vit
from mugs.pretrain.config import TrainConfig
from mugs.pretrain.train import pretrain

VIEWS = ViewRecipe(large_size=32, small_size=16, num_small=2)


def block_macs(tokens: int, width: int) -> int:
    """Multiply-adds of a block: qkv 3 L D^2, projection L D^2, MLP 8 L D^2, attention 2 L^2 D."""
    return 12 * tokens * width**2 + 2 * tokens**2 * width


def test_the_count_of_a_step_equals_one_by_hand() -> None:
    method, config = build(Case(SMALLEST)), SMALLEST
    width, depth, patch = 24, 2, 8
    patches = {32: 16, 16: 4}
    embedding = {size: n * width * 3 * patch**2 for size, n in patches.items()}
    blocks = {size: depth * block_macs(n + 1, width) for size, n in patches.items()}
    hidden, out, k = config.head_hidden, config.head_out, config.num_prototypes

    projector = width * hidden + hidden * hidden + hidden * out
    predictor = 2 * out * config.predictor_hidden
    group = width * hidden + hidden * hidden + hidden * config.group_bottleneck
    group += config.group_bottleneck * k
    relation = block_macs(1 + config.num_neighbours, width)
    search = config.memory_size * width

    teacher = 2 * (embedding[32] + blocks[32] + 2 * projector + group + relation + search)
    # Three passes, of which the gradient of the pixels is not needed and the search has none.
    student = sum(
        crops * (2 * embedding[size] + 3 * blocks[size]) for size, crops in ((32, 2), (16, 2))
    )
    student += 4 * (3 * (2 * (projector + predictor) + group + relation) + search)
    # Two InfoNCE losses: 4 crops with the queue, its gradient at once, and 2 x 4 positives both
    # ways.
    losses = 2 * (2 * 4 * config.queue_size * out + 2 * 8 * out)
    # The group loss has no product.

    assert method.count_step_flops(VIEWS, 4) == 2 * 4 * (teacher + student + losses)
    method.accelerate(activation_checkpointing=True)
    assert method.count_step_flops(VIEWS, 1) == 2 * (teacher + student + losses)
    assert all(not p.is_meta and p.grad is None for p in method.student.parameters())


def test_the_count_is_that_of_what_runs() -> None:
    method = build(Case(replace(SMALLEST, drop_path=0.1, head_norm="batch")))
    write_out_attention(method.student, method.teacher)  # the counter knows no fused one
    with FlopCounterMode(display=False) as counter:
        losses, _ = method.compute_losses(method.student, Case(SMALLEST).views(0), 0)
        sum(losses.values()).backward()
    assert method.count_step_flops(VIEWS, 4) == counter.get_total_flops()


def test_the_count_of_a_classifier_equals_one_by_hand() -> None:
    model = ImageClassifier(build_vit(SMALLEST.arch), torch.nn.Linear(24, 10))
    macs = 2 * 16 * 24 * 3 * 8**2 + 3 * (2 * block_macs(17, 24) + 24 * 10)
    assert count_image_flops(model, 32) == 2 * macs


def test_peaks() -> None:
    assert device_peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == 989.0
    assert device_peak_tflops("NVIDIA H100 PCIe", "fp32") == 378.0
    assert device_peak_tflops("NVIDIA A100-SXM4-80GB", "fp32") == 156.0
    assert device_peak_tflops("some other device", "bf16") is None
    fields = metering.Meter(torch.device("cpu"), "fp32", 5e11).fields(4, 2.0)
    assert (fields["tflops"], fields["peak_share"]) == (1.0, None) and fields["peak_memory_mb"] > 10


@pytest.mark.parametrize("status", [None, "Name:\tpython\nVmRSS:\t  123 kB\n"])
def test_peak_memory_where_the_kernel_does_not_tell_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str | None
) -> None:
    monkeypatch.setattr(metering, "PROCESS_STATUS", tmp_path / "status")
    if status is not None:
        (tmp_path / "status").write_text(status)
    assert metering.peak_memory_mb(torch.device("cpu")) > 10


def test_metrics_and_trace_of_a_run(tmp_path: Path, digits: FolderSource) -> None:
    config = TrainConfig(
        epochs=1,
        batch_size=len(digits) // 5,
        base_lr=1e-2,
        warmup_epochs=0,
        views=VIEWS,
        log_steps=2,
        trace_steps=1,
    )
    method = Mugs(replace(SMALLEST, queue_size=80, memory_size=80))
    pretrain(method, digits, config, tmp_path, torch.device("cpu"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    metrics = [line for line in lines if "tflops" in line]
    assert [(m["step"], m["epoch"]) for m in metrics] == [(1, 0), (3, 0), (4, 0)]
    for m in metrics:
        assert m["images_per_second"] * m["step_ms"] == pytest.approx(1000 * config.batch_size)
        flops = method.count_step_flops(VIEWS, config.batch_size)
        assert m["tflops"] * m["step_ms"] == pytest.approx(flops / 1e9)
        assert 0 <= m["data_wait_share"] < 1
        assert m["peak_memory_mb"] > 0 and m["peak_share"] is None
    with gzip.open(tmp_path / "trace" / "rank_0000.json.gz", "rt") as stream:
        names = {event.get("name", "") for event in json.load(stream)["traceEvents"]}
    assert any("aten::" in name for name in names)
    assert [name for name in names if name.startswith("Profiler")] == ["ProfilerStep#2"]


TARGETS = {
    0: {"total": 3.0, "instance": 3.0, "group": 3.0, "local_group": 3.0},
    2: {"total": 2.0, "instance": 2.0, "no_such": 1.0},
}


def test_the_table() -> None:
    assert load_calibration_targets(None) == {}
    assert load_calibration_targets("s100")[0] == {
        "total": 9.0208,
        "instance": 9.5816,
        "group": 7.8942,
        "local_group": 9.5867,
    }
    assert (
        load_calibration_targets("l250")[6]["group"] == 5.4695
        and load_calibration_targets("s300")[6]["total"] == 6.9055
    )
    for run in ("s100", "s300", "l250"):
        assert list(load_calibration_targets(run)) == list(range(7))
        for epoch in load_calibration_targets(run).values():
            parts = sum(epoch[name] for name in ("instance", "group", "local_group"))
            assert epoch["total"] == pytest.approx(parts / 3, abs=2e-4)
    with pytest.raises(ValueError, match="b400"):
        load_calibration_targets("b400")


def train(folder: Path, source: FolderSource) -> list[dict[str, Any]]:
    """Nine steps in three epochs; the lines of metrics.jsonl."""
    torch.set_num_threads(1)
    config = TrainConfig(
        epochs=3,
        batch_size=4,
        base_lr=1e-2,
        warmup_epochs=1,
        steps_per_epoch=3,
        views=ViewRecipe(large_size=32, small_size=16, num_small=1),
        checkpoint_steps=2,
        log_steps=1,
        calibration="s300",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mugs.pretrain.train.load_calibration_targets", {"s300": TARGETS}.__getitem__)
        pretrain(Mugs(SMALLEST), source, config, folder, torch.device("cpu"))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_means_of_a_run(
    digits: FolderSource, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    lines = train(tmp_path, digits)
    found = {line["epoch"]: line["calibration"] for line in lines if "calibration" in line}
    assert set(found) == {0, 2}
    losses = [line for line in lines if "loss" in line]
    for name in ("total", "instance", "group", "local_group"):
        ours = sum(line["loss" if name == "total" else f"loss_{name}"] for line in losses[:3]) / 3
        assert found[0]["ours"][name] == pytest.approx(ours)
        assert found[0]["deviation_percent"][name] == pytest.approx(100 * (ours - 3) / 3)
    assert found[0]["target"] == TARGETS[0] and found[0]["partial"] is False
    assert set(found[2]["ours"]) == {"total", "instance"}
    said = [record.message for record in caplog.records if "calibration, epoch" in record.message]
    assert (
        len(said) == 2
        and "epoch 0: total " in said[0]
        and "(target 3.0000, " in said[0]
        and "only" not in said[0]
    )


def test_a_restart_in_mid_epoch_gives_the_same(digits: FolderSource, tmp_path: Path) -> None:
    straight = [line for line in train(tmp_path, digits) if "calibration" in line]
    (tmp_path / "metrics.jsonl").unlink()
    shutil.rmtree(
        tmp_path / "checkpoints" / "step_00000009"
    )  # as if killed in the last epoch, after step 8 of 9
    again = [line for line in train(tmp_path, digits) if "checkpoint" not in line]
    assert len(again) == 2 and not again[1]["calibration"]["partial"]
    for name, value in straight[-1]["calibration"]["ours"].items():
        assert again[1]["calibration"]["ours"][name] == pytest.approx(value, rel=1e-12)


def test_an_epoch_without_its_start_is_marked() -> None:
    means = EpochMeans({0: {"total": 2.0}}, 4, {})
    for step in (2, 3):
        means.add(step, StepResult(torch.tensor(3.0), {}, torch.tensor(1)))
    comparison = means.compare_with_target(3)
    assert comparison is not None and comparison.as_record()["partial"] is True
    assert (
        EpochMeans({}, 4, means.state()).compare_with_target(3) is None
    )  # resumed without targets
    assert (
        comparison.format_line()
        == "calibration, epoch 0 over 2 of 4 steps only: total 3.0000 (target 2.0000, +50.0%)"
    )
