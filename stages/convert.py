"""Images -> FFCV files (`.beton`) of the train and validation split."""

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

        def report(done: int, total: int, progress: Progress = progress) -> None:
            progress.total = total
            progress.update(done, items=done - progress.done)

        convert_to_beton(
            source, target, allow_bad=cfg.allow_bad, threads=cfg.threads, report=report
        )
        progress.close()
        outputs |= {split: target, f"{split}_sidecar": target.with_name(target.name + ".json")}
    return StageOutput(
        outputs=outputs, info={"dataset": cfg.dataset, "num_classes": len(sources["train"].classes)}
    )


def preflight(cfg: ConvertConfig, inputs: Mapping[str, StageConfig]) -> tuple[str, float]:
    """Numbers of images and classes, and the bytes of the images.

    Raises SourceError, ValueError as `run` would, except for images that are damaged within.
    """
    if cfg.train_dir in BUILTIN:
        return "images that come with scikit-learn", 0.0
    sources = open_data_set(cfg)
    refuse_cut_short(sources.values(), cfg)
    counts = [f"{len(source):,} {split} images" for split, source in sources.items()]
    size = sum(sampled_bytes(source) for source in sources.values())
    words = (
        f"{', '.join(counts)} of {len(sources['train'].classes)} classes, about {size / 1e9:.1f} GB"
    )
    return words, size


def refuse_cut_short(sources: "Iterable[FolderSource]", cfg: ConvertConfig) -> None:
    """Raise SourceError, in one line, with the images of all splits that were cut short."""
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


def sampled_bytes(source: "FolderSource") -> float:
    """Bytes of all images, by the mean of about a thousand."""
    sizes = [source.size(index) for index in range(0, len(source), max(1, len(source) // 1000))]
    return len(source) * sum(sizes) / len(sizes)


def verify_converted_images(entry: ManifestEntry, every: int) -> list[str]:
    """What is wrong with every `every`-th image of the converted files, a line each."""
    from mugs.data.sources.convert import verify_beton

    splits = [split for split in ("train", "val") if split in entry.outputs]
    return [line for split in splits for line in verify_beton(entry.output(split), every=every)]


SPEC = StageSpec(
    name="convert",
    config=ConvertConfig,
    entrypoint="stages.convert:run",
    preflight="stages.convert:preflight",
    check="stages.convert:verify_converted_images",
    resources=Resources(gpu=False, cpus_per_rank=16, hours=4.0),
)
