"""MGC written loop by loop from its description: one image, one cell, one row at a time.

It shares the layers of the backbone and the heads' weights with the product, and nothing of its
pairs, pooling, batch normalization, losses, clipping or batching.
"""

from itertools import product

import torch
from torch import Tensor, nn

from mugs.data.loading.batch import Views
from mugs.methods.mgc import LEVELS, Mgc, MgcNetwork


class NaiveMgc:
    """Starts from the weights of an `Mgc` and repeats its training steps naively."""

    def __init__(self, method: Mgc, clip: float) -> None:
        self.config = method.config
        self.student = method.student
        self.teacher = method.teacher
        self.state: dict[str, Tensor] = {}
        self.clip = clip
        self.optimizer = torch.optim.AdamW(
            [p for p in self.student.parameters() if p.requires_grad], lr=0.0, foreach=False
        )

    def pairs(self, boxes: Tensor, flips: Tensor, level: int) -> list[tuple[int, int, float]]:
        """Cells of both crops and the share of each pair of one image."""
        vit = self.student.backbone.config
        grid = vit.image_size // vit.patch_size // self.config.windows[level]
        num = self.config.num_pairs[level]
        (x1, y1, w1, h1), (x2, y2, w2, h2) = boxes.tolist()
        left, right = max(x1, x2), min(x1 + w1, x2 + w2)
        top, bottom = max(y1, y2), min(y1 + h1, y2 + h2)
        # Lengths in pixels / grid, which are whole numbers.
        left, right, top, bottom = (grid * v for v in (left, right, top, bottom))
        shared = max(right - left, 0) * max(bottom - top, 0)
        united = (w1 * h1 + w2 * h2) * grid**2 - shared

        def scanned(start: int, size: int, low: int, high: int, rule: tuple[int, ...]) -> list[int]:
            stride = min(max(rule[0] * shared // united, rule[1]), rule[2])
            touched = [
                k
                for k in range(grid)
                if min(grid * start + size * (k + 1), high) > max(grid * start + size * k, low)
            ]
            return touched[::stride]

        rows = scanned(y1, h1, top, bottom, self.config.row_strides[level])
        columns = scanned(x1, w1, left, right, self.config.column_strides[level])
        found = []
        for r, c, other_r, other_c in product(rows, columns, range(grid), range(grid)):
            height = min(grid * y1 + h1 * (r + 1), grid * y2 + h2 * (other_r + 1), bottom) - max(
                grid * y1 + h1 * r, grid * y2 + h2 * other_r, top
            )
            width = min(grid * x1 + w1 * (c + 1), grid * x2 + w2 * (other_c + 1), right) - max(
                grid * x1 + w1 * c, grid * x2 + w2 * other_c, left
            )
            if height > 0 and width > 0:
                one = r * grid + (grid - 1 - c if flips[0] else c)
                two = other_r * grid + (grid - 1 - other_c if flips[1] else other_c)
                found.append((one, two, height * width / (w1 * h1 + w2 * h2)))
        if len(found) > num:
            found = sorted(found, key=lambda pair: pair[2])[-num:]
        return found + [(0, 0, 0.0)] * (num - len(found))

    def token(self, patches: Tensor, cell: int, window: int) -> Tensor:
        """Mean of the patches (L, D) of an image that a cell covers."""
        side = round(len(patches) ** 0.5)
        row, column = divmod(cell, side // window)
        covered = [
            patches[(row * window + i) * side + column * window + j]
            for i in range(window)
            for j in range(window)
        ]
        return torch.stack(covered).mean(0)

    def head(self, layers: nn.Sequential, rows: Tensor) -> Tensor:
        for layer in layers:
            if isinstance(layer, nn.Linear | nn.ReLU):
                rows = layer(rows)
                continue
            mean = rows.mean(0)
            variance = ((rows - mean) ** 2).mean(0)
            rows = (rows - mean) / torch.sqrt(variance + 1e-5)
            if layer.weight is not None:
                rows = rows * layer.weight + layer.bias
        return rows

    def rows(
        self, network: MgcNetwork, images: Tensor, cells: list[list[int]], level: int
    ) -> Tensor:
        """Rows of one crop at a level: of each image, of each of its pairs."""
        window = self.config.windows[level]
        tokens = []
        for image, chosen in zip(images, cells, strict=True):
            patches = network.backbone.norm(network.backbone.tokens(image[None]))[0, 1:]
            tokens += [self.token(patches, cell, window) for cell in chosen]
        rows = self.head(network.projectors[LEVELS[level]], torch.stack(tokens))
        if network.predictors is not None:
            rows = self.head(network.predictors[LEVELS[level]], rows)
        return rows

    def contrast(self, queries: Tensor, keys: Tensor, shares: list[float]) -> Tensor:
        used = [n for n in range(len(queries)) if self.config.padding == "counted" or shares[n] > 0]
        total, divisor = torch.zeros(()), 0.0
        for n in used:
            cosines = torch.stack(
                [torch.cosine_similarity(queries[n], keys[m], dim=0) for m in used]
            )
            log_p = torch.log_softmax(cosines / self.config.temperature, 0)
            weight = shares[n] if self.config.overlap_weighting else 1.0
            total = total - weight * log_p[used.index(n)]
            divisor += weight
        return total / divisor

    def step(
        self, views: Views, *, epoch: int, lr: float, wd: float, momentum: float, frozen: bool
    ) -> dict[str, float]:
        """One training step; returns the losses."""
        with torch.no_grad():
            mine = dict(self.student.named_parameters())
            for name, parameter in self.teacher.named_parameters():
                parameter.copy_(momentum * parameter + (1 - momentum) * mine[name])
        losses = {}
        for level, name in enumerate(LEVELS):
            pairs = [
                self.pairs(boxes, flips, level)
                for boxes, flips in zip(views.extras["boxes"], views.extras["flips"], strict=True)
            ]
            shares = [share for of_image in pairs for _, _, share in of_image]
            cells = [[[pair[i] for pair in of_image] for of_image in pairs] for i in (0, 1)]
            queries = [self.rows(self.student, views.large[i], cells[i], level) for i in (0, 1)]
            with torch.no_grad():
                keys = [self.rows(self.teacher, views.large[i], cells[i], level) for i in (0, 1)]
            losses[name] = self.contrast(queries[0], keys[1], shares) + self.contrast(
                queries[1], keys[0], shares
            )
        counts = dict(zip(LEVELS, self.config.num_pairs, strict=True))
        total = sum(counts[name] * loss for name, loss in losses.items()) / sum(counts.values())
        self.optimizer.zero_grad()
        total.backward()
        self.update(lr, wd)
        return {"total": total.item(), **{name: loss.item() for name, loss in losses.items()}}

    def update(self, lr: float, wd: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = wd
            for parameter in group["params"]:
                factor = self.clip / (parameter.grad.norm().item() + 1e-6)
                if self.clip and factor < 1:
                    parameter.grad.mul_(factor)
        self.optimizer.step()
