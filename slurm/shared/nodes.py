"""Which nodes of the cluster could run a job, by what Slurm says of its nodes.

A node that is taken for fitting but does not fit does harm: others are then excluded, and the job
waits for ever. So what is not understood counts as not fitting, or raises SlurmError.
"""

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline import attempts
from slurm.shared.queue import (
    NO_NODE_FITS,
    SCRIPT,
    QueuedJob,
    SlurmError,
    parse_scontrol,
    unanswered,
)

Scontrol = Callable[..., tuple[int, str]]
"""Calls scontrol with some arguments; returns its exit code and its output or error."""

NOTHING = ("", "(null)", "N/A", "None")  # how Slurm spells that a field is empty
# A node in one of these states takes no new job until somebody puts it right.
_UNFIT_STATES = frozenset((
    "DOWN", "DRAIN", "DRAINED", "DRAINING", "ERROR", "FAIL", "FAILING", "FUTURE", "INVAL",
    "INVALID_REG", "MAINT", "NOT_RESPONDING", "UNKNOWN",
))  # fmt: skip
_MEMORY_UNITS = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}


@dataclass(frozen=True)
class NodeFacts:
    """What Slurm says of one node. `gres` counts resources by name and by `name:type`."""

    name: str
    states: frozenset[str]
    partitions: frozenset[str]
    features: frozenset[str]
    gres: Mapping[str, int]
    cpus: int
    memory_mb: float

    @property
    def takes_jobs(self) -> bool:
        """Whether the node may start a job, now or once its present jobs have ended."""
        return not self.states & _UNFIT_STATES


def find_fitting_nodes(job: Mapping[str, str], scontrol: Scontrol) -> set[str]:
    """Return the nodes that could run a job, given as the fields of `scontrol show job`.

    The job's own list of excluded nodes is not looked at.

    Raises:
        SlurmError: Slurm does not answer, or the job asks for something that is not understood.
    """
    partitions = set(job.get("Partition", "").split(","))
    features = _field(job, "Features")
    several = _count_nodes(job) > 1
    if several and "[" in features:
        raise SlurmError(f"all nodes of a job must have the same one of {features}")
    fitting = {
        node.name
        for node in list_nodes(scontrol)
        if node.takes_jobs
        and node.partitions & partitions
        and matches_features(features, node.features)
        and _has_room(node, job)
    }
    if reservation := _field(job, "Reservation"):
        fitting &= _list_reserved_nodes(reservation, scontrol)
    return fitting


def can_spare_node(job: Mapping[str, str], node: str, scontrol: Scontrol) -> bool:
    """Return whether a job still has enough nodes when it avoids this one too.

    Raises:
        SlurmError: that cannot be known.
    """
    if _field(job, "ReqNodeList"):
        return False
    excluded = expand_hostlist(_field(job, "ExcNodeList"), scontrol)
    if node in excluded:
        return False
    left = find_fitting_nodes(job, scontrol) - excluded - {node}
    return len(left) >= _count_nodes(job)


def lift_exclusion(job: QueuedJob, run_dir: Path, scontrol: Scontrol) -> str:
    """Let a job that no node fits have the nodes again that were excluded after failures.

    Nodes that the cluster profile excludes stay excluded. Returns what was done, "" if nothing: the
    job does not wait for that, no node was excluded after a failure, or Slurm refuses.
    """
    if job.reason != NO_NODE_FITS:
        return ""
    code, out = scontrol("-o", "show", "job", job.job_id)
    excluded = _field(parse_scontrol(out), "ExcNodeList") if code == 0 else ""
    try:
        names = expand_hostlist(excluded, scontrol)
        kept = expand_hostlist(_read_script_option(run_dir, "exclude"), scontrol)
    except SlurmError:
        return ""
    failed_on = {failure.host for failure in attempts.list_failures(run_dir)}
    lifted = sorted(names & failed_on - kept)
    if not lifted:
        return ""
    left = ",".join(sorted(names - set(lifted)))
    code, _ = scontrol("update", f"JobId={job.job_id}", f"ExcNodeList={left}")
    if code != 0:
        return ""
    return f"{', '.join(lifted)} failed before but may be used again, so it can start"


