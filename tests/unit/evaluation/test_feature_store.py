"""Stored features equal computed ones, are resumed shard by shard, and are refused when they are
not what they say.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mugs.data.loading.evaluation import iter_eval_batches
from mugs.data.sources.folder import FolderSource
from mugs.engine.control import NullControl
from mugs.evaluation import feature_store
from mugs.evaluation.config import Feature
from mugs.evaluation.feature_store import (
    FeatureStore,
    FeatureStoreError,
    StoreLayout,
    extract_split,
    shard_path,
)
from mugs.evaluation.features import build_feature_function
from mugs.models.config import ViTConfig
from mugs.models.vit import ViT, build_vit

CPU = torch.device("cpu")
NAMES: tuple[Feature, ...] = ("cls", "patch_mean", "last4_cls", "cls_patchmean")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FolderSource:
    root = tmp_path_factory.mktemp("images")
    for index in range(11):
        folder = root / f"class{index % 3}"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (20, 24), (20 * index, 255 - 20 * index, 7)).save(
            folder / f"{index:02d}.png"
        )
    return FolderSource(root)


@pytest.fixture(scope="module")
def vit() -> ViT:
    torch.manual_seed(0)
    return build_vit(
        ViTConfig(embed_dim=16, depth=5, num_heads=2, patch_size=8, image_size=16)
    ).eval()


def layout(source: FolderSource) -> StoreLayout:
    return StoreLayout(
        images=len(source), fingerprint=source.fingerprint, resize=18, crop=16, shard_images=4
    )


def extract(
    vit: ViT,
    source: FolderSource,
    folder: Path,
    wanted: StoreLayout | None = None,
    control: NullControl | None = None,
) -> FeatureStore:
    wanted = wanted or layout(source)
    extract_split(
        vit,
        source,
        folder / "train",
        wanted,
        device=CPU,
        batch_size=3,
        threads=1,
        control=control,
    )
    return FeatureStore(folder)


class NoteSaves(NullControl):
    """Note which shards were on disk when one was said to be saved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saves: list[int] = []

    def saved(self, step: int, seconds: float) -> None:
        assert seconds >= 0
        assert len(list(self.folder.glob("shard_*.safetensors"))) >= step
        self.saves.append(step)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("fp16", 3e-3)])
def test_they_are_the_features_of_the_backbone(
    vit: ViT, source: FolderSource, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    store = extract(vit, source, tmp_path, replace(layout(source), dtype=dtype))
    ((images, labels, _),) = iter_eval_batches(source, resize=18, crop=16, batch_size=11)
    for name in NAMES:
        values, stored_labels = store.load("train", name)
        torch.testing.assert_close(
            values, build_feature_function(vit, name)(images).detach(), atol=tolerance, rtol=0
        )
        assert torch.equal(stored_labels, labels) and values.dtype == torch.float32
    assert {load_file(p)["cls"].dtype for p in (tmp_path / "train").glob("*.safetensors")} == {
        feature_store.DTYPES[dtype]
    }


def test_only_missing_and_bad_shards_are_computed(
    vit: ViT,
    source: FolderSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    meetings: list[set[Path]],
) -> None:
    whole, _ = extract(vit, source, tmp_path).load("train", "cls")
    folder = tmp_path / "train"
    shard_path(folder, 1).unlink()
    os.truncate(shard_path(folder, 2), 100)
    (folder / ".shard_00001.safetensors.0a.tmp").write_bytes(b"begun")
    shard_path(folder, 3).write_bytes(b"of an earlier, finer cut")
    computed: list[range] = []
    compute = feature_store._compute

    def counted(
        vit: ViT, source: FolderSource, ids: range, *rest: object
    ) -> dict[str, torch.Tensor]:
        computed.append(ids)
        return compute(vit, source, ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(feature_store, "_compute", counted)
    control = NoteSaves(folder)
    store = extract(vit, source, tmp_path, control=control)
    assert computed == [range(4, 8), range(8, 11)]
    assert control.saves == [2, 3], "what it computed, for the decision whether it may start again"
    assert torch.equal(store.load("train", "cls")[0], whole)
    shards = [f"shard_0000{i}.safetensors" for i in range(3)]
    met = [sorted(p.name for p in found if p.parent == folder) for found in meetings[3:]]
    assert met == [shards[::2], shards, ["index.json", *shards]], "the ranks wait for each other"
    extract(vit, source, tmp_path, replace(layout(source), fingerprint="other images"))
    assert len(computed) == 5


def test_shards_are_divided_over_the_ranks(
    vit: ViT, source: FolderSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank after the other, here: each leaves the shards of the others alone."""
    alone, _ = extract(vit, source, tmp_path / "alone").load("train", "cls_patchmean")
    monkeypatch.setattr(feature_store.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(feature_store.distributed, "rank", lambda: 1)
    monkeypatch.setattr(feature_store.distributed, "is_main", lambda: False)
    store = extract(vit, source, tmp_path)
    assert [p.name for p in (tmp_path / "train").iterdir()] == ["shard_00001.safetensors"]
    monkeypatch.undo()
    extract(vit, source, tmp_path)
    assert torch.equal(store.load("train", "cls_patchmean")[0], alone)


def test_what_cannot_be_used_is_named(vit: ViT, source: FolderSource, tmp_path: Path) -> None:
    with pytest.raises(FeatureStoreError, match="blocks: 6 wanted, the backbone has 5"):
        extract(vit, source, tmp_path, replace(layout(source), blocks=6))
    store = extract(vit, source, tmp_path, replace(layout(source), blocks=2))
    with pytest.raises(FeatureStoreError, match="holds 2 blocks, last4_cls needs 4"):
        store.load("train", "last4_cls")
    with pytest.raises(FeatureStoreError, match=r"val/index\.json: not an index"):
        store.load("val", "cls")
    path = shard_path(tmp_path / "train", 1)
    tensors = load_file(path)
    save_file({name: value[:-1] for name, value in tensors.items()}, path)
    with pytest.raises(FeatureStoreError, match="shard_00001"):
        store.load("train", "cls")
    index = tmp_path / "train" / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "format": 9}))
    with pytest.raises(FeatureStoreError, match="format 9, this code reads 1"):
        store.load("train", "cls")


def test_features_too_large_for_fp16_are_refused(
    source: FolderSource, tmp_path: Path, vit: ViT
) -> None:
    large = build_vit(vit.config).eval()
    torch.nn.init.constant_(large.norm.weight, 1e6)
    with pytest.raises(FeatureStoreError, match="cls of images 0 to 3 is not finite in fp16"):
        extract(large, source, tmp_path, replace(layout(source), dtype="fp16"))


def test_fewer_blocks_than_a_feature_wants() -> None:
    shallow = build_vit(ViTConfig(embed_dim=16, depth=3, num_heads=2, patch_size=8, image_size=16))
    with pytest.raises(ValueError, match="outputs of 4 blocks are wanted, the backbone has 3"):
        build_feature_function(shallow, "last4_cls")(torch.zeros(1, 3, 16, 16))
