"""Command line of the reproduction: plan | submit | run | status | tables | figures | report | verify | logs | cancel.

It parses, wires the packages and exits: 0 fine, 1 a run failed, 2 a usage or configuration error, 75 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.manifest import ManifestEntry
    from pipeline.spec import StageRun
    from results.collect import Collection
    from results.report.graph import Node
    from results.tables import Table
    from results.variants import Reference
    from slurm.cluster import ClusterProfile

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="""Plan, run, watch and tabulate reproductions.

    A REPRODUCTION is a bundled name, such as mini, or a YAML file like those in pipeline/configs: runs of stages, each
    with its configuration and the runs it needs. Every command takes all its runs, or those of --only.

    Exit code: 0 fine, 1 a run failed or a check found something, 2 usage or configuration error, 75 interrupted (the
    same command goes on).""",
)

Name = Annotated[str, typer.Argument(metavar="REPRODUCTION", help="Bundled name (mini, ...), or path of a YAML file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="run.key=value, as in pretrain.epochs=3; give it to every command. Repeatable."),
]
OnlyOption = Annotated[list[str] | None, typer.Option("--only", help="Name of a run, or a stage. Repeatable.")]
RootOption = Annotated[
    Path | None, typer.Option(help="Where runs are kept: else the profile's, MUGS_RUN_ROOT or ~/mugs-runs.")
]
ProfileOption = Annotated[
    int, typer.Option(min=0, help="Steps of each pretraining to write a profiler trace of, into <run>/trace/.")
]
ClusterOption = Annotated[str | None, typer.Option(help="Cluster profile: bundled name or path.")]


@app.command()
def plan(
    reproduction: Name,
    overrides: SetOption = None,
    only: OnlyOption = None,
    cluster: ClusterOption = None,
    run_root: RootOption = None,
) -> None:
    """What would run, where and at what cost, and what is done already.

    Also says which settings are missing, and with --cluster whether the runs fit its nodes. Starts nothing.
    """
    from pipeline import manifest
    from pipeline.plan import unresolved
    from slurm import console, estimates

    runs, _ = _runs(reproduction, overrides, only)
    root, profile = _place(run_root, cluster)
    if profile is not None:
        from slurm.cluster import check_fit

        for run in runs:
            check_fit(profile, run.name, run.resources)
    split = manifest.split(root, runs)
    console.show_plan(runs, split, root, unresolved(runs), estimates.advice(split.pending, root))


@app.command()
def submit(
    reproduction: Name,
    cluster: Annotated[str, typer.Option(help="Cluster profile: bundled name or path.")],
    overrides: SetOption = None,
    only: OnlyOption = None,
    profile: ProfileOption = 0,
    run_root: RootOption = None,
) -> None:
    """Queue on Slurm what is neither done nor queued.

    So it is also the way to resume and to retry. One job per run, each after those it needs. Jobs use a copy of the
    code as it is now. Look on with `status`.
    """
    from slurm import console
    from slurm.submit import submit as queue_runs

    runs, _ = _runs(reproduction, overrides, only)
    _refuse_unresolved(runs)
    _, where = _place(run_root, cluster)
    assert where is not None
    console.show_submissions(queue_runs(_profiled(runs, profile), where))


@app.command(name="run")
def run_command(
    reproduction: Name,
    overrides: SetOption = None,
    only: OnlyOption = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes per run; default: one per GPU here.")] = None,
    profile: ProfileOption = 0,
    run_root: RootOption = None,
) -> None:
    """Run here and now what is not done.

    One run after the other on this machine, without Slurm. What depends on a run that failed is left out. Ctrl-C saves
    and stops, the same command goes on from there; twice stops at once.
    """
    from slurm import console
    from slurm.local import run_here

    runs, _ = _runs(reproduction, overrides, only)
    _refuse_unresolved(runs)
    root, _ = _place(run_root, None)
    outcomes = run_here(_profiled(runs, profile), root, ranks=ranks, started=console.announce)
    console.show_outcomes(outcomes)
    if any(outcome.state == "interrupted" for outcome in outcomes):
        typer.echo("interrupted, run again to resume", err=True)
        raise typer.Exit(75)
    if any(outcome.state in ("failed", "not run") for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def status(
    reproduction: Name,
    overrides: SetOption = None,
    only: OnlyOption = None,
    cluster: ClusterOption = None,
    run_root: RootOption = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show again every few seconds, to the end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs.")] = False,
) -> None:
    """Where every run stands: done, running, queued, failed, waiting.

    With speed and time left, or the line it failed with and the log that holds the rest. Exit code 1 when one failed.
    """
    from slurm import console
    from slurm import status as states

    runs, _ = _runs(reproduction, overrides, only)
    root, _ = _place(run_root, cluster)
    while True:
        found = states.status(runs, root)
        if as_json:
            typer.echo(states.as_json(found))
        else:
            console.show_status(found)
        if not watch or not any(s.state in ("running", "queued") for s in found):
            break
        time.sleep(5)
    if any(s.state == "failed" for s in found):
        raise typer.Exit(1)


@app.command()
def tables(
    reproduction: Annotated[
        str | None, typer.Argument(metavar="REPRODUCTION", help="Only its runs; default: every finished run.")
    ] = None,
    table: Annotated[list[str] | None, typer.Option(help="Name of a table; repeatable, default all.")] = None,
    format: Annotated[Literal["md", "latex", "csv"], typer.Option(help="Of what is printed.")] = "md",
    filled: Annotated[bool, typer.Option("--filled", help="Only tables with a number of ours.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write files here instead of printing.")] = None,
    explain: Annotated[
        tuple[str, str, str] | None,
        typer.Option(metavar="TABLE ROW COLUMN", help="Where one cell comes from, as in: table1 'mugs vit-s/16' k-nn."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another run root, or a published folder: compare, cell by cell.")
    ] = None,
    publish: Annotated[
        Path | None, typer.Option(help="Write rows, runs and tables to a folder to keep: results/published/NAME.")
    ] = None,
    overrides: SetOption = None,
    cluster: ClusterOption = None,
    run_root: RootOption = None,
) -> None:
    """The paper's tables, from the rows of finished runs.

    Printed numbers beside ours; runs that compare with nothing in the paper form a part of their own. Rows that are
    damaged, or two that claim one cell, stop it and are named with file and line.
    """
    from results import compare, render, spec
    from results import publish as publication
    from results.explain import explain as origin
    from results.tables import build_all

    _check_tables_options(table, filled, out=out, explain=explain, against=against, publish=publish)
    root, _ = _place(run_root, cluster)
    chosen = _runs(reproduction, overrides, None)[0] if reproduction else None
    collection = _collection(root, chosen).checked()
    if publish is not None:
        for path in publication.publish(collection, publish):
            typer.echo(path)
    elif explain is not None:
        typer.echo(origin(collection, *explain), nl=False)
    elif against is not None:
        other = _other(against.expanduser().absolute(), chosen).checked()
        pairs = compare.compare(collection.results, other.results, table or spec.names())
        typer.echo(render.laid_text(compare.laid(pairs), format))
    else:
        built = build_all(collection.results, table or spec.names())
        _warn_left_over(collection, () if table else built)
        built = [each for each in built if each.used or not filled]
        if out is not None:
            for file, path in render.write_all(built, out).items():
                typer.echo(f"{file}: {path}")
        else:
            typer.echo("\n".join(render.to_text(each, format) for each in built))


@app.command()
def figures(
    out: Annotated[Path, typer.Option(help="Folder for the files.")],
    reproduction: Annotated[
        str | None, typer.Argument(metavar="REPRODUCTION", help="Only its runs; default: every finished run.")
    ] = None,
    classes: Annotated[list[int] | None, typer.Option(help="Class of the t-SNE, by number; repeatable.")] = None,
    overrides: SetOption = None,
    cluster: ClusterOption = None,
    run_root: RootOption = None,
) -> None:
    """Figures as PNG and SVG: Figure 2 with ours, k-NN over epochs, training curves, t-SNE of stored features.

    Those there is material for; the same bytes each time.
    """
    from results.figures.every import drawings
    from results.figures.style import write

    root, _ = _place(run_root, cluster)
    chosen = _runs(reproduction, overrides, None)[0] if reproduction else None
    for path in write(drawings(_collection(root, chosen).checked(), root, classes or ()), out):
        typer.echo(path)


@app.command()
def report(
    reproduction: Annotated[
        str | None,
        typer.Argument(metavar="REPRODUCTION", help="Only its runs, done or not; default: all done."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The file; default: report.html in the run root.")] = None,
    overrides: SetOption = None,
    cluster: ClusterOption = None,
    run_root: RootOption = None,
) -> None:
    """One HTML page: tables, figures, runs and their states, costs, provenance, deviations.

    It holds all it needs and opens from disk. Rows that are refused are listed on it.
    """
    from results.report.page import report as page
    from results.report.page import write

    root, _ = _place(run_root, cluster)
    chosen = _runs(reproduction, overrides, None)[0] if reproduction else None
    collection = _collection(root, chosen)
    text = page(collection, root, nodes=_nodes(chosen, root), paper_says=_paper_says(collection))
    root.mkdir(parents=True, exist_ok=True)
    path = write(text, out or root / "report.html")
    for line in collection.problems:
        typer.echo(f"refused: {line}", err=True)
    typer.echo(f"{path} ({len(text.encode()) / 1e6:.1f} MB)")


@app.command()
def verify(
    reproduction: Name,
    deep: Annotated[bool, typer.Option("--deep", help="Also look at every image of .beton files.")] = False,
    every: Annotated[int, typer.Option(min=1, help="With --deep: only every N-th image.")] = 1,
    repair: Annotated[
        bool, typer.Option("--repair", help="Set bad checkpoints aside, remove leftovers of interrupted writes.")
    ] = False,
    overrides: SetOption = None,
    only: OnlyOption = None,
    cluster: ClusterOption = None,
    run_root: RootOption = None,
) -> None:
    """Check the files of runs against their checksums.

    Of finished runs every output against its size and SHA-256 in the manifest, of all runs every checkpoint, with
    --deep every image of the converted data sets: checksum, label, and that it decodes. A line per problem; exit code
    1 when one is left. A bad checkpoint is set aside as bad_step_..., and only where a good one remains.
    """
    from pipeline import manifest
    from stages.checkpoints import inspect

    runs, _ = _runs(reproduction, overrides, only)
    root, _ = _place(run_root, cluster)
    wrong, repaired, checked, checkpoints = [], [], 0, 0
    for run in runs:
        entry = manifest.read(root, run.run_id)
        if entry is not None:
            checked += 1
            wrong += manifest.problems(entry, hashes=True) + (_deep_problems(run.stage, entry, every) if deep else [])
        elif (path := manifest.entry_path(root, run.run_id)).exists():
            wrong.append(f"{path}: not a readable manifest entry")
        found = inspect(run.run_dir(root), repair=repair)
        wrong, repaired, checkpoints = wrong + found.problems, repaired + found.repaired, checkpoints + found.good
    for line in [*wrong, *(f"{line} (repaired)" for line in repaired)]:
        typer.echo(line, err=True)
    mended = f"{len(repaired)} repaired, " if repaired else ""
    recorded = f"{checked} of {len(runs)} runs are recorded, {checkpoints} good checkpoints"
    typer.echo(f"{recorded}, {mended}{len(wrong)} problems")
    if wrong:
        raise typer.Exit(1)


@app.command()
def logs(
    reproduction: Name,
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, or a stage.")],
    lines: Annotated[int, typer.Option(help="How many of the last lines.")] = 40,
    overrides: SetOption = None,
    cluster: ClusterOption = None,
    run_root: RootOption = None,
) -> None:
    """The path and the end of a run's newest log.

    The logs of all attempts and ranks are beside it.
    """
    from slurm import status as states

    runs, _ = _runs(reproduction, overrides, [run])
    root, _ = _place(run_root, cluster)
    for found in states.status(runs, root):
        path = found.log or states.newest_log(found.run.run_dir(root))
        typer.echo(f"==> {path or f'{found.run.name}: no log yet'}")
        if path and Path(path).is_file():
            typer.echo("\n".join(Path(path).read_text(errors="replace").splitlines()[-lines:]))


@app.command()
def cancel(
    reproduction: Name,
    overrides: SetOption = None,
    only: OnlyOption = None,
    cluster: ClusterOption = None,
    run_root: RootOption = None,
) -> None:
    """Cancel the queued and running jobs of a reproduction's runs.

    What is done stays done; `submit` goes on from the last checkpoints.
    """
    from slurm import queue

    runs, _ = _runs(reproduction, overrides, only)
    root, _ = _place(run_root, cluster)
    jobs = queue.queued(runs, root, required=True)
    ids = [job.job_id for run in runs for job in jobs.get(run.run_id, [])]
    queue.cancel(ids)
    typer.echo(f"cancelled {len(ids)} jobs{': ' if ids else ''}{' '.join(ids)}")


def _runs(
    reproduction: str, overrides: Sequence[str] | None, only: Sequence[str] | None
) -> tuple[list[StageRun], list[StageRun]]:
    """Chosen runs and all runs of a reproduction, in order."""
    from pipeline import config
    from pipeline.plan import build_plan, select
    from stages import STAGES

    everything = build_plan(config.load(reproduction, STAGES, overrides or ()))
    return select(everything, only or ()), everything


def _check_tables_options(tables: Sequence[str] | None, filled: bool, **given: Any) -> None:
    """Stop at options that exclude each other, and at unknown tables."""
    from results import spec

    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        _stop(f"--{' and --'.join(chosen)} do different things; give one of them")
    if filled and chosen not in ([], ["out"]):
        _stop(f"--filled says nothing with --{chosen[0]}; leave it out")
    if tables and chosen in (["explain"], ["publish"]):
        _stop(f"--table says nothing with --{chosen[0]}; leave it out")
    asked = [("--table", name) for name in tables or ()]
    asked += [("--explain", given["explain"][0])] if given["explain"] else []
    for option, name in asked:
        if name not in spec.names():
            _stop(f"{option} {name}: expected one of {', '.join(spec.names())}")


def _collection(root: Path, runs: Sequence[StageRun] | None) -> Collection:
    """Results of finished runs: of the given ones, or of all there are; what is refused is named in it."""
    from pipeline import manifest
    from pipeline.identity import runtime_names
    from results.collect import collect
    from results.runs import from_entry
    from stages import STAGES

    ids = manifest.run_ids(root) if runs is None else [run.run_id for run in runs]
    entries = [entry for identity in ids if (entry := manifest.find_done(root, identity, rows=False))]
    runtime = {name: runtime_names(spec.config) for name, spec in STAGES.items()}
    found = [from_entry(entry.model_dump(mode="json"), runtime.get(entry.stage, ())) for entry in entries]
    return collect(root, found, _recipes() if found else ())


def _other(folder: Path, runs: Sequence[StageRun] | None) -> Collection:
    """Results of another run root, or of a published folder."""
    from results.publish import is_published, read

    if not folder.is_dir():
        _stop(f"--against {folder}: there is no such folder")
    return read(folder) if is_published(folder) else _collection(folder, runs)


def _recipes() -> list[Reference]:
    """The bundled reproductions: what the settings of a finished run are compared with."""
    from pipeline import config
    from pipeline.identity import science
    from results.variants import Recipe, Reference
    from stages import STAGES

    found = []
    for name in config.bundled():
        runs = config.load(name, STAGES).runs
        recipes = [Recipe(run.spec.name, _dataset(key, runs), science(run.config)) for key, run in runs.items()]
        found.append(Reference(name, tuple(recipes)))
    return found


def _dataset(name: str, runs: Mapping[str, RunConfig]) -> str:
    """The data set that a run of a reproduction is about: its own, else that of what it takes data or features of."""
    run = runs[name]
    own = getattr(run.config, "dataset", None)
    sources = [run.needs[role] for role in ("data", "features") if role in run.needs]
    return str(own or (_dataset(sources[0], runs) if sources else ""))


def _nodes(runs: Sequence[StageRun] | None, root: Path) -> list[Node]:
    """The runs of a reproduction with their states, for the report; none when it is about all that is done."""
    from results.report.graph import Node
    from slurm import status as states

    found = states.status(runs, root) if runs else []
    return [Node(s.run.run_id, s.run.stage, s.run.name, s.state, s.detail, tuple(s.run.needs.values())) for s in found]


def _paper_says(collection: Collection) -> dict[str, list[str]]:
    """By pretraining: its settings beside what the paper's text says where that differs from the release."""
    from results.runs import flat
    from stages.presets import paper

    return {
        run.run_id: [
            f"{key}={flat(run.config)[key]}, the paper says {value}"
            for key, value in flat(paper(str(run.config.get("arch")))).items()
            if key in flat(run.config) and flat(run.config)[key] != value
        ]
        for run in collection.runs.values()
        if run.stage == "pretrain"
    }


