"""Command line of the reproduction: its commands, their options and help. The work is done in the packages.

Exit codes: 0 fine, 1 a run failed or a check found something, 2 a usage or configuration error, 75 interrupted.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from pipeline.spec import StageRun

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

Name = Annotated[
    str,
    typer.Argument(
        metavar="REPRODUCTION", help="Bundled name (mini, ...), or path of a YAML file."
    ),
]
AnyName = Annotated[
    str | None,
    typer.Argument(metavar="REPRODUCTION", help="Only its runs; default: every finished run."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="RUN.KEY=VALUE",
        help="As in pretrain.epochs=3; give it to every command. Repeatable.",
    ),
]
Only = Annotated[
    list[str] | None, typer.Option(metavar="RUN", help="Name of a run, or a stage. Repeatable.")
]
Root = Annotated[
    Path | None,
    typer.Option(help="Where runs are kept: else the profile's, MUGS_RUN_ROOT or ~/mugs-runs."),
]
Profile = Annotated[
    int, typer.Option(min=0, help="Steps of each pretraining to trace, into <run>/trace/.")
]
Cluster = Annotated[str | None, typer.Option(help="Cluster profile: bundled name or path.")]
Unseen = Annotated[
    bool,
    typer.Option("--unseen", help="Look at no data: only compute nodes have it, or to save time."),
]


@app.command()
def plan(
    reproduction: Name,
    overrides: Set = None,
    only: Only = None,
    cluster: Cluster = None,
    run_root: Root = None,
    unseen: Unseen = False,
) -> None:
    """What would run, where and at what cost, and what is done already.

    Also says what is in the way: settings that are missing, data sets, lists and weights that are not as they should
    be, and with --cluster runs that do not fit its nodes. Starts nothing, and exits with 0 whatever it finds.
    """
    from pipeline import manifest
    from slurm import console
    from slurm.submission import estimates
    from stages.commands.preflight import list_problems

    runs, every, root = _chosen_of_all(reproduction, overrides, only, cluster, run_root)
    split = manifest.split_runs(root, runs)
    console.show_plan(runs, split, root, estimates.advise_checkpoint_interval(split.pending, root))
    if cluster is not None:
        from slurm.submission.profile import find_gpu_shortages, load_profile

        console.show_lines(find_gpu_shortages(load_profile(cluster), split.pending))
    console.announce_data_checks(unseen)
    console.show_lines(list_problems(runs, every, root, unseen=unseen))


@app.command()
def doctor(
    reproduction: Name,
    overrides: Set = None,
    only: Only = None,
    cluster: Cluster = None,
    run_root: Root = None,
    unseen: Unseen = False,
) -> None:
    """What is in the way, before GPUs are spent.

    Python, packages and FFCV; with --cluster Slurm, its partition and account, and a dry run of the jobs; the run root
    and its room; of every run that is not done its settings, and the data sets, lists and weights it reads. Data sets
    are looked through for layout, numbers, labels and images that were cut short, which takes minutes for a large one.
    Changes nothing; exit code 1 when something is wrong.
    """
    from pipeline import environment
    from slurm import console
    from slurm import run_root as place
    from stages.commands.preflight import check_runs

    runs, every, root = _chosen_of_all(reproduction, overrides, only, cluster, run_root)
    console.announce_data_checks(unseen)
    found = check_runs(runs, every, root, unseen=unseen)
    ffcv = any(getattr(run.config, "loader", "") == "ffcv" for run in found.pending)
    findings = [
        *environment.check_environment(ffcv_required=ffcv),
        *environment.check_free_space(root, found.bytes),
    ]
    if cluster:
        from slurm.submission.preflight import check_cluster

        findings += check_cluster(place.load_profile_at(cluster, run_root), found.pending)
    else:
        findings.append(environment.skip_cluster_check())
    raise typer.Exit(console.show_findings([*findings, *found.findings]))


@app.command()
def submit(
    reproduction: Name,
    cluster: Annotated[str, typer.Option(help="Cluster profile: bundled name or path.")],
    overrides: Set = None,
    only: Only = None,
    profile: Profile = 0,
    run_root: Root = None,
    unseen: Unseen = False,
) -> None:
    """Queue on Slurm what is neither done nor queued.

    So it is also the way to resume and to retry. One job per run, each after those it needs. Before the first, the data
    sets, lists and weights that the runs read are looked at, as by `doctor`. Jobs use a copy of the code as it is now.
    Look on with `status`.
    """
    from pipeline.plan import with_trace_steps
    from slurm import console
    from slurm import run_root as place
    from slurm.submission import submit as submission
    from stages.commands.preflight import require_no_problems

    chosen, every, root = _chosen_of_all(reproduction, overrides, only, cluster, run_root)
    runs, on = with_trace_steps(chosen, profile), place.load_profile_at(cluster, run_root)
    submission.check_submission(runs, on)  # in a moment, before the look that may take minutes
    console.announce_data_checks(unseen)
    require_no_problems(runs, every, root, unseen=unseen)
    console.show_submissions(submission.submit(runs, on))


@app.command(name="run")
def run_command(
    reproduction: Name,
    overrides: Set = None,
    only: Only = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes per run; default: one per GPU here.")
    ] = None,
    profile: Profile = 0,
    run_root: Root = None,
) -> None:
    """Run here and now what is not done.

    One run after the other on this machine, without Slurm; one that watches another runs beside it. What depends on a
    run that failed is left out. Ctrl-C saves and stops, the same command goes on from there; twice stops at once.
    """
    from pipeline.plan import check_required_settings, with_trace_steps
    from slurm import console
    from slurm.local.executor import run_locally

    runs, root = _chosen(reproduction, overrides, only, None, run_root)
    check_required_settings(runs)
    outcomes = run_locally(
        with_trace_steps(runs, profile), root, ranks=ranks, on_start=console.announce_run
    )
    raise typer.Exit(console.show_outcomes(outcomes))


@app.command()
def status(
    reproduction: Name,
    overrides: Set = None,
    only: Only = None,
    cluster: Cluster = None,
    run_root: Root = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show again every few seconds, to the end.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs.")] = False,
) -> None:
    """Where every run stands: done, running, queued, failed, waiting.

    With speed and time left, or the line it failed with and the log that holds the rest. Exit code 1 when one failed.
    """
    from slurm import console
    from slurm import status as states

    runs, root = _chosen(reproduction, overrides, only, cluster, run_root)
    for found in states.watch_status(runs, root) if watch else [states.collect_status(runs, root)]:
        typer.echo(states.format_json(found)) if as_json else console.show_status(found)
    if any(s.state == "failed" for s in found):
        raise typer.Exit(1)


@app.command()
def tables(
    reproduction: AnyName = None,
    table: Annotated[
        list[str] | None, typer.Option(help="Name of a table; repeatable, default all.")
    ] = None,
    format: Annotated[
        Literal["md", "latex", "csv"] | None, typer.Option(help="Of what is printed; default md.")
    ] = None,
    filled: Annotated[
        bool, typer.Option("--filled", help="Only tables with a number of ours.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write files here instead of printing.")] = None,
    explain: Annotated[
        tuple[str, str, str] | None,
        typer.Option(
            metavar="TABLE ROW COLUMN",
            help="Where one cell comes from, as in: table1 'mugs vit-s/16' k-nn.",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Another run root, or a published folder: compare, cell by cell."),
    ] = None,
    publish: Annotated[
        Path | None,
        typer.Option(
            help="Write rows, runs and tables to a folder to keep: results/published/NAME."
        ),
    ] = None,
    overrides: Set = None,
    cluster: Cluster = None,
    run_root: Root = None,
) -> None:
    """The paper's tables, from the rows of finished runs.

    Printed numbers beside ours; runs that compare with nothing in the paper form a part of their own. Rows that are
    damaged, or two that claim one cell, stop it and are named with file and line.
    """
    from results import options
    from stages.commands import tables as tabulated

    options.check_table_options(
        table=table,
        format=format,
        filled=filled,
        out=out,
        explain=explain,
        against=against,
        publish=publish,
    )
    runs, root = _chosen(reproduction, overrides, None, cluster, run_root)
    given = tabulated.TablesRequest(
        table or (), format or "md", filled, out, explain, against, publish
    )
    _show(
        tabulated.run(
            root,
            runs if reproduction else None,
            given,
            warn=lambda line: typer.echo(line, err=True),
        )
    )


@app.command()
def figures(
    out: Annotated[Path, typer.Option(help="Folder for the files.")],
    reproduction: AnyName = None,
    classes: Annotated[
        list[int] | None, typer.Option(help="Class of the t-SNE, by number; repeatable.")
    ] = None,
    overrides: Set = None,
    cluster: Cluster = None,
    run_root: Root = None,
) -> None:
    """Figures of finished runs, as PNG and SVG.

    Figure 2 with ours, k-NN over epochs, training curves, t-SNE of stored features: those there is material for; the
    same bytes each time.
    """
    from results.figures.all_figures import draw_all_figures
    from results.figures.style import write_figures
    from stages.commands.finished_results import collect_finished

    runs, root = _chosen(reproduction, overrides, None, cluster, run_root)
    _show(
        write_figures(
            draw_all_figures(
                collect_finished(root, runs if reproduction else None).require_valid(),
                root,
                classes or (),
            ),
            out,
        )
    )


@app.command()
def report(
    reproduction: AnyName = None,
    out: Annotated[
        Path | None, typer.Option(help="The file; default: report.html in the run root.")
    ] = None,
    overrides: Set = None,
    cluster: Cluster = None,
    run_root: Root = None,
) -> None:
    """One HTML page with all results.

    Tables, figures, runs and their states, costs, provenance, deviations. It holds all it needs and opens from disk. Of
    a reproduction it shows all runs, done or not. Rows that are refused are listed on it.
    """
    from pipeline.files import write_atomic
    from results.report.graph import Node
    from results.report.page import render_report as page
    from slurm.status import collect_status
    from stages.commands.finished_results import collect_finished, find_paper_differences

    runs, root = _chosen(reproduction, overrides, None, cluster, run_root)
    collection, found = (
        collect_finished(root, runs if reproduction else None),
        collect_status(runs, root),
    )
    nodes = [
        Node(s.run.run_id, s.run.stage, s.run.name, s.state, s.detail, tuple(s.run.needs.values()))
        for s in found
    ]
    text = page(collection, root, nodes=nodes, paper_says=find_paper_differences(collection))
    path = write_atomic(out or root / "report.html", text)
    _show((f"refused: {line}" for line in collection.problems), err=True)
    typer.echo(f"{path} ({len(text.encode()) / 1e6:.1f} MB)")


@app.command()
def verify(
    reproduction: Name,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also look at every image of .beton files.")
    ] = False,
    every: Annotated[
        int | None, typer.Option(min=1, help="With --deep: only every N-th image.")
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Set bad checkpoints aside, remove leftovers of interrupted writes."
        ),
    ] = False,
    overrides: Set = None,
    only: Only = None,
    cluster: Cluster = None,
    run_root: Root = None,
) -> None:
    """Check the files of runs against their checksums.

    Of finished runs every output against its size and SHA-256 in the manifest, of all runs every checkpoint, with
    --deep every image of the converted data sets: checksum, label, and that it decodes. A line per problem; exit code
    1 when one is left. A bad checkpoint is set aside as bad_step_..., and only where a good one remains.
    """
    from stages.commands.verify import verify_runs as check

    if every and not deep:
        raise typer.BadParameter("expected --deep beside it", param_hint="--every")
    runs, root = _chosen(reproduction, overrides, only, cluster, run_root)
    found = check(runs, root, every=(every or 1) if deep else 0, repair=repair)
    _show([*found.wrong, *(f"{line} (repaired)" for line in found.repaired)], err=True)
    typer.echo(found.summary(len(runs)))
    if found.wrong:
        raise typer.Exit(1)


@app.command()
def logs(
    reproduction: Name,
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, or a stage.")],
    lines: Annotated[int, typer.Option(min=1, help="How many of the last lines.")] = 40,
    overrides: Set = None,
    cluster: Cluster = None,
    run_root: Root = None,
) -> None:
    """The path and the end of a run's newest log.

    The logs of all attempts and ranks are beside it.
    """
    from slurm import console
    from slurm.shared.logs import find_newest_log
    from slurm.status import collect_status

    runs, root = _chosen(reproduction, overrides, [run], cluster, run_root)
    for found in collect_status(runs, root):
        console.show_log(
            found.run.name, found.log or find_newest_log(found.run.run_dir(root)), lines
        )


@app.command()
def cancel(
    reproduction: Name,
    overrides: Set = None,
    only: Only = None,
    cluster: Cluster = None,
    run_root: Root = None,
) -> None:
    """Cancel the queued and running jobs of a reproduction's runs.

    What is done stays done; `submit` goes on from the last checkpoints.
    """
    from slurm.shared import queue

    runs, root = _chosen(reproduction, overrides, only, cluster, run_root)
    jobs = queue.find_jobs(runs, root, required=True)
    ids = [job.job_id for run in runs for job in jobs.get(run.run_id, [])]
    queue.cancel_jobs(ids)
    typer.echo(f"cancelled {len(ids)} jobs{': ' if ids else ''}{' '.join(ids)}")


@app.command(name="import")
def import_command(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="A .pth or .safetensors; download, for one of timm's."),
    ],
    arch: Annotated[
        str, typer.Option(help="vit_s16, vit_b16, vit_l16; with --source timm what timm calls it.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write, .safetensors.")],
    source: Annotated[
        Literal["mugs", "timm", "ours"], typer.Option(help="Whose layout the file has.")
    ] = "mugs",
    network: Annotated[
        Literal["teacher", "student"], typer.Option(help="Of a full Mugs checkpoint.")
    ] = "teacher",
    sha256: Annotated[str | None, typer.Option(help="What the file must have.")] = None,
) -> None:
    """Weights from elsewhere into a file of ours.

    A released Mugs checkpoint, full or backbone only, or a plain ViT of timm. Stops with the keys that are missing or
    not expected, and writes nothing then. To evaluate weights, see the reproduction evaluate_released.
    """
    from stages.commands.weights import import_file, import_settings

    _show(
        import_file(import_settings(file, arch, source=source, network=network, sha256=sha256), out)
    )


@app.command()
def export(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="Folder, id or name of a finished run, or a file of ours."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    format: Annotated[
        Literal["timm", "safetensors"], typer.Option(help="timm: a .pth state dict.")
    ] = "timm",
    weights: Annotated[
        str, typer.Option(help="teacher, or student or initial of a pretraining.")
    ] = "teacher",
    cluster: Cluster = None,
    run_root: Root = None,
) -> None:
    """Our backbone into a plain file for timm.

    `timm.create_model(...).load_state_dict(...)` takes it; the whole call is printed. Before it is written timm has to
    give an image the same class token as our own network does.
    """
    from slurm import run_root as place
    from stages.commands.weights import export_backbone as write

    _show(write(run, out, place.choose_run_root(run_root, cluster), weights=weights, format=format))


@app.command()
def clean(
    reproduction: Name,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="REPRODUCTION", help="Another one whose runs stay. Repeatable."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is shown.")] = False,
    overrides: Set = None,
    cluster: Cluster = None,
    run_root: Root = None,
) -> None:
    """What the run root holds that nothing needs any more, with sizes.

    Folders of unfinished runs that neither this reproduction asks for, nor those of --also, nor the bundled ones;
    leftovers of interrupted writes; checkpoints of finished runs but the last. Removes nothing without --yes, and never
    what is or may be queued or running, changed within the last hour, or is an output of a finished run. Slurm is asked
    about runs that were submitted; they stay where it does not answer.
    """
    from slurm import run_root as place
    from slurm.active_runs import find_active_runs
    from stages.commands import clean as cleaning

    root = place.choose_run_root(run_root, cluster)
    _show(
        cleaning.clean_run_root(
            root,
            cleaning.planned_run_ids(reproduction, overrides, also or ()),
            find_active_runs,
            yes=yes,
        )
    )


def _chosen(
    reproduction: str | None, overrides: Set, only: Only, cluster: Cluster, run_root: Root
) -> tuple[list[StageRun], Path]:
    """The chosen runs (none of no reproduction), and where runs are kept."""
    runs, _, root = _chosen_of_all(reproduction, overrides, only, cluster, run_root)
    return runs, root


def _chosen_of_all(
    reproduction: str | None, overrides: Set, only: Only, cluster: Cluster, run_root: Root
) -> tuple[list[StageRun], list[StageRun], Path]:
    """The chosen runs, all of the reproduction, and where runs are kept."""
    from pipeline.plan import select_runs
    from slurm import run_root as place
    from stages.commands.reproduction import all_runs

    if overrides and not reproduction:
        raise typer.BadParameter("name the REPRODUCTION that it is about", param_hint="--set")
    every = all_runs(reproduction, overrides) if reproduction else []
    return select_runs(every, only or ()), every, place.choose_run_root(run_root, cluster)


def _show(lines: Iterable[object], *, err: bool = False) -> None:
    for line in lines:
        typer.echo(line, err=err)


def main() -> None:
    """Entry point; user errors become a message and exit code 2."""
    from pipeline.provenance import ForeignPackageError, check_one_root

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        check_one_root()
        app()
    except Exception as error:
        if not isinstance(error, (ForeignPackageError, OSError)) and not isinstance(
            error, _mistakes()
        ):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


def _mistakes() -> tuple[type[Exception], ...]:
    """Errors of users; imported when there is one, since --help needs none of this."""
    from pipeline.spec import ConfigError
    from results.explain import NoSuchCellError
    from results.options import OptionError
    from results.store import RowsError
    from slurm.shared.queue import SlurmError

    return ConfigError, NoSuchCellError, OptionError, RowsError, SlurmError


if __name__ == "__main__":
    main()
