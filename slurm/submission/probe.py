"""Probe a cluster with a short job: submit it as runs are, and say what its ranks found.

    <run_root>/probes/<user id>/<time>-<process>/   request, reports of the ranks, Slurm's output

The folder is removed once its reports are read; it stays if the job failed.
"""

import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.files import write_json_atomic
from pipeline.findings import Finding, ok, skipped, wrong
from pipeline.probe_report import REQUEST, ProbeRequest, RankReport, read_report, report_path
from pipeline.spec import ConfigError, Resources, StageRun
from slurm.shared import queue
from slurm.shared.logs import read_last_line
from slurm.submission.estimates import LEAD_BESIDES_SAVE_S, estimate_lead_seconds
from slurm.submission.profile import (
    ClusterProfile,
    find_profile_resources,
    fold_ranks,
    probe_command,
    profile_of_run,
)
from slurm.submission.snapshot import checking_lines, make_own_folder, take_snapshot
from slurm.submission.submit import render_script

_NAME = f"{queue.JOB_PREFIX}probe"
_HOURS = 0.2
_MOST_NODES = 2  # enough to see what is between nodes
_LEAD_S = 30
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")
_SLOW_SHARE = 0.8  # of the median of all GPUs
_SLOW_LINK_GB_S = 1.0  # between nodes; Ethernet of 10 Gbit/s
_LATE_S = 15.0  # ranks ask about as often whether a newer attempt has begun
_FEW_FILES_S = 50.0  # below that, records of a run take longer than steps
_SCALE_MB = {True: 1024, False: 64}  # with and without GPUs: what a second or two can take


