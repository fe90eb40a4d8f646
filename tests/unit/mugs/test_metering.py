"""Metrics of device use: counted operations, known peaks, a trace."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from step_cases import SMALLEST, Case, build
from torch.utils.flop_counter import FlopCounterMode

from mugs.data.mini.digits import materialize_digits
from mugs.data.sources.base import FolderSource
from mugs.data.views.config import ViewRecipe
from mugs.engine import metering
from mugs.engine.metering import Meter, device_peak_tflops
from mugs.methods.mugs import Mugs
from mugs.pretrain.config import TrainConfig
from mugs.pretrain.train import pretrain

VIEWS = ViewRecipe(large_size=32, small_size=16, num_small=2)


def test_the_formula_counts_what_runs() -> None:
    method = build(Case(replace(SMALLEST, num_prototypes=64)))
    for network in (method.student, method.teacher):
        for module in network.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        losses, _ = method.compute_losses(method.student, Case(SMALLEST).views(0), 0)
        sum(losses.values()).backward()
    # Pixels need no gradient, so the patch embedding is counted once too often: 5% in this network, 1% in ViT-S.
    assert method.flops(VIEWS, 4) == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_peaks() -> None:
    assert device_peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == 989.0
    assert device_peak_tflops("NVIDIA H100 PCIe", "fp32") == 378.0
    assert device_peak_tflops("NVIDIA A100-SXM4-80GB", "fp32") == 156.0
    assert device_peak_tflops("some other device", "bf16") is None
    fields = Meter(torch.device("cpu"), "fp32", 5e11).fields(4, 2.0)
    assert (fields["tflops"], fields["peak_share"]) == (1.0, None)
    assert fields["peak_memory_mb"] > 10


@pytest.mark.parametrize("status", [None, "Name:\tpython\nVmRSS:\t  123 kB\n"])
def test_peak_memory_where_the_kernel_does_not_tell_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str | None
) -> None:
    monkeypatch.setattr(metering, "PROCESS_STATUS", tmp_path / "status")
    if status is not None:
        (tmp_path / "status").write_text(status)
    assert metering.peak_memory_mb(torch.device("cpu")) > 10


def test_metrics_and_trace_of_a_run(tmp_path: Path) -> None:
    materialize_digits(tmp_path / "digits")
    config = TrainConfig(
        epochs=1,
        batch_size=4,
        base_lr=1e-2,
        warmup_epochs=0,
        steps_per_epoch=5,
        views=VIEWS,
        log_steps=2,
        profile_steps=2,
    )
    source = FolderSource(tmp_path / "digits" / "val")
    pretrain(Mugs(SMALLEST), source, config, tmp_path / "run", torch.device("cpu"))
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    metrics = [line for line in lines if "tflops" in line]
    assert len(metrics) == 3
    assert all(
        m["tflops"] > 0 and m["peak_memory_mb"] > 0 and m["peak_share"] is None for m in metrics
    )
    with gzip.open(tmp_path / "run" / "trace" / "rank_0000.json.gz", "rt") as stream:
        assert any("aten::" in event.get("name", "") for event in json.load(stream)["traceEvents"])
