"""Small runs that `diagnose` makes: a sample of images through the recorded backbone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mugs.evaluation.config import Feature
from pipeline.manifest import ManifestEntry
from results.diagnosis import Answer, Cause, answer_question

if TYPE_CHECKING:
    from torch import Tensor

    from mugs.data.sources.base import Source
    from mugs.evaluation.feature_health import FeatureHealth, LabelAgreement
    from mugs.models.vit import ViT

# A class needs several images to have neighbors, so few classes are taken, and all that they have
# of images up to a number.
CLASSES = 20
IMAGES_PER_CLASS = 25

# One minus the mean cosine of two computations of the same features, about their mean: what all
# images have in common would hide a difference. Below EQUAL, it is rounding on one kind of machine.
# Other devices, and fp16, change less than SAME.
EQUAL = 1e-6
SAME = 1e-3
# By how many times a mistake must fit better than the right way, where both fit.
BETTER = 10.0
# Features that are all the same, or vary in one direction only, tell no images apart. Digits on a
# dark ground have a mean cosine of 0.99 in a sound network.
COLLAPSED_COSINE = 0.9999
COLLAPSED_RANK = 2.0
# Standard errors by which neighbors must agree more often than chance, before their labels count.
LEARNED = 6.0
# Pixels, 0 to 1: JPEG encoders and decoders differ by less.
PIXEL_TOLERANCE = 0.01

# Mean of ImageNet's pixels, which every network here is normalized with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)


@dataclass(frozen=True)
class EvaluationInputs:
    """What an evaluation of a frozen backbone was made of; `features` if they were stored."""

    data: ManifestEntry
    weights: ManifestEntry
    label: str
    resize: int
    crop: int
    features: ManifestEntry | None
    # One that the method trains: features of an untrained token may be alike.
    feature: Feature = "cls"


def measure_evaluation(inputs: EvaluationInputs) -> list[Answer]:
    """Return what a sample of images says of labels, features and, if stored, their computation.

    Raises:
        OSError, ValueError: a file of the evaluation cannot be read.
    """
    import torch

    from mugs.data.sources.open import open_source
    from mugs.evaluation.feature_health import measure_health, measure_label_agreement
    from mugs.weights.backbone_file import load_backbone

    sources = {split: open_source(inputs.data.output(split)) for split in ("train", "val")}
    chosen = {split: choose_sample(source) for split, source in sources.items()}
    vit = load_backbone(inputs.weights.output(inputs.label)).eval()
    answers = []
    with torch.no_grad():
        images = {
            split: load_images(source, chosen[split], inputs) for split, source in sources.items()
        }
        features = {
            split: compute_features(vit, found, inputs.feature)
            for split, (found, _) in images.items()
        }
        if inputs.features is not None:
            val, _ = images["val"]
            answers.append(_answer_repeat(inputs, inputs.features, vit, val, chosen["val"]))
        # Pixels tell some classes apart even if the network does not.
        pixels = {split: shrink_images(found) for split, (found, _) in images.items()}
        agreements = [
            measure_label_agreement(
                values["train"], images["train"][1], values["val"], images["val"][1]
            )
            for values in (features, pixels)
        ]
        answers.append(_answer_labels(inputs, agreements))
        answers.append(_answer_health(inputs, measure_health(features["val"])))
    return answers


def choose_sample(source: "Source") -> list[int]:
    """Return the images of some classes, evenly chosen, in the order of the data set."""
    import numpy as np

    labels = np.array([source.label(index) for index in range(len(source))])
    present = np.unique(labels)
    some = present[np.linspace(0, len(present) - 1, min(CLASSES, len(present))).astype(int)]
    found = [np.flatnonzero(labels == each)[:IMAGES_PER_CLASS] for each in some]
    return sorted(int(index) for part in found for index in part)


def load_images(
    source: "Source", chosen: Sequence[int], size: EvaluationInputs
) -> "tuple[Tensor, Tensor]":
    """Return normalized images (N, 3, crop, crop) and their labels (N,)."""
    import torch

    from mugs.data.loading.evaluation import iter_eval_batches

    batches = iter_eval_batches(
        source, resize=size.resize, crop=size.crop, indices=chosen, threads=1, batch_size=100
    )
    found = [(images, labels) for images, labels, _ in batches]
    return torch.cat([images for images, _ in found]), torch.cat([labels for _, labels in found])


def compute_features(vit: "ViT", images: "Tensor", feature: Feature) -> "Tensor":
    """Return features (N, D); in parts, since the activations of all take gigabytes."""
    import torch

    from mugs.evaluation.features import build_feature_function

    compute = build_feature_function(vit, feature)
    return torch.cat([compute(part) for part in torch.split(images, 50)])


def shrink_images(images: "Tensor") -> "Tensor":
    """Return images (N, 3, H, W) as few gray pixels (N, 64), centered."""
    from torch.nn.functional import adaptive_avg_pool2d

    pixels = adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), 8).flatten(1)
    return pixels - pixels.mean(dim=1, keepdim=True)


def measure_channels(path: Path) -> "tuple[tuple[float, ...], tuple[float, ...]]":
    """Return mean and standard error of red, green and blue (0 to 1) over a sample of a data set.

    Raises:
        OSError, ValueError: the file cannot be read.
    """
    import io

    import numpy as np

    from mugs.data.sources.base import open_image
    from mugs.data.sources.open import open_source

    source = open_source(path)
    means = []
    for index in choose_sample(source):
        with open_image(io.BytesIO(source.read(index))) as image:
            means.append(np.asarray(image.convert("RGB")).mean(axis=(0, 1)) / 255)
    values = np.array(means)
    errors = values.std(axis=0) / np.sqrt(len(values))
    return tuple(map(float, values.mean(axis=0))), tuple(map(float, errors))


def compare_channels(
    data: ManifestEntry, reference: tuple[float, ...], whose: str
) -> Iterator[Cause]:
    """Yield a cause if the channels of a data set are not those of the reference.

    Raises:
        OSError, ValueError: the images cannot be read.
    """
    mean, error = measure_channels(data.output("train"))
    tolerance = [PIXEL_TOLERANCE + 4 * each for each in error]

    def differs(other: tuple[float, ...]) -> bool:
        pairs = zip(mean, other, tolerance, strict=True)
        return any(abs(ours - theirs) > most for ours, theirs, most in pairs)

    def distance(other: tuple[float, ...]) -> float:
        return sum(abs(ours - theirs) for ours, theirs in zip(mean, other, strict=True))

    def as_text(values: tuple[float, ...]) -> str:
        return ", ".join(f"{value:.3f}" for value in values)

    reverse = reference[::-1]
    swapped = differs(reference) and distance(reverse) < distance(reference) / 2
    # Channels may differ by less than the images among themselves, so their order counts as well.
    order = (mean[0] - mean[2], reference[0] - reference[2])
    contrast = abs(order[1]) > PIXEL_TOLERANCE and abs(order[0] + order[1]) < abs(order[1]) / 2
    evidence = f"means of red, green, blue {as_text(mean)}; {whose} has {as_text(reference)}"
    where = f"convert {data.name}"
    if swapped or contrast:
        yield Cause(
            0.93,
            f"{where}: red and blue are exchanged (BGR)",
            evidence,
            f"write the images as RGB, and repeat {data.name} and what needs it",
        )
    elif differs(reference):
        yield Cause(
            0.7,
            f"{where}: the images are not those of the reference",
            evidence,
            f"compare some images of {data.name} with the original ones by eye",
        )


def _answer_repeat(
    inputs: EvaluationInputs,
    entry: ManifestEntry,
    vit: "ViT",
    images: "Tensor",
    chosen: Sequence[int],
) -> Answer:
    """Compare stored features with those that the recorded images and weights give now."""
    import torch
    from torch.nn.functional import cosine_similarity

    from mugs.evaluation.feature_store import FeatureStore

    question = "do the stored features come out again"
    stored, _ = FeatureStore(entry.output("features")).load("val", inputs.feature)
    wanted = stored[torch.tensor(chosen)]
    middle = wanted.mean(dim=0)

    def measure_distance(features: "Tensor") -> float:
        found = cosine_similarity((features - middle).double(), (wanted - middle).double())
        return 1 - float(found.mean())

    right = measure_distance(compute_features(vit, images, inputs.feature))
    seen = f"{len(chosen)} of them, with a mean cosine of {format_cosine(right)}"
    if right < EQUAL:
        return Answer(question, seen=seen)
    distances = {
        what: measure_distance(compute())
        for what, compute in list_mistakes(inputs, vit, images).items()
    }
    what = min(distances, key=lambda name: distances[name])
    remedy = f"repeat {entry.name} with this code, in another run root"
    evidence = f"mean cosine {format_cosine(right)} to features that were computed again"
    if distances[what] < min(SAME, right / BETTER):
        told = f"{evidence}, {format_cosine(distances[what])} to such ones"
        return Answer(question, (Cause(1.0, f"features {entry.name}: {what}", told, remedy),))
    if right < SAME:
        return Answer(question, seen=seen)
    unlike = f"features {entry.name}: not those of these weights and images"
    return Answer(question, (Cause(0.96, unlike, evidence, remedy),))


def format_cosine(distance: float) -> str:
    """Return a cosine by what it lacks to 1; rounding alone lacks nothing."""
    return "1" if distance < 1e-9 else f"1 - {distance:.1e}"


def list_mistakes(
    inputs: EvaluationInputs, vit: "ViT", images: "Tensor"
) -> "dict[str, Callable[[], Tensor]]":
    """Return what is often done wrong in an evaluation, each with the features that it gives."""
    import torch

    from mugs.data.views.config import ViewRecipe

    recipe = ViewRecipe()
    mean = torch.tensor(recipe.mean).view(3, 1, 1)
    std = torch.tensor(recipe.std).view(3, 1, 1)
    pixels = images * std + mean
    compute = partial(compute_features, vit, feature=inputs.feature)
    mistakes: dict[str, Callable[[], Tensor]] = {
        "computed without normalizing the images": lambda: compute(pixels),
        "computed from pixels of 0 to 255": lambda: compute(255 * pixels),
        "computed with red and blue exchanged (BGR)": lambda: compute(
            (pixels.flip(1) - mean) / std
        ),
        "computed with positions that were cut and not resized": lambda: (
            _compute_with_cut_positions(vit, images, inputs.feature)
        ),
    }
    for label in ("teacher", "student", "initial"):
        if label != inputs.label and label in inputs.weights.outputs:
            path = inputs.weights.output(label)
            mistakes[f"computed with the {label} instead of the {inputs.label}"] = partial(
                _compute_with_backbone, path, images, inputs.feature
            )
    return mistakes


def _compute_with_backbone(path: Path, images: "Tensor", feature: Feature) -> "Tensor":
    from mugs.weights.backbone_file import load_backbone

    return compute_features(load_backbone(path).eval(), images, feature)


def _compute_with_cut_positions(vit: "ViT", images: "Tensor", feature: Feature) -> "Tensor":
    """Return features with the first positions of the table, as many as there are patches."""
    import torch

    table = vit.pos_embed
    patches = (images.shape[2] // vit.config.patch_size) * (
        images.shape[3] // vit.config.patch_size
    )
    # Where there are too few, the table is repeated.
    rows = torch.arange(patches) % (table.shape[1] - 1)
    try:
        vit.pos_embed = torch.nn.Parameter(
            torch.cat([table[:, :1], table[:, 1:][:, rows]], dim=1), requires_grad=False
        )
        return compute_features(vit, images, feature)
    finally:
        vit.pos_embed = table


def _answer_labels(inputs: EvaluationInputs, agreements: "Sequence[LabelAgreement]") -> Answer:
    """Say whether labels belong to images: neighbors within a split, and across splits, agree."""
    question = "do the labels belong to the images"
    for found in agreements:
        error = (found.chance * (100 - found.chance) / found.images) ** 0.5
        floor = found.chance + LEARNED * error
        within = {"train": found.within_train, "val": found.within_val}
        if max(within.values()) < floor:
            continue
        evidence = (
            f"the nearest neighbors agree for {found.within_train:.0f}% within train,"
            f" {found.within_val:.0f}% within val, {found.from_train_to_val:.0f}% from train to"
            f" val; by chance {found.chance:.0f}%"
        )
        best = max(within.values()) - found.chance
        shuffled = [split for split, value in within.items() if value - found.chance < best / 4]
        remedy = f"check the labels of {inputs.data.name} against their source, and convert again"
        where = f"convert {inputs.data.name}"
        if shuffled:
            cause = Cause(0.97, f"{where}: labels of {shuffled[0]} are shuffled", evidence, remedy)
            return Answer(question, (cause,))
        if found.from_train_to_val - found.chance < best / 4:
            what = f"{where}: train and val number their classes differently"
            return Answer(question, (Cause(0.97, what, evidence, remedy),))
        return Answer(question, seen=evidence)
    return Answer(question, unknown="neither the features nor the pixels tell the classes apart")


def _answer_health(inputs: EvaluationInputs, health: "FeatureHealth") -> Answer:
    question = "did the features collapse"
    evidence = f"{_describe_health(health)}, mean norm {health.mean_norm:.1f}"
    collapsed = _has_collapsed(health)
    cause = Cause(
        0.9,
        f"{inputs.weights.stage} {inputs.weights.name}: the features of all images are alike",
        evidence,
        "look at the losses of the pretraining: figures --out DIR; then at temperatures and queues",
    )
    return answer_question(question, [cause] if collapsed else [], evidence)


def _describe_health(health: "FeatureHealth") -> str:
    return f"effective rank {health.effective_rank:.1f}, mean cosine {health.mean_cosine:.3f}"


def _has_collapsed(health: "FeatureHealth") -> bool:
    return health.mean_cosine > COLLAPSED_COSINE or health.effective_rank < COLLAPSED_RANK


# Ends of names of the tables in a checkpoint whose rows must differ: prototypes, queues, memories.
TABLES = ("last_layer.weight_v", "queue.rows", "memory.keys")
# Rows of a table that are looked at.
MOST_ROWS = 4096


def measure_checkpoint(entry: ManifestEntry) -> Answer:
    """Say whether the rows of prototypes, queues and memories of the last checkpoint are alike.

    Raises:
        OSError, CheckpointError: the checkpoint cannot be read.
    """
    from mugs.checkpoint.record import list_checkpoints
    from mugs.checkpoint.save_load import load_state_dict_file
    from mugs.evaluation.feature_health import measure_health

    question = f"did prototypes or queues of {entry.name} collapse"
    checkpoints = list_checkpoints(entry.run_dir / "checkpoints")
    if not checkpoints:
        return Answer(question, unknown="there is no checkpoint any more")
    newest = checkpoints[-1]
    found = {
        name: measure_health(table[:: -(-len(table) // MOST_ROWS)])
        for part in ("teacher", "extra_state")
        for name, table in load_state_dict_file(newest, part).items()
        if name.endswith(TABLES) and table.ndim == 2 and len(table) > 1
    }
    causes = [
        Cause(
            0.88,
            f"pretrain {entry.name}: all rows of {name} are alike",
            f"{_describe_health(health)}, in {newest.name}",
            "look at the losses of the pretraining: figures --out DIR; then at temperatures",
        )
        for name, health in found.items()
        if _has_collapsed(health)
    ]
    told = [f"{name}: {_describe_health(health)}" for name, health in found.items()]
    return answer_question(question, causes, "; ".join(told) or "the method has none")