def probe_cluster(
    profile: ClusterProfile,
    runs: Sequence[StageRun],
    *,
    on_wait: Callable[[str], object] = lambda job_id: None,
    pause_s: float = 2.0,
) -> list[Finding]:
    """Run a job of the shape of the largest run, at most two nodes, and return what it found.

    Raises:
        SlurmError: Slurm does not take the job, or does not answer.
    """
    run = max(runs, key=lambda each: (each.resources.gpus, each.resources.ranks))
    own = profile_of_run(profile, run)
    need = choose_probe_shape(own, run.resources)
    folder = _make_folder(profile.run_root)
    scale = _SCALE_MB[need.gpu]
    request = ProbeRequest(gpu=need.gpu, disk_mb=scale, reduce_mb=scale // 4, small_files=500)
    write_json_atomic(folder / REQUEST, request.model_dump())
    code = take_snapshot(profile.run_root)
    text = render_script(
        own,
        need,
        folder=folder,
        name=_NAME,
        dependency="singleton",
        command=probe_command(own, folder),
        code=code,
        checks=checking_lines(code),
        lead_s=_LEAD_S,
        # It is asked for once more, by the user; Slurm must not do it.
        teardown=("exit $?",),
    )
    job_id = queue.submit_text(text, "--no-requeue", what="the probe")
    on_wait(job_id)
    try:
        state = _wait(job_id, pause_s)
    except BaseException:  # Ctrl-C too: nobody reads what it finds
        queue.cancel_jobs([job_id])
        raise
    return list(_read_findings(folder, state, need, profile, run, runs))


def choose_probe_shape(profile: ClusterProfile, need: Resources) -> Resources:
    """Return the resources of the probe for a run, on the nodes of this cluster."""
    folded = fold_ranks(profile, need)
    changes = {"nodes": min(folded.nodes, _MOST_NODES), "hours": _HOURS}
    shape = folded.model_copy(update=changes)
    return shape.mark_from_command_line(need.names_from_command_line)


def _make_folder(run_root: Path) -> Path:
    """Return a new folder, which only this user can change."""
    mine = run_root / "probes" / str(os.geteuid())
    make_own_folder(run_root, mine)
    folder = mine / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder.mkdir(mode=0o755)
    return folder


def _wait(job_id: str, pause_s: float) -> str:
    """Return how a job ended."""
    while True:
        state = queue.query_job_state(job_id) or "gone"
        if state == "gone" or state.startswith(_ENDED):
            return state
        time.sleep(pause_s)


def _read_findings(
    folder: Path,
    state: str,
    need: Resources,
    profile: ClusterProfile,
    run: StageRun,
    runs: Sequence[StageRun],
) -> Iterator[Finding]:
    reports = []
    for rank in range(need.ranks):
        try:
            reports.append(read_report(report_path(folder, rank)))
        except ConfigError as error:
            yield wrong("probe", error, f"read the job's output in {folder}")
    finished = [report for report in reports if report.part == "done"]
    for report in reports:
        if report.error:
            yield wrong(f"probe {report.node}", f"rank {report.rank}: {report.error}", _see(folder))
    if len(finished) < need.ranks:
        reached = ", ".join(sorted({report.part for report in reports})) or "not started"
        last = _find_last_words(folder)
        yield wrong("probe", f"the job ended as {state} in part {reached}; {last}", _see(folder))
    else:
        shutil.rmtree(folder, ignore_errors=True)
    yield from judge_reports(reports, need, profile, run, runs)


def _see(folder: Path) -> str:
    return f"read the job's output in {folder}, or leave the node out (exclude)"


def _find_last_words(folder: Path) -> str:
    lines = (read_last_line(str(path)) for path in sorted(folder.glob("*.err")))
    return next((line for line in lines if line), "no output")


def judge_reports(
    reports: Sequence[RankReport],
    need: Resources,
    profile: ClusterProfile,
    run: StageRun,
    runs: Sequence[StageRun],
) -> Iterator[Finding]:
    """Say what the ranks of a probe found, and what to change in the profile."""
    if not reports:
        return
    yield _judge_cpus(reports, need, profile, run, runs)
    yield from _judge_torch(reports)
    if need.gpu:
        yield from _judge_gpus(reports)
    yield from _judge_links(reports, need)
    yield from _judge_disks(reports, profile, runs)
    yield from _judge_nodes(reports)


def _judge_cpus(
    reports: Sequence[RankReport],
    need: Resources,
    profile: ClusterProfile,
    run: StageRun,
    runs: Sequence[StageRun],
) -> Finding:
    cpus = min(report.cpus for report in reports)
    asked = find_profile_resources(profile_of_run(profile, run), need).get(
        "cpus_per_rank", need.cpus_per_rank
    )
    alike = [each for each in runs if each.resources.gpu == need.gpu]
    threads = max((getattr(each.config, "threads", 0) for each in alike), default=0)
    detail = f"a rank may use {cpus} CPUs, {asked} were asked for; its loader has {threads} threads"
    if cpus < asked:
        remedy = "bind ranks to all their CPUs: add --cpu-bind=cores to srun of the profile"
        return wrong("probe CPUs", detail, remedy)
    # Where ranks are not bound, each sees the CPUs of all.
    if (own := min(cpus, asked)) < threads:
        names = [each.name for each in alike if getattr(each.config, "threads", 0) > own]
        # Of a profile, what runs without GPUs get is not taken.
        more = "cpus_per_rank in the profile" if need.gpu else "resources.cpus_per_rank of the run"
        remedy = f"{', '.join(names)}: set {more} to {threads}, or threads to {own}"
        return wrong("probe CPUs", detail, remedy)
    return ok("probe CPUs", detail)


def _judge_torch(reports: Sequence[RankReport]) -> Iterator[Finding]:
    builds = {
        f"{report.torch} (CUDA {report.torch_cuda})" if report.torch_cuda else report.torch
        for report in reports
        if report.torch
    }
    slowest = max((report.import_s or 0.0 for report in reports), default=0.0)
    detail = (
        f"{', '.join(sorted(builds)) or 'not imported'}; its import takes up to {slowest:.0f} s"
    )
    if len(builds) > 1:
        remedy = "set python to one that is the same on all nodes, or run in a container"
        yield wrong("probe torch", detail, remedy)
    else:
        yield ok("probe torch", detail)
    for report in reports:
        if report.ffcv is not None:
            found = report.ffcv or "can be imported"
            make = skipped if report.ffcv else ok
            yield make("probe FFCV", f"{report.node}: {found}")


def _judge_gpus(reports: Sequence[RankReport]) -> Iterator[Finding]:
    speeds = [report.tflops for report in reports if report.tflops]
    usual = statistics.median(speeds) if speeds else 0.0
    bad = False
    for report in reports:
        where = f"{report.node}, rank {report.rank}"
        if report.gpu_problem:
            bad = True
            yield wrong("probe GPU", f"{where}: {report.gpu_problem}", _find_gpu_remedy(report))
        elif report.tflops and report.tflops < _SLOW_SHARE * usual:
            bad = True
            speed = f"{report.tflops:.0f} TFLOP/s, the others have {usual:.0f}"
            yield wrong("probe GPU", f"{where}: {speed}", f"exclude: {report.node}")
    if not bad:
        kinds = ", ".join(sorted({report.gpu for report in reports if report.gpu}))
        drivers = ", ".join(sorted({report.driver for report in reports if report.driver}))
        yield ok("probe GPU", f"{len(speeds)} x {kinds}, driver {drivers}, {usual:.0f} TFLOP/s")


def _find_gpu_remedy(report: RankReport) -> str:
    if not report.driver:
        return "the node has no NVIDIA driver: set gpu_type, gres or constraint, or exclude it"
    if not report.torch_cuda:
        return "this torch is built without CUDA: docs/installation.md says which one to install"
    if report.gpu:
        return f"exclude: {report.node}, and tell the administrators"
    return (
        f"driver {report.driver} and a torch for CUDA {report.torch_cuda} may not fit: "
        "MUGS_TORCH=cuda12 make setup is for drivers before 580"
    )


def _judge_links(reports: Sequence[RankReport], need: Resources) -> Iterator[Finding]:
    how = "NCCL" if need.gpu else "gloo"
    inside = [report.node_gb_s for report in reports if report.node_gb_s is not None]
    between = [report.all_gb_s for report in reports if report.all_gb_s is not None]
    if inside:
        yield ok("probe links", f"within a node: {min(inside):.2f} GB/s all-reduce ({how})")
    if not between:
        return
    detail = f"over {need.nodes} nodes: {min(between):.2f} GB/s all-reduce ({how})"
    if need.gpu and min(between) < _SLOW_LINK_GB_S:
        remedy = (
            "set NCCL_SOCKET_IFNAME or NCCL_IB_HCA under env of the profile to the fast network; "
            "NCCL_DEBUG: INFO shows which one is used"
        )
        yield wrong("probe links", detail, remedy)
    else:
        yield ok("probe links", detail)


def _judge_disks(
    reports: Sequence[RankReport], profile: ClusterProfile, runs: Sequence[StageRun]
) -> Iterator[Finding]:
    shared = [report.shared_disk for report in reports if report.shared_disk is not None]
    if shared:
        speed = min(disk.write_mb_s for disk in shared)
        files = min(disk.files_per_s for disk in shared)
        detail = (
            f"run root: {speed:.0f} MB/s from each node, a record takes "
            f"{max(disk.fsync_ms for disk in shared):.0f} ms, {files:.0f} small files a second"
        )
        if files < _FEW_FILES_S:
            remedy = "choose another run_root: one on a scratch file system"
            yield wrong("probe disk", detail, remedy)
        else:
            yield ok("probe disk", detail)
        yield from _judge_save(speed, profile, runs)
    late = [report.visible_s for report in reports if report.visible_s is not None]
    if late:
        detail = f"a renamed file is seen by other nodes after {max(late):.2f} s"
        if max(late) > _LATE_S:
            remedy = "choose a run_root that shows it sooner (NFS: mounted with acdirmax=5)"
            yield wrong("probe visibility", detail, remedy)
        else:
            yield ok("probe visibility", detail)
    for report in reports:
        local = report.local_disk
        if local is None or report.shared_disk is None:
            continue
        where = (
            f"{report.node}: {local.folder} has {local.free_gb:.0f} GB, {local.write_mb_s:.0f} MB/s"
        )
        if local.device == report.shared_disk.device:
            yield skipped("probe local disk", f"{where}, but is the disk of the run root")
        else:
            yield ok("probe local disk", where)


def _judge_save(
    speed_mb_s: float, profile: ClusterProfile, runs: Sequence[StageRun]
) -> Iterator[Finding]:
    """Say whether jobs are warned early enough for their largest checkpoint at this speed."""
    if not (sizes := {run.name: run.config.estimate_checkpoint_gb() for run in runs}):
        return
    largest = max(runs, key=lambda run: sizes[run.name])
    save_s = 1000 * sizes[largest.name] / max(speed_mb_s, 1e-3)
    lead_s = estimate_lead_seconds(profile_of_run(profile, largest), largest)
    wanted = math.ceil(save_s + LEAD_BESIDES_SAVE_S)
    detail = (
        f"{largest.name} saves in about {save_s:.0f} s, and is warned {lead_s} s before its end"
    )
    if wanted > lead_s:
        yield wrong("probe lead time", detail, f"set signal_delay_s: {wanted} in the profile")
    else:
        yield ok("probe lead time", detail)


def _judge_nodes(reports: Sequence[RankReport]) -> Iterator[Finding]:
    ahead = {r.node: r.clock_ahead_s for r in reports if r.clock_ahead_s is not None}
    if ahead:
        clocks = ", ".join(f"{node} {seconds:+.1f} s" for node, seconds in sorted(ahead.items()))
        yield ok("probe clocks", f"against the file server: {clocks}; no decision depends on it")
    if without := sorted({report.node for report in reports if not report.has_sbatch}):
        detail = f"no sbatch on {', '.join(without)}: a keeper there cannot submit"
        yield skipped("probe keeper", f"{detail}; use submit --keep, or another partition for it")
    else:
        yield ok("probe keeper", "nodes have sbatch, which keepers need")
