"""Checks of runs before any of them starts: settings, inputs, files, free space."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import manifest
from pipeline.files import expand_home
from pipeline.findings import Finding, ok, skipped, wrong
from pipeline.inputs import list_input_paths
from pipeline.plan import list_unset_settings
from pipeline.run_root import name_snapshot_folder
from pipeline.runfile import import_by_name
from pipeline.spec import ConfigError, StageConfig, StageRun
from stages import STAGES
from stages.commands.reproduction import Selection
from stages.shared.image_data import ConvertConfig, count_images


@dataclass
class RunChecks:
    """Findings of all runs; the runs that are not done, and the bytes each writes by folder."""

    findings: list[Finding] = field(default_factory=list)
    pending: list[StageRun] = field(default_factory=list)
    sizes: dict[Path, float] = field(default_factory=dict)

    @property
    def bytes(self) -> float:
        """Bytes still to be written: an interrupted run has part of its files already."""
        return sum(max(0.0, size - _written_bytes(folder)) for folder, size in self.sizes.items())


def check_runs(selection: Selection, *, skip_data_checks: bool = False) -> RunChecks:
    """Check the selected runs that are not done.

    `skip_data_checks` leaves out the files that the runs read: only settings and needs are checked.
    """
    # Of all runs of the reproduction: an input may be done without being selected.
    done = manifest.split_runs(selection.root, selection.every).done
    by_id = {run.run_id: run for run in selection.every}
    available = {*done, *(run.run_id for run in selection.runs)}
    checks = RunChecks()
    for run in selection.runs:
        if run.run_id in done:
            checks.findings.append(ok(run.name, "done"))
            continue
        checks.pending.append(run)
        for need in run.needs.values():
            if need not in available:
                name = by_id[need].name
                detail = f"needs {name}, which is not done"
                checks.findings.append(wrong(run.name, detail, f"--only {name} too"))
        # Inputs outside the selection count too: they say what the run will read.
        findings, size = _check_run(run, collect_input_configs(run, by_id), skip_data_checks)
        checks.findings += findings
        checks.sizes[run.run_dir(selection.root)] = size
    return checks


def list_problems(selection: Selection, *, skip_data_checks: bool = False) -> list[str]:
    """Return a line for each problem of the selected runs, with what to do about it."""
    findings = check_runs(selection, skip_data_checks=skip_data_checks).findings
    return [
        f"{finding.subject}: {finding.detail}; to do: {finding.remedy}"
        for finding in findings
        if finding.state == "wrong"
    ]


def require_no_problems(selection: Selection, *, skip_data_checks: bool = False) -> None:
    """Raise ConfigError with every problem, before anything is submitted."""
    if lines := list_problems(selection, skip_data_checks=skip_data_checks):
        raise ConfigError("\n".join(["Nothing was submitted. Fix these first:", *lines]))


def collect_input_configs(run: StageRun, by_id: Mapping[str, StageRun]) -> dict[str, StageConfig]:
    """Return the configurations of the run's inputs, and of their inputs, by role.

    If a role occurs more than once, the nearest input counts: `data` of a k-NN run is the data set
    it evaluates on, even if the pretraining it needs has another one.
    """
    direct = {role: by_id[need] for role, need in run.needs.items()}
    found: dict[str, StageConfig] = {role: filler.config for role, filler in direct.items()}
    for filler in direct.values():
        found = {**collect_input_configs(filler, by_id), **found}
    return found


def list_written_folders(run_root: Path, runs: Iterable[StageRun]) -> list[Path]:
    """Return the folders that these runs write to, and that may be another user's by now."""
    folders = [run_root / "manifest", run_root / name_snapshot_folder()]
    for run in runs:
        run_dir = run.run_dir(run_root)
        folders += [run_dir.parent, run_dir]
        folders += [run_dir / name for name in ("attempts", "claims", "logs", "checkpoints")]
    return list(dict.fromkeys(folders))


def _check_run(
    run: StageRun, inputs: Mapping[str, StageConfig], skip_data_checks: bool
) -> tuple[list[Finding], float]:
    """Return the findings of a run, and how many bytes it writes as far as that is known."""
    size = 1e9 * run.config.estimate_disk_gb(inputs)
    if lines := list_unset_settings([run]):
        # Each line reads "setting is not set: what to do".
        unset = [line.split(": ", 1) for line in lines]
        return [wrong(run.name, detail, remedy) for detail, remedy in unset], size
    try:
        check_image_counts(run.config, inputs, skip_data_checks=skip_data_checks)
    except ValueError as error:
        return [wrong(run.name, error, f"change {run.name}, or the data set")], size
    entry = STAGES[run.stage].preflight
    # Most evaluations read only what earlier runs write.
    if entry is None:
        return [ok(run.name, "settings are complete; it reads no files of its own")], size
    if skip_data_checks:
        return [skipped(run.name, "its files are not checked")], size
    try:
        # The stage checks its own files; it alone knows how many bytes it writes beyond its
        # estimate.
        words, more = import_by_name(entry)(run.config, inputs)
    except (ValueError, OSError, ImportError) as error:
        return [wrong(run.name, error, _data_remedy(run))], size
    return [ok(run.name, words)], size + more


def check_image_counts(
    config: StageConfig, inputs: Mapping[str, StageConfig], *, skip_data_checks: bool
) -> None:
    """Raise ValueError if a run needs more images than its data set has, as far as that is known.

    The images are listed once for all runs that need them.
    """
    data = inputs.get("data")
    if isinstance(data, ConvertConfig):
        config.check_image_counts(count_images(data, listed=not skip_data_checks))


def _data_remedy(run: StageRun) -> str:
    """Return what to do about refused files, with the settings that say where they are."""
    places = dict(list_input_paths(run.config))
    settings = ", ".join(f"{run.name}.{name}" for name in places)
    remedy = f"correct the files, or {settings or 'the run'}"
    # Paths that exist are not the problem of a login node without the data, so the option is not
    # named.
    if not all(expand_home(place).exists() for place in places.values()):
        remedy += "; --skip-data-checks if only compute nodes have them"
    return remedy


def _written_bytes(folder: Path) -> int:
    try:
        return manifest.measure_size(folder) if folder.is_dir() else 0
    except FileNotFoundError:  # the run is active and removed a file while its folder was listed
        return 0
