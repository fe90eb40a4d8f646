"""The command line as a user meets it: in a process of its own, its output piped."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from commands import call_command_line, write_commands
from typer.testing import CliRunner

import run_stage
from pipeline.findings import wrong
from pipeline.manifest import ManifestEntry, SplitRuns
from pipeline.spec import ConfigError, Resources, StageConfig, StageRun
from slurm import console
from slurm.facts import describe_findings, describe_submissions
from slurm.submission.submit import Submission
from stages.commands.reproduction import all_runs

ROOT = Path(__file__).resolve().parents[2]
Cli = Callable[..., subprocess.CompletedProcess[str]]
YAML = """
name: small
runs:
  digits: {stage: convert, dataset: mine, num_classes: 10}
  knn: {stage: knn, needs: {data: digits}}
"""


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run the command line with a run root of its own."""
    (tmp_path / "runs").mkdir()
    return partial(call_command_line, folder=tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["plan", "--help"],
        ["plan", "mini"],
        ["plan", "paper"],
        ["plan", "paper", "--graph", "text"],
        ["status", "mini"],
        ["verify", "mini"],
    ],
)
def test_nothing_heavy_is_imported(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys, atexit\n"
        f"sys.argv = ['run_stage.py', *{arguments!r}]\n"
        "import run_stage\n"
        "try:\n    run_stage.main()\n"
        "except SystemExit as done:\n    assert not done.code, done.code\n"
        "heavy = {'torch', 'pandas', 'numpy', 'submitit'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "MUGS_RUN_ROOT": str(tmp_path), "PATH": "/nowhere"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_help_lists_the_commands(cli: Cli) -> None:
    shown = cli("--help")
    assert shown.returncode == 0
    assert all(
        word in shown.stdout for word in ("plan", "submit", "run", "status", "tables", "verify")
    )


def test_plan_is_plain_when_piped(cli: Cli, tmp_path: Path) -> None:
    shown = cli("plan", "mini")
    assert shown.returncode == 0, shown.stderr
    assert "\x1b" not in shown.stdout and not re.search("[─│┃]", shown.stdout)
    header, *lines = shown.stdout.splitlines()
    assert " ".join(header.split()) == "run stage state nodes GPUs hours GPU-hours run id"
    assert re.search(
        r"^pretrain +pretrain +not done +1 +0 +[\d.]+ +0 +[0-9a-f]{12}$", shown.stdout, re.M
    )
    assert lines.pop().startswith("predicted: 0 GPU-hours, ")
    left = f"{len(lines) - 1} not done, 0 GPU-hours if each run takes all of its hours"
    assert lines[-1] == f"0 done, {left}, in {tmp_path / 'runs'}"


def test_plan_sums_the_gpu_hours_of_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    def run(name: str, **resources: float) -> StageRun:
        return StageRun("knn", name, name * 12, StageConfig(), {}, Resources(**resources), "x:y")

    runs = [run("a", nodes=2, ranks_per_node=3, hours=1.5), run("b", hours=8), run("c", gpu=False)]
    runs.append(run("d", ranks_per_node=4, hours=0.25))
    # What a conversion counted is shown once it is done.
    notes = ["train: 22 images: CMYK, made RGB", "val: 3 files that are no images: .txt"]
    done = ManifestEntry(stage="knn", name="b", run_id="b" * 12, info={"notes": notes})
    split = SplitRuns(done={done.run_id: done}, pending=[runs[0], *runs[2:]])
    console.show_plan(runs, split, Path("/r"), ["advice"])
    rows = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert [row[2:7] for row in rows[1:5]] == [
        ["not done", "2", "6", "1.5", "9"],
        ["done", "1", "1", "8", "8"],
        ["not done", "1", "0", f"{Resources().hours:g}", "0"],
        ["not done", "1", "4", "0.25", "1"],
    ]
    assert " ".join(rows[5]) == (
        "1 done, 3 not done, 10 GPU-hours if each run takes all of its hours, in /r"
    )
    assert rows[6:] == [*([f"b: {note}"] for note in notes), ["advice"]]


def test_user_errors_are_one_line_and_exit_code_2(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(YAML.replace("needs", "neds"))
    cases = {
        ("plan", "bad.yaml"): "did you mean 'needs'",
        ("plan", "no_such"): "no reproduction 'no_such'",
        ("plan", "mini", "--cluster", "no_such"): "no cluster profile 'no_such'",
        ("plan", "mini", "--set", "pretrain.epoch=3"): "did you mean 'epochs'",
        ("run", "mini", "--only", "nothing"): "nothing: no such run or stage",
        ("tables", "--table", "table99"): "--table table99: expected one of",
    }
    for arguments, words in cases.items():
        done = cli(*arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert words in done.stderr, done.stderr


def test_usage_errors_exit_with_2(cli: Cli) -> None:
    assert cli("plan").returncode == 2 and cli("no-such-command").returncode == 2
    assert cli("tables", "--format", "pdf").returncode == 2
    assert "give --deep as well" in cli("verify", "mini", "--every", "2").stderr
    assert "name the REPRODUCTION" in cli("tables", "--set", "pretrain.epochs=3").stderr


def test_run_root_inside_the_checkout_is_refused(cli: Cli) -> None:
    done = cli("plan", "mini", env={"MUGS_RUN_ROOT": str(ROOT / "runs")})
    assert done.returncode == 2 and "inside the checkout" in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "status mini", "status --json", "status --watch", "logs mini knn", "cancel mini",
        "tables", "tables mini --explain table1 mugs k-nn", "tables --publish x", "report",
        "figures --out x", "bundle mini", "verify mini", "diagnose mini knn", "clean mini",
        "sink mini --to tensorboard --out x", "notify mini",
    ],
)  # fmt: skip
def test_a_run_root_that_does_not_exist_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """A mistyped one would look like one in which nothing was run, or in which all is well."""
    monkeypatch.setenv("MUGS_WEBHOOK", "http://127.0.0.1:9/")
    monkeypatch.chdir(tmp_path)
    missing = tmp_path / "typo"
    done = CliRunner().invoke(run_stage.app, [*line.split(), "--run-root", str(missing)])
    assert isinstance(done.exception, ConfigError), (done.exception, done.output)
    assert str(done.exception).startswith(f"run root {missing}: there is no such folder; ")
    assert not list(tmp_path.iterdir())


def test_an_export_from_a_run_root_that_does_not_exist_names_it(tmp_path: Path) -> None:
    """RUN may also be a file, or a folder of another run root."""
    call = ["export", "pretrain", "--out", "x.pth", "--run-root", str(tmp_path / "typo")]
    done = CliRunner().invoke(run_stage.app, call)
    assert isinstance(done.exception, ConfigError)
    assert f"neither a file nor a finished run in {tmp_path / 'typo'}" in str(done.exception)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("status mini", "waiting"),
        ("status", "0 runs"),
        ("tables", "Table 1"),
        ("report", "report.html"),
        ("verify mini", "0 of "),
    ],
)
def test_before_the_first_run_there_is_nothing_to_refuse(
    tmp_path: Path, line: str, words: str
) -> None:
    done = CliRunner().invoke(run_stage.app, [*line.split(), "--run-root", str(tmp_path)])
    assert done.exit_code == 0, (done.exception, done.output)
    assert words in done.stdout and "failed" not in done.stdout


