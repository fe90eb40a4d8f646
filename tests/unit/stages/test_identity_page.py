"""docs/identity.md: each line of its table is true."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_reproduction
from pipeline.manifest import ManifestEntry
from pipeline.plan import build_plan
from pipeline.settings import Mark, Settings, setting_fields
from stages import STAGES
from stages.commands import reproduction
from stages.commands.reproduction import all_runs

PAGE = Path(__file__).parents[3] / "docs" / "identity.md"
ROWS = dict(re.findall(r"^\| (.+?) \| (yes|no) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
BASE = "mugs_vit_s16_ep100"
HASH = "0" * 64

# Of each line: reproduction, run, and an override that changes only what the line is about.
CHANGES: dict[str, tuple[str, str, str]] = {
    "Setting of a stage, at whatever value": (BASE, "pretrain", "pretrain.min_lr=2e-6"),
    "Setting marked `Added`, at its default": (BASE, "pretrain", "pretrain.decay=matrices"),
    "Setting marked `Added`, at another value": (BASE, "pretrain", "pretrain.decay=all"),
    "Setting marked `Runtime`": (BASE, "pretrain", "pretrain.threads=3"),
    "Setting by a former name": (BASE, "pretrain", "pretrain.views.student_coin=released"),
    "`variant`": (BASE, "pretrain", "pretrain.variant=mine"),
    "Epoch, as steps": (BASE, "pretrain", "imagenet.num_train_images=2000000"),
    "`seed`, also by `--seeds` or `seeds`": (BASE, "pretrain", "pretrain.seed=1"),
    "Run that fills a role": (BASE, "knn", "pretrain.seed=1"),
    "Path of data, lists and weights (`InputPath`, `RequiredAtRun`)": (
        BASE, "imagenet", "imagenet.train_dir=/elsewhere",
    ),
    "Content of a list or weights file": ("evaluate_released", "import", "import.file=/other.pth"),
    "SHA-256 of weights, if `sha256` is set": (
        "evaluate_released", "import", f"import.sha256='{HASH}'",
    ),
    "Number of images and classes, if set": (BASE, "imagenet", "imagenet.num_classes=999"),
    "`resources`: nodes, ranks, hours": (BASE, "pretrain", "pretrain.resources.nodes=2"),
}  # fmt: skip
# Lines that no override of a run can show; the tests that do.
ELSEWHERE = {
    "Content of a folder": "test_another_input_is_told",
    "Setting marked `Internal`": "test_no_setting_of_code_is_in_yaml",
    "Setting of a method that is not chosen": "test_settings_of_other_methods_are_refused",
    "Setting without effect at the values of others": "test_windows_of_whole_images_are_refused",
    "`MUGS_TF32` and other environment variables": "test_only_named_variables_are_kept",
    "Cluster profile": "test_a_run_knows_no_profile",
    "Version of the code and of packages": "test_every_version_of_the_code_is_kept",
    "Name of the run, description of the reproduction": "test_names_are_no_identity",
}


def plan_id(reproduction: str, name: str, *overrides: str) -> str:
    runs = build_plan(load_reproduction(reproduction, STAGES, overrides))
    if name == "import":
        return next(run.run_id for run in runs if run.stage == "import")
    return next(run.run_id for run in runs if run.name == name)


def test_the_page_has_these_lines() -> None:
    assert ROWS.keys() == CHANGES.keys() | ELSEWHERE.keys()
    tests = "\n".join(p.read_text() for p in PAGE.parents[1].glob("tests/**/test_*.py"))
    assert all(f"def {test}(" in tests for test in ELSEWHERE.values())


@pytest.mark.parametrize("line", CHANGES)
def test_each_line_is_true(line: str) -> None:
    reproduction, name, override = CHANGES[line]
    if name == "import":
        first = next(
            run.name
            for run in build_plan(load_reproduction(reproduction, STAGES))
            if run.stage == "import"
        )
        override = override.replace("import.", f"{first}.", 1)
    changed = plan_id(reproduction, name) != plan_id(reproduction, name, override)
    assert changed == (ROWS[line] == "yes")


def test_no_setting_of_code_is_in_yaml() -> None:
    def walk(cls: type[Settings]) -> Any:
        for field in setting_fields(cls).values():
            yield field
            if field.nested is not None:
                yield from walk(field.nested)

    fields = [field for spec in STAGES.values() for field in walk(spec.config)]
    assert fields and not any(Mark.INTERNAL in field.marks for field in fields)


def test_settings_of_other_methods_are_refused() -> None:
    config: Any = load_reproduction(BASE, STAGES).runs["pretrain"].config
    for other in config.unused_settings():
        changed = replace(getattr(config, other), drop_path=0.5)
        with pytest.raises(ValueError, match="method that is not chosen"):
            replace(config, **{other: changed})


def test_a_run_knows_no_profile() -> None:
    (run,) = [r for r in build_plan(load_reproduction(BASE, STAGES)) if r.name == "pretrain"]
    assert not hasattr(run, "profile") and "profile" not in setting_fields(type(run.config))


@pytest.mark.parametrize(("recorded", "lines"), [({}, 1), ({"variant": "mine"}, 0)])
def test_another_variant_of_a_finished_run_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recorded: dict[str, str], lines: int
) -> None:
    """Its rows have the name that it was run with, whatever is asked for now."""
    (run,) = [r for r in all_runs(BASE, ["pretrain.variant=mine"]) if r.name == "pretrain"]
    entry = ManifestEntry(stage="pretrain", name="pretrain", run_id=run.run_id, config=recorded)
    monkeypatch.setattr(reproduction.manifest, "read_entry", lambda root, run_id: entry)
    told = reproduction.list_changed_inputs(reproduction.Selection([run], [run], tmp_path))
    assert len(told) == lines
    assert all("is done as variant ''" in line for line in told)


def test_names_are_no_identity(tmp_path: Path) -> None:
    ids = []
    for name in ("photos", "pictures"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            f"name: {name}\ndescription: of {name}\nruns:\n  {name}:\n    stage: convert\n"
            "    dataset: own\n    num_classes: 2\n"
        )
        ids.append(plan_id(str(path), name))
    assert ids[0] == ids[1]
