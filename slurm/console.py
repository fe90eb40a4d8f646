"""What the command line shows: tables on a terminal, aligned plain lines when piped."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.text import clean_line, format_count, join_equal
from slurm.shared.logs import MOST_BYTES, read_tail
from slurm.status import format_duration

if TYPE_CHECKING:
    from pipeline.findings import Finding
    from pipeline.manifest import SplitRuns
    from pipeline.spec import StageRun
    from slurm.keeper import Round
    from slurm.local.executor import Outcome
    from slurm.status import RunStatus
    from slurm.submission.submit import Submission

_STYLES = {
    "done": "green",
    "running": "cyan",
    "queued": "yellow",
    "failed": "bold red",
    "blocked": "bold red",
    "unknown": "magenta",
    "waiting": "dim",
}


def print_line(line: str = "") -> None:
    """Print a line on stdout, at once also when piped.

    What is printed may come from logs and records of others.
    """
    print(clean_line(line), flush=True)


def show_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table: drawn on a terminal, columns padded with spaces otherwise."""
    cells = [[clean_line(str(cell)) for cell in row] for row in rows]
    if sys.stdout.isatty():
        # Imported here: rich takes longer than most commands.
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*header)
        for row in cells:
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        Console().print(table)
        return
    lines = [list(header), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    # In one go: thousands of lines, each handed on alone, take longer than all else about them.
    print("\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines), flush=True)


def show_plan(
    runs: Sequence[StageRun], split: SplitRuns, root: Path, advice: Sequence[str]
) -> None:
    """Print the runs in order with what each needs, the total of those not done, and advice."""
    rows = [
        (
            run.name,
            run.stage,
            "done" if run.run_id in split.done else "not done",
            run.resources.nodes,
            run.resources.gpus,
            f"{run.resources.hours:g}",
            f"{run.resources.gpu_hours:g}",
            run.run_id,
        )
        for run in runs
    ]
    show_table(("run", "stage", "state", "nodes", "GPUs", "hours", "GPU-hours", "run id"), rows)
    hours = sum(run.resources.gpu_hours for run in split.pending)
    # No bound: a run that reaches its time limit goes on in another job. To ask for hours on a
    # cluster, the prediction below is meant.
    total = f"{hours:g} GPU-hours if each run takes all of its hours"
    print_line(f"{len(split.done)} done, {len(split.pending)} not done, {total}, in {root}")
    show_lines(join_equal((run.name, fact) for run in runs for fact in run.facts))
    # Counts of images that a finished conversion changed or skipped, for example.
    show_lines(
        f"{run.name}: {note}"
        for run in runs
        if run.run_id in split.done
        for note in split.done[run.run_id].info.get("notes", [])
    )
    show_remarks(runs)
    show_lines(advice)


def show_problems(problems: Sequence[str]) -> None:
    """Print what `submit` would refuse, below a line that counts it."""
    if problems:
        count = format_count(len(problems), "problem")
        show_lines([f"{count} to solve before submit:", *(f"  {line}" for line in problems)])


def show_remarks(runs: Iterable[StageRun]) -> None:
    """Print a line for each setting that is valid but that the user may not have meant."""
    notes = join_equal((run.name, remark) for run in runs for remark in run.remarks)
    show_lines(f"note: {note}" for note in notes)


def show_lines(lines: Iterable[str]) -> None:
    """Print lines as they are."""
    for line in lines:
        print_line(line)


def show_submissions(submissions: Sequence[Submission]) -> int:
    """Print what was submitted now, what was queued before, and what is done.

    Returns 1 if a run was skipped, else 0.
    """
    rows = [(s.run.name, s.run.stage, s.action, s.job_id or "-", s.run.run_id) for s in submissions]
    show_table(("run", "stage", "action", "job", "run id"), rows)
    show_lines(
        f"note: {s.run.name}: goes on with other code than before (snapshot {s.other_code}); "
        "tables --explain will show both"
        for s in submissions
        if s.other_code
    )
    show_lines(f"note: {s.run.name}: {s.reason}" for s in submissions if s.action == "skipped")
    if deferred := [s for s in submissions if s.action == "deferred"]:
        print_line(
            f"note: {len(deferred)} runs are not submitted yet: {deferred[0].reason}; a keeper "
            "submits them as other jobs end, without one submit again"
        )
    return int(any(s.action == "skipped" for s in submissions))


def show_keeper(job_id: str | None) -> None:
    """Print which job submits again what is missing."""
    if job_id is not None:
        print_line(
            f"keeper: job {job_id} submits again what Slurm ends without requeueing it; "
            "you need to do nothing until status says done"
        )


def show_round(found: Round) -> None:
    """Print what a keeper in this terminal did."""
    if found.submitted or found.state != "working":
        print_line(f"keeper: {found.state}; submitted {', '.join(found.submitted) or 'nothing'}")
        show_lines(f"  {reason}" for reason in found.reasons)


def show_status(found: Sequence[RunStatus]) -> None:
    """Print the state of every run, the logs of what failed, and a count."""
    rows = [(s.run.name, s.run.stage, s.state, s.job_id or "-", s.detail) for s in found]
    show_table(("run", "stage", "state", "job", "detail"), rows)
    _show_logs(status for status in found if status.state in ("failed", "unknown"))
    counts = Counter(status.state for status in found)
    print_line(", ".join(f"{count} {state}" for state, count in counts.items()))
    _show_cost(found)


def _show_cost(found: Sequence[RunStatus]) -> None:
    """Print what all attempts cost, and how much of it is of runs that are not done."""
    unfinished = [status.cost for status in found if status.state != "done"]
    if any(cost.seconds for cost in unfinished):
        hours = sum(status.cost.gpu_hours for status in found)
        part = sum(cost.gpu_hours for cost in unfinished)
        time_of_all = format_duration(sum(status.cost.seconds for status in found))
        time_of_part = format_duration(sum(cost.seconds for cost in unfinished))
        print_line(
            f"cost so far: {hours:.1f} GPU-hours in jobs of {time_of_all} together; "
            f"of it in runs that are not done: {part:.1f} GPU-hours in {time_of_part}"
        )


def _show_logs(failed: Iterable[RunStatus | Outcome]) -> None:
    """Print which log tells more about each run."""
    show_lines(f"{each.run.name} log: {each.log}" for each in failed if each.log)


def show_log(name: str, log: str | None, lines: int) -> None:
    """Print where a run's log is, and its last lines."""
    print_line(f"==> {log or f'{name}: no log yet'}")
    if not log:
        return
    try:
        show_lines(read_tail(Path(log), MOST_BYTES)[-lines:])
    except OSError as error:
        print_line(f"unreadable: {log}: {error.strerror}")


def show_findings(findings: Sequence[Finding]) -> int:
    """Print the findings, each problem with its remedy, and a count; return 1 for a problem."""
    for finding in findings:
        print_line(f"{finding.state:<8}{finding.subject}: {finding.detail}")
        if finding.state == "wrong":
            print_line(f"        to do: {finding.remedy}")
    counts = Counter(finding.state for finding in findings)
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    problems = f"{counts['wrong'] or 'no'} problem{'' if counts['wrong'] == 1 else 's'}"
    print_line(f"{len(findings) - counts['skipped']} checked{skipped}, {problems}")
    return 1 if counts["wrong"] else 0


def announce_data_checks(skip_data_checks: bool) -> None:
    """Say on stderr that files are being checked, since this can take minutes."""
    if not skip_data_checks:
        sys.stderr.write(
            "checking data sets, file lists and weights (--skip-data-checks skips this)\n"
        )


def announce_saving(job_ids: Sequence[str]) -> None:
    """Say on stderr that running jobs save before they end."""
    sys.stderr.write(
        f"waiting for {format_count(len(job_ids), 'running job')} to save, which may take minutes "
        "(Ctrl-C: end now)\n"
    )


def announce_probe(job_id: str) -> None:
    """Say on stderr that a job is waited for."""
    sys.stderr.write(f"probe: job {job_id} takes minutes once it starts (Ctrl-C: cancel it)\n")


def announce_run(run: StageRun, ranks: int) -> None:
    """Print a line before a run starts on this machine."""
    plural = "s" if ranks > 1 else ""
    print_line(f"==> {run.name} ({run.stage}, {run.run_id}), {ranks} rank{plural}")


def show_outcomes(outcomes: Sequence[Outcome]) -> int:
    """Print what became of every run on this machine; return 0, 1 if one failed, or 75.

    75 tells that the runs were interrupted and that the same command resumes them.
    """
    rows = [
        (o.run.name, o.run.stage, o.state, format_duration(o.seconds), o.detail) for o in outcomes
    ]
    show_table(("run", "stage", "outcome", "time", "detail"), rows)
    _show_logs(outcomes)
    states = {outcome.state for outcome in outcomes}
    if "interrupted" in states:
        sys.stderr.write("interrupted, run again to resume\n")
        return 75
    return 1 if states & {"failed", "not run"} else 0
