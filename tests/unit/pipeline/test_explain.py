"""What gave each setting its value: the last of default, recipe, file, --set and profile."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

import run_stage
from pipeline import config
from pipeline.explain import ExplainedSetting, explain_run
from pipeline.identity import science_fields
from pipeline.settings import Settings, setting_fields
from pipeline.spec import Resources
from slurm.submission.profile import ClusterProfile, find_profile_resources
from stages import STAGES
from stages.commands.explain import find_run, tabulate_settings
from stages.commands.reproduction import all_runs

YAML = """
name: mine
include: {BASE: [photos]}
runs:
  weights: {stage: import, arch: vit_s16, epochs: 100, file: /w.pth}
  first:
    like: [finetune/imagenet, finetune/imagenet_vit_s16]
    needs: {data: photos, weights: weights}
    head: {scale: 0.5}
    max_images_per_step: 64
    resources: {ranks_per_node: 4}
  second: {like: first, layer_decay: 0.75, workers: 3}
  probe: {stage: linear, needs: {data: photos, weights: weights}}
"""
BASE = """
name: base
runs:
  photos: {stage: convert, dataset: photos, num_classes: 3, train_dir: /t, val_dir: /v}
"""
FILE = "mine.yaml: runs."


@pytest.fixture
def reproduction(tmp_path: Path) -> str:
    (tmp_path / "base.yaml").write_text(BASE)
    path = tmp_path / "mine.yaml"
    path.write_text(YAML.replace("BASE", str(tmp_path / "base.yaml")))
    return str(path)


def explain(reproduction: str, name: str, *overrides: str) -> dict[str, ExplainedSetting]:
    run = find_run(reproduction, name, overrides)
    decided = {"memory_gb": (7, "cluster profile x")}
    return {line.name: line for line in explain_run(reproduction, STAGES, run, overrides, decided)}


@pytest.mark.parametrize(
    ("setting", "value", "source"),
    [
        ("stage", "finetune", "recipe finetune/imagenet"),
        ("batch_size", 1024, "recipe finetune/imagenet"),
        # The later of two recipes.
        ("layer_decay", 0.75, f"{FILE}second"),
        ("rate.base_lr", 0.0012, "recipe finetune/imagenet_vit_s16"),
        # Through a run that this one is like.
        ("head.scale", 0.5, f"{FILE}first"),
        ("head.kind", "linear", "recipe finetune/imagenet"),
        # Under its former name.
        ("micro_batch_size", 64, f"{FILE}first"),
        ("workers", 3, f"{FILE}second"),
        ("seed", 5, "command line (--set)"),
        ("rate.min_lr", 0.0, "command line (--set)"),
        # A mapping that is put over that of the recipe.
        ("images.size", 96, "command line (--set)"),
        ("images.resize", 256, "default"),
        ("images.erase_prob", 0.25, "recipe finetune/imagenet"),
        ("labelled", None, "default"),
        ("resources.ranks_per_node", 4, f"{FILE}first"),
        ("resources.hours", 2.0, "command line (--set)"),
        ("resources.max_failures", 3, "default"),
        ("resources.memory_gb", 7, "cluster profile x"),
    ],
)
def test_the_last_that_speaks_counts(
    reproduction: str, setting: str, value: object, source: str
) -> None:
    given = ("second.seed=5", "second.rate.min_lr=0", "second.images={size: 96}")
    found = explain(reproduction, "second", *given, "second.resources.hours=2")[setting]
    assert found.value == value
    assert found.source.endswith(source)


def test_what_follows_from_other_settings(reproduction: str) -> None:
    photos = explain(reproduction, "photos")
    assert (
        photos["root"].source == "filled in from other settings or the inputs"
        and photos["root"].value == ""
    )
    assert photos["train_dir"].source.endswith("base.yaml: runs.photos")
    assert photos["resources.hours"].source == "default of the stage convert"
    assert (
        explain(reproduction, "probe")["base_lr"].source
        == "filled in from other settings or the inputs"
    )


def test_a_recipe_by_set(reproduction: str) -> None:
    """It counts more than the file, and another --set more than it."""
    given = ("probe.like=linear/s300", "probe.epochs=7")
    found = explain(reproduction, "probe", *given)
    assert found["base_lr"].source == "recipe linear/s300"
    assert found["epochs"].source == "command line (--set)"
    assert found["needs.data"].source.endswith(f"{FILE}probe")


def list_names(settings: Settings, prefix: str = "") -> list[str]:
    names = []
    for field in setting_fields(type(settings)).values():
        value = getattr(settings, field.name)
        if field.name in settings.unused_settings():
            continue
        if isinstance(value, Settings):
            names += list_names(value, f"{prefix}{field.name}.")
        else:
            names.append(f"{prefix}{field.name}")
    return names


@pytest.mark.parametrize("name", ["mini", "mugs_vit_l16_ep250", "mugs_vit_s16_ep800_transfer"])
def test_every_setting_of_every_run(name: str) -> None:
    """Each has a line; whatever nothing gave has its default; "in run id" is what the id has."""
    for run in all_runs(name):
        lines = explain_run(name, STAGES, run)
        settings = [line for line in lines if not line.name.startswith(("needs.", "resources."))]
        assert [line.name for line in settings] == ["stage", *list_names(run.config)]
        flat = {f"needs.{role}" for role in run.needs} | {"stage"}
        assert {line.name for line in lines if line.in_run_id} >= flat
        identity = science_fields(run.config)
        for line in settings[1:]:
            first = setting_fields(type(run.config))[line.name.partition(".")[0]]
            assert not line.in_run_id or first.record_name in identity, line
            if line.source == "default" and first.nested is None:
                assert line.value == first.default, line
    assert config.list_recipe_files()


def test_the_command(reproduction: str, tmp_path: Path) -> None:
    """A plain table, with what the profile decides; --set counts more."""
    profile = tmp_path / "cluster.yaml"
    profile.write_text("run_root: /runs\ncpus_per_rank: 6\n")
    call = ["plan", reproduction, "--explain", "first", "--cluster", str(profile)]
    shown = CliRunner().invoke(run_stage.app, call).stdout.splitlines()
    assert shown[0].split() == ["setting", "value", "from", "in", "run", "id"]
    (line,) = (line for line in shown if line.startswith("resources.cpus_per_rank"))
    assert line.split()[1:] == ["6", "cluster", "profile", str(profile), "no"]
    given = "first.resources.cpus_per_rank=2"
    shown = CliRunner().invoke(run_stage.app, [*call, "--set", given]).stdout.splitlines()
    (line,) = (line for line in shown if line.startswith("resources.cpus_per_rank"))
    assert line.split()[1:] == ["2", "command", "line", "(--set)", "no"]
    wrong = CliRunner().invoke(run_stage.app, ["plan", reproduction, "--explain", "firts"])
    assert "--explain firts: no such run; did you mean 'first'?" in str(wrong.exception)


def test_ranks_that_a_profile_spreads_over_more_nodes() -> None:
    need = Resources(ranks_per_node=8)
    profile = ClusterProfile(run_root=Path("/runs"), gpus_per_node=4, memory_per_gpu_gb=10)
    assert find_profile_resources(profile, need) == {
        "nodes": 2,
        "ranks_per_node": 4,
        "memory_gb": 40,
    }
    assert find_profile_resources(profile, need.model_copy(update={"memory_gb": 32})) == {
        "nodes": 2,
        "ranks_per_node": 4,
        "memory_gb": 16,
    }


def test_values_are_shown_as_json(reproduction: str) -> None:
    run = find_run(reproduction, "second", None)
    table = {line[0]: line for line in tabulate_settings(reproduction, run, None, {})}
    assert table["labelled"][1] == "null" and table["images.scale"][1] == "[0.08, 1.0]"
    assert table["decay_tokens"][3] == "no" and table["seed"][3] == "yes"
