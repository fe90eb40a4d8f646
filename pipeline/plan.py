"""A reproduction as stage runs, in an order in which each run comes after those it needs."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from pipeline.config import Reproduction, RunConfig
from pipeline.identity import run_id
from pipeline.reading import format_choices
from pipeline.remarks import remark_on_overrides
from pipeline.settings import Mark, Settings, setting_fields
from pipeline.spec import ConfigError, StageRun


def build_plan(reproduction: Reproduction) -> list[StageRun]:
    """Return the stage runs of a reproduction in topological order, otherwise as written.

    Raises:
        ConfigError: names runs that need each other in a circle, or what does not fit together.
    """
    # Roles first: the order below follows them.
    for run in reproduction.runs.values():
        _check_needs(reproduction, run)
    planned: dict[str, StageRun] = {}
    by_id: dict[str, StageRun] = {}
    for name in _order(reproduction):
        run = reproduction.runs[name]
        inputs = {role: planned[filler].config for role, filler in run.needs.items()}
        where = f"{reproduction.source}: runs.{name}"
        try:
            run.config.check_resources(run.resources)
            where += ".needs"
            run.config.check_inputs(inputs)
            config = run.config.complete_from(inputs)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
        # Ids of inputs are part of a run's id, so they are known first: that is why order matters.
        needs = {role: planned[filler].run_id for role, filler in run.needs.items()}
        identity = run_id(run.spec.name, config, needs)
        same = by_id.get(identity)
        if same is not None and reproduction.joined:
            planned[name] = same
            continue
        if same is not None:
            # They would share a folder's id and a manifest entry.
            raise ConfigError(
                f"{reproduction.source}: runs {same.name!r} and {name!r} are the same run; "
                "remove one"
            )
        planned[name] = by_id[identity] = StageRun(
            stage=run.spec.name,
            name=name,
            run_id=identity,
            config=config,
            needs=needs,
            resources=run.resources,
            entrypoint=run.spec.entrypoint,
            rows_writer=run.spec.rows_writer,
            facts=tuple(config.list_facts(inputs)),
            own_name=run.own_name,
            written_name=run.written_name,
            remarks=(*config.list_remarks(inputs), *remark_on_overrides(run)),
        )
    # A run that has two names in `planned` comes once.
    return list(by_id.values())


def _check_needs(reproduction: Reproduction, run: RunConfig) -> None:
    where = f"{reproduction.source}: runs.{run.name}.needs"
    for role, filler in run.needs.items():
        if role not in run.spec.needs:
            choices = format_choices(role, run.spec.needs)
            raise ConfigError(f"{where}: stage {run.spec.name!r} has no role {role!r}{choices}")
        if filler not in reproduction.runs:
            choices = format_choices(filler, reproduction.runs)
            raise ConfigError(f"{where}.{role}: there is no run {filler!r}{choices}")
        stage = reproduction.runs[filler].spec.name
        if stage not in run.spec.fillers(role):
            wanted = " or ".join(run.spec.fillers(role))
            raise ConfigError(
                f"{where}.{role}: run {filler!r} is a {stage!r} run, expected {wanted}"
            )
    for role in run.spec.needs:
        if role not in run.needs and not run.spec.optional(role):
            wanted = " or ".join(run.spec.fillers(role))
            raise ConfigError(f"{where}: role {role!r} is not filled; name a {wanted} run")


def _order(reproduction: Reproduction) -> list[str]:
    """Return the names of the runs, depth first: each after those it needs, else as written."""
    order: dict[str, None] = {}  # a list would be searched for each of thousands of names

    def visit(name: str, path: list[str]) -> None:
        if name in order:
            return
        if name in path:
            cycle = " -> ".join([*path[path.index(name) :], name])
            raise ConfigError(f"{reproduction.source}: runs need each other in a circle: {cycle}")
        for filler in reproduction.runs[name].needs.values():
            visit(filler, [*path, name])
        order[name] = None

    for name in reproduction.runs:
        visit(name, [])
    return list(order)


def select_runs(runs: Sequence[StageRun], only: Sequence[str]) -> list[StageRun]:
    """Return the runs whose name or stage is in `only`, or all of them if it is empty.

    A word that is both the name of a run and a stage means the run alone: `knn` leaves out
    `knn_initial`. The name that a run has in the file means all of its seeds.

    Raises:
        ConfigError: there is no such run or stage.
    """
    names = {name for run in runs for name in (run.name, run.written_name) if name}
    known = names | {run.stage for run in runs}
    for name in only:
        if name not in known:
            raise ConfigError(f"{name}: no such run or stage{format_choices(name, known)}")
    stages = set(only) - names
    return [
        run
        for run in runs
        if not only or run.name in only or run.written_name in only or run.stage in stages
    ]


def list_unset_settings(runs: Iterable[StageRun]) -> list[str]:
    """Return a line for each setting that a run requires and that is not set, with the --set."""
    # --set knows a run by its name in the file; all of its seeds lack the same setting.
    keys = [f"{run.written_name or run.name}.{key}" for run in runs for key in _unset(run.config)]
    return [
        f"{key} is not set: --set {key}=/path/to/{key.rpartition('.')[2]}"
        for key in dict.fromkeys(keys)
    ]


def check_required_settings(runs: Iterable[StageRun]) -> None:
    """Raise ConfigError with all settings that are required and not set."""
    if lines := list_unset_settings(runs):
        raise ConfigError("; ".join(lines))


def with_trace_steps(runs: Sequence[StageRun], steps: int) -> Sequence[StageRun]:
    """Return the runs, set to trace their first `steps` steps where they train step by step.

    Their run ids stay the same, because a trace changes no result.
    """
    if steps == 0:
        return runs
    if not any(hasattr(run.config, "trace_steps") for run in runs):
        raise ConfigError("--trace-steps: none of the selected runs can be traced")
    changed = {"trace_steps": steps}
    return [
        replace(run, config=replace(run.config, **changed))
        if hasattr(run.config, "trace_steps")
        else run
        for run in runs
    ]


def _unset(settings: Settings) -> Iterator[str]:
    for field in setting_fields(type(settings)).values():
        value = getattr(settings, field.name)
        if isinstance(value, Settings):
            yield from (f"{field.name}.{key}" for key in _unset(value))
        elif value is None and Mark.REQUIRED_AT_RUN in field.marks:
            yield field.name