def test_plan_needs_no_run_root_yet(tmp_path: Path) -> None:
    call = ["plan", "mini", "--skip-data-checks", "--run-root", str(tmp_path / "new")]
    assert CliRunner().invoke(run_stage.app, call).exit_code == 0
    assert not (tmp_path / "new").exists()


def documented_keys(command: str) -> set[str]:
    """The keys that AGENTS.md names for `COMMAND --json`."""
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| `{command} --json` \|(.+)\|$", text, re.MULTILINE)
    assert row is not None
    return set(re.findall(r"`(\w+)`", row[1]))


def test_plan_for_programs(cli: Cli) -> None:
    facts = json.loads(cli("plan", "mini", "--json", "--skip-data-checks").stdout)
    assert set(facts) | set(facts["runs"][0]) == documented_keys("plan")
    pretrain = next(run for run in facts["runs"] if run["run"] == "pretrain")
    digits = next(run for run in facts["runs"] if run["run"] == "digits")
    assert pretrain["needs"] == {"data": digits["run_id"]} and pretrain["state"] == "not done"
    assert facts["done"] == 0 and facts["not_done"] == len(facts["runs"])
    assert facts["problems"] == []


def test_facts_for_programs_are_those_of_the_documentation() -> None:
    run = all_runs("mini")[0]
    made = describe_submissions([Submission(run, "submitted", "7", "c0de")], "8")
    assert made["keeper"] == "8" and made["runs"][0]["job_id"] == "7"
    actions = {"done", "queued", "submitted", "skipped", "deferred"}
    assert set(made) | set(made["runs"][0]) | actions == documented_keys("submit")
    (found,) = describe_findings([wrong("disk", "full", "make room")])
    assert found["remedy"] == "make room"
    assert set(found) | {"ok", "wrong", "skipped"} == documented_keys("doctor")


