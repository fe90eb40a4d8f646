"""In which facts of their environments runs differ: packages, driver, GPUs, machine."""

from collections.abc import Iterable, Mapping
from typing import Any

from results.runs import FinishedRun, flatten_config
from results.variants import format_setting

# Facts that differ between any two jobs, and say nothing about their numbers.
OF_THE_JOB = ("slurm", "batch_script")
# Facts that only a run which computes with torch records: of the others, as conversions, none is no
# difference.
OF_TORCH = ("cuda", "cudnn", "nccl")
# Each run has its own, from the cores that it may use and its ranks: told last and together, or
# they would hide what differs between machines.
OF_THE_RANKS = ("variables.MKL_NUM_THREADS", "variables.OMP_NUM_THREADS")
# Facts that are told in one line.
LINES = (
    ("python", "os", "kernel", "libc"),
    ("cpu", "cpus_allowed", "memory_gb"),
    ("gpus", "driver", "cuda", "cudnn", "nccl"),
    ("container",),
    ("batch_script",),
)


def list_environment_differences(runs: Iterable[FinishedRun]) -> list[str]:
    """Return a line for each fact in which the environments differ, with the runs of each value.

    Runs without a record of it (of older versions of this code) are left out.
    """
    facts = {run.run_id: _flatten(run.environment) for run in runs if run.environment}
    lines = []
    threads: dict[str, list[str]] = {}
    for name in sorted({name for found in facts.values() for name in found}):
        values: dict[str, list[str]] = {}
        for run_id, found in sorted(facts.items()):
            if name in OF_TORCH and name not in found:
                continue
            values.setdefault(found.get(name, "none"), []).append(run_id)
        if len(values) > 1:
            parts = [f"{value} ({', '.join(ids)})" for value, ids in sorted(values.items())]
            told = "; ".join(parts)
            if name in OF_THE_RANKS:
                threads.setdefault(told, []).append(name.removeprefix("variables."))
            else:
                lines.append(f"{name}: {told}")
    # Equal lines as one: both variables are set to the same number.
    lines += [
        f"threads of a rank, which follow from its settings ({', '.join(names)}): {told}"
        for told, names in threads.items()
    ]
    return lines


def _flatten(environment: Mapping[str, Any]) -> dict[str, str]:
    facts = {key: value for key, value in environment.items() if key not in OF_THE_JOB}
    return {name: format_setting(value) for name, value in flatten_config(facts).items()}


def describe_environment(environment: Mapping[str, Any]) -> list[str]:
    """Return the environment of a run in a few lines; its packages are only counted."""
    if not environment:
        return []
    lines = []
    for names in LINES:
        known = [name for name in names if name in environment]
        told = [f"{name} {format_setting(environment[name])}" for name in known]
        if told:
            lines.append(", ".join(told))
    for group in ("slurm", "variables"):
        if found := environment.get(group):
            told = [f"{name}={value}" for name, value in sorted(found.items())]
            lines.append(f"{group}: {', '.join(told)}")
    packages = len(environment.get("packages", {}))
    return [*lines, f"{packages} installed packages, listed in the record of the run"]
