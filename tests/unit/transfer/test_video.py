"""Label propagation, J and F against naive versions and values worked out by hand; DAVIS' layout;
the mini videos.
"""

import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mugs import distributed
from mugs.data.dense.davis import VideoFolder, check_videos, one_hot_patches, read_frame, resize_map
from mugs.data.dense.pictures import label_colors, overlay_labels, side_by_side
from mugs.data.mini.scenes_and_videos import materialize_videos
from mugs.data.sources.base import SourceError
from mugs.models.vit import build_vit
from mugs.transfer.video.config import PropagationRecipe
from mugs.transfer.video.evaluate import evaluate_videos
from mugs.transfer.video.j_and_f import (
    average_scores,
    boundary_accuracy,
    find_boundary,
    region_similarity,
    score_objects,
)
from mugs.transfer.video.propagation import (
    frame_features,
    frame_size,
    harden_labels,
    neighborhood_mask,
    propagate_labels,
    propagate_to_frame,
)

MINI = PropagationRecipe(short_side=64, multiple=16, previous_frames=2, radius=3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos") / "mini"
    materialize_videos(root, videos=3, frames=6)
    return root


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def naive(target, sources, labels, grid, radius, k, temperature):  # type: ignore[no-untyped-def]
    height, width = grid
    out = torch.zeros(height * width, labels.shape[-1])
    for p in range(height * width):
        candidates = []
        for r in range(len(sources)):
            for q in range(height * width):
                if abs(p // width - q // width) <= radius and abs(p % width - q % width) <= radius:
                    similarity = float(target[p] @ sources[r, q])
                    candidates.append((math.exp(similarity / temperature), r, q))
        best = sorted(candidates, reverse=True)[:k]
        total = sum(w for w, _, _ in best)
        for w, r, q in best:
            out[p] += w / total * labels[r, q]
    return out


@pytest.mark.parametrize(("radius", "k"), [(1, 5), (2, 3), (9, 5)])
def test_one_frame_against_loops(radius: int, k: int) -> None:
    grid = (4, 5)
    target, sources = unit(20, 8), unit(3, 20, 8, seed=1)
    labels = torch.rand(3, 20, 4, generator=torch.Generator().manual_seed(2))
    near = neighborhood_mask(*grid, radius, CPU)
    got = propagate_to_frame(target, sources, labels, near, PropagationRecipe(num_neighbours=k))
    torch.testing.assert_close(
        got, naive(target, sources, labels, grid, radius, k, 0.1), rtol=1e-4, atol=1e-5
    )


def test_references_are_the_first_frame_and_the_last_few() -> None:
    """With two previous frames, frame 4 looks at 0, 2 and 3, and frame 1 at 0 alone."""
    grid, frames = (3, 3), [unit(9, 6, seed=s) for s in range(5)]
    first = F.one_hot(torch.arange(9) % 3).float()
    recipe = PropagationRecipe(previous_frames=2, radius=1, num_neighbours=3)
    got = list(propagate_labels(frames, first, grid, recipe))
    soft = {0: first}
    for t, references in ((1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 2, 3])):
        sources, labels = (
            torch.stack([frames[r] for r in references]),
            torch.stack([soft[r] for r in references]),
        )
        soft[t] = naive(frames[t], sources, labels, grid, 1, 3, 0.1)
        torch.testing.assert_close(got[t - 1], soft[t], rtol=1e-4, atol=1e-5)
    assert len(got) == 4


def test_defaults_of_the_protocol() -> None:
    recipe = PropagationRecipe()
    assert frame_size(480, 854, recipe) == (480, 832)
    assert frame_size(854, 480, recipe) == (832, 480)
    assert frame_size(1080, 1920, recipe) == (480, 832)
    with pytest.raises(ValueError, match="long side of 20 x 20 cut to a multiple of 64 is 0"):
        frame_size(20, 20, PropagationRecipe(short_side=30))


def test_each_object_is_stretched_before_the_largest_is_taken() -> None:
    """Object 1 never exceeds the background, but is at its own highest where it is strongest."""
    soft = torch.tensor([[0.9, 0.1], [0.6, 0.4], [1.0, 0.0], [1.0, 0.0]])
    assert harden_labels(soft, (1, 4), 1).tolist() == [[0, 1, 0, 0]]
    constant = torch.tensor([[0.5, 0.0], [0.5, 0.0]])
    assert harden_labels(constant, (1, 2), 1).tolist() == [[0, 0]]


def test_hard_labels_are_enlarged_bilinearly() -> None:
    soft = torch.rand(12, 3, generator=torch.Generator().manual_seed(0))
    maps = F.interpolate(soft.T.reshape(1, 3, 3, 4), size=(24, 32), mode="bilinear")[0]
    stretched = torch.stack([(m - m.min()) / (m - m.min()).max() for m in maps])
    assert torch.equal(harden_labels(soft, (3, 4), 8), stretched.argmax(0).to(torch.uint8))


def test_features_are_normed_patch_tokens() -> None:
    vit = build_vit("vit_mini").eval()
    image = torch.randn(3, 32, 48)
    want = vit.norm(vit.tokens(image[None]))[0, 1:]
    torch.testing.assert_close(frame_features(vit, image), want / want.norm(dim=-1, keepdim=True))


def test_region_by_hand() -> None:
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    assert region_similarity(a, b) == 1.0
    a[:2] = True
    assert region_similarity(a, b) == 0.0
    b[1:3] = True
    assert region_similarity(a, b) == pytest.approx(4 / 12)


def test_boundary_by_hand() -> None:
    mask = np.zeros((5, 5), bool)
    mask[1:3, 1:3] = True
    want = ["11100", "10100", "11100", "00000", "00000"]
    assert ["".join(str(int(v)) for v in row) for row in find_boundary(mask)] == want
    edge = np.zeros((3, 3), bool)
    edge[:, 2] = True
    assert find_boundary(edge).astype(int).tolist() == [[0, 1, 0]] * 3
    assert not find_boundary(np.ones((3, 3), bool)).any()


def naive_boundary(mask: np.ndarray) -> np.ndarray:
    """The rule of the DAVIS evaluators: shifted copies with zeros at the far sides, then both edges
    and the corner.
    """
    right, below, diagonal = (np.zeros_like(mask) for _ in range(3))
    right[:, :-1], below[:-1], diagonal[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
    out = (mask ^ right) | (mask ^ below) | (mask ^ diagonal)
    out[-1] = mask[-1] ^ right[-1]
    out[:, -1] = mask[:, -1] ^ below[:, -1]
    out[-1, -1] = False
    return out


def naive_f(mine: np.ndarray, theirs: np.ndarray) -> float:
    """Matches through discs drawn around every boundary pixel."""
    height, width = mine.shape
    radius = math.ceil(0.008 * math.sqrt(height**2 + width**2))

    def grown(mask: np.ndarray) -> np.ndarray:
        out = np.zeros_like(mask)
        for y, x in np.argwhere(mask):
            for dy in range(-radius, radius + 1):
                for dx in range(-radius, radius + 1):
                    inside = 0 <= y + dy < height and 0 <= x + dx < width
                    if inside and dy * dy + dx * dx <= radius * radius:
                        out[y + dy, x + dx] = True
        return out

    a, b = naive_boundary(mine), naive_boundary(theirs)
    if a.sum() == 0 or b.sum() == 0:
        return float(a.sum() == b.sum())
    precision, recall = (a & grown(b)).sum() / a.sum(), (b & grown(a)).sum() / b.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def blobs(seed: int, height: int, width: int, density: float) -> np.ndarray:
    """Smooth random regions, touching the sides too."""
    noise = torch.rand(1, 1, 6, 9, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(noise, size=(height, width), mode="bicubic")[0, 0] < density).numpy()


@pytest.mark.parametrize("seed", range(12))
def test_j_and_f_against_naive_ones(seed: int) -> None:
    height, width = ((37, 52), (150, 220))[seed % 2]  # tolerances of 1 and 3 pixels
    mine = blobs(seed, height, width, 0.5)
    theirs = blobs(seed + (100 if seed % 3 == 0 else 0), height, width, 0.55)
    assert np.array_equal(find_boundary(mine), naive_boundary(mine))
    assert boundary_accuracy(mine, theirs) == pytest.approx(naive_f(mine, theirs), abs=1e-12)
    pixels, other = set(map(tuple, np.argwhere(mine))), set(map(tuple, np.argwhere(theirs)))
    assert region_similarity(mine, theirs) == pytest.approx(
        len(pixels & other) / len(pixels | other)
    )


def test_f_of_empty_masks() -> None:
    empty, full, one = np.zeros((20, 30), bool), np.ones((20, 30), bool), blobs(0, 20, 30, 0.5)
    assert (
        boundary_accuracy(empty, empty) == 1.0 and boundary_accuracy(full, empty) == 1.0
    )  # neither has a boundary
    assert boundary_accuracy(empty, one) == 0.0 and boundary_accuracy(one, empty) == 0.0
    far = np.zeros((20, 30), bool)
    far[:3, :3] = True
    assert boundary_accuracy(far, far[::-1, ::-1]) == 0.0


def test_the_first_and_the_last_frame_do_not_count() -> None:
    """Two objects in four frames: object 1 is found in frame 1 and lost in 2, object 2 always
    found.
    """
    truth = np.zeros((4, 20, 20), np.uint8)
    truth[:, 2:8, 2:8] = 1
    truth[:, 12:18, 12:18] = 2
    predicted = truth.copy()
    predicted[2][truth[2] == 1] = 0
    predicted[0] = predicted[3] = 0
    table = score_objects(predicted, truth, 2)
    assert table.tolist() == [[0.5, 0.5], [1.0, 1.0]]
    scores = average_scores(np.concatenate([table, [[0.0, 0.3]]]))
    assert (scores.j, scores.f, scores.jf) == pytest.approx((50.0, 60.0, 55.0))


def test_reading(mini: Path) -> None:
    videos = VideoFolder(mini)
    masks = videos.masks("digits_00")
    assert masks.shape == (6, 64, 96) and set(np.unique(masks)) == {0, 1, 2}
    frame = videos.frames("digits_00")[3]
    pixels = read_frame(frame, (64, 96), MINI.mean, MINI.std)
    plain = torch.from_numpy(np.array(Image.open(frame))).permute(2, 0, 1) / 255
    want = (plain - torch.tensor(MINI.mean).view(3, 1, 1)) / torch.tensor(
        [0.228, 0.224, 0.225]
    ).view(3, 1, 1)
    torch.testing.assert_close(pixels, want, rtol=1e-4, atol=1e-4)
    assert read_frame(frame, (32, 48), MINI.mean, MINI.std).shape == (3, 32, 48)


def test_labels_of_patches_are_those_of_their_middle() -> None:
    mask = np.zeros((8, 12), np.uint8)
    # The pixel just below and right of the middle of the patch of rows 0 ... 3, columns 4 ... 7.
    mask[2, 6] = 2
    labels = one_hot_patches(mask, (2, 3), 2)
    assert labels.argmax(1).tolist() == [0, 2, 0, 0, 0, 0] and labels.shape == (6, 3)
    assert resize_map(torch.tensor([[0, 1], [2, 0]], dtype=torch.uint8), 4, 4)[1].tolist() == [
        0,
        0,
        1,
        1,
    ]


MAP = "Annotations/480p/digits_01/00003.png"


def write_map(root: Path, height: int, width: int, number: int) -> None:
    Image.fromarray(np.full((height, width), number, np.uint8)).save(root / MAP)


def remove_frames(root: Path, video: str, keep: int) -> None:
    for path in sorted((root / "JPEGImages" / "480p" / video).iterdir())[keep:]:
        path.unlink()


def other_size(root: Path) -> None:
    """Image and map fit each other, but not the first frame."""
    write_map(root, 64, 95, 0)
    Image.new("RGB", (95, 64)).save(root / "JPEGImages/480p/digits_01/00003.jpg")


# How the videos are changed, and what is said of it; 3 videos with 18 frames are expected.
CHANGES: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "nothing": (lambda root: None, None),
    "file of macOS": (
        lambda root: (root / "JPEGImages/480p/digits_01/._00003.jpg").write_bytes(b"\x00\x05"),
        None,
    ),
    "list": (
        lambda root: (root / "ImageSets/2017/val.txt").unlink(),
        r"ImageSets/2017/val\.txt: no such file",
    ),
    "names": (
        lambda root: (root / "ImageSets/2017/val.txt").write_text("\n"),
        r"val\.txt: names no video",
    ),
    "twice": (
        lambda root: (root / "ImageSets/2017/val.txt").write_text(
            "digits_00\ndigits_01\ndigits_00\n"
        ),
        r"val\.txt: 1 videos are named again: digits_00",
    ),
    "map": (lambda root: (root / MAP).unlink(), r"digits_01/00003\.png: missing, and 0 more"),
    "size": (
        lambda root: write_map(root, 64, 95, 0),
        r"00003\.png: 95 x 64 pixels, its image has 96 x 64",
    ),
    "other size": (other_size, r"00003\.png: not of the size of the first map of digits_01"),
    # By name, it would come last.
    "numbers": (
        lambda root: [
            (root / folder / "480p/digits_01" / f"00003{suffix}").rename(
                root / folder / "480p/digits_01" / f"3{suffix}"
            )
            for folder, suffix in (("JPEGImages", ".jpg"), ("Annotations", ".png"))
        ],
        r"digits_01: numbers of frames have fewer and more digits",
    ),
    "two frames": (lambda root: remove_frames(root, "digits_02", 2), r"digits_02: 2 frames"),
    "three frames": (
        lambda root: remove_frames(root, "digits_02", 3),
        r"15 frames found, 18 expected",
    ),
    "video": (
        lambda root: (root / "ImageSets/2017/val.txt").write_text("digits_00\ndigits_02\n"),
        r"2 videos found, 3 expected, 12 frames found, 18 expected",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_layout_is_checked(mini: Path, tmp_path: Path, change: str) -> None:
    make, words = CHANGES[change]
    shutil.copytree(mini, tmp_path / "videos")
    make(tmp_path / "videos")
    with pytest.raises(SourceError, match=words) if words else nullcontext():
        check_videos(VideoFolder(tmp_path / "videos"), 3, 18, threads=1, report=print)


def test_ranks_share_the_videos(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    vit, videos = build_vit("vit_mini"), VideoFolder(mini)
    alone = evaluate_videos(vit, videos, MINI, CPU, out_dir=tmp_path / "one", num_pictures=2)
    assert 0 < alone.j < 100 and alone.jf == pytest.approx((alone.j + alone.f) / 2)
    masks = sorted(
        p.relative_to(tmp_path / "one") for p in (tmp_path / "one" / "masks").rglob("*.png")
    )
    assert len(masks) == 18 and len(list((tmp_path / "one" / "pictures").iterdir())) == 2
    written = np.array(Image.open(tmp_path / "one" / "masks" / "digits_01" / "00000.png"))
    assert np.array_equal(written, videos.masks("digits_01")[0])

    sent: list[torch.Tensor] = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(
            distributed,
            "all_gather_rows",
            lambda rows: sent.append(rows) or torch.cat([rows, rows]),
        )
        evaluate_videos(vit, videos, MINI, CPU, out_dir=tmp_path / "two")
    tables = [rows[0] for rows in sent if rows.ndim == 4]
    assert [t.isnan().all(dim=(1, 2)).tolist() for t in tables] == [
        [False, True, False],
        [True, False, True],
    ]
    merged = torch.where(tables[0].isnan(), tables[1], tables[0]).flatten(0, 1)
    assert average_scores(merged.numpy()) == alone


def test_a_still_video_keeps_its_masks(tmp_path: Path) -> None:
    """Nothing moves: what is propagated is the first map, as far as patches can tell."""
    materialize_videos(tmp_path / "v", videos=1, frames=3)
    videos = VideoFolder(tmp_path / "v")
    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        first = (tmp_path / "v" / kind / "480p" / "digits_00" / f"00000.{suffix}").read_bytes()
        for number in (1, 2):
            (tmp_path / "v" / kind / "480p" / "digits_00" / f"0000{number}.{suffix}").write_bytes(
                first
            )
    torch.manual_seed(0)
    recipe = PropagationRecipe(short_side=256, multiple=16, num_neighbours=1, radius=2)
    found = evaluate_videos(build_vit("vit_mini"), videos, recipe, CPU, out_dir=tmp_path)
    assert found.j > 75


def test_colors() -> None:
    """The first colors of the public palette."""
    first = [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [128, 128, 0],
        [0, 0, 128],
        [128, 0, 128],
        [0, 128, 128],
    ]
    assert label_colors()[:7].tolist() == first and label_colors()[15].tolist() == [192, 128, 128]
    image = np.full((1, 3, 3), 100, np.uint8)
    labels = np.array([[0, 1, 255]], np.uint8)
    assert overlay_labels(image, labels, first=0).tolist() == [
        [[100] * 3, [117, 40, 40], [100] * 3]
    ]
    assert overlay_labels(image, labels, first=1).tolist() == [
        [[117, 40, 40], [40, 117, 40], [100] * 3]
    ]
    assert side_by_side([image, image]).shape == (1, 10, 3)


def test_a_later_object_is_not_scored(
    mini: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(mini, tmp_path / "videos")
    write_map(tmp_path / "videos", 64, 96, 3)
    assert VideoFolder(tmp_path / "videos").masks("digits_01").max() == 3
    (line,) = caplog.messages
    assert line.startswith("digits_01: objects up to 3 appear later; those above 2")
