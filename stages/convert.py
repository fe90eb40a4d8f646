"""Image folders -> FFCV files (`.beton`) of the train and validation split."""

from pathlib import Path

from pydantic import Field

from pipeline.manifest import ManifestEntry
from pipeline.spec import Runtime, StageConfig, StageContext, StageOutput

BUILTIN_DIGITS = "builtin:sklearn_digits"


class ConvertConfig(StageConfig):
    """What the data set is. Its name and counts are its identity; where it lies does not enter the run id."""

    dataset: str = Field(min_length=1)
    num_classes: int | None = None
    num_train_images: int | None = None
    num_val_images: int | None = None
    allow_bad: tuple[str, ...] = ()
    train_dir: str | None = Runtime(None, required_at_run=True)
    val_dir: str | None = Runtime(None, required_at_run=True)
    threads: int = Runtime(4, ge=1)


def run(ctx: StageContext, cfg: ConvertConfig) -> StageOutput:
    """Convert both splits on rank 0; outputs `train` and `val` (.beton) and their sidecars."""
    from mugs.data.convert import convert_folder
    from mugs.engine.progress import Progress

    outputs: dict[str, Path] = {}
    classes: list[str] = []
    for split, folder, count in (
        ("train", cfg.train_dir, cfg.num_train_images),
        ("val", cfg.val_dir, cfg.num_val_images),
    ):
        source = resolve(folder, split, ctx.run_dir)
        target = ctx.run_dir / f"{split}.beton"
        progress = Progress(f"convert {split}", 1, unit="images", path=ctx.run_dir / "progress.json")

        def report(done: int, total: int, progress: Progress = progress) -> None:
            progress.total = total
            progress.update(done, items=done - progress.done)

        sidecar = convert_folder(source, target, allow_bad=cfg.allow_bad, threads=cfg.threads, progress=report)
        progress.close()
        check_count(source, "images", len(sidecar.names), count)
        check_count(source, "classes", len(sidecar.classes), cfg.num_classes)
        if split == "val" and sidecar.classes != classes:
            raise ValueError(f"{source}: its classes differ from those of the train split")
        classes = sidecar.classes
        outputs |= {split: target, f"{split}_sidecar": target.with_name(target.name + ".json")}
    return StageOutput(outputs=outputs, info={"dataset": cfg.dataset, "num_classes": len(classes)})


def check(entry: ManifestEntry, every: int) -> list[str]:
    """What is wrong with every `every`-th image of the converted files, a line each."""
    from mugs.data.convert import verify

    return [line for split in ("train", "val") for line in verify(entry.output(split), every=every)]


def resolve(folder: str | None, split: str, run_dir: Path) -> Path:
    """The folder to convert; the built-in digits are first written as JPEG files below the run's folder."""
    if folder is None:
        raise ValueError(f"{split}_dir is not set")
    if folder.startswith(BUILTIN_DIGITS):
        from mugs.data.digits import materialize_digits

        images = run_dir / "images"
        materialize_digits(images)
        return images / split
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"{split}_dir: {path} is not a folder")
    return path


def check_count(source: Path, what: str, found: int, expected: int | None) -> None:
    """Refuse a folder that does not hold what the data set is declared to hold."""
    if expected is not None and found != expected:
        raise ValueError(f"{source}: {found} {what} found, the configuration declares {expected}")