def _read_script_option(run_dir: Path, option: str) -> str:
    """Return the value of an option in a run's batch script; "" if it is not there."""
    try:
        text = (run_dir / SCRIPT).read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(rf"^#SBATCH --{option}=(.*)$", text, re.MULTILINE)
    return "".join(shlex.split(found[1])) if found else ""


def expand_hostlist(hostlist: str, scontrol: Scontrol) -> set[str]:
    """Return the names in a hostlist such as `n[0-2],gpu7`. Slurm itself expands it.

    Raises:
        SlurmError: Slurm does not understand it.
    """
    if hostlist in NOTHING:
        return set()
    code, out = scontrol("show", "hostnames", hostlist)
    if code != 0 or not out.split():
        raise SlurmError(f"cannot expand {hostlist!r}: {out.strip() or f'exit {code}'}")
    return set(out.split())


def list_nodes(scontrol: Scontrol) -> list[NodeFacts]:
    """Return all nodes of the cluster.

    Raises:
        SlurmError: Slurm does not answer.
    """
    code, out = scontrol("-o", "show", "node")
    parsed = map(parse_scontrol, out.splitlines())
    nodes = [_parse_node(fields) for fields in parsed if "NodeName" in fields]
    if code != 0 or not nodes:
        raise unanswered("the nodes", code, out)
    return nodes


def describe_nodes(partitions: set[str], scontrol: Scontrol) -> str:
    """Return what the nodes of partitions have: `3 x 64 CPUs, 500 GB, gpu:a100:8 (1 down)`.

    Raises:
        SlurmError: Slurm does not answer.
    """
    kinds: dict[str, list[NodeFacts]] = {}
    for node in list_nodes(scontrol):
        if node.partitions & partitions:
            gres = [f"{name}:{count}" for name, count in node.gres.items() if ":" in name]
            words = [f"{node.cpus} CPUs", f"{node.memory_mb / 1000:.0f} GB", *gres]
            kinds.setdefault(", ".join(words), []).append(node)
    parts = []
    for kind, alike in kinds.items():
        away = sum(not node.takes_jobs for node in alike)
        parts.append(f"{len(alike)} x {kind}{f' ({away} down or drained)' if away else ''}")
    return "; ".join(parts) or "none"


def _parse_node(fields: Mapping[str, str]) -> NodeFacts:
    # `IDLE+DRAIN`, `DOWN*`; the last character of a state tells more of it, such as `*` for a node
    # that does not respond.
    state = fields.get("State", "UNKNOWN")
    states = {word.rstrip("*~#!%$@^-") for word in state.split("+")}
    if "*" in state:
        states.add("NOT_RESPONDING")
    return NodeFacts(
        name=fields["NodeName"],
        states=frozenset(states),
        partitions=frozenset(_field(fields, "Partitions").split(",")),
        features=frozenset(_field(fields, "ActiveFeatures").split(",")),
        gres=parse_gres(_field(fields, "Gres")),
        # CPUEfctv leaves out CPUs that are kept for the system; older versions have CPUTot only.
        cpus=_read_count(fields.get("CPUEfctv") or fields.get("CPUTot") or "0"),
        memory_mb=parse_memory_mb(fields.get("RealMemory", "0")),
    )


