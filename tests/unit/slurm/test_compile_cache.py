"""Compiled code goes with a run to other nodes, and nobody else's is ever loaded."""

import json
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import attempts
from pipeline.control import Interrupted
from slurm.node import compile_cache as module
from slurm.node.compile_cache import (
    VARIABLES,
    CompileCache,
    compile_cache,
    compute_key,
    describe_processors,
    list_compiled,
    make_private_folder,
    remove_unused,
    unpack_missing,
)

KERNEL = "inductor/ab/kernel.so"
INDEX = "numba/render/hue.nbi"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Where the run root keeps the copy."""
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs/compiled/key.tar"


def make_node(tmp_path: Path, name: str, archive: Path) -> CompileCache:
    """The cache of a node with a temporary folder of its own."""
    (tmp_path / name).mkdir(exist_ok=True)
    cache = CompileCache(tmp_path / name / "mugs-compiled/key", archive)
    cache.prepare()
    return cache


def write(cache: CompileCache, name: str, content: bytes = b"code", *, age_s: float = 100) -> Path:
    """Write a file as a compiler does, some time ago."""
    path = cache.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_another_node_starts_with_what_was_compiled(tmp_path: Path, archive: Path) -> None:
    first = make_node(tmp_path, "n0", archive)
    write(first, KERNEL, b"machine code").chmod(0o755)
    write(first, INDEX)
    assert first.save_now() and not first.save_now()
    assert archive.stat().st_mode & 0o777 == 0o600
    second = make_node(tmp_path, "n1", archive)
    assert (second.folder / KERNEL).read_bytes() == b"machine code"
    assert os.access(second.folder / KERNEL, os.X_OK) and (second.folder / INDEX).exists()
    # Nothing new: nothing is written again, also by who finds it all on its node.
    assert not second.save_now() and not make_node(tmp_path, "n1", archive).save_now()
    write(second, "inductor/cd/more.so")
    assert second.save_now()
    assert (make_node(tmp_path, "n2", archive).folder / "inductor/cd/more.so").exists()


def test_what_a_node_has_stays_and_is_saved_for_another_run_root(
    tmp_path: Path, archive: Path
) -> None:
    write(make_node(tmp_path, "n0", archive), KERNEL)
    other = tmp_path / "runs/compiled-2/key.tar"
    assert make_node(tmp_path, "n0", other).save_now() and other.exists()
    write(make_node(tmp_path, "n1", archive), KERNEL, b"in use")
    assert (make_node(tmp_path, "n1", other).folder / KERNEL).read_bytes() == b"in use"


@pytest.mark.parametrize(
    "name",
    [
        "inductor/ab/.12.34.tmp",
        "numba/render/hue.nbi.tmp.0123456789abcdef",
        "triton/KEY/tmp.pid_7_0123/kernel.cubin",
        "inductor/locks/kernel.lock",
    ],
)
def test_what_is_being_written_is_not_copied(tmp_path: Path, archive: Path, name: str) -> None:
    node = make_node(tmp_path, "n0", archive)
    write(node, name)
    write(node, "inductor/ab/linking.so", age_s=1)
    (node.folder / "inductor/link.so").symlink_to("/etc/passwd")
    assert list_compiled(node.folder) == {} and not node.save_now()
    assert not archive.exists()


def test_a_copy_is_made_once_compilers_rest(tmp_path: Path, archive: Path) -> None:
    node = make_node(tmp_path, "n0", archive)
    write(node, KERNEL)
    assert not node.save_if_settled()
    write(node, INDEX)
    assert not node.save_if_settled()
    assert node.save_if_settled() and not node.save_if_settled()


def test_ranks_of_a_node_unpack_once(tmp_path: Path, archive: Path) -> None:
    first = make_node(tmp_path, "n0", archive)
    write(first, KERNEL)
    first.save_now()
    node = make_node(tmp_path, "n1", archive)
    (node.folder / KERNEL).unlink()
    assert not (make_node(tmp_path, "n1", archive).folder / KERNEL).exists()
    # Long after, something that cleans temporary folders may have removed it.
    os.utime(node.folder.with_suffix(".from"), (0, 0))
    assert (make_node(tmp_path, "n1", archive).folder / KERNEL).exists()


def test_a_damaged_copy_is_replaced(
    tmp_path: Path, archive: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = make_node(tmp_path, "n0", archive)
    write(first, KERNEL, b"x" * 5000)
    first.save_now()
    archive.write_bytes(archive.read_bytes()[:2000])
    second = make_node(tmp_path, "n1", archive)
    assert not (second.folder / KERNEL).exists() and "is damaged" in caplog.text
    write(second, KERNEL)
    assert second.save_now()
    assert (make_node(tmp_path, "n2", archive).folder / KERNEL).exists()


def test_no_room_is_only_a_warning(
    tmp_path: Path, archive: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    node = make_node(tmp_path, "n0", archive)
    write(node, KERNEL)
    archive.parent.write_text("in the way")
    assert not node.save_now() and "not kept for the next attempt" in caplog.text
    assert not node.save_now()  # not once more every minute
    monkeypatch.setattr(module, "_LARGEST", 2)
    write(node, INDEX)
    assert not node.save_now() and "too much to be copied" in caplog.text


@pytest.mark.parametrize("fault", ["open to others", "link"])
def test_a_folder_that_is_not_ours_alone_is_refused(tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "compiled"
    if fault == "link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "theirs")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(PermissionError, match="is not this user's alone"):
        make_private_folder(folder)


def test_a_copy_that_others_may_write_is_refused(tmp_path: Path, archive: Path) -> None:
    first = make_node(tmp_path, "n0", archive)
    write(first, KERNEL)
    first.save_now()
    archive.chmod(0o666)
    with pytest.raises(PermissionError, match="is not this user's alone"):
        make_node(tmp_path, "n1", archive)
    assert not list_compiled(tmp_path / "n1/mugs-compiled/key")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "compiled"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    with pytest.raises(PermissionError, match="belongs to user 12345"):
        make_private_folder(folder)


def test_names_that_lead_elsewhere_are_passed_over(tmp_path: Path) -> None:
    folder, path = tmp_path / "inner", tmp_path / "bad.tar"
    folder.mkdir()
    (tmp_path / "file").write_text("x")
    with tarfile.open(path, "w") as tar:
        for name in ("../out", "/tmp/mugs-out", "ok/../../out", "ok/file"):
            member = tar.gettarinfo(tmp_path / "file")
            member.name = name
            with open(tmp_path / "file", "rb") as file:
                tar.addfile(member, file)
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with open(path, "rb") as file:
        assert unpack_missing(file, folder) == {"ok/file": 1}
    assert [p.name for p in folder.rglob("*") if p.is_file()] == ["file"]
    assert not (tmp_path / "out").exists()


def test_the_key_is_of_code_cpu_and_gpus(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    cpu = tmp_path / "cpuinfo"
    gpu = tmp_path / "driver/nvidia/gpus/0000:01:00.0/information"
    cpu.write_text("processor : 0\nmodel name : Xeon\ncpu MHz : 2000\nflags : avx2 avx512f\n")
    gpu.write_text("Model: \t\t NVIDIA A100-SXM4-80GB\nIRQ: 5\nGPU UUID: GPU-1\n")
    before = describe_processors(tmp_path)
    assert before == "Model: NVIDIA A100-SXM4-80GB\nflags : avx2 avx512f\nmodel name : Xeon"
    keys = {compute_key(before), compute_key()}
    cpu.write_text(cpu.read_text().replace(" avx512f", ""))
    keys.add(compute_key(describe_processors(tmp_path)))
    gpu.write_text("Model: NVIDIA H100\n")
    keys.add(compute_key(describe_processors(tmp_path)))
    monkeypatch.setattr(module, "code_root", lambda: Path("/runs/code-0/0123456789ab"))
    keys.add(compute_key(before))
    assert len(keys) == 5 and compute_key(before) == compute_key(before)


def test_what_was_long_unused_is_removed(tmp_path: Path) -> None:
    for name in ("key-1", "old", "new"):
        (tmp_path / name).mkdir()
    old = time.time() - 15 * 86400
    for name in ("key-1.lock", "old.lock"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (old, old))
    os.utime(tmp_path / "old", (old, old))
    remove_unused(tmp_path, keep=tmp_path / "key-1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["key-1", "key-1.lock", "new"]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder, and the environment of its job."""
    for name in VARIABLES:
        # First set, so that what the cache sets is taken back after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    run_dir = tmp_path / "runs/pretrain/toy-0123"
    run_dir.mkdir(parents=True)
    return run_dir


