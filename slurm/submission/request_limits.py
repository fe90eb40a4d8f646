"""What a job asks for, beside the limits of a partition, a QOS, an association and a reservation.

Slurm's default (`EnforcePartLimits=NO`) lets `sbatch --test-only` and `sbatch` pass a job that is
above such a limit; it then waits for ever. What Slurm does not tell limits nothing here.
"""

import grp
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.spec import StageRun
from slurm.shared import nodes, queue
from slurm.submission.profile import (
    ClusterProfile,
    find_profile_resources,
    fold_ranks,
    time_limit_minutes,
)

Partitions = Mapping[str, Mapping[str, str]]
"""What Slurm says of each partition, by its name."""

_MB_PER_GB = 1024.0
# Importing PyTorch, torchvision and timm takes 0.74 GB; a rank that has less dies before its work.
_LEAST_MB_PER_RANK = 1500.0
# Limits of a QOS on one job, or on all jobs of a user or an account, so on a single one, too.
_QOS_MOST = ("MaxTRES", "MaxTRESPU", "MaxTRESPA", "GrpTRES")
_ASSOCIATION_MOST = ("MaxTRES", "GrpTRES")


@dataclass(frozen=True)
class Request:
    """What one job asks for. `memory_mb` of each node is None if it takes the partition's default,
    and 0 for all that there is.
    """

    minutes: int
    nodes: int
    ranks_per_node: int
    cpus_per_node: int
    gpus_per_node: int
    gpu_type: str
    memory_mb: float | None

    def count_tres(self) -> dict[str, float]:
        """Return the totals of the job by Slurm's names of trackable resources."""
        totals = {
            "node": float(self.nodes),
            "cpu": float(self.nodes * self.cpus_per_node),
            "gres/gpu": float(self.nodes * self.gpus_per_node),
        }
        if self.gpu_type:
            totals[f"gres/gpu:{self.gpu_type}"] = totals["gres/gpu"]
        if self.memory_mb:
            totals["mem"] = self.nodes * self.memory_mb
        return totals


def describe_job(profile: ClusterProfile, run: StageRun) -> Request:
    """Return what the job of a run asks for."""
    need = fold_ranks(profile, run.resources)
    decided = find_profile_resources(profile, run.resources)
    memory_gb = decided.get("memory_gb", need.memory_gb)
    return Request(
        minutes=time_limit_minutes(profile, run.resources),
        nodes=need.nodes,
        ranks_per_node=need.ranks_per_node,
        cpus_per_node=need.ranks_per_node * decided.get("cpus_per_rank", need.cpus_per_rank),
        gpus_per_node=need.ranks_per_node if need.gpu else 0,
        gpu_type=profile.gpu_type or (profile.gres or "").partition(":")[2],
        memory_mb=None if memory_gb is None else memory_gb * _MB_PER_GB,
    )


def find_refusal(
    profile: ClusterProfile, run: StageRun, partitions: Partitions, user: str
) -> str | None:
    """Return which limit a run's job exceeds, so that it would never start; None if none is known.

    `partitions` are those that Slurm may choose from: one of them has to take the job. Their limits
    of time are not compared here.
    """
    request = describe_job(profile, run)
    refusals = [
        _find_partition_refusal(name, fields, profile, request)
        for name, fields in partitions.items()
    ]
    if refusals and all(refusals):
        return refusals[0]
    return (
        _find_qos_refusal(profile.qos, request)
        or _find_association_refusal(profile, request, partitions, user)
        or (
            _find_reservation_refusal(profile.reservation, request) if profile.reservation else None
        )
    )


def _find_partition_refusal(
    name: str, fields: Mapping[str, str], profile: ClusterProfile, request: Request
) -> str | None:
    refusals = (
        *_compare_access(fields, profile),
        *_compare_nodes(fields, request),
        *_compare_memory(fields, request),
    )
    for refusal in refusals:
        return f"partition {name} {refusal}"
    qos = fields.get("QoS", "")
    return None if qos in nodes.NOTHING else _find_qos_refusal(qos, request)


