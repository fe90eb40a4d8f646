"""`tables` as a user meets it: the same bytes anywhere, origins of cells,
comparison of run roots, refusals.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from results.collect import CollectedResults
from results.explain import explain_cell
from results.runs import run_from_entry
from results.schema import Result, ResultRow
from results.spec import OptionError, table_names
from stages.commands.tables import rename_settings

ROOT = Path(__file__).resolve().parents[3]
Cli = Callable[..., subprocess.CompletedProcess[str]]
PROVENANCE = {"git_sha": "c0ffee", "git_dirty": True, "versions": {"torch": "2.0"}}


@pytest.fixture
def cli(run_root: Any) -> Cli:
    """A command on the run root."""

    def call(
        *arguments: str, command: str = "tables", **env: str
    ) -> subprocess.CompletedProcess[str]:
        clean = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("SLURM", "MUGS", "LC_", "LANG"))
        }
        line = [
            sys.executable,
            str(ROOT / "run_stage.py"),
            command,
            "--run-root",
            str(run_root.path),
            *arguments,
        ]
        return subprocess.run(
            line, env=clean | env, capture_output=True, text=True, timeout=60, encoding="utf-8"
        )

    return call


@pytest.fixture
def filled(run_root: Any, row: ResultRow, pretraining: dict[str, Any]) -> Any:
    """A data set, a pretraining, and its k-NN of two settings."""
    root = run_root
    config = {**pretraining, "epochs": 800, "weight_decay": [0.0, 0.0]}
    teacher = {
        "teacher": {"path": "pretrain/pretrain-pre/teacher.safetensors", "size": 1, "sha256": ""}
    }
    notes = ["train: 22 images: CMYK, made RGB"]
    root.add("data", "convert", info={"dataset": "imagenet1k", "notes": notes})
    facts = {"gpu_hours": 12.5, "provenance": PROVENANCE, "outputs": teacher}
    root.add("pre", "pretrain", upstream={"data": "data"}, config=config, **facts)
    (root.path / teacher["teacher"]["path"]).write_text("w")
    rows = [row, replace(row, setting="cls, k=10, T=0.07", value=74.0)]
    root.add(
        "abc",
        "knn",
        rows,
        upstream={"data": "data", "weights": "pre"},
        config={"weights": "teacher"},
    )
    return root


@pytest.mark.slow
def test_the_same_bytes_in_any_locale_time_zone_and_hash_seed(
    cli: Cli, filled: Any, tmp_path: Path
) -> None:
    outputs = []
    places = (
        {"LC_ALL": "C", "TZ": "UTC", "PYTHONHASHSEED": "1"},
        {"LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Tokyo"},
    )
    for number, env in enumerate(
        (*places, {"LC_ALL": "de_DE.ISO-8859-1", "PYTHONHASHSEED": "77", "PYTHONUTF8": "0"})
    ):
        done = cli("--out", str(tmp_path / str(number)), **env)
        assert done.returncode == 0, done.stderr
        outputs.append(
            {path.name: path.read_bytes() for path in sorted((tmp_path / str(number)).iterdir())}
        )
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(outputs[0]) == 3 * len(table_names())  # Markdown, LaTeX, CSV
    assert b"75.1" in outputs[0]["table1.md"]
    assert [line[:12] for line in cli("--filled").stdout.splitlines() if line.startswith("###")][
        :1
    ] == ["### Table 1:"]
    assert (
        cli("--filled").stdout.count("\n### ") == 1
    )  # and Table 9, whose multi-crop line is the same run


def test_a_cell_is_traced_to_its_upstream_runs(cli: Cli, filled: Any) -> None:
    text = cli("--explain", "table1", "mugs vit-s/16 3200", "k-nn").stdout
    for words in (
        "table1, Mugs ViT-S/16, 3200 epochs, ours (",
        "), k-NN: 75.1 (paper 75.6, -0.5)",
        "differs from the released recipe: pretrain.weight_decay=[0, 0] (recipe: [0.04, 0.1])",
        "setting: cls, k=20, T=0.05",
        "seed 0: 75.1 %, knn/knn-abc/rows.csv, line 2",
        "checkpoint: pretrain/pretrain-pre/teacher.safetensors",
        "run pre  pretrain",
        "code: c0ffee, with uncommitted changes",
        "cost: 12.5 GPU-hours",
        "mugs.drop_path: 0.1",
        "run data  convert",
        "note: train: 22 images: CMYK, made RGB",
    ):
        assert words in text, (words, text)


def test_explain_has_the_names_that_settings_have_today() -> None:
    record = {"views": {"weak_only": True}, "max_images_per_step": 8, "of_other_code": 1}
    entry = {"stage": "pretrain", "name": "p", "run_id": "a", "config": record}
    named = rename_settings(run_from_entry(entry))
    assert named["micro_batch_size"] == 8 and named["of_other_code"] == 1
    assert "weak_only" not in named["views"]
    # Made from stored features, whose size is that of their own run.
    made = {"stage": "knn", "config": {"crop": 224, "ks": [20]}, "upstream": {"features": "f"}}
    assert rename_settings(run_from_entry(entry | made)) == {"ks": [20]}
    made["upstream"] = {"data": "d", "weights": "w"}
    assert rename_settings(run_from_entry(entry | made)) == made["config"]
    entry["stage"] = "of_other_code"
    assert rename_settings(run_from_entry(entry)) == record


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("table1", "mugs", "linear"),
            "no cell of ours in a column 'linear' (columns with one: k-NN)",
        ),
        (
            ("table1", "dino", "k-nn"),
            "no row of ours with a result has the words 'dino', of these:",
        ),
        (("table11", "mugs", "k-nn"), "--explain table11: expected one of"),
    ],
)
def test_what_cannot_be_explained_is_told(
    cli: Cli, filled: Any, arguments: tuple[str, ...], words: str
) -> None:
    done = cli("--explain", *arguments)
    assert done.returncode == 2 and words in done.stderr, done.stderr


def test_the_same_line_in_two_groups_is_told_apart(results: Callable[..., list[Result]]) -> None:
    (strong,) = results({"epochs": 100, "stage": "linear", "setting": "best epoch", "value": 76.0})
    weak = replace(
        strong, row=replace(strong.row, run_id="w", value=75.0), variant="weak augmentation"
    )
    both = CollectedResults((strong, weak))
    assert "Linear: 75.0 (paper 75.7, -0.7)" in explain_cell(both, "table8", "weak mugs", "linear")
    with pytest.raises(
        OptionError, match=r"(?s)several rows of ours .*weak: Mugs ViT-S/16.*strong: Mugs ViT-S/16"
    ):
        explain_cell(both, "table8", "mugs", "linear")


@pytest.mark.parametrize("given", ["mugs", "dino", "mugs vit-mini", "no such row"])
def test_the_example_of_an_error_explains_a_cell(
    results: Callable[..., list[Result]], given: str
) -> None:
    facts = {"arch": "vit_mini", "dataset": "sklearn_digits"}
    untrained = "mugs (initialisation)"
    found = results(
        {**facts, "epochs": 24, "method": "mugs"},
        {**facts, "epochs": 24, "method": untrained, "run_id": "u"},
        {**facts, "epochs": 12, "method": "mugs", "run_id": "w"},
    )
    collection = CollectedResults(tuple(found))
    with pytest.raises(OptionError) as error:
        explain_cell(collection, "table1", given, "k-nn")
    command, table, words, column = shlex.split(str(error.value).rpartition("\ne.g. ")[2])
    assert command == "--explain" and len(words.split()) == 2
    assert explain_cell(collection, table, words, column).startswith("table1, Mugs ")


@pytest.mark.parametrize("command", ["tables", "figures"])
def test_conflicts_are_left_out_and_name_both_lines(
    cli: Cli, filled: Any, row: ResultRow, tmp_path: Path, command: str
) -> None:
    filled.add("def", "knn", [replace(row, run_id="def", value=70.0)], upstream={"weights": "pre"})
    done = cli(*(["--out", str(tmp_path / "f")] if command == "figures" else []), command=command)
    assert done.returncode == 1
    assert (
        "left out: knn/knn-abc/rows.csv, line 2: 75.1 of run abc; knn/knn-def/rows.csv, line 2: 70"
        in done.stderr
    )
    # The other setting of the same run is still there.
    assert command == "figures" or "run abc; cls, k=10, T=0.07" in done.stdout


def test_a_conflict_is_not_published(cli: Cli, filled: Any, row: ResultRow, tmp_path: Path) -> None:
    filled.add("def", "knn", [replace(row, run_id="def", value=70.0)], upstream={"weights": "pre"})
    done = cli("--publish", str(tmp_path / "published"))
    assert done.returncode == 2 and not (tmp_path / "published").exists()


BATCHES = {"a": (0, 64, 15.0), "b": (1, 256, 22.0), "c": (2, 256, 23.0)}


@pytest.mark.parametrize("epochs", [800, 17])
def test_only_runs_that_are_equal_but_for_the_seed_are_averaged(
    cli: Cli, run_root: Any, row: ResultRow, pretraining: dict[str, Any], epochs: int
) -> None:
    for name, (seed, batch, value) in BATCHES.items():
        config = {**pretraining, "epochs": epochs, "batch_size": batch, "seed": seed}
        run_root.add(f"p{name}", "pretrain", config=config)
        mine = replace(row, run_id=name, seed=seed, value=value, epochs=epochs)
        run_root.add(name, "knn", [mine], upstream={"weights": f"p{name}"})
    done = cli("--table", "table1")
    assert done.returncode == 0
    assert "15.0" in done.stdout and "22.5 ± 0.7 (n=2)" in done.stdout
    assert r"pretrain.batch\_size=64" in done.stdout and r"pretrain.batch\_size=256" in done.stdout


def test_evaluations_with_the_same_setting_in_words_are_not_averaged(
    cli: Cli, run_root: Any, row: ResultRow, pretraining: dict[str, Any]
) -> None:
    for seed, (name, threshold) in enumerate({"a": 0.1, "b": 0.2}.items()):
        config = {**pretraining, "epochs": 17, "seed": seed}
        run_root.add(f"p{name}", "pretrain", config=config)
        mine = replace(row, run_id=name, seed=seed, value=60.0 + seed, epochs=17)
        run_root.add(
            name, "knn", [mine], upstream={"weights": f"p{name}"}, config={"threshold": threshold}
        )
    shown = cli("--table", "table1").stdout
    assert "60.0" in shown and "61.0" in shown and "n=2" not in shown


def test_a_number_that_went_through_two_versions_of_the_code_says_so(
    cli: Cli, filled: Any, row: ResultRow, pretraining: dict[str, Any]
) -> None:
    earlier = [{"attempt": 1, **PROVENANCE, "git_sha": "0ld", "snapshot": None}]
    facts = {**PROVENANCE, "snapshot": "5a7", "earlier": earlier}
    filled.add("p2", "pretrain", config={**pretraining, "epochs": 300}, provenance=facts)
    mine = replace(row, run_id="k", value=70.0, epochs=300)
    filled.add("k", "knn", [mine], upstream={"weights": "p2"})
    shown = cli("--table", "table1").stdout
    assert shown.count("more than one version of the code: k") == 1
    explained = cli("--explain", "table1", "mugs vit-s/16 1200", "k-nn").stdout
    assert "code: c0ffee, with uncommitted changes\n" in explained
    assert "code of attempt 1: 0ld, with uncommitted changes, packages torch 2.0" in explained


def test_a_variant_of_ones_own_has_rows_of_its_name(
    cli: Cli, filled: Any, row: ResultRow, pretraining: dict[str, Any]
) -> None:
    config = {**pretraining, "epochs": 800, "weight_decay": [0.0, 0.0], "variant": "my idea"}
    filled.add("own", "pretrain", config=config)
    filled.add("k", "knn", [replace(row, run_id="k", value=55.5)], upstream={"weights": "own"})
    done = cli("--table", "table1")
    assert done.returncode == 0, done.stderr
    assert "(my idea)" in done.stdout and "55.5" in done.stdout and "75.1" in done.stdout


def test_filled_says_when_there_is_nothing(cli: Cli, run_root: Any) -> None:
    run_root.path.mkdir(exist_ok=True)
    done = cli("--filled")
    assert (done.returncode, done.stdout) == (
        0,
        "",
    ) and "no table has a result of ours" in done.stderr
    # Perhaps a --set is missing.
    (run_root.path / "knn" / "knn-0123456789ab").mkdir(parents=True)
    words = "knn not begun with these settings"
    assert words in cli("mini", "--filled").stderr and words not in cli("--filled").stderr


def test_unknown_names_are_told_on_stderr(cli: Cli, filled: Any, row: ResultRow) -> None:
    filled.add("odd", "knn", [replace(row, run_id="odd", stage="guess")])
    done = cli("--table", "table1")
    assert done.returncode == 0 and "75.1" in done.stdout
    assert (
        "in no table of the paper: knn/knn-odd/rows.csv, line 2: unknown stage 'guess'"
        in done.stderr
    )


def test_run_roots_are_compared_cell_by_cell(
    cli: Cli, filled: Any, row: ResultRow, tmp_path: Path
) -> None:
    other = type(filled)(tmp_path / "other")
    other.add("new", "knn", [replace(row, run_id="new", value=74.6)])
    other.add(
        "lin",
        "linear",
        [replace(row, run_id="lin", stage="linear", setting="best epoch", value=78.0)],
    )
    text = cli("--against", str(other.path), "--table", "table1").stdout
    assert "3 cells: 0 equal, 0 different, 3 in one only." in text  # other settings here than there
    assert (
        "1 equal, 0 different, 0 in one only."
        in cli("--against", str(filled.path), "--table", "table1").stdout
    )


def test_a_published_folder_is_compared_with_too(cli: Cli, filled: Any, tmp_path: Path) -> None:
    assert cli("--publish", str(tmp_path / "kept")).returncode == 0
    assert (
        "1 equal, 0 different, 0 in one only."
        in cli("--against", str(tmp_path / "kept"), "--table", "table1").stdout
    )
    done = cli("--against", str(tmp_path / "gone"))
    assert done.returncode == 2 and "there is no such folder" in done.stderr
    # A folder above the one that is meant would compare every number with none.
    (tmp_path / "above").mkdir()
    done = cli("--against", str(tmp_path / "above"))
    assert done.returncode == 2 and "no results of these runs are there" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--out", "x", "--against", "y"), "--out and --against cannot be combined"),
        (("--publish", "x", "--table", "table1"), "--table cannot be combined with --publish"),
        (("--publish", "x", "--filled"), "--filled cannot be combined with --publish"),
        (("--out", "x", "--format", "md"), "--format cannot be combined with --out"),
    ],
)
def test_options_that_do_not_go_together(cli: Cli, arguments: tuple[str, ...], words: str) -> None:
    done = cli(*arguments)
    assert done.returncode == 2 and words in done.stderr


def test_report_and_figures_are_written(
    cli: Cli, filled: Any, row: ResultRow, tmp_path: Path
) -> None:
    filled.add("bad", "knn", [replace(row, run_id="bad", value=500.0)])
    done = cli(command="report")
    assert done.returncode == 0, done.stderr
    assert "refused: knn/knn-bad/rows.csv, line 2: value 500" in done.stderr
    assert "75.1" in (filled.path / "report.html").read_text(encoding="utf-8")
    failed = cli("--out", str(tmp_path / "figures"), command="figures")
    assert failed.returncode == 1 and "rows.csv, line 2" in failed.stderr
    (filled.path / "manifest/bad.json").unlink()
    assert cli("--out", str(tmp_path / "figures"), command="figures").returncode == 0
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "figure2.png",
        "figure2.svg",
    ]


def test_a_run_root_that_does_not_exist_is_refused(cli: Cli, tmp_path: Path) -> None:
    done = cli("--run-root", str(tmp_path / "typo"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: run root {tmp_path / 'typo'}: there is no such folder;")


def test_nothing_heavy_is_imported(filled: Any) -> None:
    code = (
        f"import sys\nsys.argv = ['run_stage.py', 'tables', '--run-root', {str(filled.path)!r}]\n"
        "import run_stage\n"
        "try:\n    run_stage.main()\n"
        "except SystemExit as done:\n    assert not done.code, done.code\n"
        "heavy = {'torch', 'pandas', 'numpy', 'submitit', 'matplotlib', 'jinja2'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
