"""Whether a cluster would take the jobs: commands, partition, account, and a dry run of each job.

Nothing is queued.
"""

import getpass
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence

from pipeline.findings import Finding, ok, skipped, wrong
from pipeline.spec import StageRun
from slurm.shared import nodes, queue
from slurm.shared.limits import read_job_limits
from slurm.submission.estimates import estimate_save_seconds
from slurm.submission.profile import (
    ClusterProfile,
    find_gpu_shortages,
    fold_ranks,
    profile_of_run,
    time_limit_minutes,
)
from slurm.submission.request_limits import Partitions, find_refusal
from slurm.submission.submit import Dependencies, sbatch_text

_AFTER_PREEMPTION = defaultdict(
    lambda: "not known what becomes of a preempted job",
    OFF="jobs are not preempted",
    REQUEUE="Slurm puts a preempted job back into the queue, and it resumes",
    CANCEL="a preempted job ends, and the keeper submits it again",
    SUSPEND="a preempted job stands still until it may go on",
)
_LOSES_SAVES = ("REQUEUE", "CANCEL")  # how a preempted job ends
_STEP_S = 5.0  # the step under way comes before the save
_KEEPERS = 2  # places in the queue: one that works, and its successor
_STARTS_NOTHING = {"DOWN", "DRAIN", "INACTIVE"}
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
        *_check_partitions([profile, *(profile_of_run(profile, run) for run in runs)], partitions),
        _check_account(profile),
        *_describe_preemption(profile, runs, partitions),
        *_check_job_limits(profile, runs, partitions),
    ]
    # With a wrong partition or account, every dry run would only repeat that.
    if any(finding.state == "wrong" for finding in findings):
        return findings
    # A reproduction has dozens of runs and few kinds of jobs: one dry run for each set of
    # resources.
    alike: dict[tuple[str, str], list[StageRun]] = defaultdict(list)
    for run in runs:
        options = profile_of_run(profile, run).model_dump_json()
        alike[options, run.resources.model_dump_json()].append(run)
    return findings + [_check_job(profile, group, partitions) for group in alike.values()]


def _check_partitions(profiles: Sequence[ClusterProfile], partitions: Partitions) -> list[Finding]:
    """Check the partitions of the profile and of its stages, each choice once."""
    choices = dict.fromkeys(profile.partition for profile in profiles)
    return [_check_partition(choice, partitions) for choice in choices]


def _check_partition(choice: str | None, partitions: Partitions) -> Finding:
    names = _default_partitions(partitions) if choice is None else choice.split(",")
    if unknown := [name for name in names if name not in partitions]:
        remedy = f"set partition to one of {', '.join(sorted(partitions))}"
        return wrong("partition", f"there is no {', '.join(unknown)}", remedy)
    states = {name: partitions[name].get("State", "?") for name in names}
    detail = ", ".join(f"{name} is {state}" for name, state in states.items())
    # Slurm takes jobs for a partition that is down; they wait until it is up.
    if states and set(states.values()) <= _STARTS_NOTHING:
        return wrong("partition", f"{detail}: it starts no job", "set another partition, or wait")
    return ok("partition", detail if choice else f"the cluster's default{detail and f': {detail}'}")


def _check_account(profile: ClusterProfile) -> Finding:
    user = get_user_name()
    accounts = queue.list_associations(user, "Account")
    if not accounts:
        return skipped("account", f"the cluster lists no accounts of {user}")
    choices = ", ".join(accounts)
    if profile.account is None:
        return ok("account", f"the default one of {choices}")
    if profile.account not in accounts:
        remedy = f"set account to one of {choices}"
        return wrong("account", f"{user} has no account {profile.account}", remedy)
    return ok("account", profile.account)


def _check_job_limits(
    profile: ClusterProfile, runs: Sequence[StageRun], partitions: Partitions
) -> list[Finding]:
    """Say how many jobs the cluster keeps and runs, and what becomes of runs beyond that."""
    name = _list_partitions(profile, partitions)[:1]  # its first one stands for all
    limits = read_job_limits(
        get_user_name(),
        account=profile.account,
        partition=partitions.get(name[0], {}) if name else {},
        qos=profile.qos,
    )
    findings = []
    if (most := limits.submitted) is not None:
        detail = f"at most {most.count} of your jobs may be in the queue ({most.source})"
        needed = f"these are {len(runs)} and a keeper"
        if len(runs) + _KEEPERS <= most.count:
            findings.append(ok("queue limit", f"{detail}; {needed}"))
        elif most.count > _KEEPERS:
            detail = (
                f"{detail}; {needed}: submit queues what fits, the keeper the others as jobs end"
            )
            findings.append(ok("queue limit", detail))
        else:
            remedy = "use submit --keep, which needs no place in the queue, or set another qos"
            findings.append(wrong("queue limit", f"{detail}, too few for a keeper", remedy))
    if (most := limits.running) is not None:
        detail = f"at most {most.count} of your jobs run at a time ({most.source})"
        if most.count:
            findings.append(ok("job limit", f"{detail}; the others wait in the queue"))
        else:
            findings.append(wrong("job limit", detail, "set another qos or account"))
    return findings


def _list_partitions(profile: ClusterProfile, partitions: Partitions) -> list[str]:
    return profile.partition.split(",") if profile.partition else _default_partitions(partitions)


