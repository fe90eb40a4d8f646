"""A bundle of real runs: checked elsewhere, its k-NN repeated, and no secret in any file."""

from pathlib import Path

import pytest
from commands import call_command_line

SECRETS = {"HUB_TOKEN": "planted-7f3a", "AWS_SECRET_ACCESS_KEY": "planted-91bc"}
CHANGES = ("--set", "pretrain.epochs=1", "--set", "pretrain.warmup_epochs=0")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_bundle_of_real_runs_is_checked_elsewhere(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    # One by one: a command may take five minutes.
    for run in ("digits", "pretrain", "knn_initial"):
        arguments = ("run", "mini", "--only", run, *CHANGES)
        done = call_command_line(*arguments, folder=here, env=SECRETS)
        assert done.returncode == 0, done.stderr
    bundle = tmp_path / "there" / "mini.zip"
    for command in (("report", "mini"), ("bundle", "mini", "--weights", "--out", str(bundle))):
        done = call_command_line(*command, *CHANGES, folder=here, env=SECRETS)
        assert done.returncode == 0, done.stderr
    for path in tmp_path.rglob("*"):
        # A bundle stores its files as they are.
        assert not path.is_file() or b"planted-" not in path.read_bytes(), path

    there = bundle.parent
    arguments = ("verify", "mini.zip", "--data", "builtin:sklearn_digits", "--certificate")
    other = {"LC_ALL": "C", "TZ": "Asia/Tokyo", "TMPDIR": str(there)}
    done = call_command_line(*arguments, folder=there, env=other)
    assert done.returncode == 0, done.stderr
    assert "4 numbers of k-NN repeated, all equal" in done.stdout
    assert "level 2 of 4: evaluation repeated" in done.stdout
    # What was repeated is gone (torch keeps a cache there).
    assert not list(there.glob("mugs-verify-*"))
    assert (there / "mini.certificate.svg").is_file()
