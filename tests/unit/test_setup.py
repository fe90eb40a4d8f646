"""The set-up script says what it needs before it installs anything."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_full_disk_is_told_before_anything_is_installed(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    (clone / ".ci").mkdir(parents=True)
    for name in (".ci/setup.sh", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, clone / name)
    df = tmp_path / "bin" / "df"
    df.parent.mkdir()
    df.write_text("#!/bin/sh\necho header\necho /dev/disk 100000000 95000000 5000000 95% /\n")
    df.chmod(0o755)
    done = subprocess.run(
        ["bash", ".ci/setup.sh"],
        cwd=clone,
        env={**os.environ, "PATH": f"{df.parent}:{os.environ['PATH']}", "MUGS_TORCH": "cuda13"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"stopped: 4 GiB are free in {clone}" in done.stdout
    assert not (clone / ".venv").exists()
