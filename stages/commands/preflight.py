"""What can be known about runs before one is started: settings, inputs, the files they will read, room they take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import manifest
from pipeline.findings import Finding, ok, skipped, wrong
from pipeline.identity import marked
from pipeline.plan import list_unset_settings
from pipeline.runfile import resolve
from pipeline.spec import ConfigError, StageConfig, StageRun
from stages import STAGES


@dataclass
class RunChecks:
    """A finding or more for each run; the bytes that those not done will write, as far as it can be told, by folder."""

    findings: list[Finding] = field(default_factory=list)
    pending: list[StageRun] = field(default_factory=list)
    sizes: dict[Path, float] = field(default_factory=dict)

    @property
    def bytes(self) -> float:
        """Less what their folders hold already."""
        return sum(max(0.0, size - _there(folder)) for folder, size in self.sizes.items())


def check_runs(
    runs: Sequence[StageRun], every: Sequence[StageRun], root: Path, *, unseen: bool = False
) -> RunChecks:
    """Look at the chosen runs; `every`: all of the reproduction, in which their inputs are found.

    `unseen`: at their settings and needs alone, at none of the files they will read.
    """
    done = manifest.split_runs(root, every).done
    by_id, chosen = {run.run_id: run for run in every}, {run.run_id for run in runs}
    found = RunChecks()
    for run in runs:
        if run.run_id in done:
            found.findings.append(ok(run.name, "done"))
            continue
        found.pending.append(run)
        found.findings += [
            wrong(
                run.name,
                f"needs {by_id[need].name}, which is not done",
                f"--only {by_id[need].name} too",
            )
            for need in run.needs.values()
            if need not in done and need not in chosen
        ]
        findings, size = _check_run(run, collect_input_configs(run, by_id), unseen)
        found.findings += findings
        found.sizes[run.run_dir(root)] = size
    return found


def list_problems(
    runs: Sequence[StageRun], every: Sequence[StageRun], root: Path, *, unseen: bool = False
) -> list[str]:
    """What is wrong with those of the runs that are not done, and what to do, a line each."""
    findings = check_runs(runs, every, root, unseen=unseen).findings
    return [
        f"{each.subject}: {each.detail}; to do: {each.remedy}"
        for each in findings
        if each.state == "wrong"
    ]


def require_no_problems(
    runs: Sequence[StageRun], every: Sequence[StageRun], root: Path, *, unseen: bool = False
) -> None:
    """Raise ConfigError with all that is in the way."""
    if lines := list_problems(runs, every, root, unseen=unseen):
        raise ConfigError("nothing is queued before this is put right:\n" + "\n".join(lines))


def collect_input_configs(run: StageRun, by_id: Mapping[str, StageRun]) -> dict[str, StageConfig]:
    """Configurations by role, those of inputs of inputs too; the nearest of a role counts."""
    direct = {role: by_id[need] for role, need in run.needs.items()}
    found: dict[str, StageConfig] = {role: filler.config for role, filler in direct.items()}
    for filler in direct.values():
        found = {**collect_input_configs(filler, by_id), **found}
    return found


def _check_run(
    run: StageRun, inputs: Mapping[str, StageConfig], unseen: bool
) -> tuple[list[Finding], float]:
    size = 1e9 * run.config.disk_gb(inputs)
    if unset := [line.split(": ", 1) for line in list_unset_settings([run])]:
        return [wrong(run.name, detail, remedy) for detail, remedy in unset], size
    entry = STAGES[run.stage].preflight
    if entry is None:
        return [ok(run.name, "nothing of its own to look at")], size
    if unseen:
        return [skipped(run.name, "its files are not looked at")], size
    try:
        words, more = resolve(entry)(run.config, inputs)
    except (ValueError, OSError, ImportError) as error:
        places = data_settings(run.config)
        remedy = f"correct the files, or {', '.join(f'{run.name}.{name}' for name in places) or 'the run'}"
        if not all(Path(place).expanduser().exists() for place in places.values()):
            remedy += "; --unseen where only compute nodes have them"
        return [wrong(run.name, error, remedy)], size
    return [ok(run.name, words)], size + more


def data_settings(config: StageConfig) -> dict[str, str]:
    """Where the files of a run are, by the dotted names of the settings that say so; of those that are set."""
    found: dict[str, str] = {}
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, StageConfig):
            found |= {f"{name}.{inner}": place for inner, place in data_settings(value).items()}
        elif value and marked(info, "required_at_run"):
            found[name] = value
    return found


def _there(folder: Path) -> int:
    try:
        return manifest.measure_size(folder) if folder.is_dir() else 0
    except FileNotFoundError:  # a run that goes on while it is looked at
        return 0
