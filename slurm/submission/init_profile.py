"""A first cluster profile, from what Slurm says of partitions, nodes, limits and accounts."""

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import check_overwrite, write_atomic
from pipeline.spec import ConfigError
from slurm.shared import queue
from slurm.shared.nodes import NodeFacts, list_nodes
from slurm.submission.preflight import find_partition_limit_s, get_user_name
from slurm.submission.profile import load_profile
from slurm.submission.request_limits import Partitions

_USUAL_HOURS = 24  # where a partition has no limit: jobs that say when they end start earlier
_CONVERT_CPUS = 32  # what a conversion asks for
_CONVERT_MEMORY_GB = 64


@dataclass(frozen=True)
class Survey:
    """What Slurm says of the partition that jobs would run in.

    `node` stands for the most frequent kind of node with GPUs, `cpu_partition` for one whose nodes
    have no GPU, with `cpu_node` for its most frequent kind.
    """

    partition: str
    fields: Mapping[str, str]
    node: NodeFacts
    limit_s: float
    cpu_partition: str | None
    cpu_node: NodeFacts
    accounts: Sequence[str]
    qos: Sequence[str]

    @property
    def gpus(self) -> int:
        """GPUs of a node."""
        return self.node.gres["gpu"]

    @property
    def gpu_type(self) -> str | None:
        """The type of most GPUs of a node; None if Slurm knows no types."""
        types = {
            name.removeprefix("gpu:"): count
            for name, count in self.node.gres.items()
            if name.count(":") == 1
        }
        return max(types, key=lambda name: types[name]) if types else None


def write_profile(out: Path, run_root: Path, partition: str | None, *, force: bool) -> list[str]:
    """Write a profile for this cluster; return lines that say what it holds and what comes next.

    Raises:
        ConfigError: there is such a file, and no `force`; no partition has GPUs; or what Slurm says
            makes no valid profile.
        SlurmError: Slurm does not answer.
    """
    if out.exists() and not force:  # even one of ours: its reader may have changed it
        raise ConfigError(f"{out} is there already; --force overwrites it")
    check_overwrite(out, "", force=force)  # a regular file only
    survey = survey_cluster(partition)
    text = "\n".join([*_write_lines(survey, run_root), ""])
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "profile.yaml"
        trial.write_text(text, encoding="utf-8")
        load_profile(str(trial))
    write_atomic(out, text)
    node = survey.node
    return [
        f"{out}: partition {survey.partition}, nodes with {survey.gpus} GPUs"
        f"{f' ({survey.gpu_type})' if survey.gpu_type else ''}, {node.cpus} CPUs, "
        f"{node.memory_mb / 1000:.0f} GB",
        f"read it, then check it: run_stage.py doctor REPRODUCTION --cluster {out}",
    ]


def survey_cluster(partition: str | None = None) -> Survey:
    """Ask Slurm for what a profile needs; without a partition, take the one with the most GPUs.

    Raises:
        ConfigError: there is no such partition, or none has nodes with GPUs that take jobs.
        SlurmError: Slurm does not answer.
    """
    partitions = {
        name: fields
        for name, fields in queue.list_partitions().items()
        if fields.get("State", "UP") == "UP" or name == partition
    }
    if partition is not None and partition not in partitions:
        raise ConfigError(
            f"there is no partition {partition!r}; there are {', '.join(sorted(partitions))}"
        )
    nodes = [node for node in list_nodes(queue.call_scontrol) if node.takes_jobs]
    name = partition or _find_gpu_partition(partitions, nodes)
    with_gpus = [node for node in nodes if name in node.partitions and node.gres.get("gpu")]
    if not with_gpus:
        what = f"no node of partition {name}" if name else "no node of this cluster"
        raise ConfigError(f"{what} has GPUs and takes jobs; name another one with --partition")
    node = _find_usual_node(with_gpus)
    without = [node for node in nodes if not node.gres.get("gpu")]
    cpu_partition = _find_cpu_partition(partitions, nodes)
    cpu_nodes = [node for node in without if cpu_partition in node.partitions]
    user = get_user_name()
    return Survey(
        partition=name,
        fields=partitions[name],
        node=node,
        limit_s=find_partition_limit_s(partitions[name]),
        cpu_partition=cpu_partition,
        cpu_node=_find_usual_node(cpu_nodes) if cpu_nodes else node,
        accounts=queue.list_associations(user, "Account"),
        qos=queue.list_associations(user, "QOS"),
    )