def test_submit_without_slurm_is_explained(cli: Cli, tmp_path: Path) -> None:
    profile = tmp_path / "c.yaml"
    profile.write_text(f"run_root: {tmp_path}/runs\n")
    done = cli("submit", "mini", "--cluster", str(profile), env={"PATH": "/nowhere"})
    assert done.returncode == 2 and "squeue: not found" in done.stderr, done.stderr


@pytest.fixture
def fake_slurm(tmp_path: Path, cli: Cli) -> dict[str, str]:
    """Slurm's commands as scripts: `squeue` prints the file `queue`,
    `scancel` notes what it was given.
    """
    ids = {run["run"]: run["run_id"] for run in json.loads(cli("status", "mini", "--json").stdout)}
    me = os.geteuid()
    jobs = {"11": ids["pretrain"], "12": ids["knn"], "13": "somebodyelses"}
    lines = [
        f"{job}|mugs-{run}|RUNNING|None|(null)|{me}|(null)|(null)\n" for job, run in jobs.items()
    ]
    elsewhere = (
        f"14|mugs-{ids['knn']}|RUNNING|None|(null)|{me}|"
        f"/other/runs/knn/knn-{ids['knn']}/submission.sh|(null)\n"
    )
    (tmp_path / "queue").write_text("".join([*lines, elsewhere]))
    commands = {
        "squeue": f"cat {tmp_path}/queue",
        "sbatch": "exit 1",
        "scancel": f'echo "$@" >> {tmp_path}/cancelled',
    }
    return {"PATH": write_commands(tmp_path / "bin", **commands)}


def test_cancel_ends_the_jobs_of_the_reproduction_only(
    cli: Cli, fake_slurm: dict[str, str], tmp_path: Path
) -> None:
    done = cli("cancel", "mini", "--only", "linear", env=fake_slurm)
    assert done.stdout.startswith("canceled no job: none of these runs has one in /")
    assert not (tmp_path / "cancelled").exists()
    root = ["--run-root", str(tmp_path / "runs")]
    assert (
        cli("cancel", "mini", "--now", "--only", "knn", *root, env=fake_slurm).stdout
        == "canceled 1 job: 12\n"
    )
    assert cli("cancel", "mini", "--now", env=fake_slurm).stdout == "canceled 2 jobs: 11 12\n"
    assert (tmp_path / "cancelled").read_text() == "12\n11 12\n"


def test_cancel_without_slurm_or_with_one_that_refuses(
    cli: Cli, fake_slurm: dict[str, str], tmp_path: Path
) -> None:
    done = cli("cancel", "mini", env={"PATH": "/nowhere"})
    assert done.returncode == 2 and "squeue: not found" in done.stderr
    write_commands(tmp_path / "bin", scancel="echo 'scancel: error: Access denied' >&2; exit 1")
    done = cli("cancel", "mini", "--now", env=fake_slurm)
    assert done.returncode == 2 and "Access denied" in done.stderr and "canceled" not in done.stdout


