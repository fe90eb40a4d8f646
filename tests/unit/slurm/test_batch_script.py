"""What the batch script does after srun, run by a shell that finds only what the script needs."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.spec import Resources, StageConfig, StageRun
from slurm.submission.profile import ClusterProfile
from slurm.submission.submit import Dependencies, sbatch_text

RUN = StageRun("tiny", "x", "0123456789ab", StageConfig(), {}, Resources(gpu=False), "x:run")
Play = Callable[..., tuple[int, bool]]
RUNNING = "JobState=RUNNING"


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """Run a batch script: the ranks end with `code`, the handler with `decision` (None: there is no
    such Python). Return the exit code of the job, and whether the shell has requeued it.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    shell, grep = (shutil.which(name) or f"/bin/{name}" for name in ("sh", "grep"))
    (folder / "grep").symlink_to(grep)

    def write(name: str, lines: str) -> None:
        (folder / name).write_text(f"#!{shell}\n{lines}\n")
        (folder / name).chmod(0o755)

    def run(
        code: int,
        decision: int | None,
        state: str | None = RUNNING,
        *,
        shell_command: Sequence[str] = ("/bin/bash",),
        **options: Any,
    ) -> tuple[int, bool]:
        note = tmp_path / "requeued"
        note.unlink(missing_ok=True)
        python = folder / "jobs_python"
        profile = ClusterProfile(run_root=tmp_path / "runs", python=str(python), **options)
        text = sbatch_text(RUN, profile, Dependencies(), Path("/code"))
        write("srun", f"exit {code}")
        if decision is not None:
            write("jobs_python", f"exit {decision}")
        if state is not None:
            says = (
                f'case "$*" in *show*) echo {shlex.quote(state)};; *) echo "$*" > requeued;; esac'
            )
            write("scontrol", says)
        done = subprocess.run(
            [*shell_command, "-c", text],
            env={"PATH": str(folder), "SLURM_JOB_ID": "7"},
            cwd=tmp_path,
            capture_output=True,
            timeout=60,
        )
        assert not note.exists() or note.read_text() == "requeue 7\n"
        return done.returncode, note.exists()

    return run


@pytest.mark.parametrize(
    ("code", "decision", "expected"),
    [
        (0, None, (0, False)),
        (75, 75, (75, False)),  # the handler saw to it
        (75, 0, (0, False)),  # the run is done
        (137, 0, (0, False)),
        (137, 137, (137, False)),
        (255, 255, (255, False)),
        (75, 76, (75, True)),  # it has no scontrol: it runs in the container
        (137, 76, (137, True)),
        (140, 76, (140, True)),
        (75, None, (75, True)),  # there is no such Python outside the container
        (75, 1, (75, True)),  # or one without our packages
        (75, 126, (75, True)),
        (137, None, (137, False)),  # nobody can say whether it would fail again
        (1, None, (1, False)),
    ],
)
def test_who_requeues(play: Play, code: int, decision: int | None, expected: object) -> None:
    """No program of coreutils is on the path, so none can be too old."""
    assert play(code, decision) == expected


@pytest.mark.parametrize(
    "state", ["JobState=CANCELLED", "JobState=COMPLETING", "JobState=PENDING", "", None]
)
@pytest.mark.parametrize("decision", [76, None])
def test_a_job_that_is_ending_or_unknown_is_not_requeued(
    play: Play, decision: int | None, state: str | None
) -> None:
    """None: the shell has no scontrol either."""
    assert play(75, decision, state) == (75, False)


def test_env_of_the_node_is_asked_nothing_that_is_new(play: Play, tmp_path: Path) -> None:
    """`env` of coreutils 8.30 refuses `--block-signal` with exit code 125."""
    env = tmp_path / "bin" / "env"
    env.write_text("#!/bin/sh\nexit 125\n")
    env.chmod(0o755)
    assert play(0, None) == (0, False)


# Those beside bash where they are installed.
SHELLS = [
    *("bash", "bash --posix", "bash -eu", "bash -euo pipefail", "sh"),
    *(shell for shell in ("dash", "mksh", "busybox sh") if shutil.which(shell.split()[0])),
]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("setup", ["true", "set -eu", "PS4=x; set -e -x", "export SHELLOPTS"])
def test_old_and_strict_shells(play: Play, shell: str, setup: str) -> None:
    """Nothing needs a new bash, and what `setup` turns on does not end the script after srun."""
    name, *flags = shell.split()
    command = [shutil.which(name) or name, *flags]
    for code, decision, expected in (
        (0, None, (0, False)),
        (137, 137, (137, False)),
        (75, 76, (75, True)),
        (75, None, (75, True)),
    ):
        assert play(code, decision, shell_command=command, setup=(setup,)) == expected


OLD_TOOLS = (
    "env", "timeout", "mktemp", "stdbuf", "realpath", "readlink", "date", "sha256sum", "nproc",
    "hostname", "cat", "sed", "awk", "tr", "ls", "numactl", "flock", "nvidia-smi",
)  # fmt: skip


@pytest.mark.parametrize(("code", "decision"), [(0, None), (75, 76), (75, None), (137, 137)])
def test_tools_of_the_node_may_be_old(
    play: Play, tmp_path: Path, code: int, decision: int | None
) -> None:
    """They refuse options that are new, as `env --block-signal`: none of them is called."""
    for name in OLD_TOOLS:
        tool = tmp_path / "bin" / name
        tool.write_text(f"#!{shutil.which('sh')}\necho {name} >> {tmp_path}/asked\nexit 125\n")
        tool.chmod(0o755)
    assert play(code, decision)[0] == code
    assert not (tmp_path / "asked").exists()


# Of those that a script may hold; Slurm 18.08 has no `--gpus-per-node` yet.
SBATCH_1808 = {
    "account", "comment", "constraint", "cpus-per-task", "dependency", "error", "exclude",
    "exclusive", "gres", "job-name", "kill-on-invalid-dep", "mem", "nodelist", "nodes",
    "ntasks-per-node", "open-mode", "output", "partition", "qos", "requeue", "reservation",
    "signal", "time", "wckey",
}  # fmt: skip
SRUN_1808 = {"unbuffered", "output", "error", "cpus-per-task", "kill-on-bad-exit"}


def test_options_of_an_old_slurm(tmp_path: Path) -> None:
    words = {"partition", "account", "qos", "constraint", "nodelist", "exclude", "reservation"}
    profile = ClusterProfile(
        run_root=tmp_path, gres="gpu:a100", exclusive=True, memory_gb=4, **dict.fromkeys(words, "x")
    )
    run = replace(RUN, resources=Resources(nodes=2, ranks_per_node=8))
    text = sbatch_text(run, profile, Dependencies(), Path("/code"))
    asked = set(re.findall(r"^#SBATCH --([a-z-]+)", text, re.MULTILINE))
    assert words < asked <= SBATCH_1808
    (line,) = re.findall(r"^srun .*", text, re.MULTILINE)
    assert set(re.findall(r" --([a-z-]+)", line)) == SRUN_1808