def _compare_access(fields: Mapping[str, str], profile: ClusterProfile) -> Iterator[str]:
    """Yield why a partition is not for this user, account or QOS."""
    if fields.get("RootOnly") == "YES":
        yield "takes jobs of root only (RootOnly)"
    if fields.get("ReqResv") == "YES" and not profile.reservation:
        yield "takes jobs with a reservation only (ReqResv): set reservation"
    for key, value in (("Accounts", profile.account), ("Qos", profile.qos)):
        allowed = _split(fields.get(f"Allow{key}", "ALL"))
        if value and "ALL" not in allowed and allowed and value.lower() not in allowed:
            yield f"takes no jobs of {value} (Allow{key}={','.join(allowed)})"
        if value and value.lower() in _split(fields.get(f"Deny{key}", "")):
            yield f"takes no jobs of {value} (Deny{key})"
    groups = fields.get("AllowGroups", "ALL").split(",")
    if "ALL" not in groups and not set(groups) & _list_groups() and os.geteuid() != 0:
        yield f"takes jobs of the groups {', '.join(groups)} only (AllowGroups)"


def _split(names: str) -> list[str]:
    """Return names in lower case, as Slurm keeps them, but for ALL."""
    if names in nodes.NOTHING:
        return []
    return [name if name == "ALL" else name.lower() for name in names.split(",")]


def _list_groups() -> set[str]:
    names = set()
    for number in {os.getegid(), *os.getgroups()}:
        try:
            names.add(grp.getgrgid(number).gr_name)
        except KeyError:  # a group that this host does not know
            continue
    return names


def _compare_nodes(fields: Mapping[str, str], request: Request) -> Iterator[str]:
    """Yield which number of nodes or CPUs a partition does not give one job."""
    for key, asked, what in (
        ("MaxNodes", request.nodes, "nodes"),
        ("MaxCPUsPerNode", request.cpus_per_node, "CPUs of a node"),
    ):
        most = _read_number(fields.get(key, ""))
        if most is not None and asked > most:
            yield f"gives a job at most {most:.0f} {what} ({key}), it asks for {asked}"
    least = _read_number(fields.get("MinNodes", ""))
    if least is not None and request.nodes < least:
        yield f"gives a job at least {least:.0f} nodes (MinNodes), it asks for {request.nodes}"


def _compare_memory(fields: Mapping[str, str], request: Request) -> Iterator[str]:
    """Yield why a job may not have its memory in a partition, or would get too little."""
    if request.memory_mb is not None:
        key, most = _read_memory(fields, "Max", request.cpus_per_node)
        if most is not None and request.memory_mb > most:
            yield (
                f"gives a job at most {_gb(most)} of a node ({key}), it asks for "
                f"{_gb(request.memory_mb)}: set memory_gb"
            )
        return
    key, usual = _read_memory(fields, "Def", request.cpus_per_node)
    if usual is not None and usual < request.ranks_per_node * _LEAST_MB_PER_RANK:
        yield (
            f"gives {_gb(usual)} of a node to a job that does not say how much it needs ({key}), "
            f"too little for {request.ranks_per_node} ranks: set memory_gb"
        )


def _read_memory(fields: Mapping[str, str], kind: str, cpus: int) -> tuple[str, float | None]:
    """Return `MaxMemPerNode` in MB, or `MaxMemPerCPU` of so many CPUs; None if there is none."""
    for key, factor in ((f"{kind}MemPerNode", 1), (f"{kind}MemPerCPU", cpus)):
        # 0 stands for no limit.
        if number := _read_number(fields.get(key, "")):
            return key, number * factor
    return "", None


def _read_number(text: str) -> float | None:
    """Return a number that limits; None for UNLIMITED and whatever else is none."""
    return float(text) if re.fullmatch(r"\d+", text) else None


def _gb(megabytes: float) -> str:
    return f"{megabytes / _MB_PER_GB:.3g} GB"


