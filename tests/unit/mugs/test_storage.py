"""Checkpoints in the background, what is kept of them, and room for them."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from checkpoint_cases import POLICY, loaded_step, names, only, parts_of, save
from safetensors.torch import load_file, save_file
from shim import failing, intercepted

from mugs.checkpoint import space
from mugs.checkpoint.background import BackgroundWriter
from mugs.checkpoint.host_copy import HostCopy
from mugs.checkpoint.record import CheckpointError, verify_checkpoint
from mugs.checkpoint.save_load import (
    SavePolicy,
    StateDicts,
    check_free_space_for_run,
    save_checkpoint,
)
from mugs.checkpoint.tensors import DTYPE_NAMES, read_tensors, write_tensors
from mugs.engine.loop import train
from pipeline.files import replace_atomically

ROOT = Path(__file__).resolve().parents[3]


class Counting:
    """A task whose state counts its steps; `at` runs something after a step."""

    def __init__(self, total_steps: int = 6, at: dict[int, Any] | None = None) -> None:
        self.total_steps, self.at = total_steps, at or {}
        self.state = torch.zeros(100)
        self.started_at: int | None = None

    def steps(self, start: int) -> Iterator[None]:
        self.started_at = start
        for step in range(start + 1, self.total_steps + 1):
            self.state.fill_(step)
            self.at.get(step, lambda: None)()
            yield

    def check_before_save(self) -> None:
        """There is nothing to check."""

    def state_dicts(self) -> StateDicts:
        return {"state": {"count": self.state}}

    def metadata(self) -> dict[str, Any]:
        return {"count": float(self.state[0])}

    def load_state(self, parts: Any, notes: Any) -> None:
        self.state.copy_(parts["state"]["count"])


def test_files_are_what_the_library_writes_and_reads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{i}": (torch.randn(3, 5, generator=generator) * 9).to(dtype)
        for i, dtype in enumerate(DTYPE_NAMES)
    }
    tensors |= {
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(7),
        "turned": torch.randn(4, 3).T,
    }
    stored = write_tensors(tmp_path / "ours", tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "theirs")
    assert stored.size == (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size
    for found in (load_file(tmp_path / "ours"), read_tensors(tmp_path / "theirs")):
        assert found.keys() == tensors.keys()
        assert all(
            found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in tensors.items()
        )
    (tmp_path / "any").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "any").stat().st_mode
    with pytest.raises(TypeError, match=r"c is torch\.complex64"):
        write_tensors(tmp_path / "c", {"c": torch.zeros(1, dtype=torch.complex64)})


def test_a_folder_is_flushed_before_it_gets_its_name(tmp_path: Path) -> None:
    with intercepted() as calls, replace_atomically(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "inner").touch()
    made = [name for name, _ in calls.log]
    assert made[-6:] == ["open", "fsync", "fsync", "replace", "fsync", "unlink"], "file and folders"


def test_the_copy_is_reused_and_independent() -> None:
    copy, parts = HostCopy(), parts_of(1)
    first = copy.copy_from(parts)["student"]["weight"]
    expected = parts["student"]["weight"].clone()
    parts["student"]["weight"].zero_()
    assert torch.equal(first, expected)
    assert copy.copy_from(parts)["student"]["weight"].data_ptr() == first.data_ptr()
    grown = copy.copy_from({"student": {"weight": torch.ones(3)}})
    assert grown["student"]["weight"].tolist() == [1, 1, 1] and len(copy.buffers) == 1


def test_training_goes_on_while_the_state_of_the_save_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, log = threading.Event(), []

    def slow_save(*args: Any, **options: Any) -> Path:
        assert gate.wait(30)
        log.append(args[1])
        return save_checkpoint(*args, **options)

    monkeypatch.setattr("mugs.checkpoint.background.save_checkpoint", slow_save)
    state = {"state": {"x": torch.full((10,), 1.0)}}
    writer = BackgroundWriter(tmp_path, POLICY)
    assert writer.save(1, state, {}) is None
    state["state"]["x"].fill_(2.0)  # while the write waits
    assert log == []
    gate.set()
    saved = writer.save(2, state, {})
    assert 0 <= saved.stall_s <= saved.durable_s and (saved.step, saved.bytes) == (1, 40)
    assert writer.wait() is not None and log == [1, 2]
    writer.close()
    for step in (1, 2):
        path = tmp_path / f"step_{step:08d}" / "state.safetensors"
        assert read_tensors(path)["x"].tolist() == [step] * 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_copy_from_the_gpu_is_page_locked_and_of_its_moment() -> None:
    copy, weight = HostCopy(), torch.zeros(4 << 20, device="cuda")
    for value in (1.0, 2.0):
        weight.fill_(value)
        taken = copy.copy_from({"student": {"weight": weight}})["student"]["weight"]
        weight.fill_(9.0)  # the next step
        assert taken.is_pinned() and bool((taken == value).all())


@pytest.mark.parametrize("step", [3, 6])
def test_an_error_of_the_writer_ends_the_run(tmp_path: Path, step: int) -> None:
    folder = tmp_path / "checkpoints"

    def break_disk() -> None:
        shutil.rmtree(folder)
        folder.touch()  # a file where the folder should be

    with pytest.raises(
        CheckpointError, match=f"step_0000000{step} failed: .*checkpoints: File exists"
    ):
        train(Counting(at={step: break_disk}), folder, every=step, policy=POLICY)


def test_a_run_ends_with_its_checkpoint_on_disk_and_says_how_long_it_took(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    train(Counting(), tmp_path / "checkpoints", every=4, policy=POLICY)
    assert names(tmp_path / "checkpoints") == only(4, 6)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 6]
    assert all(line["checkpoint"]["durable_s"] >= line["checkpoint"]["stall_s"] for line in lines)
    assert "checkpoint of step 6" in caplog.text and "stood still for" in caplog.text


def test_a_failing_run_keeps_the_write_in_flight(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("of the task")

    with pytest.raises(ValueError, match="of the task"):
        train(Counting(at={4: fail}), tmp_path / "checkpoints", every=3, policy=POLICY)
    again = Counting()
    train(again, tmp_path / "checkpoints", every=3, policy=POLICY)
    assert again.started_at == 3


def test_the_interpreter_waits_for_the_write(tmp_path: Path) -> None:
    code = (
        "import sys, time, torch\n"
        "from pathlib import Path\n"
        "import mugs.checkpoint.background as background\n"
        "save = background.save_checkpoint\n"
        "background.save_checkpoint = lambda *a, **k: (time.sleep(0.3), save(*a, **k))\n"
        "writer = background.BackgroundWriter(Path(sys.argv[1]), background.SavePolicy())\n"
        "writer.save(5, {'state': {'x': torch.ones(3)}}, {})\n"
        "sys.exit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=120)
    assert done.returncode == 3
    assert verify_checkpoint(tmp_path / "step_00000005").step == 5


def test_milestones_stay(tmp_path: Path) -> None:
    train(
        Counting(10),
        tmp_path / "checkpoints",
        every=3,
        policy=replace(POLICY, keep=1, milestone_steps=4),
    )
    assert names(tmp_path / "checkpoints") == only(4, 8, 10)


def test_keep_counts(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, replace(POLICY, keep=3))
    assert names(tmp_path) == only(3, 4, 5)
    with pytest.raises(ValueError, match="keep 0"):
        SavePolicy(keep=0)


def test_a_bad_one_in_the_way_is_set_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    for bad in only(2, 3):
        os.truncate(tmp_path / bad / "student.safetensors", 100)
    save(tmp_path, 2, replace(POLICY, keep=1))
    assert loaded_step(tmp_path) == 2
    assert names(tmp_path) == ["bad_step_00000002", "bad_step_00000003", "step_00000002"]
    save(tmp_path, 3)
    os.truncate(tmp_path / "step_00000003" / "student.safetensors", 100)
    save(tmp_path, 3)
    assert len(names(tmp_path)) == 5 and loaded_step(tmp_path) == 3, (
        "a second bad one of the same step"
    )


def test_the_only_good_one_is_never_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses what it was given: everything written reads back wrong,
    so the old one stays.
    """
    save(tmp_path, 1)

    def write_and_lose(path: Path, tensors: Any) -> Any:
        stored = write_tensors(path, tensors)
        os.truncate(path, stored.size - 1)
        return stored

    monkeypatch.setattr("mugs.checkpoint.save_load.write_tensors", write_and_lose)
    for step in (2, 3):
        with pytest.raises(CheckpointError, match="read back wrong"):
            save(tmp_path, step, replace(POLICY, keep=1))
    assert loaded_step(tmp_path) == 1


