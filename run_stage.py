"""Command line of the reproduction: its commands, their options and their help text.

The work is done in the packages; a command here only resolves its runs, calls one function, and
shows what came back. Heavy modules are imported inside the commands, so that `--help` answers at
once.

Exit codes: 0 fine, 1 a run failed or a check found a problem, 2 usage or configuration error,
70 internal error, 75 interrupted, or Slurm did not answer.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer

from slurm.shared.exit_codes import EXIT_INTERNAL, EXIT_INTERRUPTED

if TYPE_CHECKING:
    from pipeline.spec import StageRun
    from results.report.graph import Node
    from slurm.status import RunStatus
    from slurm.submission.profile import ClusterProfile
    from stages.commands.forecast import CurveForecast
    from stages.commands.repeat_knn import RepeatedRun
    from stages.commands.reproduction import Selection
    from stages.commands.verify_bundle import BundleCheck

_CTRL_C = 130  # exit code of typer then
# Old option names that still work but that --help does not list. click applies the function to
# every option name a user types, in every command.
RENAMED_OPTIONS = {"unseen": "skip-data-checks", "profile": "trace-steps"}

app = typer.Typer(
    no_args_is_help=True,
    # Rich would slow down --help; tracebacks stay as Python prints them.
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"token_normalize_func": lambda name: RENAMED_OPTIONS.get(name, name)},
    help="""Plan, run and watch reproductions, and print their tables.

    A REPRODUCTION is a bundled name, such as mini, or the path of a YAML file like those in
    pipeline/configs. It lists runs: the stage of each, its settings, and the runs it needs.
    Most commands work on all of its runs, or on those selected with --only.

    Exit code: 0 fine, 1 a run failed or a check found a problem, 2 usage or configuration error,
    70 internal error (the message names a file with the traceback), 75 interrupted, or Slurm did
    not answer (repeat the same command to continue).""",
)

# Options and arguments that several commands share.
ReproductionName = Annotated[
    str,
    typer.Argument(metavar="REPRODUCTION", help="Bundled name (mini, ...) or path of a YAML file."),
]
OptionalReproduction = Annotated[
    str | None,
    typer.Argument(metavar="REPRODUCTION", help="Use only its runs. Default: every finished run."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="RUN.KEY=VALUE",
        help="Change a setting, e.g. pretrain.epochs=3. Repeat it on every command; paths may be "
        "omitted, except for submit, run and doctor. Repeatable.",
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(metavar="RUN", help="Only this run or stage, without what it needs. Repeatable."),
]
Seeds = Annotated[
    list[str] | None,
    typer.Option(
        "--seeds",
        metavar="N ...",
        help="Repeat each pretraining, and the runs that need it, with these seeds, e.g. --seeds 0 "
        "1 2. Tables show mean and standard deviation. Repeat it on every command, like --set.",
    ),
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Overwrite files that this command did not write."),
]
RunRoot = Annotated[
    Path | None,
    typer.Option(
        help="Folder of all runs. Default: the profile's, else MUGS_RUN_ROOT, else ~/mugs-runs."
    ),
]
TraceSteps = Annotated[
    int,
    typer.Option(min=0, help="Trace this many steps of each pretraining, into <run>/trace/."),
]
Cluster = Annotated[str | None, typer.Option(help="Cluster profile: bundled name or path.")]
SkipDataChecks = Annotated[
    bool,
    typer.Option(
        "--skip-data-checks",
        help="Skip the data-set checks (e.g. if the data is only on compute nodes).",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Co2 = Annotated[
    float | None,
    typer.Option(
        "--co2",
        min=0,
        metavar="G_PER_KWH",
        help="Grams of CO2 that a kWh costs where the GPUs are. Shows kg beside kWh, if the GPUs "
        "counted their energy.",
    ),
]


@app.command()
def plan(
    reproduction: ReproductionName,
    overrides: Overrides = None,
    seeds: Seeds = None,
    only: Only = None,
    cluster: Cluster = None,
    run_root: RunRoot = None,
    skip_data_checks: SkipDataChecks = False,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Show only this run: each setting and resource, its value, and whether the "
            "recipe, the reproduction, the cluster profile, --set or a default gave it.",
        ),
    ] = None,
    graph: Annotated[
        Literal["text", "mermaid"] | None,
        typer.Option(help="Print only which run waits for which, as a tree or for Mermaid."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what would run, what is done, and what it costs.

    Also lists every problem: missing settings, data sets, file lists or weights that are wrong,
    and with --cluster the runs that do not fit its nodes. Starts nothing. The exit code is 0 even
    if there are problems; use doctor for a check.
    """
    from pipeline import manifest
    from slurm import console
    from slurm.facts import describe_plan, format_json
    from slurm.submission import estimates
    from slurm.submission import profile as place
    from stages.commands.prediction import predict_cost
    from stages.commands.preflight import list_problems
    from stages.commands.reproduction import list_changed_inputs

    if explain is not None:
        from stages.commands.explain import HEADER, find_run, tabulate_settings

        run = find_run(reproduction, explain, overrides, seeds)
        decided = _find_profile_resources(cluster, run)
        console.show_table(HEADER, tabulate_settings(reproduction, run, overrides, decided))
        return
    selection = _select(reproduction, overrides, only, cluster, run_root, seeds, may_be_new=True)
    split = manifest.split_runs(selection.root, selection.runs)
    if graph is not None:
        from pipeline.graph import render_graph

        console.show_lines(render_graph(selection.runs, split.done, graph))
        return
    advice = estimates.advise_checkpoint_interval(split.pending, selection.root)
    profile = place.load_profile(cluster) if cluster else None
    shortages = place.find_gpu_shortages(profile, split.pending) if profile else []
    advice += place.find_crowded_cpus(profile, split.pending)
    prediction = predict_cost(
        selection.runs, selection.every, split.done, profile and (profile.gres or profile.gpu_type)
    )
    changed = list(list_changed_inputs(selection))
    if not as_json:  # first, since the data checks may take minutes
        console.show_plan(selection.runs, split, selection.root, [prediction.describe(), *advice])
        console.show_lines([*changed, *shortages])
    console.announce_data_checks(skip_data_checks)
    problems = [*shortages, *list_problems(selection, skip_data_checks=skip_data_checks)]
    if as_json:
        lines = {"advice": advice, "changed_inputs": changed, "problems": problems}
        facts = describe_plan(selection.runs, split, selection.root, **lines)
        typer.echo(format_json({**facts, "prediction": prediction.to_json()}))
    else:
        console.show_problems(problems[len(shortages) :])