def _find_gpu_partition(partitions: Partitions, nodes: Iterable[NodeFacts]) -> str:
    """Return the partition with the most GPUs; of equal ones the default, then the first."""
    counts: Counter[str] = Counter()
    for node in nodes:
        for name in node.partitions & set(partitions):
            counts[name] += node.gres.get("gpu", 0)
    if not any(counts.values()):
        return ""
    return min(
        counts,
        key=lambda name: (-counts[name], partitions[name].get("Default") != "YES", name),
    )


def _find_cpu_partition(partitions: Partitions, nodes: Sequence[NodeFacts]) -> str | None:
    """Return the partition with the most CPUs of those that have no GPU at all; None without."""
    cpus: Counter[str] = Counter()
    for node in nodes:
        for name in node.partitions & set(partitions):
            cpus[name] += node.cpus
    with_gpus = {name for node in nodes if node.gres.get("gpu") for name in node.partitions}
    choices = sorted(set(cpus) - with_gpus)
    return max(choices, key=lambda name: cpus[name]) if choices else None


def _find_usual_node(nodes: Sequence[NodeFacts]) -> NodeFacts:
    """Return a node of the most frequent kind; of equally frequent ones, the largest."""

    def kind(node: NodeFacts) -> tuple[int, int, float]:
        return (node.gres.get("gpu", 0), node.cpus, node.memory_mb)

    counts = Counter(kind(node) for node in nodes)
    return max(nodes, key=lambda node: (counts[kind(node)], kind(node), node.name))


def _write_lines(survey: Survey, run_root: Path) -> Iterator[str]:
    """Write the YAML of a profile, with comments where Slurm leaves a choice."""
    node = survey.node
    yield "# Written by init-cluster. Read it once; docs/cluster_profiles.md explains every key."
    yield "# run_root must be shared by all nodes."
    yield f"run_root: {json.dumps(str(run_root))}"
    yield f"partition: {json.dumps(survey.partition)}"
    yield from _write_preemption(survey.fields)
    if len(survey.accounts) == 1:
        yield f"account: {json.dumps(survey.accounts[0])}"
    elif survey.accounts:
        yield f"# account: {survey.accounts[0]}   # yours: {', '.join(survey.accounts)}"
    if survey.qos:
        yield f"# qos: {survey.qos[0]}   # yours: {', '.join(survey.qos)}"
    if survey.gpu_type:
        yield f"gpu_type: {json.dumps(survey.gpu_type)}"
    yield f"gpus_per_node: {survey.gpus}"
    yield f"cpus_per_rank: {max(1, node.cpus // survey.gpus)}"
    yield f"memory_per_gpu_gb: {max(1, int(node.memory_mb / 1024 // survey.gpus))}"
    yield "stages:"
    yield f"  convert: {_describe_conversion(survey)}"
    if math.isinf(survey.limit_s):
        yield f"max_hours: {_USUAL_HOURS}   # then a job resumes; the partition has no limit"
    else:
        # Rounded down: a job of a second more than the limit would wait for ever.
        yield f"max_hours: {math.floor(survey.limit_s / 36) / 100:g}   # the partition's limit"
    yield "env:"
    yield '  OMP_NUM_THREADS: "1"'


def _write_preemption(fields: Mapping[str, str]) -> Iterator[str]:
    mode = fields.get("PreemptMode", "OFF")
    if mode != "OFF":
        grace = fields.get("GraceTime", "0")
        yield f"# Jobs may be preempted here: PreemptMode={mode}, GraceTime={grace} seconds."


def _describe_conversion(survey: Survey) -> str:
    """Return the keys of conversions: a partition without GPUs, and no more than a node has."""
    node = survey.cpu_node
    keys: dict[str, object] = {}
    if survey.cpu_partition:
        keys["partition"] = survey.cpu_partition
    if node.cpus < _CONVERT_CPUS:
        keys["cpus_per_rank"] = node.cpus
    keys["memory_gb"] = max(1, min(_CONVERT_MEMORY_GB, int(node.memory_mb / 1024)))
    return "{" + ", ".join(f"{key}: {json.dumps(value)}" for key, value in keys.items()) + "}"
