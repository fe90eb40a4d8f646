"""The runs of a reproduction, and those that a command is about."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import config, manifest
from pipeline.inputs import find_changed_inputs, find_mixed_inputs
from pipeline.plan import build_plan, select_runs
from pipeline.seeds import parse_seeds
from pipeline.spec import ConfigError, StageRun
from stages import STAGES

# What tells runs with other inputs apart, by stage; for the others it is the name of the data set.
IDENTITY_HINT = {"import": "sha256"}


@dataclass(frozen=True)
class Selection:
    """What a command works on: the selected `runs`, `every` run of the reproduction, the run root.

    Without a reproduction there are no runs; commands that print results then take every finished
    run.
    """

    runs: Sequence[StageRun]
    every: Sequence[StageRun]
    root: Path


def list_changed_inputs(selection: Selection) -> list[str]:
    """Return a line for each finished run whose settings lead to other inputs than it read."""
    lines = []
    for run in selection.runs:
        entry = manifest.read_entry(selection.root, run.run_id)
        if entry is None:
            continue
        lines += [
            f"note: {run.name} is done, but {line} than the last one, which went on from its "
            "checkpoint; repeat it in another run root for a result of one input"
            for line in find_mixed_inputs(entry)
        ]
        changed = find_changed_inputs(run.config, entry)
        lines += [
            f"note: {run.name} is done, but {line}; its result stays that of the former input. For"
            f" another run, give it another identity ({IDENTITY_HINT.get(run.stage, 'dataset')})"
            " or use another run root"
            for line in changed
        ]
        # Records of before the setting have none.
        recorded = entry.config.get("variant", "")
        if getattr(run.config, "variant", recorded) != recorded:
            lines.append(
                f"note: {run.name} is done as variant {recorded!r}, and tables keep that name; "
                "repeat it in another run root for another one"
            )
    return lines


def load_selection(
    reproduction: str | None,
    overrides: Sequence[str] | None,
    only: Sequence[str] | None,
    root: Path,
    seeds: Sequence[str] | None = None,
) -> Selection:
    """Return the runs of a reproduction that `only` names, or all of them without `only`.

    Without a reproduction there are none.
    """
    if not reproduction:
        # `status` finds the runs, and those of `only`, in the run root.
        return Selection([], [], root)
    every = all_runs(reproduction, overrides, seeds)
    return Selection(select_runs(every, only or ()), every, root)


def list_seeded_runs(runs: Sequence[StageRun]) -> Iterator[tuple[int, StageRun]]:
    """Yield each run that is there with several seeds, with its seed.

    `runs` are in the order of a plan: each after those that it needs.
    """
    copies = Counter(run.written_name for run in runs)
    seeds: dict[str, int] = {}
    for run in runs:
        config: Any = run.config
        inherited = [seeds[need] for need in run.needs.values() if need in seeds]
        if config.repeats_with_seed():
            seeds[run.run_id] = config.seed
        elif inherited:
            seeds[run.run_id] = inherited[0]
        if run.run_id in seeds and copies[run.written_name] > 1:
            yield seeds[run.run_id], run


def check_run_root(root: Path) -> None:
    """Raise ConfigError if the run root does not exist.

    A mistyped path would otherwise look like a run root without runs, or with nothing wrong.
    """
    if not root.is_dir():
        raise ConfigError(
            f"run root {root}: there is no such folder; give that of your runs with --run-root or"
            " --cluster (run and submit make a new one)"
        )


def all_runs(
    name_or_path: str,
    overrides: Sequence[str] | None = None,
    seeds: Sequence[str] | None = None,
) -> list[StageRun]:
    """Return every run of a reproduction, each after the runs it needs.

    `overrides` are the values of --set, `seeds` those of --seeds.

    Raises:
        ConfigError: the file or an option is wrong; the message names the place.
    """
    numbers = parse_seeds(seeds) if seeds else ()
    return build_plan(config.load_reproduction(name_or_path, STAGES, overrides or (), numbers))