@app.command()
def doctor(
    reproduction: ReproductionName,
    overrides: Overrides = None,
    seeds: Seeds = None,
    only: Only = None,
    cluster: Cluster = None,
    run_root: RunRoot = None,
    skip_data_checks: SkipDataChecks = False,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="Also run a job of a few minutes that measures GPUs, links and disks.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check everything that could stop the runs.

    Run it before GPU time is spent. Checks Python, the packages and FFCV; the run root, its free
    space, and every folder that the runs write to; with --cluster the profile's Python, Slurm, its
    partitions, account and time limits, and a dry run of the jobs; and for every
    run that is not done its settings and the data sets, file lists and weights it reads. Data sets
    are checked for layout, number of files, labels and truncated images, which takes minutes for a
    large one the first time. Changes nothing. The exit code is 1 if there is a problem.

    With --probe, a job like that of the largest run, on at most two nodes, looks for itself: GPUs
    and their health, driver against torch, all-reduce within and between nodes, clocks, the run
    root's disk and that of the nodes, CPUs against loader threads, FFCV. What to change in the
    profile stands below each problem.
    """
    from pipeline import environment
    from slurm import console
    from slurm.facts import describe_findings, format_json
    from slurm.submission import profile as place
    from stages.commands.preflight import check_runs, list_written_folders
    from stages.commands.reproduction import list_changed_inputs

    if probe and not cluster:
        raise typer.BadParameter("names the cluster to probe", param_hint="--cluster")
    selection = _select(reproduction, overrides, only, cluster, run_root, seeds, may_be_new=True)
    console.announce_data_checks(skip_data_checks)
    checks = check_runs(selection, skip_data_checks=skip_data_checks)
    # FFCV is only a problem for runs that insist on it; the others take another loader.
    ffcv = any(getattr(run.config, "loader", "") == "ffcv" for run in checks.pending)
    findings = [
        *environment.check_environment(ffcv_required=ffcv),
        *environment.check_free_space(selection.root, checks.bytes),
        *environment.check_folders(list_written_folders(selection.root, checks.pending)),
    ]
    profile = None
    if cluster:
        from slurm.submission.preflight import check_cluster
        from slurm.submission.probe import probe_cluster

        profile = place.load_profile_at(cluster, run_root)
        if profile.python and not profile.in_container:
            findings.append(environment.check_job_python(profile.python))
        findings += check_cluster(profile, checks.pending)
        if probe:
            findings += probe_cluster(
                profile, checks.pending or selection.runs, on_wait=console.announce_probe
            )
    else:
        findings.append(environment.skip_cluster_check())
    findings += checks.findings
    if as_json:
        typer.echo(format_json(describe_findings(findings)))
        raise typer.Exit(1 if any(finding.state == "wrong" for finding in findings) else 0)
    code = console.show_findings(findings)
    console.show_lines(place.find_crowded_cpus(profile, checks.pending))
    console.show_lines(list_changed_inputs(selection))
    raise typer.Exit(code)


@app.command(name="init-cluster")
def init_cluster(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The profile to write.")],
    run_root: Annotated[
        Path, typer.Option(help="Folder of all runs, shared by all nodes. Goes into the profile.")
    ] = Path("$HOME/mugs-runs"),
    partition: Annotated[
        str | None,
        typer.Option(help="Partition of the jobs. Default: the one with the most GPUs."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE if it is there.")] = False,
) -> None:
    """Write a cluster profile from what Slurm says of this cluster.

    Asks for partitions, GPUs, CPUs and memory of the nodes, time limits, and your accounts, and
    submits nothing. Read the file: a comment stands where Slurm did not tell. Then check it with
    doctor REPRODUCTION --cluster FILE.
    """
    from slurm.submission.init_profile import write_profile

    _print(write_profile(out, run_root, partition, force=force))


@app.command()
def submit(
    reproduction: ReproductionName,
    cluster: Annotated[str, typer.Option(help="Cluster profile: bundled name or path.")],
    overrides: Overrides = None,
    seeds: Seeds = None,
    only: Only = None,
    trace_steps: TraceSteps = 0,
    run_root: RunRoot = None,
    skip_data_checks: SkipDataChecks = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the batch files; submit and check nothing.")
    ] = False,
    break_lock: Annotated[
        bool,
        typer.Option(
            "--break-lock", help="Take over from a submission that has died on another host."
        ),
    ] = False,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep",
            help="Be the keeper in this terminal, for clusters where jobs may not submit jobs.",
        ),
    ] = False,
    no_keeper: Annotated[
        bool, typer.Option("--no-keeper", help="Queue no keeper: submit again yourself.")
    ] = False,
    at_once: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Have at most N of the runs in the queue at a time; the keeper submits the next.",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="HOURS",
            help="Submit nothing if the runs may take more GPU-hours than that, attempts so far "
            "included; the keeper stops when they are spent.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Submit to Slurm every run that is neither done nor queued.

    Run it again to resume or retry. Submits one job per run, chained by dependencies. First checks
    the data sets, file lists and weights that the runs read (as doctor does) and submits nothing if
    one is wrong. Jobs use a copy of the code as it is now. Follow progress with status. Runs that
    another user of the run root has begun are named and left out, with those that need them; the
    exit code is then 1.

    Also queues a keeper: a small job that starts whenever a job of these runs ends, and submits
    again what Slurm has ended without requeueing it. It stops when all is done, or when a run needs
    a person; status then says why.
    """
    from pipeline.plan import with_trace_steps
    from slurm import console, keeper
    from slurm.facts import describe_submissions, format_json
    from slurm.submission import profile as place
    from slurm.submission import submit as submission
    from stages.commands.reproduction import list_changed_inputs
    from stages.commands.whole_run_root import remember_runs

    selection = _select(reproduction, overrides, only, cluster, run_root, seeds, may_be_new=True)
    # Tracing changes no result, so the run ids stay the same.
    runs = with_trace_steps(selection.runs, trace_steps)
    profile = place.load_profile_at(cluster, run_root, max_at_once=at_once)
    if keep and (no_keeper or as_json):
        raise typer.BadParameter("not with --no-keeper or --json", param_hint="--keep")
    if dry_run:
        _print(submission.preview_scripts(runs, profile))
        return
    if not as_json:
        console.show_remarks(runs)
        console.show_lines([f"run root: {profile.run_root}", *list_changed_inputs(selection)])
    _require_submittable(selection, runs, profile, budget, skip_data_checks)
    made = submission.submit(
        runs, profile, break_lock=break_lock, leave_room=not (keep or no_keeper)
    )
    remember_runs(profile.run_root, [each.run for each in made if each.action == "submitted"])
    if not as_json:
        console.show_submissions(made)
    if keep:
        found = keeper.watch(runs, profile, budget, on_round=console.show_round)
        finished = found.state == "finished"
        raise typer.Exit(submission.find_exit_code(made, kept=True) if finished else 1)
    kept = [each.run for each in made if each.action != "skipped"]
    keeper_id, notes = (None, []) if no_keeper else keeper.try_queue_keeper(kept, profile, budget)
    _print(notes, err=True)
    if as_json:
        typer.echo(format_json(describe_submissions(made, keeper_id)))
    else:
        console.show_keeper(keeper_id)
    raise typer.Exit(submission.find_exit_code(made, kept=keeper_id is not None))


@app.command(name="run")
def run_command(
    reproduction: ReproductionName,
    overrides: Overrides = None,
    seeds: Seeds = None,
    only: Only = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes per run, if its stage can use more than one. "
            "Default: one per local GPU.",
        ),
    ] = None,
    trace_steps: TraceSteps = 0,
    cluster: Cluster = None,
    run_root: RunRoot = None,
) -> None:
    """Run what is not done, on this machine.

    Needs no Slurm: of a cluster profile, only run_root and env are used. Runs start one after
    another, except a `knn_curve` run with `watch: true`: without GPUs, it starts together with the
    pretraining that it measures. If a run fails, the runs that need it are left out. Press Ctrl-C
    to save and stop, and repeat the command to continue. Press Ctrl-C twice to stop at once.
    """
    from pipeline.plan import check_required_settings, with_trace_steps
    from slurm import console
    from slurm.local.executor import run_locally
    from slurm.submission.profile import load_local_environment
    from stages.commands.reproduction import list_changed_inputs

    selection = _select(reproduction, overrides, only, cluster, run_root, seeds, may_be_new=True)
    # Otherwise an unset path would stop a later run after hours of work.
    check_required_settings(selection.runs)
    runs = with_trace_steps(selection.runs, trace_steps)
    console.show_remarks(runs)
    console.show_lines(list_changed_inputs(selection))
    env = load_local_environment(cluster) if cluster else {}
    outcomes = run_locally(
        runs, selection.root, ranks=ranks, env=env, on_start=console.announce_run
    )
    raise typer.Exit(console.show_outcomes(outcomes))


