"""The one Vision Transformer: timm's, with the released position table resize and Mugs' relation block.

Shapes: N images, L tokens (class token first), D width.
"""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mugs.models.config import ARCHITECTURES, ViTConfig
from mugs.models.stochastic_depth import StochasticDepth


class ViT(VisionTransformer):
    """timm's VisionTransformer without a head, plus `relation_depth` blocks that see a query and its neighbours.

    Parameter names are those of timm and of the released Mugs checkpoints. The relation blocks take no part in
    `cls_feature`, `last_blocks` or `forward`; only pretraining calls `relate`.
    """

    cls_token: nn.Parameter
    pos_embed: nn.Parameter

    def __init__(
        self, config: ViTConfig, *, relation_depth: int = 0, drop_path: float = 0.0
    ) -> None:
        super().__init__(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            num_classes=0,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            dynamic_img_size=True,
            weight_init="skip",
        )
        self.config = config
        side = config.image_size // config.patch_size
        self.position_grid = (side, side)
        self.activation_checkpointing = (
            False  # keep only the input of each block and run it again on the way back
        )
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        block = partial(Block, config.embed_dim, config.num_heads, qkv_bias=True, norm_layer=norm)
        self.relation_blocks = nn.ModuleList(block() for _ in range(relation_depth))
        rates = torch.linspace(0, drop_path, config.depth).tolist()
        for rate, layer in zip(rates, self.blocks, strict=True):
            layer.drop_path1 = StochasticDepth(rate)
            layer.drop_path2 = StochasticDepth(rate)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patches (N, H, W, D) -> tokens (N, 1 + H*W, D) with class token and positions."""
        num, height, width, dim = x.shape
        tokens = torch.cat([self.cls_token.expand(num, -1, -1), x.reshape(num, -1, dim)], dim=1)
        return tokens + resize_position_table(self.pos_embed, height, width, self.position_grid)

    @torch.no_grad()
    def set_position_grid(self, height: int, width: int) -> None:
        """Make the position table one of height x width patches: resized once, bicubic, then trained as it is.

        This is how dense tasks start (released code): a resize to the size, without the scale-factor rule.
        """
        table, dim = self.pos_embed, self.pos_embed.shape[2]
        grid = table[:, 1:].reshape(1, *self.position_grid, dim).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
        patches = grid.permute(0, 2, 3, 1).reshape(1, height * width, dim)
        self.pos_embed = nn.Parameter(torch.cat([table[:, :1], patches], dim=1))
        self.position_grid = (height, width)

    def tokens(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, L, D): the last block's output *before* the final LayerNorm."""
        for output in self.block_outputs(images):
            last = output
        return last

    def block_outputs(self, images: Tensor) -> Iterator[Tensor]:
        """(N, 3, H, W) -> (N, L, D) after every block in turn, before the final LayerNorm."""
        x = self._pos_embed(self.patch_embed(images))
        for block in self.blocks:
            x = self._block(block, x)
            yield x

    def _block(self, block: nn.Module, x: Tensor) -> Tensor:
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        out: Tensor = (
            checkpoint(
                run_block_with_uniforms, block, x, read_depth_uniforms(block), use_reentrant=False
            )
            if recompute
            else block(x)
        )
        return out

    def apply_relation_blocks(self, query: Tensor, neighbours: Tensor) -> Tensor:
        """Query (N, D) and neighbours (N, k, D) -> local-group feature (N, D), after the shared final LayerNorm."""
        x = torch.cat([query[:, None], neighbours], dim=1)
        for block in self.relation_blocks:
            x = block(x)
        feature: Tensor = self.norm(x[:, 0])
        return feature

    def cls_feature(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, D): class token after the final LayerNorm, the feature of frozen evaluations."""
        feature: Tensor = self.norm(self.tokens(images)[:, 0])
        return feature

    def last_blocks(self, images: Tensor, num: int) -> list[Tensor]:
        """The outputs (N, L, D) of the last `num` blocks, each after the final LayerNorm, first to last.

        Raises ValueError where there are fewer blocks.
        """
        if num > len(self.blocks):
            raise ValueError(
                f"the outputs of {num} blocks are wanted, the backbone has {len(self.blocks)}"
            )
        outputs = islice(self.block_outputs(images), len(self.blocks) - num, None)
        return [self.norm(x) for x in outputs]

    def class_attention(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, heads, h, w): what the class token of the last block attends to, by patch.

        The softmax is over all tokens: a map sums to one less the share of the class token itself.
        """
        x = self._pos_embed(self.patch_embed(images))
        for block in self.blocks[:-1]:
            x = block(x)
        last: Any = self.blocks[-1]
        qkv = last.attn.qkv(last.norm1(x)).unflatten(-1, (3, last.attn.num_heads, -1))
        query, key = (part.transpose(1, 2).float() for part in (qkv[:, :1, 0], qkv[:, :, 1]))
        weights: Tensor = (query @ key.transpose(-2, -1) * last.attn.scale).softmax(dim=-1)
        height, width = (side // self.config.patch_size for side in images.shape[2:])
        return weights[:, :, 0, 1:].reshape(len(images), -1, height, width)

    def stochastic_depth_layers(self) -> list[StochasticDepth]:
        """The stochastic-depth branches, first to last."""
        return [m for m in self.modules() if isinstance(m, StochasticDepth)]

    def set_depth_uniforms(self, uniforms: Tensor | None) -> None:
        """Hand (2 * depth, N) draws to the stochastic-depth branches of the next pass; None keeps every branch."""
        for index, branch in enumerate(self.stochastic_depth_layers()):
            branch.uniform = None if uniforms is None else uniforms[index]


def read_depth_uniforms(block: nn.Module) -> list[Tensor | None]:
    """What the stochastic-depth branches of a block hold for the coming pass."""
    return [m.uniform for m in block.modules() if isinstance(m, StochasticDepth)]


def run_block_with_uniforms(block: nn.Module, x: Tensor, draws: list[Tensor | None]) -> Tensor:
    """A block's pass with the given draws: by the time it is repeated, those of another crop size are set."""
    branches = (m for m in block.modules() if isinstance(m, StochasticDepth))
    for branch, uniform in zip(branches, draws, strict=True):
        branch.uniform = uniform
    out: Tensor = block(x)
    return out


def init_weights(module: nn.Module) -> None:
    """Released initialisation: Linear weights N(0, 0.02) cut at +-2, biases 0; convolutions keep the default."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def resize_position_table(
    table: Tensor, height: int, width: int, table_grid: tuple[int, int]
) -> Tensor:
    """Position table (1, 1 + r*c, D) for a grid of height x width patches -> (1, 1 + height*width, D).

    Released rule: bicubic by scale factor (n + 0.1) / s, the factor kept for the sampling positions. This is not
    a resize to size n; 96-pixel crops sample with step 14 / 6.1. `table_grid` is (r, c).
    """
    count, dim = table.shape[1] - 1, table.shape[2]
    if count == height * width and height == width:
        return table
    rows, columns = table_grid
    grid = table[:, 1:].reshape(1, rows, columns, dim).permute(0, 3, 1, 2)
    factors = ((height + 0.1) / rows, (width + 0.1) / columns)
    grid = F.interpolate(grid, scale_factor=factors, mode="bicubic", recompute_scale_factor=False)
    if grid.shape[2:] != (height, width):
        raise ValueError(
            f"position table of {rows}x{columns} resized to {tuple(grid.shape[2:])}, not {height}x{width}"
        )
    return torch.cat(
        [table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, height * width, dim)], dim=1
    )


def build_vit(arch: str | ViTConfig, *, relation_depth: int = 0, drop_path: float = 0.0) -> ViT:
    """The named architecture, or one of the given shape. Raises ValueError for an unknown name."""
    if isinstance(arch, str) and arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r} (valid: {', '.join(ARCHITECTURES)})")
    config = ARCHITECTURES[arch] if isinstance(arch, str) else arch
    return ViT(config, relation_depth=relation_depth, drop_path=drop_path)
