"""How many jobs of a user the cluster keeps in its queue and runs at a time, by its accounting."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from slurm.shared import nodes, queue

_USUAL_QOS = "normal"  # where an association names no other


@dataclass(frozen=True)
class JobLimit:
    """A number of jobs, and what sets it: a QOS, or the association of user and account."""

    count: int
    source: str


@dataclass(frozen=True)
class JobLimits:
    """Most jobs of a user in the queue, and most of them that run; None where nothing limits."""

    submitted: JobLimit | None = None
    running: JobLimit | None = None


def read_job_limits(
    user: str, *, account: str | None, partition: Mapping[str, str], qos: str | None
) -> JobLimits:
    """Return what limits the jobs of a user in a partition, given as Slurm describes it.

    Without accounting, or where it does not tell, nothing limits.
    """
    own = _read_associations(user, account, partition.get("PartitionName", ""))
    levels = []
    # Slurm takes the first of these that sets a limit.
    all_qos = _read_qos()
    partition_qos = partition.get("QoS", "")
    job_qos = qos or next((row[0] for row in own if row[0]), "") or _USUAL_QOS
    for name in dict.fromkeys((partition_qos, job_qos)):
        if name not in nodes.NOTHING and name in all_qos:
            levels.append((f"QOS {name}", all_qos[name]))
    levels += [("your association", row[1:]) for row in own[:1]]
    return JobLimits(
        submitted=_find_first_limit(levels, (1, 3)), running=_find_first_limit(levels, (0, 2))
    )


def _find_first_limit(
    levels: Iterable[tuple[str, Sequence[str]]], columns: Sequence[int]
) -> JobLimit | None:
    """Return the limit of the first level that has one; there, the smallest of these columns."""
    for source, row in levels:
        counts = [int(row[column]) for column in columns if row[column].isdecimal()]
        if counts:
            return JobLimit(min(counts), source)
    return None


def _read_qos() -> dict[str, Sequence[str]]:
    """Return MaxJobs, MaxSubmit, GrpJobs and GrpSubmit of each QOS, as text."""
    rows = _ask("qos", "format=Name,MaxJobsPU,MaxSubmitJobsPU,GrpJobs,GrpSubmitJobs", columns=5)
    return {row[0]: row[1:] for row in rows}


def _read_associations(user: str, account: str | None, partition: str) -> list[Sequence[str]]:
    """Return DefaultQOS, MaxJobs, MaxSubmit, GrpJobs and GrpSubmit of a user's associations.

    Only those of the account, or of the user's usual one; one for the partition comes first.
    """
    if account is None:
        usual = _ask("user", user, "format=DefaultAccount", columns=1)
        account = usual[0][0] if usual else None
    rows = _ask(
        "associations",
        f"user={user}",
        "format=Account,Partition,DefaultQOS,MaxJobs,MaxSubmitJobs,GrpJobs,GrpSubmitJobs",
        columns=7,
    )
    fitting = [
        row for row in rows if account in (None, row[0]) and row[1] in ("", partition.lower())
    ]
    return [row[2:] for row in sorted(fitting, key=lambda row: row[1] == "")]


def _ask(*what: str, columns: int) -> list[list[str]]:
    """Return the rows that sacctmgr shows, those with so many columns."""
    code, out, _ = queue.call_slurm("sacctmgr", "-n", "-P", "show", *what)
    rows = (line.split("|") for line in out.splitlines()) if code == 0 else ()
    return [row for row in rows if len(row) == columns]
