"""The one Vision Transformer: timm's, with the released resize of positions and relation blocks.

Shapes: N images, L tokens (class token first), D width, k neighbors.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mugs.devices import copy_to_device
from mugs.models.config import ARCHITECTURES, ViTConfig
from mugs.models.stochastic_depth import (
    Drawn,
    KeptSamples,
    StochasticDepth,
    add_branch,
    plan_branches,
)


class ViT(VisionTransformer):
    """timm's VisionTransformer without a head, plus `relation_depth` blocks for Mugs.

    Parameter names are those of timm and of the released Mugs checkpoints. The relation blocks see
    a query and its neighbors; only pretraining uses them (`apply_relation_blocks`).
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
        # True: keep only the input of each block, and run the block again in the backward pass.
        self.activation_checkpointing = False
        # True: do not compute the branches that stochastic depth drops. It makes shapes depend on
        # the draws, which compiled blocks must not.
        self.skip_dropped = True
        # True: resize the position table by a matrix product. Going back, torch's own resize adds
        # in any order on a GPU.
        self.resize_by_product = False
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        block = partial(Block, config.embed_dim, config.num_heads, qkv_bias=True, norm_layer=norm)
        self.relation_blocks = nn.ModuleList(block() for _ in range(relation_depth))
        # The rate grows linearly from 0 at the first block to `drop_path` at the last one.
        rates = torch.linspace(0, drop_path, config.depth).tolist()
        for rate, layer in zip(rates, self.blocks, strict=True):
            layer.drop_path1 = StochasticDepth(rate)
            layer.drop_path2 = StochasticDepth(rate)
        # timm leaves torch's defaults (weight_init="skip"); the release draws its own.
        self.apply(init_weights)
        if config.positions == "sincos":
            table = build_sincos_positions(side, config.embed_dim)
            self.pos_embed = nn.Parameter(table, requires_grad=False)
        else:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Turn patches (N, H, W, D) into tokens (N, 1 + H*W, D) with class token and positions."""
        num, height, width, dim = x.shape
        tokens = torch.cat([self.cls_token.expand(num, -1, -1), x.reshape(num, -1, dim)], dim=1)
        resize = resize_by_product if self.resize_by_product else resize_position_table
        return tokens + resize(self.pos_embed, height, width, self.position_grid)

    @torch.no_grad()
    def set_position_grid(self, height: int, width: int) -> None:
        """Give the position table one entry per patch of a grid of `height` x `width`.

        Dense tasks start so (released): the table is resized once, bicubic, by size and not by the
        scale factor of `resize_position_table`, and then trained as it is.
        """
        table = self.pos_embed
        dim = table.shape[2]
        grid = table[:, 1:].reshape(1, *self.position_grid, dim).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
        patches = grid.permute(0, 2, 3, 1).reshape(1, height * width, dim)
        self.pos_embed = nn.Parameter(
            torch.cat([table[:, :1], patches], dim=1), requires_grad=table.requires_grad
        )
        self.position_grid = (height, width)

    def tokens(self, images: Tensor, masked: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the last block's output (N, L, D) *before* the final LayerNorm.

        Args:
            images: (N, 3, H, W).
            masked: booleans (N, patches), and the vector (D,) that replaces the embedding of a
                patch where they are true. The position of the patch is added to it as to any other.
        """
        # No list: only the last output is kept in memory.
        for output in self.block_outputs(images, masked):
            last = output
        return last

    def block_outputs(
        self, images: Tensor, masked: tuple[Tensor, Tensor] | None = None
    ) -> Iterator[Tensor]:
        """Yield the output (N, L, D) of every block in turn, before the final LayerNorm."""
        patches = self.patch_embed(images)
        if masked is not None:
            where, vector = masked
            # Patches are (N, rows, columns, D); a mask counts them row by row.
            where = where.view(*patches.shape[:3], 1)
            patches = torch.where(where, vector.to(patches.dtype), patches)
        x = self._pos_embed(patches)
        for block in self.blocks:
            x = self._block(block, x)
            yield x

    def _block(self, block: Any, x: Tensor) -> Tensor:
        drawn = (block.drop_path1.drawn, block.drop_path2.drawn)
        if self.activation_checkpointing and torch.is_grad_enabled():
            # The draws are passed along: when the block runs again, those of another crop size are
            # set.
            out: Tensor = checkpoint(run_block, block, x, drawn, use_reentrant=False)
            return out
        return run_block(block, x, drawn)

    def apply_relation_blocks(self, query: Tensor, neighbors: Tensor) -> Tensor:
        """Return the local-group feature (N, D) of a query (N, D) and its neighbors (N, k, D).

        The feature is the query's token after the relation blocks and the final LayerNorm, whose
        weights the backbone shares (released).
        """
        x = torch.cat([query[:, None], neighbors], dim=1)
        for block in self.relation_blocks:
            x = block(x)
        feature: Tensor = self.norm(x[:, 0])
        return feature

    def cls_feature(self, images: Tensor) -> Tensor:
        """Return the class token (N, D) after the final LayerNorm, as frozen evaluations use it."""
        feature: Tensor = self.norm(self.tokens(images)[:, 0])
        return feature

    def last_blocks(self, images: Tensor, num: int) -> list[Tensor]:
        """Return the outputs (N, L, D) of the last `num` blocks, after the final LayerNorm.

        Raises:
            ValueError: there are fewer blocks.
        """
        if num > len(self.blocks):
            raise ValueError(
                f"the outputs of {num} blocks are wanted, the backbone has {len(self.blocks)}"
            )
        outputs = islice(self.block_outputs(images), len(self.blocks) - num, None)
        return [self.norm(x) for x in outputs]

    def class_attention(self, images: Tensor) -> Tensor:
        """Return the attention (N, heads, h, w) of the last block's class token to each patch.

        The softmax is over all tokens, so a map sums to one minus the share of the class token
        itself.
        """
        x = self._pos_embed(self.patch_embed(images))
        for block in self.blocks[:-1]:
            x = block(x)
        # The fused attention of timm does not return its weights, so the last block is spelled out.
        last: Any = self.blocks[-1]
        qkv = last.attn.qkv(last.norm1(x)).unflatten(-1, (3, last.attn.num_heads, -1))
        # The class token alone asks: (N, heads, 1, d) against the keys (N, heads, L, d) of all.
        query, key = (part.transpose(1, 2).float() for part in (qkv[:, :1, 0], qkv[:, :, 1]))
        weights: Tensor = (query @ key.transpose(-2, -1) * last.attn.scale).softmax(dim=-1)
        height, width = (side // self.config.patch_size for side in images.shape[2:])
        return weights[:, :, 0, 1:].reshape(len(images), -1, height, width)

    def stochastic_depth_layers(self) -> list[StochasticDepth]:
        """Return the stochastic-depth branches, first to last."""
        return [m for m in self.modules() if isinstance(m, StochasticDepth)]

    def set_depth_uniforms(self, uniforms: Tensor | None) -> None:
        """Hand draws (2 * depth, N) on the CPU to the branches for the next pass.

        None keeps every branch.
        """
        branches = self.stochastic_depth_layers()
        drawn: Sequence[Drawn] = [None] * len(branches)
        if uniforms is not None:
            rates = [branch.rate for branch in branches]
            device = self.cls_token.device
            drawn = plan_branches(uniforms, rates, device, skip_dropped=self.skip_dropped)
        for branch, plan in zip(branches, drawn, strict=True):
            branch.drawn = plan


def run_block(block: Any, x: Tensor, drawn: tuple[Drawn, Drawn]) -> Tensor:
    """Run a block; `drawn` is what its two residual branches do."""
    block.drop_path1.drawn, block.drop_path2.drawn = drawn
    if not any(isinstance(plan, KeptSamples) for plan in drawn):
        out: Tensor = block(x)
        return out
    x = add_branch(x, block.drop_path1, lambda part: block.ls1(block.attn(block.norm1(part))))
    return add_branch(x, block.drop_path2, lambda part: block.ls2(block.mlp(block.norm2(part))))


def init_weights(module: nn.Module) -> None:
    """Initialize as released: Linear weights N(0, 0.02) cut at +-2, biases 0.

    Convolutions keep torch's default.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def build_sincos_positions(side: int, width: int) -> Tensor:
    """Return fixed positions (1, 1 + side^2, width): zeros for the class token, then the patches.

    Of a patch, sines and cosines of its row times width / 4 frequencies 10000^(-4 i / width), then
    those of its column (as in MoCo-v3 and MGC).
    """
    # In fp64, and rounded once: the table is part of the released weights.
    frequencies = 10000.0 ** (-4 * torch.arange(width // 4, dtype=torch.float64) / width)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    row = line[:, None].expand(side, side, -1)
    column = line[None].expand(side, side, -1)
    patches = torch.cat([row, column], dim=-1).reshape(1, side * side, width)
    return torch.cat([torch.zeros(1, 1, width), patches.to(torch.get_default_dtype())], dim=1)


def resize_position_table(
    table: Tensor, height: int, width: int, table_grid: tuple[int, int]
) -> Tensor:
    """Resize a position table (1, 1 + r*c, D) to (1, 1 + height*width, D).

    `table_grid` is (r, c). Released rule (M27): bicubic by the scale factor (n + 0.1) / r, which
    torch also uses for the sampling positions. This is not a resize to size n: 96-pixel crops
    sample with a step of 14 / 6.1.
    """
    count = table.shape[1] - 1
    dim = table.shape[2]
    # By the number of patches, as released: a table of any grid with this count is used as it is.
    if count == height * width and height == width:
        return table
    rows, columns = table_grid
    grid = table[:, 1:].reshape(1, rows, columns, dim).permute(0, 3, 1, 2)
    # 0.1 keeps the product of size and factor from being rounded down to n - 1.
    factors = ((height + 0.1) / rows, (width + 0.1) / columns)
    grid = F.interpolate(grid, scale_factor=factors, mode="bicubic", recompute_scale_factor=False)
    if grid.shape[2:] != (height, width):
        raise ValueError(
            f"position table of {rows}x{columns} resized to {tuple(grid.shape[2:])}, "
            f"expected {height}x{width}"
        )
    return torch.cat(
        [table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, height * width, dim)], dim=1
    )


def resize_by_product(
    table: Tensor, height: int, width: int, table_grid: tuple[int, int]
) -> Tensor:
    """Do what `resize_position_table` does, as a product with a fixed matrix."""
    rows, columns = table_grid
    if table.shape[1] - 1 == height * width and height == width:
        return table
    matrix = make_resize_matrix(rows, columns, height, width, table.device)
    # In fp64, which neither autocast nor TF32 rounds.
    patches = (matrix @ table[0, 1:].double()).to(table.dtype)
    return torch.cat([table[:, :1], patches[None]], dim=1)


@lru_cache(maxsize=8)
def make_resize_matrix(
    rows: int, columns: int, height: int, width: int, device: torch.device
) -> Tensor:
    """Return the matrix (height * width, rows * columns) of `resize_position_table`."""
    count = rows * columns
    # The resize of tables that are 1 at one patch and 0 elsewhere.
    unit = torch.cat([torch.zeros(1, count), torch.eye(count)]).double()[None]
    resized = resize_position_table(unit, height, width, (rows, columns))
    return copy_to_device(resized[0, 1:], device)


def build_vit(arch: str | ViTConfig, *, relation_depth: int = 0, drop_path: float = 0.0) -> ViT:
    """Build a named architecture, or one of the given shape.

    Raises:
        ValueError: there is no architecture of this name.
    """
    if isinstance(arch, str) and arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r} (valid: {', '.join(ARCHITECTURES)})")
    config = ARCHITECTURES[arch] if isinstance(arch, str) else arch
    return ViT(config, relation_depth=relation_depth, drop_path=drop_path)