def test_explain_names_what_a_profile_decides(cli: Cli, tmp_path: Path) -> None:
    """CPUs of a profile are those of ranks with GPUs, and those of a stage count more."""
    (tmp_path / "own.yaml").write_text(
        f"run_root: {tmp_path}/runs\ncpus_per_rank: 9\nstages: {{knn: {{cpus_per_rank: 7}}}}\n"
    )
    for run, cpus in (("pretrain", r"[0-8]  .*"), ("knn", "7  .*own.yaml")):
        done = cli("plan", "mini", "--cluster", "own.yaml", "--explain", run)
        assert re.search(rf"resources\.cpus_per_rank +{cpus}", done.stdout), done.stdout


def test_logs_shows_the_end_of_the_newest_attempt(cli: Cli, tmp_path: Path) -> None:
    assert cli("logs", "mini", "digits").stdout == "==> digits: no log yet\n"
    (run,) = json.loads(cli("status", "mini", "--only", "digits", "--json").stdout)
    folder = tmp_path / "runs/convert" / f"digits-{run['run_id']}" / "logs"
    folder.mkdir(parents=True)
    for attempt in (1, 2):
        path = folder / f"attempt_{attempt:04d}_rank0.log"
        path.write_text("".join(f"attempt {attempt}, line {i}\n" for i in range(100)))
        os.utime(path, (1e9 + attempt, 1e9 + attempt))
    assert (
        cli("logs", "mini", "digits", "--lines", "2").stdout
        == f"==> {path}\nattempt 2, line 98\nattempt 2, line 99\n"
    )
    done = cli("logs", "mini", "digit")
    assert done.returncode == 2 and "did you mean 'digits'" in done.stderr


def test_trace_steps_reach_the_pretraining_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, StageRun] = {}

    def note(runs: list[StageRun], *_: object, **__: object) -> list[object]:
        seen.update((run.name, run) for run in runs)
        return []

    monkeypatch.setattr("slurm.local.executor.run_locally", note)
    call = CliRunner().invoke
    root = ["--run-root", str(tmp_path / "runs")]
    assert call(run_stage.app, ["run", "mini", *root]).exit_code == 0
    plain = dict(seen)
    assert call(run_stage.app, ["run", "mini", "--trace-steps", "3", *root]).exit_code == 0
    assert seen["pretrain"].config.trace_steps == 3
    assert {name: run.run_id for name, run in seen.items()} == {
        name: run.run_id for name, run in plain.items()
    }
    assert seen["knn"] == plain["knn"]
    refused = call(run_stage.app, ["run", "mini", "--only", "digits", "--profile", "3", *root])
    assert isinstance(refused.exception, ConfigError)
    assert "none of the selected runs can be traced" in str(refused.exception)


@pytest.mark.parametrize(
    "arguments",
    [
        "logs mini digits --lines 0",
        "run mini --ranks 0",
        "run mini --trace-steps -1",
        "verify mini --deep --every 0",
    ],
)
def test_numbers_out_of_bounds_are_refused(arguments: str) -> None:
    refused = CliRunner().invoke(run_stage.app, arguments.split())
    assert refused.exit_code == 2 and "Invalid value for '--" in refused.output


def test_old_option_names_work_and_are_not_listed(cli: Cli) -> None:
    assert (
        cli("plan", "mini", "--unseen").stdout == cli("plan", "mini", "--skip-data-checks").stdout
    )
    assert (
        "--trace-steps: none of the selected runs can be traced"
        in cli("run", "mini", "--only", "digits", "--profile", "3").stderr
    )
    for command in ("plan", "doctor", "submit", "run"):
        shown = cli(command, "--help").stdout
        assert "--unseen" not in shown and "--profile" not in shown
