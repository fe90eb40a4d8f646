"""The command `diagnose`: why a number of ours is lower than it should be.

A fixed order of questions, each answered from the records of a run and of those it needs, or by a
small run on a sample of its images (`measure_chain.py`).
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from mugs.evaluation.config import Feature
from pipeline import config, manifest
from pipeline.identity import science_fields
from pipeline.manifest import ManifestEntry
from pipeline.settings import use_current_names
from pipeline.spec import StageRun
from results.diagnosis import Answer, Cause, Diagnosis, answer_question
from results.figures.curves import BAND, Curves, read_curves
from results.runs import flatten_config
from results.variants import format_setting, list_differences
from results.vocabulary import describe_setting
from stages import STAGES
from stages.commands.bundle_content import read_science
from stages.commands.measure_chain import (
    IMAGENET_MEAN,
    EvaluationInputs,
    compare_channels,
    measure_channels,
    measure_checkpoint,
    measure_evaluation,
)
from stages.commands.released_weights import compare_released
from stages.commands.reproduction import Selection, all_runs
from stages.commands.run_chain import (
    Chain,
    Reference,
    is_copy,
    load_chain,
    load_reference,
    read_main_rows,
)
from stages.shared.frozen import trains_class_token

if TYPE_CHECKING:
    from mugs.data.sources.beton import Sidecar

# A setting that merely differs counts less than what was measured to be wrong, and more the more it
# differs.
LEAST_OF_SETTING = 0.4
MOST_OF_SETTING = 0.8
# Of a setting that is no number, whose size says nothing.
OTHER_SETTING = 0.55
# Numbers of other data compare with nothing, so it comes before all else.
OTHER_DATA = 0.99

# Errors of files that are missing or damaged: the questions about them stay unknown.
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError)

# The settings that the peak learning rate follows from.
PEAK = {"batch_size", "base_lr"}

# What a run is about.
SUBJECT = ("method", "arch", "dataset")

NEEDS_FEATURES = "needs a features run, or a knn run of data and weights"


@dataclass(frozen=True, kw_only=True)
class DiagnoseRequest:
    """What is asked: which recipe a run should follow, and which sound run root has references."""

    reproduction: str
    run: str
    recipe: str | None = None
    against: Path | None = None
    records_only: bool = False


def diagnose(selection: Selection, request: DiagnoseRequest) -> Diagnosis:
    """Return the answers to all questions about one of the selected runs.

    Raises:
        ConfigError: more than one run is meant, or it is not done; or a folder or a recipe does
            not exist.
    """
    chain = load_chain(selection, request.run)
    reference = load_reference(request.against, chain)
    answers = [
        compare_settings(chain, load_recipe(request, chain)),
        *describe_attempts(chain),
        count_images(chain, reference),
        compare_first_losses(chain, reference),
        compare_released(chain, reference.entries),
    ]
    if request.records_only:
        answers.append(Answer("images, labels and features", unknown="--records-only"))
    else:
        answers.append(examine_channels(chain, reference))
        answers += examine_features(chain)
        answers += examine_checkpoints(chain)
    answers += [describe_choice(chain), compare_versions(chain, reference)]
    if reference.copies:
        told = reference.describe_copies()
        answers.append(Answer("how many runs of --against are compared with", seen=told))
    run = chain.run
    return Diagnosis(
        f"{run.stage} {run.name}-{run.run_id}", describe_number(run, selection), tuple(answers)
    )


def load_recipe(request: DiagnoseRequest, chain: Chain) -> list[StageRun]:
    """Return the runs of the recipe that a run should follow.

    It is --recipe; else the reproduction itself, if it is a bundled one, without --set; else the
    bundled one whose pretraining is closest to that of the run.
    """
    if request.recipe is not None:
        return all_runs(request.recipe)
    bundled = config.list_bundled()
    if request.reproduction in bundled:
        return all_runs(request.reproduction)
    pretrainings = chain.of_stage("pretrain")
    if not pretrainings:
        return []
    mine = read_science(pretrainings[0])
    candidates: list[tuple[int, str, list[StageRun]]] = []
    for name in bundled:
        runs = all_runs(name)
        for run in runs:
            if run.stage == "pretrain":
                theirs = science_fields(run.config)
                if all(mine.get(key) == theirs.get(key) for key in SUBJECT):
                    candidates.append((len(_differences(pretrainings[0], run)), name, runs))
    return min(candidates, key=lambda found: found[:2])[2] if candidates else []


def compare_settings(chain: Chain, recipe: Sequence[StageRun]) -> Answer:
    """Compare each run of the chain with the closest of its stage in the recipe."""
    question = "are the settings those of the recipe"
    if not recipe:
        return Answer(question, unknown="no bundled recipe fits; name one with --recipe")
    counterparts = find_counterparts(chain, recipe)
    causes: list[Cause] = []
    without = []
    for entry in chain.entries:
        if entry.run_id in counterparts:
            causes += _list_setting_causes(entry, counterparts[entry.run_id])
        else:
            without.append(entry.name)
    seen = f"{len(counterparts)} runs compared, all settings are equal"
    if without:
        seen += f"; not in the recipe: {', '.join(without)}"
    return answer_question(question, causes, seen)


def find_counterparts(chain: Chain, recipe: Sequence[StageRun]) -> dict[str, StageRun]:
    """Return the run of a recipe that each run of a chain should be like, by run id.

    A recipe may have several runs of a stage. First counts what they are about, then that they need
    the counterparts of what the run needs, then the name, and last how many settings differ.
    """
    found: dict[str, StageRun] = {}
    # The farthest first: what a run needs has its counterpart then.
    for entry in reversed(chain.entries):
        needs = {found[need].run_id for need in entry.upstream.values() if need in found}
        same_stage = [run for run in recipe if run.stage == entry.stage]
        if same_stage:
            found[entry.run_id] = min(same_stage, key=partial(_rank_counterpart, entry, needs))
    return found


def _rank_counterpart(
    entry: ManifestEntry, needs: set[str], run: StageRun
) -> tuple[int, int, bool, int]:
    """Return a rank of a run of the recipe, the lower the better; `needs` are run ids in it."""
    mine = read_science(entry)
    theirs = science_fields(run.config)
    return (
        sum(mine.get(key) != theirs.get(key) for key in SUBJECT),
        len(needs - set(run.needs.values())),
        run.name != _name_in_file(entry),
        len(_differences(entry, run)),
    )


def _name_in_file(entry: ManifestEntry) -> str:
    """Return the name of a run in its file, by which --set knows it: the same for all seeds."""
    return re.sub(r"_seed\d+$", "", entry.name)


def _flatten_both(entry: ManifestEntry, run: StageRun) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a run and those of the recipe, under today's names."""
    stage_config = STAGES[entry.stage].config
    mine = use_current_names(stage_config, read_science(entry))
    theirs = use_current_names(stage_config, science_fields(run.config))
    return flatten_config(mine), flatten_config(theirs)