def test_leftovers_go_at_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / ".step_00000003.abcd.tmp").mkdir(parents=True)
    (folder / ".step_00000003.abcd.tmp" / "student.safetensors").write_bytes(b"x")
    (folder / ".room.abcd.tmp").touch()
    seen = []
    train(Counting(at={1: lambda: seen.extend(names(folder))}), folder, every=3, policy=POLICY)
    assert seen == []


def test_a_fenced_process_publishes_and_removes_nothing(tmp_path: Path) -> None:
    class Fenced(RuntimeError):
        """What the fence raises."""

    for step in (1, 2):
        save(tmp_path, step)
    for allowed in (0, 1):  # the fence falls before the write, and during it
        fence = Mock(side_effect=[None] * allowed + [Fenced])
        with pytest.raises(Fenced):
            save(tmp_path, 3, replace(POLICY, keep=1, check_may_write=fence))
        assert names(tmp_path) == only(1, 2)


def test_room_for_the_run(tmp_path: Path) -> None:
    huge = {"state": {"x": torch.empty(shutil.disk_usage(tmp_path).free // 4 // 3, device="meta")}}
    check_free_space_for_run(tmp_path / "a", parts_of(1), 10, POLICY)
    with pytest.raises(
        CheckpointError, match=r"/a: .*not enough room: .* free, .* needed for 4 checkpoints of"
    ):
        check_free_space_for_run(tmp_path / "a", huge, 10, replace(POLICY, milestone_steps=9))


def test_room_counts_what_is_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    check = Mock()
    monkeypatch.setattr("mugs.checkpoint.save_load.check_free_space", check)
    check_free_space_for_run(tmp_path, parts_of(3), 10, POLICY)
    size = sum(t.nbytes for tensors in parts_of(3).values() for t in tensors.values())
    assert 0 < check.call_args.args[1] <= size, "two of three are there"


def test_a_quota_is_noticed_before_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "reserve_space", lambda descriptor, size: errno.EDQUOT)
    with pytest.raises(OSError, match=r"quota.*free, .* needed for the thing") as caught:
        space.check_free_space(tmp_path, 1000, "the thing")
    assert caught.value.errno == errno.EDQUOT and caught.value.filename == str(tmp_path)
    assert names(tmp_path) == []


def test_reserving_takes_room_without_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "x").open("wb") as stream:
        code = space.reserve_space(stream.fileno(), 1 << 16)
        assert code in (0, errno.EOPNOTSUPP, errno.ENOSYS)
        assert os.fstat(stream.fileno()).st_size == (0 if code else 1 << 16)
        monkeypatch.setattr(space.ctypes, "CDLL", lambda *_, **__: object())
        assert space.reserve_space(stream.fileno(), 1 << 16) == errno.EOPNOTSUPP, (
            "libc has no fallocate"
        )


def test_patience_with_a_bad_disk(caplog: pytest.LogCaptureFixture) -> None:
    def failing_with(*codes: int) -> Mock:
        errors = [OSError(code, os.strerror(code), "/some/file") for code in codes]
        return Mock(side_effect=[*errors, "done"])

    stop = threading.Event()
    retry = partial(space.retry_disk_errors, what="saving", stop=stop, first_pause=0.001)
    work = failing_with(errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.ESTALE)
    assert retry(work, seconds=30) == "done" and work.call_count == 5
    assert "saving failed: /some/file: No space left on device; again in" in caplog.text
    work = failing_with(errno.EROFS)
    with pytest.raises(
        CheckpointError, match=r"^saving failed: /some/file: Read-only file system$"
    ):
        retry(work, seconds=30)
    assert work.call_count == 1, "nothing to wait for"
    work = failing_with(*[errno.EIO] * 9999)
    with pytest.raises(CheckpointError, match="Input/output error"):
        retry(work, seconds=0.05)
    assert work.call_count > 2
    stop.set()
    work = failing_with(*[errno.EIO] * 9999)
    with pytest.raises(CheckpointError):
        retry(work, seconds=30)
    assert work.call_count == 1, "told to stop"


def test_a_stumble_of_the_disk_is_survived(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with intercepted(failing(9, errno.EIO)) as calls:
        save(tmp_path, 2, replace(POLICY, retry_seconds=30))
    assert len(calls.log) > 9 and loaded_step(tmp_path) == 2
    assert names(tmp_path) == only(1, 2)


def test_optimizer_state_is_there_from_the_start() -> None:
    from mugs.engine.optim import build_pretrain_adamw, flatten_optimizer_state

    def model() -> torch.nn.Linear:
        torch.manual_seed(0)
        return torch.nn.Linear(3, 2)

    one, other = model(), model()
    ours = build_pretrain_adamw(one)
    lazy = torch.optim.AdamW(other.parameters(), lr=0.0, fused=True)
    before = {name: value.shape for name, value in flatten_optimizer_state(ours).items()}
    for net, optimizer in ((one, ours), (other, lazy)):
        for _ in range(3):
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = 0.1, 0.0
            optimizer.zero_grad()
            net(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
    assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)
    assert {name: value.shape for name, value in flatten_optimizer_state(ours).items()} == before