def _warn_left_over(collection: Collection, built: Sequence[Table]) -> None:
    """A line on stderr for each name that no table knows, and for each result that none of all the tables shows."""
    from results.tables import left_over

    for line in left_over(collection, built):
        typer.echo(line, err=True)


def _deep_problems(stage: str, entry: ManifestEntry, every: int) -> list[str]:
    """What the stage of a finished run finds wrong inside its outputs."""
    from pipeline.runfile import resolve
    from stages import STAGES

    check = STAGES[stage].check
    return list(resolve(check)(entry, every)) if check else []


def _profiled(runs: Sequence[StageRun], steps: int) -> Sequence[StageRun]:
    """The runs, those that train told to trace `steps` steps. Their ids stay: a trace changes no number."""
    if steps == 0:
        return runs
    if not any(hasattr(run.config, "profile_steps") for run in runs):
        _stop("--profile: none of the chosen runs can be traced")
    traced = {"profile_steps": steps}
    return [
        replace(run, config=run.config.model_copy(update=traced)) if hasattr(run.config, "profile_steps") else run
        for run in runs
    ]


def _refuse_unresolved(runs: Sequence[StageRun]) -> None:
    from pipeline.plan import unresolved

    if lines := unresolved(runs):
        _stop("; ".join(lines))


def _place(run_root: Path | None, cluster: str | None) -> tuple[Path, ClusterProfile | None]:
    """Run root and profile: the option, else the profile's, else MUGS_RUN_ROOT, else ~/mugs-runs."""
    from pipeline.provenance import code_root

    profile = None
    if cluster is not None:
        from slurm.cluster import load_profile

        profile = load_profile(cluster)
    if run_root is not None:
        root = run_root.expanduser().absolute()
    else:
        default = Path(os.environ.get("MUGS_RUN_ROOT") or "~/mugs-runs").expanduser().absolute()
        root = profile.run_root if profile else default
        if root.is_relative_to(code_root()):
            _stop(f"run root {root} is inside the checkout; name another with --run-root")
    return root, profile.model_copy(update={"run_root": root}) if profile else None


def _stop(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def main() -> None:
    """Entry point; user errors become one line and exit code 2."""
    from pipeline.provenance import IntruderError, check_one_root
    from pipeline.spec import ConfigError
    from results.explain import NoSuchCellError
    from results.store import RowsError
    from slurm.queue import SlurmError

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        check_one_root()
        app()
    except (ConfigError, IntruderError, NoSuchCellError, RowsError, SlurmError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