def parse_gres(text: str) -> dict[str, int]:
    """Return counts by name and by `name:type`, of `gpu:a100:8(S:0-1),gpu:v100:2` and its like.

    Requests of a job have a prefix: `gres:gpu:a100:4` or `gres/gpu:a100:4`.
    """
    counts: dict[str, int] = {}
    # Commas within parentheses list cores, not resources.
    for item in re.sub(r"\([^)]*\)", "", text).split(","):
        words = re.sub(r"^gres[:/]", "", item.strip()).replace("=", ":").split(":")
        if words == [""]:
            continue
        number = words.pop() if words[-1].isdecimal() else "1"
        for end in range(1, len(words) + 1):
            key = ":".join(words[:end])
            counts[key] = counts.get(key, 0) + int(number)
    return counts


def parse_memory_mb(text: str) -> float:
    """Return `10G`, `512M` or `500000` in MB, the unit that Slurm assumes."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?)([KMGT]?)[cn]?", text.strip())
    if found is None:
        return 0.0
    return float(found[1]) * _MEMORY_UNITS[found[2] or "M"]


def matches_features(expression: str, features: frozenset[str]) -> bool:
    """Return whether a node with these features satisfies the constraint of a job.

    Knows `a&b`, `a,b`, `a|b`, parentheses and, for jobs of one node, `[a|b]`. As Slurm does, it
    reads from left to right: `&` does not bind stronger than `|`.

    Raises:
        SlurmError: the constraint counts nodes (`a*2`), or cannot be read.
    """
    if expression in NOTHING:
        return True
    if "*" in expression:
        raise SlurmError(f"the constraint {expression} counts nodes")
    tokens = iter(re.findall(r"[()\[\]&|,]|[^()\[\]&|,]+", expression))
    return _match_tokens(tokens, features)


def _match_tokens(tokens: Iterator[str], features: frozenset[str]) -> bool:
    """Return whether features satisfy the tokens up to the next closing bracket."""
    result: bool | None = None
    operator = "&"
    for token in tokens:
        if token in ")]":
            break
        if token in "&|,":
            operator = token
            continue
        value = _match_tokens(tokens, features) if token in "([" else token in features
        if result is None:
            result = value
        else:
            result = (result or value) if operator == "|" else (result and value)
    return bool(result)


def _has_room(node: NodeFacts, job: Mapping[str, str]) -> bool:
    """Return whether a node has the CPUs, memory and generic resources that a job asks of each."""
    nodes = _count_nodes(job)
    least = _field(job, "MinCPUsNode") or "1"
    if not least.isdecimal():
        raise SlurmError(f"MinCPUsNode={least} is not understood")
    cpus = max(int(least), -(-_number(job, "NumCPUs") // nodes))
    memory_mb = parse_memory_mb(_field(job, "MinMemoryNode") or "0")
    memory_mb = max(memory_mb, cpus * parse_memory_mb(_field(job, "MinMemoryCPU") or "0"))
    wanted = parse_gres(_field(job, "TresPerNode") or _field(job, "Gres"))
    return (
        node.cpus >= cpus
        and node.memory_mb >= memory_mb
        and all(node.gres.get(name, 0) >= count for name, count in wanted.items())
    )


def _list_reserved_nodes(reservation: str, scontrol: Scontrol) -> set[str]:
    code, out = scontrol("-o", "show", "reservation", reservation)
    if code != 0:
        raise SlurmError(f"cannot ask for the reservation {reservation}: {out.strip()}")
    return expand_hostlist(_field(parse_scontrol(out), "Nodes"), scontrol)


def _field(fields: Mapping[str, str], name: str) -> str:
    """Return a field, empty where Slurm spells out that it is."""
    value = fields.get(name, "")
    return "" if value in NOTHING else value


def _read_count(text: str) -> int:
    """Return a number, 0 for what is none."""
    return int(text) if text.isdecimal() else 0


def _number(fields: Mapping[str, str], name: str) -> int:
    """Return the first number of a field such as `4` or `2-4`, at least 1."""
    found = re.match(r"\d+", fields.get(name, ""))
    return max(1, int(found[0])) if found else 1


def _count_nodes(job: Mapping[str, str]) -> int:
    return _number(job, "NumNodes")
