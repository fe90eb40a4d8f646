"""Command line of the reproduction: plan | submit | run | status | tables | verify | logs | cancel.

It parses, wires the packages and exits: 0 fine, 1 a run failed, 2 a usage or configuration error, 75 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from pipeline.manifest import ManifestEntry
    from pipeline.spec import StageRun
    from results.schema import ResultRow
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
    from slurm import console

    runs, _ = _runs(reproduction, overrides, only)
    root, profile = _place(run_root, cluster)
    if profile is not None:
        from slurm.cluster import check_fit

        for run in runs:
            check_fit(profile, run.name, run.resources)
    console.show_plan(runs, manifest.split(root, runs), root, unresolved(runs))


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
    out: Annotated[Path | None, typer.Option(help="Write files here instead of printing.")] = None,
    overrides: SetOption = None,
    cluster: ClusterOption = None,
    run_root: RootOption = None,
) -> None:
    """The paper's tables, from the rows of finished runs.

    Printed numbers beside ours; runs that compare with nothing in the paper form a group of their own.
    """
    from results import tables as rendering

    for name in table or ():
        if name not in rendering.names():
            _stop(f"--table {name}: expected one of {', '.join(rendering.names())}")
    root, _ = _place(run_root, cluster)
    runs = _runs(reproduction, overrides, None)[0] if reproduction else None
    rows = _rows(root, runs)
    if out is not None:
        for name, path in rendering.write_all(rows, out, table or None).items():
            typer.echo(f"{name}: {path}")
        return
    for name in table or rendering.names():
        typer.echo(rendering.render(name, rows, format))


@app.command()
def verify(
    reproduction: Name,
    deep: Annotated[bool, typer.Option("--deep", help="Also look at every image of .beton files.")] = False,
    every: Annotated[int, typer.Option(min=1, help="With --deep: only every N-th image.")] = 1,
    overrides: SetOption = None,
    only: OnlyOption = None,
    cluster: ClusterOption = None,
    run_root: RootOption = None,
) -> None:
    """Check the files of finished runs against their checksums.

    Every output against its size and SHA-256 in the manifest, with --deep every image of the
    converted data sets: checksum, label, and that it decodes. A line per problem; exit code 1 when there is one.
    """
    from pipeline import manifest

    runs, _ = _runs(reproduction, overrides, only)
    root, _ = _place(run_root, cluster)
    wrong, checked = [], 0
    for run in runs:
        entry = manifest.read(root, run.run_id)
        if entry is not None:
            checked += 1
            wrong += manifest.problems(entry, hashes=True) + (_deep_problems(run.stage, entry, every) if deep else [])
        elif (path := manifest.entry_path(root, run.run_id)).exists():
            wrong.append(f"{path}: not a readable manifest entry")
    for line in wrong:
        typer.echo(line, err=True)
    typer.echo(f"{checked} of {len(runs)} runs are recorded, {len(wrong)} problems")
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
def cancel(reproduction: Name, overrides: SetOption = None, only: OnlyOption = None) -> None:
    """Cancel the queued and running jobs of a reproduction's runs.

    What is done stays done; `submit` goes on from the last checkpoints.
    """
    from slurm import queue

    runs, _ = _runs(reproduction, overrides, only)
    jobs = queue.queued(required=True)
    ids = [job.job_id for run in runs for job in jobs.get(queue.job_name(run.run_id), [])]
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


def _rows(root: Path, runs: Sequence[StageRun] | None) -> list[ResultRow]:
    """Result rows of finished runs: of the given ones, or of all there are."""
    from pipeline import manifest
    from results.store import read_rows

    ids = manifest.run_ids(root) if runs is None else [run.run_id for run in runs]
    entries = [manifest.find_done(root, identity) for identity in ids]
    paths = [entry.rows_path for entry in entries if entry is not None]
    return [row for path in paths if path is not None for row in read_rows(path)]


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
    from results.store import RowsError
    from slurm.queue import SlurmError

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        check_one_root()
        app()
    except (ConfigError, IntruderError, RowsError, SlurmError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