@app.command()
def status(
    reproduction: Annotated[
        str | None,
        typer.Argument(
            metavar="REPRODUCTION",
            help="Bundled name or path of a YAML file. Default: every run in the run root.",
        ),
    ] = None,
    overrides: Overrides = None,
    seeds: Seeds = None,
    only: Only = None,
    cluster: Cluster = None,
    run_root: RunRoot = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Refresh every few seconds until the runs end.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the state of every run.

    A run is done, running, queued, failed, canceled or waiting; blocked if its job can never start;
    unknown while Slurm does not answer. Shows the speed and the time left of a running run; the
    error and the log file of a failed one; and how high the k-NN curve of a pretraining will end,
    once three finished ones in this run root differ from it only in the seed (docs/diagnosis.md).
    The exit code is 1 if a run is failed or blocked, else 75 if
    one is unknown. A job that no node fits any more, because nodes were excluded after
    failures, gets these nodes back.
    """
    from slurm import console
    from slurm import status as states
    from slurm.shared.keeper_notes import list_ended_keepers
    from stages.commands.whole_run_root import list_namesakes, load_all_runs

    selection = _select(reproduction, overrides, only, cluster, run_root, seeds)
    runs, root = selection.runs, selection.root
    settings: list[str] = []
    if not reproduction:
        runs, lines, unreadable = load_all_runs(root, only or ())
        if not as_json:
            _print([f"run root {root}: {len(runs)} runs"])
            settings = ["settings that differ from the defaults:", *(f"  {line}" for line in lines)]
        _print((f"left out: {line}" for line in unreadable), err=True)
    for found in states.watch_status(runs, root) if watch else [states.collect_status(runs, root)]:
        forecasts = _forecast_curves(found, root)
        if as_json:
            from stages.commands.forecast import explain_missing_forecasts

            known = {forecast.run.run_id: forecast.to_json() for forecast in forecasts}
            done = {status.run.run_id for status in found if status.state == "done"}
            reasons = explain_missing_forecasts(
                runs, root, known, done, whole_root=not reproduction
            )
            typer.echo(states.format_json(found, known, reasons))
        else:
            console.show_status(found)
            console.show_lines(list_namesakes(selection.runs, root))
            console.show_lines(forecast.describe() for forecast in forecasts)
            console.show_lines(list_ended_keepers(runs, root))
        if getattr(sys.stdout, "reader_left", False):
            break  # nobody watches any more
    if settings:
        _print(["\n".join(settings)])
    # With --watch, this is the last state.
    raise typer.Exit(states.exit_code(found))


@app.command()
def tables(
    reproduction: OptionalReproduction = None,
    table: Annotated[
        list[str] | None, typer.Option(help="Name of a table. Repeatable. Default: all.")
    ] = None,
    format: Annotated[
        Literal["md", "latex", "csv"] | None,
        typer.Option(help="Format of the printed tables. Default: md."),
    ] = None,
    filled: Annotated[
        bool, typer.Option("--filled", help="Only tables that have a result of ours.")
    ] = False,
    verdicts: Annotated[
        bool,
        typer.Option(
            "--verdicts",
            help="Say below each accuracy of ours whether it reproduces the printed one, differs "
            "from it, or needs more seeds. With --explain: show the arithmetic. With --against: "
            "whether each number here reproduces the one there.",
        ),
    ] = False,
    margin: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            help="With --verdicts: greatest difference that counts as reproduced. Default: 0.5.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write files into this folder instead of printing.")
    ] = None,
    force: Force = False,
    explain: Annotated[
        tuple[str, str, str] | None,
        typer.Option(
            metavar="TABLE ROW COLUMN",
            help="Show where one cell comes from, e.g. table1 'mugs vit-s/16' k-nn, or of mini "
            "table1 'mugs 24' k-nn. ROW: words of the row and of the heading above it, in any "
            "order.",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Compare every cell with another run root or a published folder; with --verdicts, "
            "whether the differences mean anything."
        ),
    ] = None,
    co2: Co2 = None,
    publish: Annotated[
        Path | None,
        typer.Option(help="Write rows, runs and tables to a folder: results/published/NAME."),
    ] = None,
    overrides: Overrides = None,
    seeds: Seeds = None,
    cluster: Cluster = None,
    run_root: RunRoot = None,
) -> None:
    """Print the paper's tables with the results of finished runs.

    Each of our results stands below the number that the paper prints. Results without a counterpart
    in the paper are in a separate section. Seeds are averaged only if all else is equal; otherwise
    there is a row for each, named by what differs. A damaged row, and rows that claim the same
    cell, are left out and named with file and line; the exit code is then 1, and nothing is
    published.
    """
    from stages.commands import tables as command
    from stages.commands.reproduction import list_changed_inputs

    request = command.TablesRequest(
        table=table or (),
        format=format,
        filled=filled,
        verdicts=verdicts,
        margin=margin,
        co2=co2,
        out=out,
        force=force,
        explain=explain,
        against=against,
        publish=publish,
    )
    # Before anything is read: collecting the results of a large run root takes seconds.
    request.check()
    selection = _select(reproduction, overrides, None, cluster, run_root, seeds)
    warnings = list_changed_inputs(selection)
    _print(command.run(selection, request, warn=warnings.append))
    _warn(warnings)


@app.command()
def figures(
    out: Annotated[Path, typer.Option(help="Write the files into this folder.")],
    reproduction: OptionalReproduction = None,
    classes: Annotated[
        list[int] | None, typer.Option(help="Number of a class to show in t-SNE. Repeatable.")
    ] = None,
    force: Force = False,
    overrides: Overrides = None,
    seeds: Seeds = None,
    cluster: Cluster = None,
    run_root: RunRoot = None,
) -> None:
    """Draw the figures of finished runs, as PNG and SVG.

    Figure 2 of the paper with our results, k-NN accuracy over epochs, training curves, and t-SNE of
    stored features: every figure for which there are results. Repeating the command writes
    identical files.
    """
    from results.figures.all_figures import draw_all_figures
    from results.figures.style import write_figures
    from stages.commands.finished_results import collect_finished
    from stages.commands.tables import warn_of_problems

    selection = _select(reproduction, overrides, None, cluster, run_root, seeds)
    collection = collect_finished(selection.root, selection.runs)
    warnings: list[str] = []
    warn_of_problems(collection, warnings.append)
    drawings = draw_all_figures(collection, selection.root, classes or ())
    _print(write_figures(drawings, out, force=force))
    _warn(warnings)


@app.command()
def report(
    reproduction: OptionalReproduction = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write. Default: report.html in the run root.")
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            help="Greatest difference that counts as reproduced in tables. Default: 0.5.",
        ),
    ] = None,
    co2: Co2 = None,
    force: Force = False,
    overrides: Overrides = None,
    seeds: Seeds = None,
    cluster: Cluster = None,
    run_root: RunRoot = None,
) -> None:
    """Write one HTML page with all results.

    Shows tables with verdicts, figures, runs and their states, costs, provenance and deviations.
    The page needs no other file and opens from disk. For a REPRODUCTION it shows all runs, done or
    not. It lists the result rows that were refused.
    """
    from slurm.status import collect_status
    from stages.commands.report import write_report

    selection = _select(reproduction, overrides, None, cluster, run_root, seeds)
    found = collect_status(selection.runs, selection.root)
    path, refused = write_report(
        selection,
        _draw_runs(found),
        out,
        forecasts=[forecast.describe() for forecast in _forecast_curves(found, selection.root)],
        margin=margin,
        co2=co2,
        force=force,
    )
    _print((f"refused: {line}" for line in refused), err=True)
    typer.echo(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


@app.command()
def bundle(
    reproduction: ReproductionName,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The file to write. Default: NAME.bundle.zip in the run root."
        ),
    ] = None,
    weights: Annotated[
        bool,
        typer.Option(
            "--weights", help="Also the backbones that were evaluated, 0.1 to 1.2 GB each."
        ),
    ] = False,
    co2: Co2 = None,
    force: Force = False,
    overrides: Overrides = None,
    seeds: Seeds = None,
    cluster: Cluster = None,
    run_root: RunRoot = None,
) -> None:
    """Write one file that a stranger can check with verify.

    The file is a zip: the reproduction with every setting, the record of each finished run, result
    rows, metrics, tables with verdicts, the report, and checksums. It holds no paths, hosts or
    environment variables of yours, no images, and no logs. Repeating the command writes the same
    bytes. Runs that are not done are named and left out.
    """
    from slurm.status import collect_status
    from stages.commands.bundle import BundleRequest, write_bundle
    from stages.commands.verify_bundle import verify_bundle

    selection = _select(reproduction, overrides, None, cluster, run_root, seeds)
    request = BundleRequest(reproduction, out, weights, co2, force)
    found = collect_status(selection.runs, selection.root)
    path, missing = write_bundle(selection, request, _draw_runs(found))
    _print(missing, err=True)
    # As whoever gets it will.
    checked = verify_bundle(path)
    _print(checked.problems, err=True)
    typer.echo(f"{path} ({path.stat().st_size / 1e6:.1f} MB): {checked.summary()}")
    if checked.problems:
        raise typer.Exit(1)


@app.command()
def sink(
    reproduction: ReproductionName,
    to: Annotated[
        Literal["tensorboard", "wandb", "mlflow", "trackio"],
        typer.Option(help="Where the metrics go."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for its files.")],
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on until no run is running or queued.")
    ] = False,
    overrides: Overrides = None,
    seeds: Seeds = None,
    only: Only = None,
    cluster: Cluster = None,
    run_root: RunRoot = None,
) -> None:
    """Pass the metrics of trainings on to TensorBoard, Weights & Biases, MLflow or trackio.

    Reads the metrics.jsonl of each run, also while it trains, from a process of its own: whatever
    happens to the sink, the training does not notice. A run that was restarted has one curve. Run
    the command again to pass on what is new. Nothing is sent over the network, unless WANDB_MODE is
    "online", or MLFLOW_TRACKING_URI names a server.
    """
    from slurm.watching import watch_until_over
    from stages.commands.sink import Sink

    selection = _select(reproduction, overrides, only, cluster, run_root, seeds)
    target = Sink(to, out, selection.runs, selection.root, Path(reproduction).stem)
    try:
        for _ in watch_until_over(selection.runs, selection.root, pause_s=10) if follow else ():
            target.pass_on()
        # After the last run has ended.
        target.pass_on()
    finally:
        target.close()
    _print(f"{name}: {count} points" for name, count in target.counts.items())


@app.command()
def notify(
    reproduction: ReproductionName,
    to: Annotated[
        Literal["slack", "json"],
        typer.Option(help="Content of the message: for Slack and what is like it, or plain JSON."),
    ] = "json",
    every: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Time between two looks at the runs.")
    ] = 30.0,
    overrides: Overrides = None,
    seeds: Seeds = None,
    only: Only = None,
    cluster: Cluster = None,
    run_root: RunRoot = None,
) -> None:
    """Wait until a reproduction is finished or stuck, and post one message about it.

    It is stuck when no run is running or queued, nothing will submit one again, and not all are
    done. The message has the error of each run that failed, and the tables as far as they are
    filled. It is posted to the address in the environment variable MUGS_WEBHOOK. The exit code is 1
    if a run is failed or blocked.
    """
    import os
    from collections import deque

    from slurm import notify as messages
    from slurm import status as states
    from slurm.watching import watch_until_over
    from stages.commands.tables import TablesRequest
    from stages.commands.tables import run as make_tables

    address = os.environ.get(messages.ADDRESS_VARIABLE)
    if not address:
        raise typer.BadParameter(f"set {messages.ADDRESS_VARIABLE} to the address of the webhook")
    selection = _select(reproduction, overrides, only, cluster, run_root, seeds)
    # Only the last state counts.
    (found,) = deque(watch_until_over(selection.runs, selection.root, pause_s=every), maxlen=1)
    tables = make_tables(
        selection, TablesRequest(filled=True), warn=lambda line: _print([line], err=True)
    )
    text = "\n".join(map(str, tables))
    message = messages.compose_message(Path(reproduction).stem, found, text)
    messages.send_message(address, messages.format_message(message, to))
    _print([message.title, *message.causes])
    raise typer.Exit(states.exit_code(found))


@app.command()
def verify(
    reproduction: Annotated[
        str,
        typer.Argument(
            metavar="REPRODUCTION|BUNDLE",
            help="Bundled name (mini, ...), path of a YAML file, or a .zip that bundle wrote.",
        ),
    ],
    deep: Annotated[
        bool, typer.Option("--deep", help="Also check every image in .beton files.")
    ] = False,
    every: Annotated[
        int | None, typer.Option(min=1, help="With --deep: check only every N-th image.")
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Set bad checkpoints aside and remove leftovers of interrupted writes."
        ),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="With a bundle: repeat its k-NN on these images (train/ and val/ in it; for mini "
            "builtin:sklearn_digits) with the bundled backbones, and compare.",
        ),
    ] = None,
    certificate: Annotated[
        bool,
        typer.Option(
            "--certificate",
            help="With a bundle: write which level was reached and by what, as JSON and badge.",
        ),
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_ROOT",
            help="With --certificate: where you repeated a pretraining of the bundle yourself.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="With --certificate: its folder. Default: that of the bundle."
        ),
    ] = None,
    force: Force = False,
    overrides: Overrides = None,
    seeds: Seeds = None,
    only: Only = None,
    cluster: Cluster = None,
    run_root: RunRoot = None,
) -> None:
    """Check the files of runs against their checksums, or a bundle.

    For finished runs, checks the size and the SHA-256 of every output; for all runs, every
    checkpoint; with --deep, every image of the converted data sets (checksum, label, and that it
    decodes). Prints a line per problem; the exit code is 1 if one is left. --repair renames a bad
    checkpoint to bad_step_..., but only if a good one remains.

    Of a bundle, checks its form and every checksum, makes the tables again from its rows, and plans
    its reproduction again. Needs no run root, and writes nothing but the certificate. Its levels:
    1 the tables come out again, 2 an evaluation does (--data), 3 a pretraining was repeated and its
    k-NN counts as reproduced, 4 its weights are equal bit by bit (--against).
    """
    from stages.commands.verify import verify_runs
    from stages.commands.verify_bundle import is_bundle

    of_runs = {"--deep": deep, "--every": every, "--repair": repair, "--set": overrides}
    of_runs |= {"--seeds": seeds, "--only": only, "--cluster": cluster, "--run-root": run_root}
    of_certificates = {"--against": against, "--out": out, "--force": force}
    of_bundles = {"--data": data, "--certificate": certificate, **of_certificates}
    if is_bundle(reproduction):
        _refuse_options(of_runs, "says nothing of a bundle")
        if not certificate:
            _refuse_options(of_certificates, "needs --certificate")
        found, repeated = _verify_bundle(Path(reproduction), data)
        if certificate:
            from stages.commands.certify import certify, write_certificate

            reached = certify(found, repeated, against)
            lines = write_certificate(reached, found.path, out, force=force)
            _print([*reached.describe(), *lines])
        good = found.intact and all(each.repeated for each in repeated)
        raise typer.Exit(0 if good else 1)
    _refuse_options(of_bundles, "is for a bundle, a file that ends in .zip")

    if every and not deep:
        raise typer.BadParameter("give --deep as well", param_hint="--every")
    selection = _select(reproduction, overrides, only, cluster, run_root, seeds)
    found = verify_runs(
        selection.runs, selection.root, every=(every or 1) if deep else 0, repair=repair
    )
    _print([*found.problems, *(f"{line} (repaired)" for line in found.repaired)], err=True)
    typer.echo(found.summary(len(selection.runs)))
    if found.problems:
        raise typer.Exit(1)


@app.command()
def diagnose(
    reproduction: ReproductionName,
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="Name of the finished run with the number, e.g. knn."),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="REPRODUCTION",
            help="What its settings should be. Default: REPRODUCTION without --set if it is a "
            "bundled one, else the bundled one that is closest.",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_ROOT",
            help="Another run root, with sound runs on the same data: counts of images, channels, "
            "losses and packages are compared with theirs. Copies of the run do not count.",
        ),
    ] = None,
    records_only: Annotated[
        bool,
        typer.Option("--records-only", help="Read records; compute nothing from images."),
    ] = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
    seeds: Seeds = None,
    cluster: Cluster = None,
    run_root: RunRoot = None,
) -> None:
    """Look for the cause of a number that is lower than it should be.

    Asks a fixed list of questions about the run and all that it needs: settings that differ from
    the recipe, ends of trainings, counts of images, first losses, released weights in the same
    evaluation, channels, whether stored features come out again, whether labels belong to the
    images, whether features collapsed. Prints the causes, likeliest first, each with what was seen
    and what to do next; then what is fine or unknown. Computes features of a few hundred images on
    this machine's CPU, which takes seconds (ViT-L: minutes). Changes nothing. The exit code is 1 if
    a cause was found.
    """
    from slurm.facts import format_json
    from stages.commands.diagnose import DiagnoseRequest
    from stages.commands.diagnose import diagnose as find_causes

    selection = _select(reproduction, overrides, None, cluster, run_root, seeds)
    request = DiagnoseRequest(
        reproduction=reproduction,
        run=run,
        recipe=recipe,
        against=against,
        records_only=records_only,
    )
    found = find_causes(selection, request)
    if as_json:
        typer.echo(format_json(found.to_json()))
    else:
        _print(found.describe())
    raise typer.Exit(1 if found.causes else 0)


@app.command()
def logs(
    reproduction: ReproductionName,
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, or of a stage.")],
    lines: Annotated[int, typer.Option(min=1, help="Number of lines to print.")] = 40,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow",
            "-f",
            help="Go on with what is written, also by later attempts, until the run ends.",
        ),
    ] = False,
    overrides: Overrides = None,
    seeds: Seeds = None,
    cluster: Cluster = None,
    run_root: RunRoot = None,
) -> None:
    """Print the path and the last lines of a run's newest log.

    The logs of all attempts and ranks are in the same folder. With --follow, Ctrl-C ends the
    command and leaves the run alone.
    """
    from slurm import console
    from slurm.follow_logs import LogFollower
    from slurm.shared.logs import find_newest_log
    from slurm.status import collect_status
    from slurm.watching import watch_until_over
    from stages.commands.whole_run_root import list_namesakes

    # A stage name selects several runs; each log is printed.
    selection = _select(reproduction, overrides, [run], cluster, run_root, seeds)
    _print(list_namesakes(selection.runs, selection.root), err=True)
    if follow:
        follower = LogFollower(selection.root, lines)
        for looked in watch_until_over(selection.runs, selection.root, pause_s=3):
            console.show_lines(follower.read_new(looked))
            if getattr(sys.stdout, "reader_left", False):
                break
        return
    for found in collect_status(selection.runs, selection.root):
        log = found.log or find_newest_log(found.run.run_dir(selection.root))
        console.show_log(found.run.name, log, lines)


@app.command()
def cancel(
    reproduction: ReproductionName,
    now: Annotated[
        bool, typer.Option("--now", help="Do not wait until running jobs have saved.")
    ] = False,
    overrides: Overrides = None,
    seeds: Seeds = None,
    only: Only = None,
    cluster: Cluster = None,
    run_root: RunRoot = None,
) -> None:
    """Cancel the queued and running jobs of the runs.

    Running jobs save first; Ctrl-C ends them without that. Finished runs stay done. Resume with
    submit: it continues from the last checkpoints.
    """
    from pipeline.text import format_count
    from slurm import console
    from slurm.submission.cancel import cancel_runs
    from stages.commands.whole_run_root import list_namesakes

    selection = _select(reproduction, overrides, only, cluster, run_root, seeds)
    ids = cancel_runs(selection.runs, selection.root, at_once=now, on_wait=console.announce_saving)
    if ids:
        typer.echo(f"canceled {format_count(len(ids), 'job')}: {' '.join(ids)}")
        return
    typer.echo(f"canceled no job: none of these runs has one in {selection.root}")
    _print(list_namesakes(selection.runs, selection.root))


@app.command(name="import")
def import_command(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="A .pth or .safetensors file, or `download` with `--source timm`."
        ),
    ],
    arch: Annotated[
        str,
        typer.Option(help="vit_s16, vit_b16 or vit_l16; with --source timm the name in timm."),
    ],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    source: Annotated[
        Literal["mugs", "timm", "ours"], typer.Option(help="Whose key names the file uses.")
    ] = "mugs",
    network: Annotated[
        Literal["teacher", "student"],
        typer.Option(help="Which network to take from a full Mugs checkpoint."),
    ] = "teacher",
    sha256: Annotated[str | None, typer.Option(help="The SHA-256 that the file must have.")] = None,
    force: Force = False,
) -> None:
    """Convert weights from elsewhere into our format.

    Reads a released Mugs checkpoint (full, or backbone only) or a plain ViT of timm. If keys are
    missing or unexpected, lists them and writes nothing. To evaluate such weights, use the
    reproduction evaluate_released.
    """
    from stages.commands.weights import import_file, import_settings

    settings = import_settings(file, arch, source=source, network=network, sha256=sha256)
    _print(import_file(settings, out, force=force))


@app.command()
def export(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Folder, id or name of a finished run, or a weights file in our format.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file to write; with hub the folder.")],
    format: Annotated[
        Literal["timm", "safetensors", "hub"] | None,
        typer.Option(
            help="timm: a .pth state dict; safetensors: the same keys in safetensors; hub: folder "
            "for the Hugging Face Hub, with a card that has the results of the run root. Default: "
            "safetensors if --out ends in .safetensors, else timm."
        ),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="teacher; for a pretraining also student or initial.")
    ] = "teacher",
    co2: Co2 = None,
    force: Force = False,
    cluster: Cluster = None,
    run_root: RunRoot = None,
) -> None:
    """Export a backbone of ours to a file that timm loads.

    Prints the lines of Python that load it. Before writing, checks that timm computes the same
    class token for an image as our own network.
    """
    from slurm.submission import profile as place
    from stages.commands.weights import export_backbone, export_to_hub

    root = place.choose_run_root(run_root, cluster)
    if format == "hub":
        _print(export_to_hub(run, out, root, weights=weights, co2=co2, force=force))
        return
    _refuse_options({"--co2": co2}, "is for --format hub, which has a card")
    _print(export_backbone(run, out, root, weights=weights, format=format, force=force))


@app.command()
def clean(
    reproduction: ReproductionName,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REPRODUCTION", help="Another reproduction whose runs to keep. Repeatable."
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Move what is listed to the trash of the run root.")
    ] = False,
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME-ID",
            help="Folder name of a run whose checkpoints may go too. Repeatable.",
        ),
    ] = None,
    empty_trash: Annotated[
        bool, typer.Option("--empty-trash", help="Delete all of the trash, whatever its age.")
    ] = False,
    overrides: Overrides = None,
    seeds: Seeds = None,
    cluster: Cluster = None,
    run_root: RunRoot = None,
) -> None:
    """List or remove files that are no longer needed.

    Lists, with their sizes: folders of unfinished runs that neither this reproduction, nor those of
    --also, nor the bundled ones ask for; leftovers of interrupted writes; all checkpoints of
    finished runs but the last. With --yes, these go to the trash of the run root; what is there for
    7 days is deleted. Checkpoints, and runs that have some, go only if --checkpoints names the run.
    Never removes outputs of finished runs, files that changed within the last hour, what is another
    user's, or runs that are or may be queued or running. Asks Slurm about submitted runs. If Slurm
    does not answer, these runs are kept. Removes nothing in a folder that is no run root.
    """
    from slurm.shared.active_runs import find_active_runs
    from slurm.submission import profile as place
    from stages.commands.clean import clean_run_root, planned_run_ids
    from stages.commands.reproduction import check_run_root

    # Read first: with a YAML file that does not parse, nothing may be removed.
    keep = planned_run_ids(reproduction, overrides, also or (), seeds)
    root = place.choose_run_root(run_root, cluster)
    check_run_root(root)
    lines = clean_run_root(
        root,
        keep,
        find_active_runs,
        yes=yes,
        checkpoints_of=checkpoints or (),
        empty_trash=empty_trash,
    )
    _print(lines)


def _require_submittable(
    selection: Selection,
    runs: Sequence[StageRun],
    profile: ClusterProfile,
    budget: float | None,
    skip_data_checks: bool,
) -> None:
    """Raise ConfigError if the runs cannot be submitted; print what the budget leaves."""
    from slurm import console
    from slurm.budget import check_budget
    from slurm.status import collect_status
    from slurm.submission.submit import check_submission
    from stages.commands.preflight import require_no_problems

    # What takes a moment comes before the data checks, which may take minutes.
    check_submission(runs, profile)
    if budget is not None:
        _print(check_budget(collect_status(runs, profile.run_root), budget), err=True)
    console.announce_data_checks(skip_data_checks)
    require_no_problems(selection, skip_data_checks=skip_data_checks)


def _select(
    reproduction: str | None,
    overrides: Overrides,
    only: Only,
    cluster: Cluster,
    run_root: RunRoot,
    seeds: Seeds = None,
    *,
    may_be_new: bool = False,
) -> Selection:
    """Return the runs that a command is about, and the folder of all runs.

    That folder has to exist, unless it `may_be_new`: commands that begin runs make it.
    """
    from slurm.submission import profile as place
    from stages import STAGES
    from stages.commands.reproduction import check_run_root, load_selection

    # Ignored silently, it would look as if the results were those of the changed setting.
    if overrides and not reproduction:
        raise typer.BadParameter("name the REPRODUCTION to change", param_hint="--set")
    if seeds and not reproduction:
        raise typer.BadParameter("name the REPRODUCTION to repeat", param_hint="--seeds")
    if cluster:
        place.check_stage_names(place.load_profile(cluster), STAGES)
    root = place.choose_run_root(run_root, cluster)
    selection = load_selection(reproduction, overrides, only, root, seeds)
    if not may_be_new:
        check_run_root(root)
    return selection


def _refuse_options(options: Mapping[str, object], reason: str) -> None:
    """Refuse options without effect: silently ignored, one would seem to have worked."""
    for name, value in options.items():
        if value:
            raise typer.BadParameter(reason, param_hint=name)


def _verify_bundle(path: Path, data: str | None) -> tuple[BundleCheck, list[RepeatedRun]]:
    """Check a bundle, repeat its k-NN if there are data, and print what was found."""
    from stages.commands.verify_bundle import verify_bundle

    found = verify_bundle(path)
    _print(found.problems, err=True)
    typer.echo(found.summary())
    repeated = _repeat_knn(found, data) if data and not found.problems else []
    _print(each.describe() for each in repeated)
    return found, repeated


def _repeat_knn(found: BundleCheck, data: str) -> list[RepeatedRun]:
    """Repeat the k-NN of a bundle on images of ours, in a folder that is removed afterwards."""
    from slurm import console
    from slurm.local.executor import run_locally
    from stages.commands import repeat_knn

    runs = repeat_knn.list_runs_to_repeat(found, data)
    with tempfile.TemporaryDirectory(prefix="mugs-verify-") as folder:
        root = Path(folder, "runs")
        repeat_knn.restore_backbones(found, runs, root)
        outcomes = run_locally(runs, root, on_start=console.announce_run)
        # Their logs are gone with the folder.
        _print(
            (f"{o.run.name}: {o.state}: {o.detail}" for o in outcomes if not o.succeeded), err=True
        )
        return list(repeat_knn.compare_with_bundle(found, runs, root))


def _draw_runs(found: Sequence[RunStatus]) -> list[Node]:
    """Return the runs as the report draws them.

    Made here, since results knows no Slurm and slurm knows no results.
    """
    from results.report.graph import Node

    return [
        Node(
            s.run.run_id,
            s.run.stage,
            s.run.name,
            s.state,
            s.detail,
            tuple(s.run.needs.values()),
            seconds=s.cost.seconds,
            gpu_hours=s.cost.gpu_hours,
        )
        for s in found
    ]


def _forecast_curves(found: Sequence[RunStatus], root: Path) -> list[CurveForecast]:
    """Return the forecasts of k-NN curves that are not complete.

    Made here, since stages knows no Slurm and slurm knows no results.
    """
    # Only what belongs to a curve is read: thousands of runs may be running.
    drawn = {status.run.needs.get("weights") for status in found if status.run.stage == "knn_curve"}
    if not drawn:
        return []
    # Imported here: with the results it takes longer than `status` of a few runs.
    from slurm.shared.progress import read_progress
    from stages.commands.forecast import list_forecasts

    running = [status.run for status in found if status.state == "running"]
    left = {
        run.run_id: read_progress(run.run_dir(root)).get("eta_s")
        for run in running
        if run.run_id in drawn
    }
    known = {run_id: seconds for run_id, seconds in left.items() if seconds is not None}
    return list(list_forecasts([status.run for status in found], root, known))


def _find_profile_resources(cluster: str | None, run: StageRun) -> dict[str, tuple[object, str]]:
    """Return the resources of a run that a cluster profile decides, each with its name."""
    if cluster is None:
        return {}
    from slurm.submission.profile import find_profile_resources, load_profile, profile_of_run

    decided = find_profile_resources(profile_of_run(load_profile(cluster), run), run.resources)
    return {name: (value, f"cluster profile {cluster}") for name, value in decided.items()}


def _warn(lines: Iterable[str]) -> None:
    """Print warnings; end with exit code 1 if results were left out."""
    from stages.commands.tables import LEFT_OUT

    left_out = False
    for line in lines:
        typer.echo(line, err=True)
        left_out = left_out or line.startswith(LEFT_OUT)
    if left_out:
        raise typer.Exit(1)


def _print(lines: Iterable[object], *, err: bool = False) -> None:
    from pipeline.text import clean_line

    stream = sys.stderr if err else sys.stdout
    for line in lines:
        # A table is one text of many lines.
        parts = [clean_line(part) for part in str(line).split("\n")]
        stream.write("\n".join([*parts, ""]))
        # At once also when piped: the next line may take minutes.
        stream.flush()


class _Output:
    """Standard output or error whose reader may leave, as `head` does.

    After an error of `error_type` the rest is dropped; the command goes on and ends with its own
    exit code.
    """

    def __init__(self, stream: TextIO, *, error_type: type[OSError] = BrokenPipeError) -> None:
        self.stream = stream
        self.error_type = error_type
        self.reader_left = False

    def write(self, text: str) -> int:
        """Write text, to nobody if the reader has left."""
        with self._let_reader_leave():
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        with self._let_reader_leave():
            self.stream.flush()

    def end(self) -> None:
        """Hand on what is left, if that can be done: it was tried, and the error was shown."""
        try:
            self.stream.flush()
        except OSError:
            self._drop_rest()

    @contextmanager
    def _let_reader_leave(self) -> Iterator[None]:
        try:
            yield
        except self.error_type:
            self.reader_left = True
            self._drop_rest()

    def _drop_rest(self) -> None:
        # Python flushes once more when it ends, and would say then that it cannot.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        """Be the stream in all else."""
        return getattr(self.stream, name)


def main() -> None:
    """Run the command line; errors of the user become a message and exit code 2."""
    # Nearly all objects stay until the end, and among those of thousands of runs, looking for
    # garbage would take a tenth of the time.
    gc.set_threshold(100_000)
    streams = sys.stdout, sys.stderr
    # Python has no stream at all for an output that the caller has closed, as with `>&-`.
    present = [stream or open(os.devnull, "w") for stream in streams]  # noqa: SIM115
    for stream in present:
        # An ASCII terminal shows other characters of paths and messages as \\xe9 and its like.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Nobody can be told that an error cannot be shown.
    outputs = [_Output(present[0]), _Output(present[1], error_type=OSError)]
    sys.stdout, sys.stderr = outputs
    try:
        _run_command_line()
    finally:
        sys.stdout, sys.stderr = streams
        for output in outputs:
            output.end()


def _run_command_line() -> None:
    from pipeline.provenance import ForeignPackageError, check_one_root

    # Warnings of ours go to stderr, so that --json and CSV on stdout stay clean.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        check_one_root()
        app(spread_seeds(sys.argv[1:]))
    except SystemExit as ended:
        # After Ctrl-C, which `run` alone takes for a request to save.
        sys.exit(EXIT_INTERRUPTED if ended.code == _CTRL_C else ended.code)
    except Exception as error:
        # With an intruder on the path our own modules may not import, so it is asked for first.
        if isinstance(error, (ForeignPackageError, OSError)):
            code: int | None = 2
        else:
            code = _find_code_of_user_error(error)
        if code is None:
            sys.exit(report_internal_error(error))
        _print([f"error: {error}"], err=True)
        sys.exit(code)


def spread_seeds(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with `--seeds 0 1 2` as one option for each seed.

    The parser takes one value for an option.
    """
    found: list[str] = []
    for argument in arguments:
        if found[-2:-1] == ["--seeds"] and found[-1].isdecimal() and argument.isdecimal():
            found.append("--seeds")
        found.append(argument)
    return found


def report_internal_error(error: Exception) -> int:
    """Print one line about an error that nobody has foreseen, and return the exit code for it.

    The traceback goes to a file that the line names.
    """
    lines = "".join(traceback.format_exception(error))
    said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    try:
        descriptor, path = tempfile.mkstemp(prefix="mugs-error-", suffix=".log")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{sys.argv}\n{lines}")
        where = f"please report it with the traceback in {path}"
    except OSError:
        where = f"please report it with this traceback:\n{lines}"
    typer.echo(f"error: internal error: {said}; {where}", err=True)
    return EXIT_INTERNAL


def _find_code_of_user_error(error: Exception) -> int | None:
    """Return the exit code for an error that a user can cause or Slurm's silence; None for others.

    Types are imported late, to keep --help fast.
    """
    from pipeline.archive import ArchiveError
    from pipeline.files import FormatVersionError, OverwriteError
    from pipeline.spec import ConfigError
    from results.sinks.writers import SinkError
    from results.spec import OptionError
    from results.store import RowsError
    from slurm.notify import MessageError
    from slurm.shared.queue import NoAnswerError, SlurmError

    if isinstance(error, NoAnswerError):
        return EXIT_INTERRUPTED
    expected = (
        ArchiveError,
        ConfigError,
        FormatVersionError,
        MessageError,
        OptionError,
        OverwriteError,
        RowsError,
        SinkError,
        SlurmError,
    )
    return 2 if isinstance(error, expected) else None


if __name__ == "__main__":
    main()
