"""The command `tables`: print tables, explain a cell, compare two run roots, or write files."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.settings import use_current_names
from pipeline.spec import StageRun
from results import publish, render, spec
from results.collect import CollectedResults
from results.compare import compare_cells
from results.energy import format_energy, sum_energy_of_runs
from results.explain import explain_cell
from results.render import Format
from results.runs import FinishedRun, iter_with_upstream
from results.spec import OptionError
from results.tables import Table, build_tables, describe_unplaced
from results.verdict import DEFAULT_MARGIN, check_margin
from stages import STAGES
from stages.commands.finished_results import collect_finished, load_comparison
from stages.commands.reproduction import Selection, list_seeded_runs
from stages.commands.whole_run_root import list_namesakes
from stages.shared.frozen import list_settings_of_features

# Options that do something instead of printing tables.
ACTIONS = ("out", "explain", "against", "publish")

# How a warning of a row that is in no table begins; the command then ends with exit code 1.
LEFT_OUT = "left out: "

# The other options, and the actions that heed them.
COMBINES_WITH = {
    "table": ("out", "against"),
    "filled": ("out",),
    "format": ("against",),
    "force": ("out", "publish"),
    "verdicts": ("out", "explain", "against"),
    "co2": ("out", "explain"),
}

# Options that say more about another one.
NEEDS = {"force": ("out", "publish"), "margin": ("verdicts",)}


@dataclass(frozen=True, kw_only=True)
class TablesRequest:
    """The options of the command, under their own names."""

    table: Sequence[str] = ()
    format: Format | None = None
    filled: bool = False
    verdicts: bool = False
    margin: float | None = None
    co2: float | None = None
    out: Path | None = None
    force: bool = False
    explain: tuple[str, str, str] | None = None
    against: Path | None = None
    publish: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", [full_table_name(name) for name in self.table])
        if self.explain:
            explained = (full_table_name(self.explain[0]), *self.explain[1:])
            object.__setattr__(self, "explain", explained)

    @property
    def verdict_margin(self) -> float | None:
        """The margin of verdicts; None if there are none."""
        if not self.verdicts:
            return None
        return DEFAULT_MARGIN if self.margin is None else self.margin

    def check(self) -> None:
        """Raise OptionError if two options exclude each other or a table does not exist."""
        actions = [name for name in ACTIONS if getattr(self, name) is not None]
        if len(actions) > 1:
            raise OptionError(f"--{' and --'.join(actions)} cannot be combined; give one of them")
        for option, needed in NEEDS.items():
            if getattr(self, option) not in (None, False) and not any(
                getattr(self, each) for each in needed
            ):
                raise OptionError(f"--{option} needs --{' or --'.join(needed)}")
        if self.margin is not None:
            check_margin(self.margin)
        # An option without effect is refused: silently ignored, it would seem to have worked.
        for option, heeding in COMBINES_WITH.items():
            if getattr(self, option) and actions and actions[0] not in heeding:
                raise OptionError(f"--{option} cannot be combined with --{actions[0]}")
        self._check_output()

    def _check_output(self) -> None:
        if self.co2 is not None and self.format == "csv":
            raise OptionError("--co2 cannot be combined with --format csv, which has no notes")
        known = spec.table_names()
        explained = self.explain[:1] if self.explain else ()
        for option, names in (("--table", self.table), ("--explain", explained)):
            for name in names:
                if name not in known:
                    raise OptionError(f"{option} {name}: expected one of {', '.join(known)}")


def full_table_name(name: str) -> str:
    """Return `table1` for `1` and for `Table 1`; other names as they are."""
    short = name.strip().lower().replace(" ", "")
    return f"table{short}" if short.isdigit() else short


def warn_of_problems(collection: CollectedResults, warn: Callable[[str], None]) -> None:
    """Name each row that is left out."""
    for problem in collection.problems:
        warn(f"{LEFT_OUT}{problem}")


def warn_of_missing_seeds(
    runs: Sequence[StageRun],
    collection: CollectedResults,
    warn: Callable[[str], None],
    where: str = "",
) -> None:
    """Say which seeds of --seeds are not done: a mean over the others would seem to be complete."""
    missing: dict[int, bool] = {}
    for seed, run in list_seeded_runs(runs):
        missing[seed] = missing.get(seed, False) or run.run_id not in collection.runs
    left = [str(seed) for seed, lacks in missing.items() if lacks]
    if len(missing) > 1 and left:
        done = len(missing) - len(left)
        word = "seed" if len(left) == 1 else "seeds"
        warn(
            f"{where}{done} of {len(missing)} seeds done; not done: {word} {', '.join(left)}"
            " (see status)"
        )


def warn_without_verdicts(tables: Sequence[Table], warn: Callable[[str], None]) -> None:
    """Say why there is no verdict, if no cell of ours has a printed number."""
    cells = sum(1 for table in tables for _ in table.our_cells())
    if cells and not any(table.count_comparisons() for table in tables):
        which = "our only cell has no" if cells == 1 else f"none of our {cells} cells has a"
        warn(f"0 verdicts: {which} printed number; --against compares with other runs")


def rename_settings(run: FinishedRun) -> Mapping[str, Any]:
    """Return the settings of a run under today's names, as `plan --explain` and the docs do.

    Those without effect, because stored features were made with others, are left out.
    """
    if run.stage not in STAGES:
        return run.config  # of code that has other stages
    stage_config = STAGES[run.stage].config
    elsewhere = list_settings_of_features(stage_config, run.upstream)
    named = use_current_names(stage_config, run.config)
    return {key: value for key, value in named.items() if key not in elsewhere}


def add_cost_note(table: Table, collection: CollectedResults, co2: float) -> Table:
    """Return a table with a note of what the runs behind it cost, in GPU-hours, kWh and CO2."""
    ids = dict.fromkeys(
        needed.run_id
        for result in sorted(table.used, key=lambda result: result.where)
        for needed in iter_with_upstream(result.row.run_id, collection.runs)
    )
    runs = [collection.runs[run_id] for run_id in ids]
    if not runs:
        return table
    energy = format_energy(sum_energy_of_runs(runs), co2, " of the GPUs")
    hours = sum(run.gpu_hours for run in runs)
    cost = f"{hours:.4g} GPU-hours, {energy or 'whose energy no GPU counted'}"
    note = f"The {len(runs)} runs behind our numbers took {cost}."
    return replace(table, notes=(*table.notes, note))


def run(
    selection: Selection, request: TablesRequest, *, warn: Callable[[str], None]
) -> Iterable[str]:
    """Return the texts to print.

    `warn` gets a line for each result that no table shows, and for each row that is left out
    because it is damaged or because another one claims the same cell.

    Raises:
        RowsError: there is such a row, and the results are to be published.
        OverwriteError: a file would be lost that this command did not write.
    """
    collection = collect_finished(selection.root, selection.runs)
    warn_of_problems(collection, warn)
    warn_of_missing_seeds(selection.runs, collection, warn)
    names = request.table or spec.table_names()
    fmt: Format = request.format or "md"
    if request.publish is not None:
        return map(str, publish.publish_tables(collection, request.publish, force=request.force))
    if request.explain is not None:
        text = explain_cell(
            collection,
            *request.explain,
            margin=request.verdict_margin,
            co2=request.co2,
            settings_of=rename_settings,
        )
        return [text.removesuffix("\n")]
    if request.against is not None:
        other = load_comparison(request.against, selection.runs)
        warn_of_problems(other, warn)
        warn_of_missing_seeds(selection.runs, other, warn, "there: ")
        compared = compare_cells(
            collection.results,
            other.results,
            names,
            request.verdict_margin,
            (collection.runs, other.runs),
        )
        return [render.render_formatted(compared, fmt)]
    tables = build_tables(collection.results, names)
    if request.co2 is not None:
        tables = [add_cost_note(table, collection, request.co2) for table in tables]
    # With a selection of tables, most results are rightly in none of them: only names that no table
    # knows are reported then.
    for line in describe_unplaced(collection, () if request.table else tables):
        warn(line)
    shown = [table for table in tables if table.used or not request.filled]
    if not shown:
        warn(f"no table has a result of ours: none in {selection.root}")
        for line in list_namesakes(selection.runs, selection.root):
            warn(line)
        return []
    if request.verdicts:
        warn_without_verdicts(shown, warn)
    if request.out is None:
        margin = request.verdict_margin
        return ["\n".join(render.render_table(table, fmt, margin) for table in shown)]
    written = render.write_tables(
        shown, request.out, margin=request.verdict_margin, force=request.force
    )
    return [f"{file}: {path}" for file, path in written.items()]