def _describe_preemption(
    profile: ClusterProfile, runs: Sequence[StageRun], partitions: Partitions
) -> list[Finding]:
    """Say what becomes of preempted jobs, and whether a keeper can submit them again."""
    config = queue.read_config()
    save_s = max((estimate_save_seconds(run, profile.run_root) for run in runs), default=0.0)
    findings = []
    for name in _list_partitions(profile, partitions):
        if name not in partitions:
            continue  # said to be wrong above
        fields = partitions[name]
        mode = fields.get("PreemptMode", config.get("PreemptMode", "?")).split(",")[0]
        grace = fields.get("GraceTime", "0")
        detail = f"{name}: PreemptMode={mode}, GraceTime={grace} s: {_AFTER_PREEMPTION[mode]}"
        if mode in _LOSES_SAVES:
            detail += _describe_time_to_save(grace, config.get("KillWait", ""), save_s)
        findings.append(ok("preemption", detail))
        if (login := fields.get("AllocNodes", "ALL")) != "ALL":
            findings.append(
                skipped(
                    "keeper",
                    f"{name} takes jobs only from {login}, so jobs may not be able to submit jobs: "
                    "use submit --keep",
                )
            )
    return findings


def _describe_time_to_save(grace: str, kill_wait: str, save_s: float) -> str:
    """Say whether a preempted job has the time to save, given what the longest save takes.

    Slurm sends SIGTERM, waits for the GraceTime, sends it again, and kills after KillWait, which
    it prints as `30 sec`.
    """
    words = kill_wait.split()
    if not (grace.isdecimal() and words and words[0].isdecimal()):
        return ""
    given_s = int(grace) + int(words[0])
    detail = (
        f"; it has {given_s} s to save (with KillWait={words[0]} s), "
        f"a save takes about {save_s:.0f} s"
    )
    if save_s + _STEP_S <= given_s:
        return detail
    return f"{detail}: not enough, so what it did since its last checkpoint is lost"


def get_user_name() -> str:
    """Return the name of this user, or the number of one that has no name, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def find_exceeded_limit(
    profile: ClusterProfile, run: StageRun, partitions: Partitions
) -> str | None:
    """Return by what the time limit of a run's job is too long; None if it is not.

    Slurm's default lets `--test-only` and `sbatch` pass such a job, which then waits for ever.
    """
    asked_s = 60.0 * time_limit_minutes(profile, run.resources)
    names = _list_partitions(profile, partitions)
    # Of several partitions, Slurm takes the first that lets the job start.
    longest = {
        name: find_partition_limit_s(partitions[name]) for name in names if name in partitions
    }
    if longest and asked_s > max(longest.values()):
        name, limit_s = max(longest.items(), key=lambda item: item[1])
        return f"its time limit is {_hours(asked_s)}, partition {name} allows {_hours(limit_s)}"
    if profile.qos and asked_s > (limit_s := queue.query_qos_limit_s(profile.qos)):
        return f"its time limit is {_hours(asked_s)}, QOS {profile.qos} allows {_hours(limit_s)}"
    return None


def _default_partitions(partitions: Partitions) -> list[str]:
    return [name for name, fields in partitions.items() if fields.get("Default") == "YES"]


def find_partition_limit_s(partition: Mapping[str, str]) -> float:
    """Return the longest time limit in a partition: its own, or that of the QOS it has."""
    limit_s = queue.parse_duration_s(partition.get("MaxTime", "UNLIMITED")) or float("inf")
    qos = partition.get("QoS", "N/A")
    return limit_s if qos in nodes.NOTHING else min(limit_s, queue.query_qos_limit_s(qos))


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g} h"


def describe_request(profile: ClusterProfile, run: StageRun, partitions: Partitions) -> str:
    """Return what a run's job asks for, and what the nodes of its partitions have."""
    need = fold_ranks(profile, run.resources)
    per_node = f"{need.ranks_per_node * (profile.cpus_per_rank or need.cpus_per_rank)} CPUs"
    if need.gpu:
        kind = profile.gres or profile.gpu_type or "any type"
        per_node += f", {need.ranks_per_node} GPUs ({kind})"
    wanted = _list_partitions(profile, partitions)
    asked = f"asked for {need.nodes} nodes with {per_node} each"
    try:
        have = nodes.describe_nodes(set(wanted), queue.call_scontrol)
    except queue.SlurmError:
        return asked
    return f"{asked}; the nodes of {','.join(wanted)} have: {have}"


def _check_job(base: ClusterProfile, runs: Sequence[StageRun], partitions: Partitions) -> Finding:
    """Make a dry run for runs with equal resources and options."""
    subject = f"jobs {', '.join(run.name for run in runs)}"
    profile = profile_of_run(base, runs[0])
    if shortages := find_gpu_shortages(base, runs[:1]):
        remedy = "change the run's resources, or gpus_per_node of the profile"
        return wrong(subject, shortages[0], remedy)
    if exceeded := find_exceeded_limit(profile, runs[0], partitions):
        remedy = (
            "set max_hours of the profile; a training that takes longer is requeued and resumes"
        )
        return wrong(subject, exceeded, remedy)
    names = _list_partitions(profile, partitions)
    chosen = {name: partitions[name] for name in names if name in partitions}
    if refusal := find_refusal(profile, runs[0], chosen, get_user_name()):
        return wrong(subject, refusal, "change the run's resources, or the profile")
    text = sbatch_text(runs[0], base, Dependencies(), profile.run_root / "code")
    accepted, answer = queue.dry_run_script(text)
    remedy = "change the run's resources, or the profile"
    if accepted:
        return ok(subject, answer)
    return wrong(subject, f"{answer}; {describe_request(profile, runs[0], partitions)}", remedy)
