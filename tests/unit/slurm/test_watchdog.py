"""Signals, watchdog and fencing of a rank, in processes of their own where a signal is needed."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline import attempts
from pipeline.control import Interrupted
from pipeline.provenance import code_root
from slurm.node.signals import StopSignals
from slurm.node.watchdog import JobControl, Watchdog

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from pipeline.control import Interrupted
from slurm.node.watchdog import JobControl
from slurm.node.signals import StopSignals
with StopSignals(ignore_repeats={ignore_repeats}) as signals:
    control = JobControl(Path("."), 1, signals)
    try:
        {body}
    except Interrupted as reason:
        print("left:", reason, flush=True)
"""


def play(body: str, *, ignore_repeats: bool = False) -> subprocess.CompletedProcess[str]:
    """Run lines under an signals, in a process of its own."""
    lines = body.strip().replace("\n", "\n        ")
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(ignore_repeats=ignore_repeats, body=lines)],
        cwd=code_root(),
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_without_a_loop_a_signal_is_acted_on_at_once() -> None:
    assert (
        play("os.kill(os.getpid(), signal.SIGUSR2)\ntime.sleep(20)").stdout
        == "left: SIGUSR2 while no step was running\n"
    )


def test_a_loop_is_asked_to_stop_and_leaves_when_it_has_saved() -> None:
    body = """
control.heartbeat(3)
os.kill(os.getpid(), signal.SIGTERM)
print(control.stop_requested(), signals.got_sigterm, signals.warned)
control.interrupted(4)
"""
    assert play(body).stdout == "True True False\nleft: SIGTERM, saved after step 4\n"


def test_a_signal_during_the_last_step_is_acted_on_after_it() -> None:
    done = play(
        "control.heartbeat(3)\nos.kill(os.getpid(), signal.SIGTERM)\n"
        "control.finish()\nprint('never')"
    )
    assert done.stdout == "left: SIGTERM after the last step\n"


def test_the_second_signal_stops_at_once_unless_slurm_sends_it() -> None:
    body = (
        "control.heartbeat(3)\nfor _ in range(2): os.kill(os.getpid(), signal.SIGINT)\n"
        "print('alive')"
    )
    assert play(body).returncode == 128 + signal.SIGINT
    assert play(body, ignore_repeats=True).stdout == "alive\n"


def test_a_signal_held_back_at_the_start_arrives() -> None:
    body = """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
os.kill(os.getpid(), signal.SIGUSR2)
print("held", flush=True)
signals.unblock()
time.sleep(20)
"""
    assert play(body).stdout == "held\nleft: SIGUSR2 while no step was running\n"


class Watched:
    """A watchdog over a control in a folder, and what it did."""

    def __init__(self, folder: Path, *, hang_s: float = 100.0, grace_s: float = 100.0) -> None:
        self.calls: list[str] = []
        self.called = threading.Event()
        self.control = JobControl(
            folder, attempts.start_attempt(folder), StopSignals(ignore_repeats=True)
        )
        self.log = (folder / "log").open("a")
        self.watchdog = Watchdog(
            control=self.control,
            log=self.log,
            grace_s=grace_s,
            hang_s=hang_s,
            on_hang=lambda seconds: self._call("hung"),
            on_grace_expired=lambda: self._call("late"),
            on_superseded=lambda: self._call("stale"),
        )

    def _call(self, name: str) -> None:
        self.calls.append(name)
        self.called.set()

    def look(self, seconds_later: float) -> list[str]:
        """What the watchdog does when it looks that much later."""
        self.watchdog._check(time.monotonic() + seconds_later)
        return self.calls


def test_a_loop_that_does_not_move_is_noticed_with_stacks(tmp_path: Path) -> None:
    watched = Watched(tmp_path, hang_s=60)
    assert watched.look(1000) == [], "nothing beats yet: another kind of stage"
    watched.control.heartbeat(1)
    assert watched.look(50) == [] and watched.look(61) == ["hung"]
    watched.log.flush()
    assert "most recent call first" in (tmp_path / "log").read_text()


def test_a_loop_at_rest_does_not_hang(tmp_path: Path) -> None:
    watched = Watched(tmp_path, hang_s=60)
    watched.control.heartbeat(1)
    watched.control.finish()
    assert watched.look(1000) == []


