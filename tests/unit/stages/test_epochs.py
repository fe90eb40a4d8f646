"""An epoch is one pass over the images, whatever batch size and data set; else `plan` says so."""

import pytest

from pipeline.spec import ConfigError, StageRun
from slurm.submission.profile import find_crowded_cpus, load_profile, sbatch_parameters
from stages.commands.reproduction import all_runs


def plan_run(reproduction: str, name: str, *overrides: str) -> StageRun:
    """Return one run of a bundled reproduction."""
    return next(run for run in all_runs(reproduction, overrides) if run.name == name)


@pytest.mark.parametrize(
    ("reproduction", "overrides", "steps"),
    [
        ("mugs_vit_s16_ep100", (), 2502),
        ("mugs_vit_s16_ep100", ("pretrain.batch_size=1024",), 1251),
        ("mugs_vit_s16_ep100", ("pretrain.batch_size=256",), 5004),
        (
            "mugs_vit_s16_ep100",
            ("imagenet.dataset=own", "imagenet.num_train_images=100000"),
            195,
        ),
        ("mugs_vit_l16_ep250", (), 2001),
        # The release's count, one step more than whole batches give.
        ("mugs_vit_b16_ep400", (), 1271),
        # The number of the digits is known when they are there.
        ("mini", (), None),
    ],
)
def test_an_epoch_is_one_pass(
    reproduction: str, overrides: tuple[str, ...], steps: int | None
) -> None:
    run = plan_run(reproduction, "pretrain", *overrides)
    assert getattr(run.config, "steps_per_epoch") == steps  # noqa: B009 (of the stage's class)
    assert not any("passes" in remark for remark in run.remarks)


def test_plan_says_how_many_passes_an_epoch_is() -> None:
    (fact,) = plan_run("mugs_vit_s16_ep100", "pretrain").facts
    assert fact == (
        "100 epochs of 2,502 steps of 512 images: 1.00 passes over 1,281,167 images each"
    )
    twice = plan_run(
        "mugs_vit_s16_ep100",
        "pretrain",
        "pretrain.batch_size=1024",
        "pretrain.steps_per_epoch=2502",
    )
    assert "2.00 passes" in twice.facts[0]
    assert any("an epoch is 2.00 passes" in remark for remark in twice.remarks)
    assert twice.run_id != plan_run("mugs_vit_s16_ep100", "pretrain").run_id


def test_a_batch_of_more_than_all_images_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"runs\.pretrain.*batch_size 512 is more than all 300"):
        plan_run("mugs_vit_s16_ep100", "pretrain", "imagenet.num_train_images=300")


