"""Lead time of the warning and advice on checkpoints: from what was measured,
else from the size of the state.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import attempts
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


def test_advice_names_steps_once_the_speed_is_known(tmp_path: Path) -> None:
    wanted = run(gb=6.0)
    (line,) = advise_checkpoint_interval([wanted, run(), run(6.0, gpu=False)], tmp_path)
    assert line.startswith("main: save a checkpoint every ")
    assert "for 40 GPUs: one failure every 53 days" in line and "checkpoint_steps" not in line
    minutes = int(line.split("a checkpoint every ")[1].split()[0])
    write_json_atomic(
        wanted.run_dir(tmp_path) / "progress.json", {"rate": 1024, "rate_unit": "img/s"}
    )
    steps = int(
        advise_checkpoint_interval([wanted], tmp_path)[0].split("checkpoint_steps=")[1].split()[0]
    )
    assert steps == pytest.approx(60 * minutes, abs=31), "a step a second"