def _find_qos_refusal(qos: str | None, request: Request) -> str | None:
    if not qos:
        return None
    fields = ("MinTRES", *_QOS_MOST)
    for row in _ask_accounting(fields, "qos", qos):
        for field, text in row.items():
            if refusal := _compare_tres(text, request, least=field == "MinTRES"):
                return f"QOS {qos} {refusal} ({field}={text})"
    return None


def _find_association_refusal(
    profile: ClusterProfile, request: Request, partitions: Partitions, user: str
) -> str | None:
    """Return what the association of the user and the account does not allow one job.

    Without an account in the profile it is the user's default one, which is not asked for.
    """
    if not profile.account:
        return None
    what = ("associations", f"user={user}", f"account={profile.account}")
    for row in _ask_accounting(("Partition", "MaxWall", *_ASSOCIATION_MOST), *what):
        # One for a partition holds there only; names are in lower case in the data base.
        if row["Partition"] and row["Partition"] not in map(str.lower, partitions):
            continue
        account = f"account {profile.account}"
        limit_s = queue.parse_duration_s(row["MaxWall"])
        if 0 < limit_s < 60 * request.minutes:
            return (
                f"{account} allows a job {limit_s / 3600:.3g} h (MaxWall), it asks for "
                f"{request.minutes / 60:.3g} h: set max_hours"
            )
        for field in _ASSOCIATION_MOST:
            if refusal := _compare_tres(row[field], request):
                return f"{account} {refusal} ({field}={row[field]})"
    return None


def _ask_accounting(fields: Sequence[str], *what: str) -> Iterator[dict[str, str]]:
    """Yield rows of what sacctmgr shows; none without accounting."""
    code, out, _ = queue.call_slurm(
        "sacctmgr", "-n", "-P", "show", *what, f"format={','.join(fields)}"
    )
    for line in out.splitlines() if code == 0 else ():
        values = line.split("|")
        if len(values) == len(fields):
            yield dict(zip(fields, values, strict=True))


def _compare_tres(text: str, request: Request, *, least: bool = False) -> str | None:
    """Return what of `cpu=64,gres/gpu=4,mem=500G` a job exceeds, or has too little of."""
    asked = request.count_tres()
    for item in text.split(","):
        name, _, value = item.partition("=")
        count = asked.get(name)
        limit = nodes.parse_memory_mb(value) if name == "mem" else _read_number(value)
        if count is None or limit is None or (count >= limit if least else count <= limit):
            continue
        show = _gb if name == "mem" else "{:.0f}".format
        bound = "at least" if least else "at most"
        return f"gives a job {bound} {show(limit)} {name}, it asks for {show(count)}"
    return None


def _find_reservation_refusal(name: str, request: Request) -> str | None:
    """Return why a reservation is too small or ends too early; None if Slurm does not tell.

    Whether the user may use it shows in the dry run.
    """
    code, out = queue.call_scontrol("-o", "show", "reservation", name)
    fields = queue.parse_scontrol(out) if code == 0 else {}
    if "FLEX" in fields.get("Flags", "").split(","):
        return None  # its jobs may begin before and go on after it
    most = _read_number(fields.get("NodeCnt", ""))
    if most is not None and request.nodes > most:
        return f"reservation {name} has {most:.0f} nodes, it asks for {request.nodes}"
    start_s, end_s = (_read_time(fields.get(key, "")) for key in ("StartTime", "EndTime"))
    if start_s is None or end_s is None:
        return None
    left_s = end_s - max(start_s, time.time())
    if left_s < 60 * request.minutes:
        return (
            f"reservation {name} has {max(0.0, left_s) / 3600:.3g} h left until it ends, it asks "
            f"for {request.minutes / 60:.3g} h: set max_hours"
        )
    return None


def _read_time(text: str) -> float | None:
    """Return seconds since 1970 of `2026-11-30T08:00:00`, in the time zone of this host."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return None
