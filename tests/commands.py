"""Our command line in a process of its own, commands of other programs as scripts, tiny stages."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "run_stage.py"


def call_command_line(
    *arguments: str, folder: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a folder as a user does, with `runs` in it as the run root."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MUGS"))}
    clean |= {"MUGS_RUN_ROOT": str(folder / "runs"), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=clean | (env or {}),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def write_commands(folder: Path, **scripts: str) -> str:
    """Write shell lines as commands into a folder; return a PATH that begins with it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def write_module(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, text: str) -> ModuleType:
    """Write a module that is found here and in processes started from now on; return it."""
    folder.mkdir()
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("MUGS_STAGE_MODULES", name)
    sys.modules.pop(name, None)
    return importlib.import_module(name)
