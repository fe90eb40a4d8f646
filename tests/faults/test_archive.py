"""A run root that was moved to another disk and archived there: read-only, for whoever looks."""

from pathlib import Path

import pytest
from called import fast_surroundings
from commands_of_users import COMPARED, READING, Command, run_command
from fence import fenced
from scene import Scene, build_scene

pytestmark = pytest.mark.slow

COMMANDS: dict[str, Command] = {
    **COMPARED,
    **READING,
    "tables --out": lambda s: ("tables", "--out", s.folder.parent / "out/tables", "--table", "1"),
    "export": lambda s: ("export", "pretrain", "--out", s.folder.parent / "out/weights.pth"),
}
# They show how long ago something was, or how much room a disk has.
OF_THE_MOMENT = ("doctor", "clean", "logs", "logs of a stage")


def test_who_looks_at_an_archive_sees_what_there_was_and_starts_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    profile = tmp_path / "cluster.yaml"
    profile.write_text(f"run_root: {tmp_path / 'disk/runs'}\n")
    with fast_surroundings():
        scene = build_scene(tmp_path / "scene")
        before = {name: run_command(scene, command) for name, command in COMMANDS.items()}
        for path in sorted(out.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        scene.folder.rename(tmp_path / "disk")
        archive = Scene(tmp_path / "disk")
        with fenced(out):
            after = {name: run_command(archive, command) for name, command in COMMANDS.items()}
            started = [
                run_command(archive, lambda s: ("run", s.reproduction)),
                run_command(archive, lambda s: ("submit", s.reproduction, "--cluster", profile)),
            ]
    for name, called in after.items():
        assert not called.complaint, (name, called.complaint)
        assert called.code == (1 if name == "doctor" else before[name].code), (name, called.err)
        if name not in OF_THE_MOMENT:
            # Settings keep the paths that the runs were started with.
            said = called.out.replace(str(archive.folder), str(scene.folder))
            assert said == before[name].out, name
    assert sorted(path.name for path in out.iterdir()) == ["tables", "weights.pth"]
    assert f"wrong   run root: {archive.root}: cannot" in after["doctor"].out
    for called in started:
        assert called.code == 2 and not called.complaint
        assert "Read-only file system" in called.err and str(archive.root) in called.err
