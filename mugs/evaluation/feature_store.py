"""Frozen features on disk, computed once and used by many evaluations.

    <folder>/<split>/shard_00000.safetensors    n images in order: cls (n, blocks, D),
                                                patch_mean (n, D), labels (n,)
                     index.json                 written last: what the shards hold

All features are taken after the final LayerNorm. A shard is computed by one rank and renamed into
place when it is complete, so a restarted run, on any number of ranks, computes only the missing
shards.
"""

import json
import logging
import time
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
from mugs.evaluation.config import Feature
from mugs.models.vit import ViT
from pipeline.control import Control
from pipeline.files import follow_umask, replace_atomically, write_atomic

logger = logging.getLogger(__name__)
FORMAT = 1  # of the files; other versions are refused
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class FeatureStoreError(ValueError):
    """Stored features cannot be used; the message names the file and the reason."""


@dataclass(frozen=True, kw_only=True)
class StoreLayout:
    """What a split holds: `images` of data set `fingerprint`, and how they were preprocessed."""

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
        """Return the images of a shard; the last one may be smaller."""
        return range(shard * self.shard_images, min((shard + 1) * self.shard_images, self.images))


def shard_path(folder: Path, shard: int) -> Path:
    """Return the path of a shard, for example `shard_00012.safetensors`."""
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
    control: Control | None = None,
) -> None:
    """Compute the missing shards, each on one rank, then write the index.

    `control` is told of every shard that is on disk: the next attempt goes on from there.

    Raises:
        FeatureStoreError: The backbone has fewer blocks than wanted, or features are not finite.
    """
    if layout.blocks > len(vit.blocks):
        raise FeatureStoreError(
            f"blocks: {layout.blocks} wanted, the backbone has {len(vit.blocks)}"
        )
    is_main = distributed.is_main()
    if is_main:
        # Remove what is no shard of this layout: unfinished files and those of other layouts. The
        # index goes too, so that none stands beside an incomplete set of shards.
        folder.mkdir(parents=True, exist_ok=True)
        shards = {shard_path(folder, shard) for shard in range(layout.shards)}
        for path in set(folder.iterdir()) - shards:
            path.unlink()
    # No rank may write before the folder is clean: its temporary file would be removed.
    distributed.barrier()

    own_shards = range(layout.shards)[distributed.rank() :: distributed.world_size()]
    with closing(
        Progress(
            f"features {folder.name}",
            len(own_shards),
            unit="shards",
            path=progress_path,
            quiet=not is_main,
        )
    ) as progress:
        for done, shard in enumerate(own_shards, 1):
            ids = layout.ids(shard)
            if not _is_good(shard_path(folder, shard), layout, len(ids)):
                tensors = _compute(vit, source, ids, layout, device, batch_size, threads)
                began = time.monotonic()
                with replace_atomically(shard_path(folder, shard)) as temporary:
                    save_file(tensors, temporary, metadata={"layout": json.dumps(asdict(layout))})
                    follow_umask(temporary)  # safetensors writes files that only the owner reads
                if control is not None:
                    control.saved(done, time.monotonic() - began)
            progress.update(done, items=len(ids))

    # The index means "complete": after all ranks' shards, and before any rank goes on to read it.
    distributed.barrier()
    if is_main:
        write_atomic(folder / "index.json", json.dumps(asdict(layout), indent=1))
    distributed.barrier()


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
    """Compute the tensors of one shard."""
    batches = iter_eval_batches(
        source,
        resize=layout.resize,
        crop=layout.crop,
        batch_size=batch_size,
        indices=ids,
        threads=threads,
        device=device,
    )
    classes, means, labels = [], [], []
    for images, label, _ in batches:
        outputs = vit.last_blocks(images, layout.blocks)
        classes.append(torch.stack([tokens[:, 0] for tokens in outputs], dim=1))
        means.append(outputs[-1][:, 1:].mean(dim=1))
        labels.append(label)

    # Checked after the conversion: a finite fp32 value may overflow in fp16.
    tensors = {"labels": torch.cat(labels)}
    for name, values in (("cls", classes), ("patch_mean", means)):
        tensors[name] = torch.cat(values).to(DTYPES[layout.dtype])
        if not torch.isfinite(tensors[name]).all():
            raise FeatureStoreError(
                f"{name} of images {ids.start} to {ids.stop - 1} is not finite in {layout.dtype}"
            )
    return {name: value.cpu() for name, value in tensors.items()}


def _is_good(path: Path, layout: StoreLayout, rows: int) -> bool:
    """Whether a shard exists, is complete and has this layout; logs a warning if unreadable."""
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            same_layout = json.loads((file.metadata() or {})["layout"]) == asdict(layout)
            return bool(same_layout and file.get_slice("cls").get_shape()[0] == rows)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        logger.warning("%s: not a readable shard of features (%s); computing it again", path, error)
        return False


@dataclass(frozen=True)
class FeatureStore:
    """Features of a finished `features` run, by split.

    >>> values, labels = FeatureStore(folder).load("train", "cls")  # (N, D) fp32 and (N,)
    """

    folder: Path

    def layout(self, split: str) -> StoreLayout:
        """Read what a split holds.

        Raises:
            FeatureStoreError: There is no usable index.
        """
        path = self.folder / split / "index.json"
        try:
            layout = StoreLayout(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise FeatureStoreError(f"{path}: not an index of stored features ({error})") from error
        if layout.format != FORMAT:
            raise FeatureStoreError(f"{path}: format {layout.format}, this code reads {FORMAT}")
        return layout

    def load(self, split: str, name: Feature) -> tuple[Tensor, Tensor]:
        """Read features (N, D') in fp32 and labels (N,) of all images, in the data set's order.

        The features are those of `build_feature_function`.
        """
        layout = self.layout(split)
        if name == "last4_cls" and layout.blocks < 4:
            raise FeatureStoreError(
                f"{self.folder / split}: holds {layout.blocks} blocks, last4_cls needs 4"
            )
        # Filled shard by shard: concatenating at the end would need twice the memory.
        values: Tensor | None = None
        labels = torch.empty(layout.images, dtype=torch.int64)
        for shard in range(layout.shards):
            ids = layout.ids(shard)
            path = shard_path(self.folder / split, shard)
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
    """Put a feature together as `build_feature_function` does, from the tensors of a shard."""
    mean: Tensor = file.get_tensor("patch_mean").float()
    if name == "patch_mean":
        return mean
    classes: Tensor = file.get_tensor("cls").float()
    if name == "cls":
        return classes[:, -1]
    if name == "last4_cls":
        return classes[:, -4:].flatten(1)
    return torch.stack([classes[:, -1], mean], dim=-1).flatten(1)