def test_too_late_for_a_boundary(tmp_path: Path) -> None:
    watched = Watched(tmp_path, grace_s=60)
    watched.control.heartbeat(1)
    watched.control.signals.warned_at = time.monotonic()
    assert watched.look(50) == [] and watched.look(61) == ["late"]
    assert watched.look(70) == ["late"], "once"


def test_nobody_waits_for_a_stage_that_has_nothing_to_save(tmp_path: Path) -> None:
    watched = Watched(tmp_path, grace_s=600)
    watched.control.signals.warned_at = time.monotonic()
    assert watched.look(10) == ["late"]


def test_an_older_attempt_is_told_to_end(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    assert watched.look(20) == []
    attempts.start_attempt(tmp_path)
    assert watched.look(40) == ["stale"] and not watched.control.may_write()


def test_the_watchdog_sees_a_signal_while_python_cannot(tmp_path: Path) -> None:
    """The main thread sits in one long C call: no handler runs, the watchdog acts all the same."""
    code = f"""
import os, signal, subprocess, time, hashlib
from pathlib import Path
from slurm.node.watchdog import Watchdog, JobControl
from slurm.node.signals import StopSignals
with StopSignals(ignore_repeats=True) as signals:
    control = JobControl(Path({str(tmp_path)!r}), 1, signals)
    control.heartbeat(1)
    def late():
        print("late", flush=True)
        os._exit(0)
    limits = {{"grace_s": 0.2, "hang_s": 60}}
    log = open("/dev/null", "w")
    with Watchdog(control=control, log=log, **limits, on_hang=print, on_grace_expired=late):
        subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -USR2 {{os.getpid()}}"])
        # takes minutes, without the interpreter's lock
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 500_000_000)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=code_root(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "late\n", done.stderr


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    # The signal arrives during the sleep at the latest.
    with pytest.raises(Interrupted), StopSignals(ignore_repeats=True):  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.long
@pytest.mark.parametrize("busy", [False, True], ids=["steps", "in one long C call"])
def test_a_rank_that_slurm_suspends_goes_on(tmp_path: Path, busy: bool) -> None:
    """Stopped for longer than a step may take: as by PreemptMode=SUSPEND, or `scontrol suspend`."""
    body = (
        'hashlib.pbkdf2_hmac("sha256", b"x", b"y", 8_000_000)'
        if busy
        else "[time.sleep(0.1) or control.heartbeat(step) for step in range(50)]"
    )
    code = f"""
import hashlib, os, signal, sys, time
from pathlib import Path
from slurm.node import watchdog
from slurm.node.watchdog import Watchdog, JobControl
from slurm.node.signals import StopSignals
watchdog._STOPPED_S = 5.0
watchdog._REARM_EVERY_S = 5.0
with StopSignals(ignore_repeats=True) as signals:
    control = JobControl(Path({str(tmp_path)!r}), 1, signals)
    control.heartbeat(1)
    limits = {{"grace_s": 60, "hang_s": {60 if busy else 7}}}
    watchdog._BACKSTOP_S = 8 - limits["hang_s"]  # its timer ends after 8 s
    log = open({str(tmp_path / "log")!r}, "a")
    def hung(seconds):
        print("hung", flush=True)
        os._exit(70)
    with Watchdog(control=control, log=log, **limits, on_hang=hung):
        print("ready", flush=True)
        {body}
        while not control.was_suspended(within_s=60):
            time.sleep(0.1)
        print("well", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=code_root(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    # In this order, and 2 s apart, Slurm stops a step.
    process.send_signal(signal.SIGTSTP)
    time.sleep(2)
    process.send_signal(signal.SIGSTOP)
    time.sleep(12)
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=120)
    assert out == "well\n" and process.returncode == 0, (tmp_path / "log").read_text()


def test_the_time_of_a_suspension_does_not_count(tmp_path: Path) -> None:
    watched = Watched(tmp_path, hang_s=60, grace_s=60)
    watched.control.heartbeat(1)
    watched.control.signals.warned_at = time.monotonic()
    assert not watched.control.was_suspended(within_s=1000)
    watched.control.resume(3600)
    assert watched.look(3600 + 50) == [] and watched.control.was_suspended(within_s=60)
    assert set(watched.look(3600 + 61)) == {"hung", "late"}
