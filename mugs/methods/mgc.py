"""MGC: contrast of tokens that show the same piece of an image, at three granularities (arXiv
2407.02014).

Two crops overlap. Tokens of one crop are compared with those of the other that show the same piece:
patches (part), means of 2 x 2 patches (object) and of 7 x 7 patches (scene). The class token is not
trained. Negatives are all other sampled tokens of the batch. Where to look:

    which tokens belong together     mugs/methods/mgc_pairs.py
    loss                             mugs/losses/batch_info_nce.py
    EMA of the teacher               `Mgc.before_forward`; it moves before its own pass (released)

Shapes: N images of a rank, L patches, D width, M pairs of a level.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mugs.data.loading.batch import Views
from mugs.data.views.annotate import Annotate
from mugs.losses.batch_info_nce import batch_info_nce_loss
from mugs.methods.annotations import annotate_geometry
from mugs.methods.base import Method, Network
from mugs.methods.config import MgcConfig
from mugs.methods.mgc_pairs import PairRule, Pairs, StrideRule, find_pairs
from mugs.methods.teacher import update_ema
from mugs.models.batch_norm import AllRanksBatchNorm
from mugs.models.heads import build_mlp
from mugs.models.vit import ViT, build_vit, init_weights
from mugs.weights.backbone_file import load_strictly, remove_wrappers

LEVELS = ("part", "object", "scene")

# The beginnings of our names, and of those in released checkpoints, whatever the windows are.
RELEASED_NAMES = {
    "student.backbone": "base_encoder",
    "teacher.backbone": "momentum_encoder",
    "student.projectors.part": "projector_patch",
    "student.projectors.object": "projector_divide_32",
    "student.projectors.scene": "projector_divide_112",
    "student.predictors.part": "predictor_patch",
    "student.predictors.object": "predictor_divide_32",
    "student.predictors.scene": "predictor_divide_112",
    "teacher.projectors.part": "projector_patch_momentum",
    "teacher.projectors.object": "projector_divide_momentum_32",
    "teacher.projectors.scene": "projector_divide_momentum_112",
}
# Batch normalization keeps these in released checkpoints, and nothing uses them.
RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class MgcNetwork(Network):
    """A backbone, and for each level a projector; the student has a predictor after each."""

    def __init__(self, config: MgcConfig, *, drop_path: float, with_predictors: bool) -> None:
        super().__init__(build_vit(config.arch, drop_path=drop_path))
        self.windows = dict(zip(LEVELS, config.windows, strict=True))
        width, hidden, out = self.backbone.embed_dim, config.head_hidden, config.head_out

        def build_heads(*widths: int) -> nn.ModuleDict:
            return nn.ModuleDict(
                {
                    level: build_mlp(
                        list(widths), bias=False, norm="batch", activation="relu", norm_output=True
                    ).apply(init_weights)
                    for level in LEVELS
                }
            )

        self.projectors = build_heads(width, hidden, hidden, out)
        self.predictors = build_heads(out, hidden, out) if with_predictors else None

    def forward(self, crops: Tensor, cells: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return rows (2, N * M, out) of each level.

        Args:
            crops: (2, N, 3, S, S).
            cells: which cells of the two crops are compared, (2, N, M) for each level.
        """
        self.set_crop_uniforms(0, 2)
        patches = self.patches(crops.flatten(0, 1))
        patches = patches.view(2, -1, *patches.shape[1:])
        return {level: self._rows(level, patches, chosen) for level, chosen in cells.items()}

    def patches(self, images: Tensor) -> Tensor:
        """Return the patch tokens (N, L, D) after the final LayerNorm."""
        tokens: Tensor = self.backbone.norm(self.backbone.tokens(images)[:, 1:])
        return tokens

    def _rows(self, level: str, patches: Tensor, cells: Tensor) -> Tensor:
        rows = []
        for tokens, chosen in zip(patches, cells, strict=True):
            pooled = pool_patches(tokens, self.windows[level])
            row = pooled.gather(1, chosen[..., None].expand(-1, -1, pooled.shape[-1])).flatten(0, 1)
            # Crop by crop: batch normalization must not mix the two.
            row = self.projectors[level](row)
            rows.append(row if self.predictors is None else self.predictors[level](row))
        return torch.stack(rows)


def pool_patches(patches: Tensor, window: int) -> Tensor:
    """Return means (N, (S / window)^2, D) of windows of patches (N, S^2, D), without overlap."""
    if window == 1:
        return patches
    num, count, width = patches.shape
    side = int(count**0.5)
    grid = patches.transpose(1, 2).reshape(num, width, side, side)
    return F.avg_pool2d(grid, window).flatten(2).transpose(1, 2)


