"""42 days on 40 GPUs, preempted every two hours: the share of time that is training,
with times measured here.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from outcome import Outcome
from simulation import Account, simulate

from mugs.checkpoint.background import BackgroundWriter
from mugs.checkpoint.save_load import SavePolicy, StateDicts, load_latest
from pipeline.availability import Conditions, best_checkpoint_interval_s

NAME = "8_availability"
STATE_GB = 6.0  # ViT-L/16: student, teacher, two moments, heads and queues in fp32
# From the end of a preempted job to its start; 7 to 12 seconds on an idle cluster of our own.
QUEUE_S = 30.0
DAYS, GPUS, PREEMPT_S = 42, 40, 7200.0


def measured(*, sample_gb: float = 0.5, times: int = 3) -> tuple[float, float, float]:
    """Stall and time to durable of a save,
    and time from the start of Python to the loaded state, for STATE_GB.

    The best of a few measurements: other work on this machine is not part of the model.
    """
    parts = {"part": {str(i): torch.randn(int(sample_gb * 2**28 / 8)) for i in range(8)}}
    stalls, writes, loads, imports = zip(*(_measure(parts) for _ in range(times)), strict=True)
    scale = STATE_GB / sample_gb
    return min(stalls) * scale, min(writes) * scale, min(imports) + min(loads) * scale


def _measure(parts: StateDicts) -> tuple[float, float, float, float]:
    """Seconds of a save's stall, until it is on disk, of loading, and of the imports."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = BackgroundWriter(folder, SavePolicy())
        writer.save(1, parts, {})
        saved = writer.wait()
        writer.close()
        assert saved is not None
        began = time.monotonic()
        assert load_latest(folder) is not None
        load = time.monotonic() - began
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-c", "import mugs.pretrain.train"],
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return saved.stall_s, saved.durable_s, load, time.monotonic() - began


def run(seeds: int = 20, **size: float) -> Outcome:
    """One simulated training per seed; `size` is that of the measurement."""
    stall, durable, start = measured(**size)
    conditions = Conditions(
        gpus=GPUS,
        stall_s=stall,
        durable_s=durable,
        restart_s=QUEUE_S + start,
        preempt_every_s=PREEMPT_S,
    )
    interval = best_checkpoint_interval_s(conditions)
    found = [simulate(conditions, DAYS * 86400.0, interval, seed) for seed in range(seeds)]
    mean = sum(account.effective for account in found) / seeds
    outcome = Outcome(NAME, seeds)
    for seed, account in enumerate(found):
        outcome.expect(account.effective >= 0.97, f"seed {seed}: {100 * account.effective:.2f}%")
    least = min(account.effective for account in found)
    assumed = (
        f"{DAYS} days of steps, {GPUS} GPUs, state {STATE_GB:g} GB, "
        f"a preemption with warning every {PREEMPT_S / 3600:g} h, "
        f"a failure every {conditions.failure_every_s / 86400:.1f} days "
        "(Llama 3: 419 in 54 days on 16,384 GPUs), "
        f"{QUEUE_S:g} s in the queue"
    )
    here = f"stall {stall:.1f} s, on disk after {durable:.1f} s, start and load {start:.1f} s"
    outcome.note = (
        f"effective training time {100 * mean:.2f}% (least {100 * least:.2f}%): {_mean(found)}; "
        f"assumed: {assumed}; measured here: {here}; "
        f"a checkpoint every {interval / 60:.0f} minutes (Daly)"
    )
    return outcome


def _mean(found: list[Account]) -> str:
    names = ("preemptions", "failures", "stalled_s", "lost_s", "restarting_s")
    means = {name: sum(getattr(account, name) for account in found) / len(found) for name in names}
    hours = {name: means[f"{name}_s"] / 3600 for name in ("stalled", "lost", "restarting")}
    stops = f"{means['preemptions']:.0f} preemptions, {means['failures']:.1f} failures"
    return (
        f"{stops}, {hours['stalled']:.1f} h saving, {hours['lost']:.1f} h lost, "
        f"{hours['restarting']:.1f} h restarting"
    )