def test_a_batch_that_holds_images_twice_is_remarked_on() -> None:
    run = plan_run(
        "mugs_vit_s16_ep100",
        "pretrain",
        "imagenet.dataset=own",
        "imagenet.num_train_images=60",
        "pretrain.steps_per_epoch=5",
    )
    assert any("42.67 passes" in remark and "twice" in remark for remark in run.remarks)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pretrain.steps_per_epoch=0", "greater than 0"),
        ("pretrain.steps_per_epoch=-3", "greater than 0"),
        # Without a limit for epoch 0, the first step would have failed.
        ("pretrain.clip=[]", "from 0 on"),
        ("pretrain.clip=[[5, 3.0]]", "from 0 on"),
        ("pretrain.clip=[[0, 3.0], [101, 0.3], [50, 1.0]]", "rising order"),
        ("pretrain.clip=[[0, -3.0]]", "greater than or equal to 0"),
        ("pretrain.mugs.queue_size=-1", "greater than 0"),
        ("pretrain.mugs.num_neighbours=0", "greater than 0"),
        ("pretrain.mugs.center_momentum=2", "less than or equal to 1"),
        ("pretrain.mugs.instance_temperature=0", "greater than 0"),
        ("pretrain.mugs.loss_weights=[-1, 1, 1]", "greater than or equal to 0"),
        ("pretrain.views.blur_prob=[2, 0, 0]", "less than or equal to 1"),
        ("pretrain.weight_decay=[-1, 0]", "greater than or equal to 0"),
        ("pretrain.patch_lr_scale=-1", "greater than or equal to 0"),
        # A negative one would prefer the farthest neighbors.
        ("knn.temperatures=[-0.07]", "greater than 0"),
        ("knn.temperatures=[]", "at least 1 item"),
        ("linear.sweep.base_lrs=[]", "at least 1 item"),
        ("linear.sweep.weight_decays=[-1]", "greater than or equal to 0"),
        ("pretrain.views.large_scale=[1.0, 0.25]", "the smaller share first"),
        # Meant as percent.
        ("pretrain.views.small_scale=[5, 25]", "at most 1"),
        ("finetune.images.scale=[0, 1]", "above 0"),
        # Validation images would have had a black border.
        ("finetune.images.size=384", "do not fill a crop of 384"),
        ("knn.crop=384", "do not fill a crop of 384"),
        ("linear.crop=384", "do not fill a crop of 384"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_run(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_run("mugs_vit_s16_ep100", "pretrain", override)


@pytest.mark.parametrize(
    ("reproduction", "override", "words"),
    [
        ("ade20k_vit_s16_ep800", "upernet.scenes.stride=700", "would have no class"),
        ("ade20k_vit_s16_ep800", "upernet.scenes.ratio=[2, 0.5]", "the smaller factor first"),
        ("coco_vit_s16_ep800", "detection.scales.crop_sides=[600, 384]", "the shorter side first"),
        (
            "mugs_vit_s16_ep800_semi",
            "finetune_1pct.labelled.seed=4",
            "seed has no effect with by: list",
        ),
        (
            "mugs_vit_s16_ep800_semi",
            "finetune_10pct.labelled={by: class_balanced, last_line: dropped}",
            "last_line has no effect with by: class_balanced",
        ),
    ],
)
def test_what_has_no_meaning_in_other_tasks_is_refused(
    reproduction: str, override: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        all_runs(reproduction, [override])


@pytest.mark.parametrize(
    ("reproduction", "name", "overrides", "words"),
    [
        ("mugs_vit_s16_ep100", "pretrain", ("min_lr=0.1",), "the learning rate rises"),
        ("mugs_vit_s16_ep100", "pretrain", ("freeze_prototypes_epochs=100",), "never trained"),
        (
            "mugs_vit_s16_ep100",
            "pretrain",
            ("clip=[[0, 3.0], [101, 0.3]]",),
            "a limit from epoch 101 on",
        ),
        (
            "mugs_vit_s16_ep100",
            "pretrain",
            ("mugs.group_teacher_temperature=[0.04, 0.07]", "mugs.group_teacher_warmup_epochs=101"),
            "mugs.group_teacher_temperature reaches 0.07 after 101 epochs",
        ),
        (
            "dino_vit_s16_ep100",
            "pretrain",
            ("dino.teacher_temperature=[0.04, 0.07]", "dino.teacher_warmup_epochs=130"),
            "dino.teacher_temperature reaches 0.07 after 130 epochs",
        ),
        (
            "ibot_vit_s16_ep100",
            "pretrain",
            ("ibot.mask_start_epoch=100",),
            "nothing is ever masked",
        ),
        (
            "ibot_vit_s16_ep100",
            "pretrain",
            ("ibot.mask_start_epoch=80",),
            "ibot.patch_teacher_temperature reaches 0.07 after 110 epochs",
        ),
        (
            "coco_vit_s16_ep800",
            "detection",
            ("epochs=10", "resources.hours=20"),
            "falls after epoch 11",
        ),
        (
            "ade20k_vit_s16_ep800",
            "upernet",
            ("steps=1000", "resources.hours=2"),
            "the warm-up of 1500 steps",
        ),
        ("ade20k_vit_s16_ep800", "upernet", ("steps=80000",), "steps is 80000 instead of 160000"),
    ],
)
def test_what_a_run_does_not_reach_is_remarked_on(
    reproduction: str, name: str, overrides: tuple[str, ...], words: str
) -> None:
    assert plan_run(reproduction, name).remarks == ()
    (remark,) = plan_run(reproduction, name, *(f"{name}.{text}" for text in overrides)).remarks
    assert words in remark


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("pretrain", ("pretrain.epochs=100",), ()),
        ("pretrain", ("pretrain.warmup_epochs=101",), ("never reaches its peak",)),
        (
            "pretrain",
            ("pretrain.epochs=800",),
            ("epochs is 800 instead of 100, but resources.hours is still 36",),
        ),
        ("pretrain", ("pretrain.epochs=800", "pretrain.resources.hours=288"), ()),
        (
            "pretrain",
            ("pretrain.resources.nodes=2",),
            ("16 GPUs instead of 8, but resources.hours is still 36",),
        ),
        # The rates of these follow the batch, or are meant for it.
        ("pretrain", ("pretrain.batch_size=1024",), ()),
        ("linear", ("linear.batch_size=512",), ()),
    ],
)
def test_what_an_override_leaves_as_it_was_is_remarked_on(
    name: str, overrides: tuple[str, ...], words: tuple[str, ...]
) -> None:
    remarks = plan_run("mugs_vit_s16_ep100", name, *overrides).remarks
    assert len(remarks) == len(words), remarks
    assert all(word in remark for word, remark in zip(words, remarks, strict=True))


@pytest.mark.parametrize(
    ("reproduction", "name"),
    [("coco_vit_s16_ep800", "detection"), ("ade20k_vit_s16_ep800", "upernet")],
)
def test_a_rate_that_does_not_follow_the_batch_is_remarked_on(reproduction: str, name: str) -> None:
    assert plan_run(reproduction, name).remarks == ()
    (remark,) = plan_run(reproduction, name, f"{name}.batch_size=64").remarks
    assert "batch_size is 64 instead of" in remark and "does not follow it" in remark


@pytest.mark.parametrize(
    ("override", "cpus"),
    [
        ("pretrain.epochs=100", 12),
        ("pretrain.resources.cpus_per_rank=5", 5),
        ("pretrain.resources={cpus_per_rank: 5}", 5),
        # As the file says; the profile would have 12.
        ("pretrain.resources.cpus_per_rank=16", 16),
    ],
)
def test_cpus_of_the_command_line_count_more_than_the_profile(
    override: str, cpus: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = plan_run("mugs_vit_s16_ep100", "pretrain", override)
    code = tmp_path_factory.mktemp("code")
    profile = load_profile("a100_8x80g")
    assert sbatch_parameters(profile, run.resources, code=code, lead_s=60)["cpus_per_task"] == cpus


@pytest.mark.parametrize(
    ("override", "cluster", "words"),
    [
        # The profile's 12 CPUs take the place of the recipe's 16.
        ((), True, "pretrain: threads is 14, but a rank has 12 CPUs"),
        ((), False, ""),
        (("pretrain.threads=12",), True, ""),
        (("pretrain.resources.cpus_per_rank=14",), True, ""),
        (("pretrain.threads=17",), False, "pretrain: threads is 17, but a rank has 16 CPUs"),
    ],
)
def test_more_loader_threads_than_cpus_are_noted(
    override: tuple[str, ...], cluster: bool, words: str
) -> None:
    run = plan_run("mugs_vit_s16_ep100", "pretrain", *override)
    profile = load_profile("a100_8x80g") if cluster else None
    assert words in "".join(find_crowded_cpus(profile, [run]))
    assert bool(find_crowded_cpus(profile, [run])) == bool(words)
