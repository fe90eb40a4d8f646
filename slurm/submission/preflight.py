"""Whether a cluster would take the jobs: commands, partition, account, and a dry run of every kind of job."""

from __future__ import annotations

import getpass
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.findings import Finding, ok, skipped, wrong
from pipeline.spec import StageRun
from slurm.shared import queue
from slurm.submission.profile import ClusterProfile, find_gpu_shortages
from slurm.submission.submit import Dependencies, sbatch_text

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol")


def check_cluster(profile: ClusterProfile, runs: Sequence[StageRun]) -> list[Finding]:
    """What is right and wrong with submitting these runs there; nothing is queued."""
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if missing:
        where = "put Slurm's commands on PATH, or do this on a login node"
        return [wrong("slurm", f"not found: {', '.join(missing)}", where)]
    try:
        partitions = queue.list_partitions()
    except queue.SlurmError as error:
        return [wrong("slurm", error, "ask the cluster's administrators why it does not answer")]
    found = [
        ok("slurm", "its commands are here and it answers"),
        _partition(profile, partitions),
        _account(profile),
    ]
    return found if any(f.state == "wrong" for f in found) else [*found, *_jobs(profile, runs)]


def _partition(profile: ClusterProfile, states: Mapping[str, str]) -> Finding:
    if profile.partition is None:
        return ok("partition", "the cluster's default")
    names = profile.partition.split(",")
    if bad := [name for name in names if name not in states]:
        return wrong(
            "partition",
            f"there is no {', '.join(bad)}",
            f"partition: one of {', '.join(sorted(states))}",
        )
    return ok("partition", ", ".join(f"{name} is {states[name]}" for name in names))


def _account(profile: ClusterProfile) -> Finding:
    user = getpass.getuser()
    known = queue.list_accounts(user)
    if not known:
        return skipped("account", f"the cluster tells of no accounts of {user}")
    if profile.account is None:
        return ok("account", f"the default one of {', '.join(known)}")
    if profile.account not in known:
        return wrong(
            "account",
            f"{user} has no account {profile.account}",
            f"account: one of {', '.join(known)}",
        )
    return ok("account", profile.account)


def _jobs(profile: ClusterProfile, runs: Sequence[StageRun]) -> list[Finding]:
    """A dry run for each different set of resources."""
    findings = []
    kinds: dict[str, list[StageRun]] = {}
    for run in runs:
        kinds.setdefault(run.resources.model_dump_json(), []).append(run)
    for alike in kinds.values():
        names = ", ".join(run.name for run in alike)
        if shortages := find_gpu_shortages(profile, alike[:1]):
            remedy = "change the run's resources, or gpus_per_node of the profile"
            findings.append(wrong(f"jobs {names}", shortages[0], remedy))
            continue
        fits, words = _dry_run(profile, alike[0])
        remedy = "change the run's resources, or the profile"
        findings.append(
            ok(f"jobs {names}", words) if fits else wrong(f"jobs {names}", words, remedy)
        )
    return findings


def _dry_run(profile: ClusterProfile, run: StageRun) -> tuple[bool, str]:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / queue.SCRIPT
        script.write_text(
            sbatch_text(run, profile, Dependencies(), profile.run_root / "code"), encoding="utf-8"
        )
        return queue.dry_run_script(script)