def test_a_job_names_the_folder_to_compilers(job: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    with compile_cache(job, 1, leads=True):
        folder = Path(os.environ["NUMBA_CACHE_DIR"]).parent
        assert folder.is_relative_to(tempfile.gettempdir())
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder / "inductor")
        assert os.environ["TRITON_CACHE_DIR"] == "/mine"
        (folder / "inductor").mkdir()
        (folder / "inductor/x.so").touch()
        os.utime(folder / "inductor/x.so", (0, 0))
    (archive,) = (job.parents[1] / f"compiled-{os.geteuid()}").iterdir()
    assert folder.name.startswith(archive.stem)


def test_an_attempt_that_is_stopped_copies_nothing(job: Path) -> None:
    def compile_and_stop() -> None:
        with compile_cache(job, 1, leads=True):
            path = Path(os.environ["NUMBA_CACHE_DIR"])
            path.mkdir()
            (path / "x.nbi").touch()
            os.utime(path / "x.nbi", (0, 0))
            raise Interrupted("SIGUSR2")

    with pytest.raises(Interrupted):
        compile_and_stop()
    assert not (job.parents[1] / f"compiled-{os.geteuid()}").exists()


def test_after_a_failure_everything_is_compiled_again(job: Path) -> None:
    with compile_cache(job, 1, leads=False):
        first = os.environ.pop("NUMBA_CACHE_DIR")
    attempts.start_attempt(job)
    attempts.record_failure(job, 1, error="Segmentation fault", log=job / "log")
    with compile_cache(job, 2, leads=False):
        assert os.environ.pop("NUMBA_CACHE_DIR") != first
    # An attempt that was only stopped is no reason.
    attempts.start_attempt(job)
    attempts.record_interruption(job, 2, "SIGUSR2")
    with compile_cache(job, 3, leads=False):
        assert os.environ["NUMBA_CACHE_DIR"] == first


