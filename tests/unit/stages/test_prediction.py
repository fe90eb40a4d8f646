"""What `plan` predicts: counted operations, rates of finished runs, the longest chain, disk."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mugs.models.flops import copy_to_meta
from mugs.models.vit import build_vit
from pipeline.manifest import ManifestEntry
from pipeline.spec import StageRun
from stages.commands.prediction import predict_cost
from stages.commands.reproduction import all_runs
from stages.shared.flops import count_finetuning, count_pretraining, find_shape

DATA = ("imagenet.train_dir=/t", "imagenet.val_dir=/v")


def test_a_forward_pass_is_counted_as_torch_counts_it() -> None:
    vit = build_vit("vit_s16")
    vit = copy_to_meta(vit, vit)
    shape = find_shape("vit_s16")
    assert shape is not None
    for size in (224, 96):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vit(torch.empty(1, 3, size, size, device="meta"))
        assert shape.count_forward(size) == counter.get_total_flops()


def test_architectures_by_name() -> None:
    assert find_shape("vit_l16") == replace(find_shape("vit_l16_x"), patch=16)  # type: ignore[type-var]
    assert [find_shape(name) for name in ("vit_mini", "resnet50", "", "vit_h14")] == [None] * 4


def test_operations_of_a_step() -> None:
    shape = find_shape("vit_s16")
    assert shape is not None
    large, small = shape.count_forward(224), shape.count_forward(96)
    found = count_pretraining(shape, large=224, small=96, num_small=10)
    assert found == 3 * (2 * large + 10 * small) + 2 * large
    assert count_finetuning(shape, 224) == 3 * large


@pytest.fixture(scope="module")
def runs() -> list[StageRun]:
    return list(all_runs("mugs_vit_s16_ep100", DATA))


def entry_of(run: StageRun, gpu_hours: float) -> ManifestEntry:
    return ManifestEntry(
        stage=run.stage, name=run.name, run_id=run.run_id, gpus=8, gpu_hours=gpu_hours
    )


def find(runs: list[StageRun], name: str) -> StageRun:
    return next(run for run in runs if run.name == name)


@pytest.mark.parametrize(
    ("gpu", "peak"), [(None, 156.0), ("nvidia_h100_80gb", 494.5), ("gpu:h200", 494.5)]
)
def test_until_a_run_is_done_a_rate_is_assumed(
    runs: list[StageRun], gpu: str | None, peak: float
) -> None:
    found = predict_cost(runs, runs, {}, gpu)
    pretrain = find(runs, "pretrain")
    cost = found.costs[pretrain.run_id]
    flops = pretrain.config.estimate_flops({})
    assert flops is not None and cost.basis == "assumed"
    assert cost.gpu_hours == pytest.approx(flops / (0.25 * peak * 1e12) / 3600)
    assert cost.hours == pytest.approx(cost.gpu_hours / pretrain.resources.gpus)
    assert "assuming 25% of the peak of an" in found.describe()
    assert found.disk_gb > 0


def test_finished_runs_of_the_same_kind_give_the_rate(runs: list[StageRun]) -> None:
    pretrain = find(runs, "pretrain")
    done = {pretrain.run_id: entry_of(pretrain, 40.0)}
    again = replace(pretrain, name="again", run_id="f" * 12)
    found = predict_cost([*runs, again], [*runs, again], done)
    assert found.costs[pretrain.run_id].basis == "done"
    assert found.costs[again.run_id].basis == "measured"
    assert found.costs[again.run_id].gpu_hours == pytest.approx(40.0)
    assert "at the rate of finished runs (TFLOP/s a GPU: pretrain fp32" in found.describe()


def test_the_longest_chain(runs: list[StageRun]) -> None:
    found = predict_cost(runs, runs, {})
    by_id = {run.run_id: run for run in runs}

    def length(run: StageRun) -> float:
        waits = [length(by_id[need]) for need in run.needs.values()]
        return found.costs[run.run_id].hours + max(waits, default=0.0)

    assert not any(run.watched for run in runs)
    assert found.critical_path_hours == pytest.approx(max(map(length, runs)))
    nothing = predict_cost(runs, runs, {run.run_id: entry_of(run, 1.0) for run in runs})
    assert (nothing.gpu_hours, nothing.critical_path_hours, nothing.disk_gb) == (0.0, 0.0, 0.0)


def test_a_run_that_watches_another_ends_with_it() -> None:
    runs = list(all_runs("mini"))
    found = predict_cost(runs, runs, {})
    curve = find(runs, "knn_curve")
    alone = {
        run.run_id: entry_of(run, 1.0) for run in runs if run.name not in ("knn_curve", "pretrain")
    }
    both = predict_cost(runs, runs, alone)
    pretrain = find(runs, "pretrain")
    hours = [both.costs[run.run_id].hours for run in (pretrain, curve)]
    assert both.critical_path_hours == max(hours) and found.critical_path_hours > max(hours)


def test_other_runs_count_with_their_limit(runs: list[StageRun]) -> None:
    found = predict_cost(runs, runs, {})
    convert = find(runs, "imagenet")
    assert found.costs[convert.run_id].basis == "limit"
    assert found.costs[convert.run_id].hours == convert.resources.hours
    assert set(found.to_json()["runs"]) == {run.run_id for run in runs}
