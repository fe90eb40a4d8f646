"""Whether a cluster would take the jobs: commands, partition, account, and a dry run of each job.

Nothing is queued.
"""

import getpass
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.findings import Finding, ok, skipped, wrong
from pipeline.spec import StageRun
from slurm.shared import queue
from slurm.submission.profile import ClusterProfile, find_gpu_shortages
from slurm.submission.submit import Dependencies, sbatch_text

_COMMANDS = ("sbatch", "squeue", "scancel", "scontrol")


def check_cluster(profile: ClusterProfile, runs: Sequence[StageRun]) -> list[Finding]:
    """Return what is right and wrong with submitting these runs to the cluster."""
    missing = [command for command in _COMMANDS if shutil.which(command) is None]
    if missing:
        remedy = "add Slurm's commands to PATH, or run this on a login node"
        return [wrong("slurm", f"not found: {', '.join(missing)}", remedy)]
    try:
        partitions = queue.list_partitions()
    except queue.SlurmError as error:
        return [wrong("slurm", error, "ask the cluster's administrators why it does not answer")]
    findings = [
        ok("slurm", "its commands are here and it answers"),
        _check_partition(profile, partitions),
        _check_account(profile),
    ]
    # With a wrong partition or account, every dry run would only repeat that.
    if any(finding.state == "wrong" for finding in findings):
        return findings
    # A reproduction has dozens of runs and few kinds of jobs: one dry run for each set of
    # resources.
    alike: dict[str, list[StageRun]] = defaultdict(list)
    for run in runs:
        alike[run.resources.model_dump_json()].append(run)
    return findings + [_check_job(profile, group) for group in alike.values()]


def _check_partition(profile: ClusterProfile, states: Mapping[str, str]) -> Finding:
    if profile.partition is None:
        return ok("partition", "the cluster's default")
    names = profile.partition.split(",")
    if unknown := [name for name in names if name not in states]:
        remedy = f"set partition to one of {', '.join(sorted(states))}"
        return wrong("partition", f"there is no {', '.join(unknown)}", remedy)
    return ok("partition", ", ".join(f"{name} is {states[name]}" for name in names))


def _check_account(profile: ClusterProfile) -> Finding:
    user = getpass.getuser()
    accounts = queue.list_accounts(user)
    if not accounts:
        return skipped("account", f"the cluster lists no accounts of {user}")
    choices = ", ".join(accounts)
    if profile.account is None:
        return ok("account", f"the default one of {choices}")
    if profile.account not in accounts:
        remedy = f"set account to one of {choices}"
        return wrong("account", f"{user} has no account {profile.account}", remedy)
    return ok("account", profile.account)


def _check_job(profile: ClusterProfile, runs: Sequence[StageRun]) -> Finding:
    """Make a dry run for runs with equal resources."""
    subject = f"jobs {', '.join(run.name for run in runs)}"
    if shortages := find_gpu_shortages(profile, runs[:1]):
        remedy = "change the run's resources, or gpus_per_node of the profile"
        return wrong(subject, shortages[0], remedy)
    text = sbatch_text(runs[0], profile, Dependencies(), profile.run_root / "code")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / queue.SCRIPT
        script.write_text(text, encoding="utf-8")
        accepted, answer = queue.dry_run_script(script)
    remedy = "change the run's resources, or the profile"
    return ok(subject, answer) if accepted else wrong(subject, answer, remedy)