class Mgc(Method):
    """The method as the engine sees it; `mugs.methods.base.Method` explains the calls."""

    config: MgcConfig
    student: MgcNetwork
    teacher: MgcNetwork

    def __init__(self, config: MgcConfig, *, seed: int = 0) -> None:
        self.config = config
        pairs = sum(config.num_pairs)
        self.loss_weights = {
            level: num / pairs for level, num in zip(LEVELS, config.num_pairs, strict=True)
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.student = MgcNetwork(config, drop_path=config.drop_path, with_predictors=True)
            self.teacher = MgcNetwork(config, drop_path=0.0, with_predictors=False)
        copy_start(self.teacher, self.student, linear=config.teacher_init == "copy")
        self.teacher.requires_grad_(False)
        if config.final_norm_bias == "frozen":
            self.student.backbone.norm.bias.requires_grad_(False)
        self.extra_state = nn.Module()  # nothing besides the networks
        self.rules = build_pair_rules(config, self.student.backbone)

    @property
    def annotate(self) -> Annotate:
        """Return what is drawn of each image besides its views."""
        return annotate_geometry

    def compute_losses(
        self, student: Callable[..., dict[str, Tensor]], views: Views, epoch: int
    ) -> tuple[dict[str, Tensor], None]:
        """Return the loss of each level, the sum of both directions."""
        boxes, flips = views.extras["boxes"], views.extras["flips"]
        pairs = {level: find_pairs(boxes, flips, rule) for level, rule in self.rules.items()}
        return self.compare(student, views.large, pairs), None

    def compare(
        self, student: Callable[..., dict[str, Tensor]], crops: Tensor, pairs: dict[str, Pairs]
    ) -> dict[str, Tensor]:
        """Return the losses of two crops (2, N, 3, S, S) of each image and these pairs."""
        cells = {level: found.cells for level, found in pairs.items()}
        with torch.no_grad():
            keys: dict[str, Tensor] = self.teacher(crops, cells)
        queries = student(crops, cells)
        return {
            level: self._loss(queries[level], keys[level], found.shares.flatten())
            for level, found in pairs.items()
        }

    def _loss(self, queries: Tensor, keys: Tensor, shares: Tensor) -> Tensor:
        """Contrast rows of crop 1 with those of crop 2, and the other way round."""
        config = self.config
        options = {
            "weights_n": shares if config.overlap_weighting else None,
            "ignored_n": shares == 0 if config.padding == "ignored" else None,
        }
        there = batch_info_nce_loss(queries[0], keys[1], config.temperature, **options)
        back = batch_info_nce_loss(queries[1], keys[0], config.temperature, **options)
        return there + back

    def before_forward(self, momentum: float) -> None:
        """Move the teacher towards the student as it is before the step (released)."""
        device = self.student.backbone.cls_token.device
        update_ema(self.teacher, self.student, momentum, torch.ones((), device=device).bool())

    def after_step(self, momentum: float, valid: Tensor) -> None:
        """Do nothing: the teacher moves in `before_forward`."""

    def load_released(self, checkpoint: Mapping[str, Any]) -> None:
        """Continue from the networks of a released full checkpoint.

        Raises:
            WeightsError: names the keys that are missing or that the networks do not have.
        """
        ours = {released: name for name, released in RELEASED_NAMES.items()}
        state = {}
        for key, value in checkpoint["state_dict"].items():
            if not key.endswith(RUNNING_STATISTICS):
                start, _, rest = remove_wrappers(key).partition(".")
                state[f"{ours.get(start, start)}.{rest}"] = value
        load_strictly(self._networks(), state, "checkpoint")

    def released_state(self) -> dict[str, dict[str, Tensor]]:
        """Return the networks under the names of a released full checkpoint.

        Running statistics have their first values.
        """
        networks = self._networks()
        state = {release_name(key): value for key, value in networks.state_dict().items()}
        for name, module in networks.named_modules():
            if isinstance(module, AllRanksBatchNorm):
                # It normalizes the output of the layer before it.
                index = int(name.rpartition(".")[2]) - 1
                width = len(state[release_name(f"{name.rpartition('.')[0]}.{index}.weight")])
                values = (torch.zeros(width), torch.ones(width), torch.tensor(0))
                for statistic, value in zip(RUNNING_STATISTICS, values, strict=True):
                    state[release_name(f"{name}.{statistic}")] = value
        return {"state_dict": state}

    def _networks(self) -> nn.ModuleDict:
        return nn.ModuleDict({"student": self.student, "teacher": self.teacher})


def release_name(key: str) -> str:
    """Return the released name of a parameter of ours."""
    for ours, released in RELEASED_NAMES.items():
        if key.startswith(f"{ours}."):
            return released + key.removeprefix(ours)
    raise AssertionError(f"no released name of {key}")


@torch.no_grad()
def copy_start(teacher: nn.Module, student: nn.Module, *, linear: bool) -> None:
    """Copy the student's first weights to the teacher, those of Linear layers only if `linear`.

    The release draws Linear layers again after the copy, for both networks (G2).
    """
    of_student = dict(student.named_modules())
    for name, module in teacher.named_modules():
        if linear or not isinstance(module, nn.Linear):
            others = dict(of_student[name].named_parameters(recurse=False))
            for key, parameter in module.named_parameters(recurse=False):
                parameter.copy_(others[key])


def build_pair_rules(config: MgcConfig, backbone: ViT) -> dict[str, PairRule]:
    """Build the rule of each level for large crops of the size that the backbone is made for.

    Raises:
        ValueError: the windows of a level do not fill the crop.
    """
    side = backbone.config.image_size // backbone.config.patch_size
    rules = {}
    for level, window, num, rows, columns in zip(
        LEVELS, config.windows, config.num_pairs, config.row_strides, config.column_strides,
        strict=True,
    ):  # fmt: skip
        if side % window != 0:
            raise ValueError(
                f"windows: {window} patches do not fill a side of {side} (level {level})"
            )
        rules[level] = PairRule(side // window, num, StrideRule(*rows), StrideRule(*columns))
    return rules
