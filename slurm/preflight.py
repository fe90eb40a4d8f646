"""Whether a cluster would take the jobs: commands, partition, account, and a dry run of every kind of job."""

from __future__ import annotations

import getpass
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.findings import Finding, ok, skipped, wrong
from pipeline.spec import ConfigError, StageRun
from slurm import queue
from slurm.cluster import ClusterProfile, check_fit
from slurm.submit import clean_environment, sbatch_text

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol")


def preflight(profile: ClusterProfile, runs: Sequence[StageRun]) -> list[Finding]:
    """What is right and wrong with submitting these runs there; nothing is queued."""
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if missing:
        where = "put Slurm's commands on PATH, or do this on a login node"
        return [wrong("slurm", f"not found: {', '.join(missing)}", where)]
    code, out, error = queue.call("scontrol", "-o", "show", "partition")
    if code != 0:
        return [wrong("slurm", (error or out).strip(), "ask the cluster's administrators why it does not answer")]
    found = [ok("slurm", "its commands are here and it answers"), *_partition(profile, out), *_account(profile)]
    return found if any(f.state == "wrong" for f in found) else [*found, *_jobs(profile, runs)]


def _partition(profile: ClusterProfile, shown: str) -> list[Finding]:
    facts = [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in shown.splitlines()]
    states = {fact["PartitionName"]: fact.get("State", "?") for fact in facts if "PartitionName" in fact}
    if profile.partition is None:
        return [ok("partition", "the cluster's default")]
    bad = [name for name in profile.partition.split(",") if name not in states]
    if bad:
        return [wrong("partition", f"there is no {', '.join(bad)}", f"partition: one of {', '.join(sorted(states))}")]
    return [ok("partition", ", ".join(f"{name} is {states[name]}" for name in profile.partition.split(",")))]


def _account(profile: ClusterProfile) -> list[Finding]:
    user = getpass.getuser()
    code, out, _ = queue.call("sacctmgr", "-n", "-P", "show", "associations", f"user={user}", "format=Account")
    known = sorted(set(out.split()))
    if code != 0 or not known:
        return [skipped("account", f"the cluster tells of no accounts of {user}")]
    if profile.account is None:
        return [ok("account", f"the default one of {', '.join(known)}")]
    if profile.account not in known:
        found = f"{user} has no account {profile.account}"
        return [wrong("account", found, f"account: one of {', '.join(known)}")]
    return [ok("account", profile.account)]


def _jobs(profile: ClusterProfile, runs: Sequence[StageRun]) -> list[Finding]:
    """A dry run for each different set of resources."""
    findings = []
    kinds: dict[str, list[StageRun]] = {}
    for run in runs:
        kinds.setdefault(run.resources.model_dump_json(), []).append(run)
    for alike in kinds.values():
        names = ", ".join(run.name for run in alike)
        try:
            check_fit(profile, alike[0].name, alike[0].resources)
        except ConfigError as error:
            findings.append(wrong(f"jobs {names}", error, "change resources, or gpus_per_node of the profile"))
            continue
        code, words = _dry_run(profile, alike[0])
        remedy = "change the run's resources, or the profile"
        findings.append(ok(f"jobs {names}", words) if code == 0 else wrong(f"jobs {names}", words, remedy))
    return findings


def _dry_run(profile: ClusterProfile, run: StageRun) -> tuple[int, str]:
    """Exit code and what `sbatch --test-only` says about the run's job."""
    with tempfile.TemporaryDirectory() as folder, clean_environment():
        script = Path(folder) / queue.SCRIPT
        script.write_text(sbatch_text(run, profile, [], profile.run_root / "code"), encoding="utf-8")
        code, out, error = queue.call("sbatch", "--test-only", str(script))
    said = (error or out).strip().splitlines()
    return code, said[-1].removeprefix("sbatch: ").removeprefix("error: ") if said else f"exit code {code}"
