"""Imports that succeeded are not tried again, unless something changed that they depend on."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import environment, import_memory

CODE = "import something"


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The code that was run in a process of its own, which always succeeds."""
    seen: list[str] = []

    def run(code: str) -> tuple[int, str]:
        seen.append(code)
        return 0, "7 GPUs"

    (tmp_path / "x-packages").mkdir()
    (tmp_path / "x-packages/_x.so").write_bytes(b"library")
    monkeypatch.setattr(environment, "_run_python", run)
    monkeypatch.setenv("MUGS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(import_memory.sys, "path", [str(tmp_path / "x-packages")])
    return seen


def try_again() -> None:
    assert environment._try_import(CODE) == (0, "7 GPUs")


def forget_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    return None


def install_a_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "x-packages/y.dist-info").mkdir()


def replace_a_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "x-packages/_x.so").write_bytes(b"another library")


def choose_other_libraries(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/elsewhere")


def hide_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def go_to_another_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_memory.platform, "node", lambda: "n7")


def wait_for_days(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = time.time() + 2 * import_memory.MAX_AGE_S
    monkeypatch.setattr(import_memory.time, "time", lambda: later)


def turn_the_clock_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = time.time() - 3600
    monkeypatch.setattr(import_memory.time, "time", lambda: earlier)


def damage_the_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = (folder / "cache/imports").iterdir()
    os.truncate(path, 20)


def plant_other_content(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = (folder / "cache/imports").iterdir()
    path.write_text(json.dumps({"entries": {CODE: ["7 GPUs"]}}))


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (forget_nothing, False),
        (install_a_package, True),
        (replace_a_library, True),
        (choose_other_libraries, True),
        (hide_gpus, True),
        (go_to_another_host, True),
        (wait_for_days, True),
        (turn_the_clock_back, True),
        (damage_the_memory, True),
        (plant_other_content, True),
    ],
)
def test_what_makes_an_import_be_tried_again(
    change: Callable[[Path, pytest.MonkeyPatch], None],
    again: bool,
    tried: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    try_again()
    try_again()
    assert tried == [CODE]
    change(tmp_path, monkeypatch)
    try_again()
    assert tried == [CODE] * (2 if again else 1)


def test_a_failure_is_not_remembered(tried: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_run_python", lambda code: (1, "ImportError"))
    assert environment._try_import(CODE) == (1, "ImportError")
    monkeypatch.setattr(environment, "_run_python", lambda code: (0, "7 GPUs"))
    try_again()


def test_a_memory_that_cannot_be_written_is_no_error(tried: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    try_again()
    try_again()
    assert tried == [CODE, CODE]
