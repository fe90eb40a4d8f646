"""Frozen features on disk, computed once: class tokens of the last blocks and patch means, in shards of images.

    <folder>/<split>/shard_00000.safetensors    cls (n, blocks, D), patch_mean (n, D), labels (n,), of n images in order
                     index.json                 written last: what the shards hold
Every value is after the final LayerNorm. A shard is computed by one rank and renamed into place when it is complete, so
a run that starts again, on any number of ranks, computes only what is missing.
"""

import json
import logging
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mugs import distributed
from mugs.data.loading.evaluation import iter_eval_batches
from mugs.data.sources.base import Source
from mugs.engine.progress import Progress
from mugs.evaluation.features import Feature
from mugs.models.vit import ViT
from pipeline.files import replace_atomically, write_atomic

logger = logging.getLogger(__name__)
FORMAT = 1
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class FeatureStoreError(ValueError):
    """Stored features cannot be used; the message names the file and the reason."""


@dataclass(frozen=True, kw_only=True)
class StoreLayout:
    """What a split holds: `images` of data set `fingerprint`, and how they were seen."""

    images: int
    fingerprint: str
    blocks: int = 4
    dtype: Literal["fp32", "fp16"] = "fp32"
    resize: int = 256
    crop: int = 224
    shard_images: int = 16384
    format: int = FORMAT

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.images // self.shard_images)

    def ids(self, shard: int) -> range:
        """Images of a shard."""
        return range(shard * self.shard_images, min((shard + 1) * self.shard_images, self.images))


def shard_path(folder: Path, shard: int) -> Path:
    """`shard_00012.safetensors`."""
    return folder / f"shard_{shard:05d}.safetensors"


def extract_split(
    vit: ViT,
    source: Source,
    folder: Path,
    layout: StoreLayout,
    *,
    device: torch.device,
    batch_size: int,
    threads: int,
    progress_path: Path | None = None,
) -> None:
    """Compute the shards that are missing, each on one rank, then write the index.

    Raises FeatureStoreError for more blocks than the backbone has, and for features that are not finite.
    """
    if layout.blocks > len(vit.blocks):
        raise FeatureStoreError(
            f"blocks: {layout.blocks} wanted, the backbone has {len(vit.blocks)}"
        )
    main = distributed.is_main()
    if main:
        _remove_others(folder, layout)
    distributed.barrier()
    mine = range(layout.shards)[distributed.rank() :: distributed.world_size()]
    bar = Progress(
        f"features {folder.name}", len(mine), unit="shards", path=progress_path, quiet=not main
    )
    with closing(bar) as progress:
        for done, shard in enumerate(mine, 1):
            ids = layout.ids(shard)
            if not _is_good(shard_path(folder, shard), layout, len(ids)):
                tensors = _compute(vit, source, ids, layout, device, batch_size, threads)
                with replace_atomically(shard_path(folder, shard)) as temporary:
                    save_file(tensors, temporary, metadata={"layout": json.dumps(asdict(layout))})
            progress.update(done, items=len(ids))
    distributed.barrier()
    if main:
        write_atomic(folder / "index.json", json.dumps(asdict(layout), indent=1))
    distributed.barrier()


def _remove_others(folder: Path, layout: StoreLayout) -> None:
    """Remove what is none of this layout's shards: what was begun and not finished, or cut another way."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in set(folder.iterdir()) - {
        shard_path(folder, shard) for shard in range(layout.shards)
    }:
        path.unlink()


@torch.no_grad()
def _compute(
    vit: ViT,
    source: Source,
    ids: range,
    layout: StoreLayout,
    device: torch.device,
    batch_size: int,
    threads: int,
) -> dict[str, Tensor]:
    batches = iter_eval_batches(
        source,
        resize=layout.resize,
        crop=layout.crop,
        batch_size=batch_size,
        indices=ids,
        threads=threads,
    )
    classes, means, labels = [], [], []
    for images, label, _ in batches:
        outputs = vit.last_blocks(images.to(device), layout.blocks)
        classes.append(torch.stack([tokens[:, 0] for tokens in outputs], dim=1))
        means.append(outputs[-1][:, 1:].mean(dim=1))
        labels.append(label)
    dtype = DTYPES[layout.dtype]
    found = {"cls": torch.cat(classes), "patch_mean": torch.cat(means)}
    for name, value in found.items():
        if not torch.isfinite(value.to(dtype)).all():
            raise FeatureStoreError(
                f"{name} of images {ids.start} to {ids.stop - 1} is not finite in {layout.dtype}"
            )
    return {
        **{name: value.to("cpu", dtype) for name, value in found.items()},
        "labels": torch.cat(labels),
    }


def _is_good(path: Path, layout: StoreLayout, rows: int) -> bool:
    """Whether a shard is there, of this layout, and whole; one that is not is named and computed again."""
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            same = json.loads((file.metadata() or {})["layout"]) == asdict(layout)
            good = same and file.get_slice("cls").get_shape()[0] == rows
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        logger.warning(
            "%s: not a readable shard of features (%s); it is computed again", path, error
        )
        return False
    return bool(good)


class FeatureStore:
    """Features of a finished `features` run, by split.

    >>> values, labels = FeatureStore(folder).load("train", "cls")     # (N, D) fp32, (N,), in the data set's order
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def layout(self, split: str) -> StoreLayout:
        """What a split holds. Raises FeatureStoreError when there is none."""
        path = self.folder / split / "index.json"
        try:
            layout = StoreLayout(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise FeatureStoreError(f"{path}: not an index of stored features ({error})") from error
        if layout.format != FORMAT:
            raise FeatureStoreError(f"{path}: format {layout.format}, this code reads {FORMAT}")
        return layout

    def load(self, split: str, name: Feature) -> tuple[Tensor, Tensor]:
        """Features (N, D') in fp32 and labels (N,) of all images, as `backbone_feature` computes them."""
        layout = self.layout(split)
        if name == "last4_cls" and layout.blocks < 4:
            raise FeatureStoreError(
                f"{self.folder / split}: holds {layout.blocks} blocks, last4_cls needs 4"
            )
        values: Tensor | None = None
        labels = torch.empty(layout.images, dtype=torch.int64)
        for shard in range(layout.shards):
            ids, path = layout.ids(shard), shard_path(self.folder / split, shard)
            try:
                with safe_open(path, framework="pt") as file:
                    part = _feature(file, name)
                    labels[ids.start : ids.stop] = file.get_tensor("labels")
                values = torch.empty(layout.images, part.shape[1]) if values is None else values
                values[ids.start : ids.stop] = part
            except (OSError, SafetensorError, RuntimeError) as error:
                raise FeatureStoreError(
                    f"{path}: not a readable shard of features ({error})"
                ) from error
        assert values is not None
        return values, labels


def _feature(file: Any, name: Feature) -> Tensor:
    mean: Tensor = file.get_tensor("patch_mean").float()
    if name == "patch_mean":
        return mean
    classes: Tensor = file.get_tensor("cls").float()
    if name == "cls":
        return classes[:, -1]
    if name == "last4_cls":
        return classes[:, -4:].flatten(1)
    return torch.stack([classes[:, -1], mean], dim=-1).flatten(1)
