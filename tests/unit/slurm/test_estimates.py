"""Lead time of the warning and advice on checkpoints: from what was measured,
else from the size of the state.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pipeline import attempts
from pipeline.availability import Conditions, best_checkpoint_interval_s, effective_time_ratio
from pipeline.files import write_json_atomic
from pipeline.spec import Resources, StageConfig, StageRun
from slurm.submission.estimates import advise_checkpoint_interval, estimate_lead_seconds
from slurm.submission.profile import ClusterProfile


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    gb: float = 0.0
    batch_size: int = 1024

    def estimate_checkpoint_gb(self) -> float:
        return self.gb


def run(gb: float = 0.0, hours: float = 24.0, gpu: bool = True) -> StageRun:
    return StageRun(
        "train",
        "main",
        "0123456789ab",
        Config(gb=gb),
        {},
        Resources(nodes=5, ranks_per_node=8, hours=hours, gpu=gpu),
        "x:run",
    )


@pytest.mark.parametrize(
    ("gb", "hours", "expected"),
    [
        (0.0, 24.0, 120),
        (6.0, 24.0, 150),  # 30 s at 0.2 GB/s
        (10000.0, 24.0, 17280),  # a fifth of the time
        (1000.0, 0.5, 600),  # ten minutes
        (1000.0, 0.1, 180),  # half of it
    ],
)
def test_lead_time_follows_from_the_state(
    tmp_path: Path, gb: float, hours: float, expected: int
) -> None:
    assert estimate_lead_seconds(ClusterProfile(run_root=tmp_path), run(gb, hours)) == expected


def test_measured_saves_count_more_and_the_profile_most(tmp_path: Path) -> None:
    wanted = run(gb=6.0)
    for seconds in (20.0, 77.5, 30.0):
        number = attempts.start_attempt(wanted.run_dir(tmp_path))
        attempts.record_save(wanted.run_dir(tmp_path), number, step=5, seconds=seconds)
    assert estimate_lead_seconds(ClusterProfile(run_root=tmp_path), wanted) == 198
    assert estimate_lead_seconds(ClusterProfile(run_root=tmp_path, signal_delay_s=44), wanted) == 44


def test_a_short_run_is_not_warned_as_soon_as_it_begins(tmp_path: Path) -> None:
    """What saves nothing would be stopped by it."""
    profile = ClusterProfile(run_root=tmp_path, signal_delay_s=600)
    assert estimate_lead_seconds(profile, run(1.0, hours=0.1)) == 180
    assert estimate_lead_seconds(profile, run(1.0, hours=1.0)) == 600


def test_runs_with_the_same_advice_share_a_line(tmp_path: Path) -> None:
    same, other = (replace(run(gb=6.0), name=name, run_id=name * 12) for name in "ab")
    apart = replace(run(gb=60.0), name="c", run_id="c" * 12)
    lines = advise_checkpoint_interval([same, apart, other], tmp_path)
    assert [line.partition(": ")[0] for line in lines] == ["a, b", "c"]


def test_advice_names_steps_once_the_speed_is_known(tmp_path: Path) -> None:
    wanted = run(gb=6.0)
    (line,) = advise_checkpoint_interval([wanted, run(), run(6.0, gpu=False)], tmp_path)
    assert line.startswith("main: advice: save a checkpoint every ")
    assert "for 40 GPUs: one failure every 53 days" in line and "checkpoint_steps" not in line
    # 6 GB: copied from the device in 3 s, written in 30 s. A step of 1024 images takes 4 s.
    conditions = Conditions(
        gpus=40, stall_s=3.0, durable_s=30.0, restart_s=180.0, preempt_every_s=7200.0
    )
    interval_s = best_checkpoint_interval_s(conditions)
    write_json_atomic(
        wanted.run_dir(tmp_path) / "progress.json", {"rate": 256, "rate_unit": "img/s"}
    )
    (line,) = advise_checkpoint_interval([wanted], tmp_path)
    assert f"every {interval_s / 60:.0f} minutes (checkpoint_steps={interval_s / 4:.0f} at" in line
    assert "each save stops the training for 3.0 s" in line
    assert f"{100 * effective_time_ratio(conditions, interval_s):.1f}% of the time" in line


@pytest.mark.parametrize("note", [{"rate": 9, "rate_unit": "steps/s"}, {"rate_unit": "img/s"}, {}])
def test_a_speed_that_is_not_of_images_gives_no_steps(
    tmp_path: Path, note: dict[str, object]
) -> None:
    wanted = run(gb=6.0)
    write_json_atomic(wanted.run_dir(tmp_path) / "progress.json", note)
    (line,) = advise_checkpoint_interval([wanted], tmp_path)
    assert "checkpoint_steps" not in line