def _differences(entry: ManifestEntry, run: StageRun) -> list[str]:
    mine, theirs = _flatten_both(entry, run)
    return list_differences(mine, theirs, {"seed"}, entry.stage)


def _list_setting_causes(entry: ManifestEntry, run: StageRun) -> Iterator[Cause]:
    mine, theirs = _flatten_both(entry, run)
    # Settings of another version of the code are on one side only.
    common = (mine.keys() & theirs.keys()) - {"seed"}
    name = _name_in_file(entry)
    for key in sorted(common):
        if mine[key] == theirs[key]:
            continue
        evidence = f"{_show(mine[key])} in the run, {_show(theirs[key])} there"
        if entry.stage == "pretrain" and key in PEAK and common >= PEAK:
            evidence += _describe_peak(mine, theirs)
        if key == "dataset":
            yield Cause(
                OTHER_DATA,
                f"{entry.stage} {entry.name}: its data set is not that of the recipe",
                evidence,
                "compare it with a recipe of the same data (--recipe): the numbers are of other"
                " images, and most settings below follow from the data",
            )
            continue
        yield Cause(
            _weigh_difference(mine[key], theirs[key]),
            f"{entry.stage} {entry.name}: {key} differs from the recipe",
            evidence,
            f"run it with --set {quote(f'{name}.{key}={json.dumps(theirs[key])}')}",
        )


def _show(value: Any) -> str:
    return format_setting(value) or "nothing"


