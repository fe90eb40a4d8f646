"""Convert images to FFCV files (`.beton`), one for training and one for validation.

The layouts of data sets are read in `mugs/data/sources/`; their settings are in
`stages/shared/image_data.py`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.manifest import ManifestEntry
from pipeline.spec import Resources, StageConfig, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.image_data import BUILTIN, ConvertConfig, open_data_set, open_splits

if TYPE_CHECKING:
    from mugs.data.sources.base import FolderSource


def run(ctx: StageContext, cfg: ConvertConfig) -> StageOutput:
    """Convert the splits on rank 0; outputs `train` and `val` (.beton) and their sidecars."""
    from mugs.data.sources.convert import convert_to_beton
    from mugs.engine.progress import Progress

    outputs: dict[str, Path] = {}
    sources = open_splits(ctx.run_dir, cfg)
    for split, source in sources.items():
        target = ctx.run_dir / f"{split}.beton"
        progress = Progress(
            f"convert {split}", 1, unit="images", path=ctx.run_dir / "progress.json"
        )

        # A default binds this split's progress; a closure would bind the loop variable.
        def report(done: int, total: int, progress: Progress = progress) -> None:
            progress.total = total
            progress.update(done, items=done - progress.done)

        convert_to_beton(
            source, target, allow_bad=cfg.allow_bad, threads=cfg.threads, report=report
        )
        progress.close()
        outputs |= {split: target, f"{split}_sidecar": target.with_name(target.name + ".json")}
    info = {"dataset": cfg.dataset, "num_classes": len(sources["train"].classes)}
    return StageOutput(outputs=outputs, info=info)


def check_images(cfg: ConvertConfig, inputs: Mapping[str, StageConfig]) -> tuple[str, float]:
    """Return the numbers of images and classes, and the bytes of the images.

    Raises:
        SourceError, ValueError: as in a run, except for images that are damaged inside.
    """
    if cfg.train_dir in BUILTIN:
        return "images that come with scikit-learn", 0.0
    sources = open_data_set(cfg)
    check_not_truncated(sources.values(), cfg)
    counts = [f"{len(source):,} {split} images" for split, source in sources.items()]
    size = sum(estimate_bytes(source) for source in sources.values())
    classes = f"{len(sources['train'].classes)} classes"
    return f"{', '.join(counts)} of {classes}, about {size / 1e9:.1f} GB", size


def check_not_truncated(sources: "Iterable[FolderSource]", cfg: ConvertConfig) -> None:
    """Raise SourceError, in one line, that names the truncated images of all splits."""
    from mugs.data.sources.base import SourceError
    from mugs.data.sources.convert import check_whole_images

    problems = []
    for source in sources:
        try:
            check_whole_images(source, allow_bad=cfg.allow_bad, threads=cfg.threads)
        except SourceError as error:
            problems.append(str(error).splitlines()[0])
    if problems:
        raise SourceError("; ".join(problems))


def estimate_bytes(source: "FolderSource") -> float:
    """Return the bytes of all images, estimated from about a thousand of them."""
    # Asking for all 1.3 million sizes of ImageNet is slow on a network file system.
    sizes = [source.size(index) for index in range(0, len(source), max(1, len(source) // 1000))]
    return len(source) * sum(sizes) / len(sizes)


def verify_converted_images(entry: ManifestEntry, every: int) -> list[str]:
    """Return what is wrong with every `every`-th converted image, one line each."""
    from mugs.data.sources.convert import verify_beton

    splits = [split for split in ("train", "val") if split in entry.outputs]
    return [line for split in splits for line in verify_beton(entry.output(split), every=every)]


SPEC = StageSpec(
    name="convert",
    config=ConvertConfig,
    entrypoint="stages.convert:run",
    preflight="stages.convert:check_images",
    check="stages.convert:verify_converted_images",
    resources=Resources(gpu=False, cpus_per_rank=16, hours=4.0),
)