def test_elsewhere_nothing_changes(job: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    with compile_cache(job, 1, leads=True):
        assert not set(VARIABLES) & set(os.environ)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/nowhere/at/all")
    with caplog.at_level(logging.WARNING), compile_cache(job, 1, leads=True):
        assert not set(VARIABLES) & set(os.environ)
    assert "no folder of this node" in caplog.text


ATTEMPT = """
import json, sys
from pathlib import Path
from slurm.node import compile_cache as module
module._YOUNG_S = 0.0
with module.compile_cache(Path(sys.argv[1]), int(sys.argv[2]), leads=True):
"""


def run_attempt(body: str, folder: Path, attempt: int) -> Any:
    """Run an attempt of a job on a node of its own; return what it printed last."""
    node = folder / f"node{attempt}"
    node.mkdir()
    run_dir = folder / "runs/pretrain/toy-0123"
    run_dir.mkdir(parents=True, exist_ok=True)
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    env |= {"SUBMITIT_EXECUTOR": "slurm", "TMPDIR": str(node), "HOME": str(node)}
    command = [sys.executable, "-c", ATTEMPT + body, str(run_dir), str(attempt)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_second_attempt_compiles_no_kernel(tmp_path: Path) -> None:
    """A kernel of the renderer, compiled by numba."""
    body = """
    from mugs.data.views.render.compiled import KERNEL_CACHE_DIR
    from mugs.data.views.render.hue import hue_byte
    hue_byte(200, 30, 90, 200, 30)
    stats = hue_byte.stats
    hits = sum(stats.cache_hits.values())
    print(json.dumps([hits, sum(stats.cache_misses.values()), KERNEL_CACHE_DIR]))
"""
    hits, misses, folder = run_attempt(body, tmp_path, 1)
    assert (hits, misses) == (0, 1) and folder.startswith(str(tmp_path / "node1"))
    hits, misses, folder = run_attempt(body, tmp_path, 2)
    assert (hits, misses) == (1, 0) and folder.startswith(str(tmp_path / "node2"))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_second_attempt_compiles_no_graph(tmp_path: Path) -> None:
    """Forward and backward of a block, by torch.compile: 72 s, then 3 s on a slow CPU."""
    body = """
    import torch
    from torch._dynamo.utils import compilation_time_metrics, counters
    block = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
    block.compile(dynamic=False)
    block(torch.ones(3, 8)).sum().backward()
    lowered = len(compilation_time_metrics.get("GraphLowering.compile_to_module", []))
    counted = {**counters["inductor"], **counters["aot_autograd"], "lowered": lowered}
    print(json.dumps(counted))
"""
    cold = run_attempt(body, tmp_path, 1)
    assert cold["fxgraph_cache_miss"] == cold["lowered"] == 2, cold
    warm = run_attempt(body, tmp_path, 2)
    assert warm["fxgraph_cache_hit"] == 2 and warm["lowered"] == 0, warm
    assert "fxgraph_cache_miss" not in warm and "autograd_cache_miss" not in warm, warm