def _describe_peak(mine: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Say whether the learning rate follows the batch: it is base_lr * batch_size / 256."""
    ours, there = (each["base_lr"] * each["batch_size"] / 256 for each in (mine, theirs))
    told = f"; the peak learning rate is {ours:g}, there {there:g}"
    if mine["batch_size"] != theirs["batch_size"] and math.isclose(ours, there):
        return f"{told}: not scaled with the batch"
    return told


def _weigh_difference(mine: Any, theirs: Any) -> float:
    """Return the likelihood of a setting that differs: more by its ratio, up to ten times."""
    ratio = _find_ratio(mine, theirs)
    if ratio is None:
        return OTHER_SETTING
    size = min(1.0, math.log10(ratio))
    return LEAST_OF_SETTING + (MOST_OF_SETTING - LEAST_OF_SETTING) * size


def _find_ratio(mine: Any, theirs: Any) -> float | None:
    """Return by how many times numbers, or those of two lists, differ at most; at least 1."""
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        ratios = [_find_ratio(one, other) for one, other in zip(mine, theirs, strict=True)]
        return max((ratio for ratio in ratios if ratio is not None), default=None)
    numbers = (int, float)
    if not (isinstance(mine, numbers) and isinstance(theirs, numbers)):
        return None
    if isinstance(mine, bool) or isinstance(theirs, bool) or mine * theirs < 0:
        return None
    if mine == theirs:
        return 1.0
    if not mine * theirs:
        return math.inf  # something is switched off, or on
    # A momentum of 0.99 remembers ten times as long as one of 0.9.
    if 0.5 <= mine < 1 and 0.5 <= theirs < 1:
        mine, theirs = 1 - mine, 1 - theirs
    return float(max(mine / theirs, theirs / mine))


def describe_attempts(chain: Chain) -> Iterator[Answer]:
    """Yield whether each training got to its last epoch, and in how many starts."""
    for entry in chain.of_stage("pretrain"):
        question = f"did {entry.name} train to its end"
        epochs = int(entry.config.get("epochs", 0))
        curves = _read_curves(entry)
        causes = []
        if curves is not None and (last := curves.steps[-1]["epoch"] + 1) < epochs:
            cause = Cause(
                0.92,
                f"pretrain {entry.name}: its metrics end early",
                f"the last epoch is {last} of {epochs}",
                "look at its log with logs, and repeat it",
            )
            causes.append(cause)
        seen = f"{epochs} epochs, {entry.restarts} restarts, {entry.ranks} ranks"
        if earlier := entry.provenance.get("earlier"):
            seen += f"; {len(earlier)} attempts with other code: see tables --explain"
        yield answer_question(question, causes, seen)


def _read_curves(entry: ManifestEntry) -> Curves | None:
    return read_curves(entry.run_dir / "metrics.jsonl")


# Epochs of which losses are compared, and how many sound runs it needs to know their spread.
FIRST_EPOCHS = 3
FEWEST_REFERENCES = 3


def compare_first_losses(chain: Chain, reference: Reference) -> Answer:
    """Compare the losses of the first epochs with the released run's, or with those of sound runs.

    The released run's are recorded beside ours by a pretraining whose setting `calibration` names
    it. Sound runs may have any seed.
    """
    question = "are the first losses those of sound runs"
    pretrainings = chain.of_stage("pretrain")
    curves = _read_curves(pretrainings[0]) if pretrainings else None
    if curves is None:
        return Answer(question, unknown="there are no metrics of a pretraining")
    entry = pretrainings[0]
    if curves.epochs:
        return _compare_with_released(question, entry, curves)
    key = _find_family(entry)
    sound = [
        mean
        for other in reference.of_stage("pretrain")
        if _find_family(other) == key
        if (found := _read_curves(other)) is not None
        if (mean := _mean_first_loss(found)) is not None
    ]
    mine = _mean_first_loss(curves)
    if len(sound) < FEWEST_REFERENCES or mine is None:
        needed = f"{FEWEST_REFERENCES} are needed; {reference.describe_lack()}"
        return Answer(question, unknown=f"{len(sound)} sound pretrainings like it, {needed}")
    middle = fmean(sound)
    spread = stdev(sound)
    evidence = f"mean {mine:.3f}; {len(sound)} sound runs have {middle:.3f} ± {spread:.3f}"
    # Few runs know their spread badly, so losses that are close count as equal.
    far = abs(mine - middle) > max(5 * spread, 0.03 * abs(middle))
    return answer_question(question, [_accuse_losses(entry, evidence)] if far else [], evidence)


def _compare_with_released(question: str, entry: ManifestEntry, curves: Curves) -> Answer:
    deviations = {
        epoch["epoch"]: 100 * (epoch["ours"]["total"] / epoch["target"]["total"] - 1)
        for epoch in curves.epochs
        if epoch["target"].get("total") and not epoch.get("partial")
    }
    if not deviations:
        return Answer(question, unknown="no whole epoch beside the released run")
    told = ", ".join(f"epoch {epoch} {value:+.1f}%" for epoch, value in deviations.items())
    evidence = f"mean loss against the released run: {told}"
    far = max(map(abs, deviations.values())) > 100 * BAND
    return answer_question(question, [_accuse_losses(entry, evidence)] if far else [], evidence)


def _accuse_losses(entry: ManifestEntry, evidence: str) -> Cause:
    return Cause(
        0.6,
        f"pretrain {entry.name}: the losses of its first epochs are others",
        evidence,
        "compare data, views and learning rate with those of the sound runs",
    )


def _find_family(entry: ManifestEntry) -> tuple[object, ...]:
    return tuple(entry.config.get(name) for name in ("method", "arch", "epochs"))


def _mean_first_loss(curves: Curves) -> float | None:
    losses = [line["loss"] for line in curves.steps if line["epoch"] < FIRST_EPOCHS]
    return fmean(losses) if losses else None


def count_images(chain: Chain, reference: Reference) -> Answer:
    """Compare the images and classes of each data set with what is known, or with a sound run."""
    question = "are all images and classes there"
    causes = []
    seen = []
    unknown = []
    for entry in chain.of_stage("convert"):
        expected = _find_expected_counts(entry, reference)
        for split, sidecar in _read_sidecars(entry).items():
            count = len(sidecar.names)
            wanted = expected.get(split)
            if wanted is None:
                unknown.append(f"{entry.name}, {split}")
            elif wanted != count:
                causes.append(
                    Cause(
                        0.91,
                        f"convert {entry.name}: {split} has not the images that it should have",
                        f"{count:,} images, {wanted:,} expected",
                        f"find the missing files, and convert {entry.name} again",
                    )
                )
            seen.append(f"{entry.name}, {split}: {count:,} in {len(sidecar.classes)} classes")
    if unknown and not causes:
        missing = f"how many there should be of {'; '.join(unknown)}"
        return Answer(question, unknown=f"{missing} ({reference.describe_lack()})")
    return answer_question(question, causes, "; ".join(seen) or "no data set with a record")


def _read_sidecars(entry: ManifestEntry) -> "dict[str, Sidecar]":
    from mugs.data.sources.base import SourceError
    from mugs.data.sources.beton import read_sidecar

    found = {}
    for split in ("train", "val"):
        if split in entry.outputs:
            try:
                found[split] = read_sidecar(entry.output(split))
            except (OSError, SourceError):
                continue  # removed to make room, as of a finished reproduction
    return found


def _find_expected_counts(entry: ManifestEntry, reference: Reference) -> dict[str, int | None]:
    from mugs.data.sources.expected import KNOWN

    dataset = str(entry.config.get("dataset", ""))
    found: dict[str, int | None] = dict(getattr(KNOWN.get(dataset), "images", None) or {})
    for other in _find_same_data(entry, reference):
        counts = {split: len(sidecar.names) for split, sidecar in _read_sidecars(other).items()}
        found = {**counts, **found}
    return found


def _find_same_data(entry: ManifestEntry, reference: Reference) -> list[ManifestEntry]:
    dataset = entry.config.get("dataset")
    return [
        other for other in reference.of_stage("convert") if other.config.get("dataset") == dataset
    ]


def examine_channels(chain: Chain, reference: Reference) -> Answer:
    """Compare the channel means of each data set with those known, or with those of a sound run."""
    question = "are the channels of the images in order"
    causes: list[Cause] = []
    unknown = []
    for entry in chain.of_stage("convert"):
        try:
            known = _find_channels(entry, reference)
            if known is None:
                unknown.append(f"no reference for {entry.name} ({reference.describe_lack()})")
            else:
                causes += compare_channels(entry, *known)
        except UNREADABLE as error:
            unknown.append(f"{entry.name} cannot be read: {error}")
    if unknown and not causes:
        return Answer(question, unknown=", ".join(unknown))
    return answer_question(question, causes, "the means are those of the reference")


def _find_channels(
    entry: ManifestEntry, reference: Reference
) -> tuple[tuple[float, ...], str] | None:
    if entry.config.get("dataset") == "imagenet1k":
        return IMAGENET_MEAN, "ImageNet"
    same = _find_same_data(entry, reference)
    if not same:
        return None
    return measure_channels(same[0].output("train"))[0], "the sound run"


def examine_features(chain: Chain) -> list[Answer]:
    """Return what a sample of images through the backbone says."""
    question = "labels and features of a sample"
    inputs = find_evaluation_inputs(chain)
    if inputs is None:
        return [Answer(question, unknown=NEEDS_FEATURES)]
    try:
        return measure_evaluation(inputs)
    except UNREADABLE as error:
        return [Answer(question, unknown=f"cannot be computed: {error}")]


def examine_checkpoints(chain: Chain) -> Iterator[Answer]:
    """Yield whether prototypes and queues of the pretrainings are in order."""
    for entry in chain.of_stage("pretrain"):
        try:
            yield measure_checkpoint(entry)
        except UNREADABLE as error:
            question = f"did prototypes or queues of {entry.name} collapse"
            yield Answer(question, unknown=f"cannot be read: {error}")


def find_evaluation_inputs(chain: Chain) -> EvaluationInputs | None:
    """Return what the features behind a run were made of; None if it is not of that kind."""
    for entry in chain.entries:
        data = chain.by_id.get(entry.upstream.get("data", ""))
        weights = chain.by_id.get(entry.upstream.get("weights", ""))
        settings = entry.config
        if data is None or weights is None or data.stage != "convert":
            continue
        if not {"resize", "crop"} <= settings.keys():
            continue
        label = str(settings.get("weights", "teacher"))
        stored = entry if entry.stage == "features" else None
        resize, crop = int(settings["resize"]), int(settings["crop"])
        trained = trains_class_token(str(weights.config.get("method", "")))
        feature: Feature = "cls" if trained else "patch_mean"
        return EvaluationInputs(data, weights, label, resize, crop, stored, feature)
    return None


def describe_number(entry: ManifestEntry, selection: Selection) -> str:
    """Return the best number of a run, in words; without one, which runs have numbers of it."""
    rows = read_main_rows(entry)
    if not rows:
        told = "no result rows of its own"
        names = list_evaluations(entry, selection)
        return f"{told}; diagnose a run that evaluates it: {', '.join(names)}" if names else told
    best = max(rows, key=lambda row: row.value)
    return f"{best.metric} {best.value:.2f} ({describe_setting(best.stage, best.setting)})"


def list_evaluations(entry: ManifestEntry, selection: Selection) -> list[str]:
    """Return the names of the finished runs with result rows that need a run, directly or not."""
    needing = {entry.run_id}
    names = []
    # In the order of a plan, each run comes after those that it needs.
    for run in selection.runs:
        if needing.isdisjoint(run.needs.values()):
            continue
        needing.add(run.run_id)
        done = manifest.find_done(selection.root, run.run_id)
        if done is not None and read_main_rows(done):
            names.append(run.name)
    return names


def describe_choice(chain: Chain) -> Answer:
    """Say how many settings the best was chosen from: fewer choices give a lower best."""
    question = "best of how many"
    values = [row.value for row in read_main_rows(chain.run)]
    if not values:
        return Answer(question, seen="the run has no number")
    if len(values) == 1:
        return Answer(question, seen="there is one number")
    seen = f"{len(values)} settings, from {min(values):.1f} to {max(values):.1f}"
    return Answer(question, seen=seen)


def compare_versions(chain: Chain, reference: Reference) -> Answer:
    """Say in which packages the run differs from a sound one of the same stage."""
    question = "do packages and devices differ from those of the reference"
    # Copied together with the run, others say as little about it as the run itself.
    same = [
        other
        for other in reference.of_stage(chain.run.stage)
        if (mine := manifest.read_entry(chain.run.run_root, other.run_id)) is None
        or not is_copy(other, mine)
    ]
    if not same:
        known = f"no run of the stage {chain.run.stage} to compare with"
        return Answer(question, unknown=f"{known}; {reference.describe_lack()}")
    ours, theirs = (
        {**(each.provenance.get("versions") or {}), "device": each.device}
        for each in (chain.run, same[0])
    )
    lines = [
        f"{name} {ours.get(name, 'none')} here, {theirs.get(name, 'none')} there"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    return Answer(question, seen="; ".join(lines) or "all are equal")
