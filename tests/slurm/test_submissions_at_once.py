"""Many submissions of one plan at once on a real Slurm, some of them killed:
each run is in the queue exactly once.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.provenance import code_root

pytestmark = pytest.mark.slurm

PLAN = """
name: held
runs:
  digits:
    stage: convert
    dataset: sklearn_digits
    num_classes: 10
    train_dir: builtin:sklearn_digits
    val_dir: builtin:sklearn_digits
    resources: {gpu: false, ranks_per_node: 1, cpus_per_rank: 1}
  one: {stage: knn, needs: {data: digits, weights: pretrain}}
  two: {stage: knn, needs: {data: digits, weights: pretrain}, ks: [7]}
  pretrain: {stage: pretrain, needs: {data: digits}, arch: vit_mini, epochs: 1, batch_size: 64}
"""
FORKS = """
import os, sys, time, random
from slurm.submission.profile import load_profile
from slurm.submission.submit import submit
from pipeline import config
from pipeline.plan import build_plan
from stages import STAGES
runs, profile = build_plan(config.load_reproduction(sys.argv[1], STAGES)), load_profile(sys.argv[2])
for seed in range(int(sys.argv[3])):
    if os.fork() == 0:
        os.setsid()
        time.sleep(random.Random(seed).random())
        print(os.getpid(), flush=True)
        submit(runs, profile)
        os._exit(0)
"""


def test_each_run_is_queued_once(slurm_cluster: Any, tmp_path: Path) -> None:
    plan, profile = tmp_path / "held.yaml", tmp_path / "cluster.yaml"
    plan.write_text(PLAN)
    text = f"run_root: {tmp_path}/runs\npartition: low\ncpus_per_rank: 1\nmemory_gb: 1\n"
    profile.write_text(text + "sbatch: {begin: now+1hour}\n")
    command = [sys.executable, "-c", FORKS, str(plan), str(profile)]
    forks = subprocess.Popen([*command, "16"], stdout=subprocess.PIPE, text=True, cwd=code_root())
    assert forks.stdout is not None
    rng = random.Random(4)
    for line in forks.stdout:
        if rng.random() < 0.4:
            time.sleep(rng.random() * 0.3)
            for kill in (os.killpg, os.kill) if rng.random() < 0.5 else (os.kill,):
                with contextlib.suppress(ProcessLookupError):
                    kill(int(line), signal.SIGKILL)
    time.sleep(1)
    subprocess.run([*command, "1"], check=True, capture_output=True, cwd=code_root(), timeout=120)
    end, jobs = time.monotonic() + 60, Counter[str]()
    while len(jobs) < 4 and time.monotonic() < end:
        jobs = Counter(slurm_cluster.run("squeue", "-h", "-o", "%j").stdout.split())
        time.sleep(0.5)
    time.sleep(3)
    jobs = Counter(slurm_cluster.run("squeue", "-h", "-o", "%j").stdout.split())
    assert sorted(jobs.values()) == [1, 1, 1, 1], jobs
