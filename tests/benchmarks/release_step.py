"""A training step of the release's shape, and the matrix products of ours alone.

The released step batches crops of one size, as ours does. It writes out attention, compares crops
pair by pair with a copy of each queue, clips and averages tensor by tensor, and updates each
parameter on its own.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from naive_mugs import NaiveMemory, NaiveMugs
from step_cases import write_out_attention
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mugs.data.loading.batch import Views
from mugs.methods.mugs import Mugs

Crops = list[dict[str, Tensor]]


class BatchedMemory(NaiveMemory):
    """The memory of the reference for whole batches."""

    def find_neighbors(self, query: Tensor, num: int) -> Tensor:
        cosines = F.normalize(query.float(), dim=-1) @ F.normalize(self.keys, dim=-1).T
        return self.values[cosines.topk(num, dim=-1).indices]

    def write_batch(self, rows: Tensor) -> None:
        size, inside = len(self.keys), self.pointer + len(rows) <= len(self.keys)
        slots = (self.pointer + torch.arange(len(rows), device=rows.device)) % size
        self.keys[slots] = self.values[slots] = rows.float()
        moved = 2 * len(rows) if inside and self.rule == "released" else len(rows)
        self.pointer = (self.pointer + moved) % size


class ReleasedStep(NaiveMugs):
    """Starts from the weights and state of a `Mugs`; clipping, rates and EMA are the reference's:
    a loop over parameters that waits for each norm.
    """

    def __init__(self, method: Mugs, *, clip: float) -> None:
        super().__init__(method, clip=clip)
        write_out_attention(self.student, self.teacher)
        self.negatives = {name: torch.stack(rows) for name, rows in self.queues.items()}
        self.stores = {
            name: BatchedMemory(m.keys, m.values, m.pointer, m.rule)
            for name, m in self.memories.items()
        }

    def run_network(self, who: str, sizes: list[Tensor]) -> Crops:
        """Outputs of all crops: a pass per crop size, then each head once."""
        net = self.student if who == "student" else self.teacher
        memory = self.stores.get(who, self.stores.get("teacher"))
        classes, related, means = [], [], []
        for crops in sizes:
            tokens = net.backbone.tokens(crops.flatten(0, 1))
            normed = net.backbone.norm(tokens)
            classes.append(normed[:, 0])
            means.append(normed[:, 1:].mean(1))
            if net.local_group_head is not None and memory is not None:
                query = tokens.mean(1)
                near = memory.find_neighbors(query.detach(), self.config.num_neighbours)
                x = torch.cat([query[:, None], near], 1)
                for block in net.backbone.relation_blocks:
                    x = block(x)
                related.append(net.backbone.norm(x)[:, 0])
        count = sum(len(crops) for crops in sizes)
        out: Crops = [{} for _ in range(count)]
        inputs = {"instance": classes, "local_group": related, "group": classes}
        for name, parts in inputs.items():
            head = getattr(net, f"{name}_head")
            if head is not None and parts:
                for crop, value in zip(out, head(torch.cat(parts)).chunk(count), strict=True):
                    crop[name] = value
        out[0]["memory"] = means[0].detach().chunk(len(sizes[0]))[0]
        return out

    def pair_loss(self, name: str, student: Tensor, teacher: Tensor, epoch: int) -> Tensor:
        """Loss of one pair of crops, all images at once."""
        config = self.config
        if name == "group":
            q = torch.softmax((teacher - self.center) / self.teacher_temperature(epoch), -1)
            scaled = student / config.group_student_temperature
            return -(q * F.log_softmax(scaled, -1)).sum(-1).mean()
        tau = config.instance_temperature if name == "instance" else config.local_group_temperature
        positive = (student * teacher).sum(-1, keepdim=True)
        logits = torch.cat([positive, student @ self.negatives[name].clone().T], 1) / tau
        target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        return F.cross_entropy(logits, target)

    def losses(self, views: Views, epoch: int) -> tuple[dict[str, Tensor], Crops, Crops]:
        with torch.no_grad():
            teacher = self.run_network("teacher", [views.large[:2]])
        student = self.run_network("student", [views.large[2:], views.small])
        result = {}
        for name in [n for n in ("instance", "local_group", "group") if n in teacher[0]]:
            large, small = [], []
            for t in range(2):
                for s in range(len(student)):
                    if s != t:
                        value = self.pair_loss(name, student[s][name], teacher[t][name], epoch)
                        (large if s < 2 else small).append(value)
            result[name] = 0.5 * sum(large) / len(large) + 0.5 * sum(small) / len(small)
        return result, student, teacher

    @torch.no_grad()
    def refresh(self, views: Views, student: Crops, teacher: Crops) -> None:
        for name, queue in self.negatives.items():
            for crop in teacher:
                slots = torch.arange(len(crop[name]), device=queue.device)
                queue[(self.queue_pointer[name] + slots) % len(queue)] = crop[name].float()
                self.queue_pointer[name] = (self.queue_pointer[name] + len(slots)) % len(queue)
        if self.stores:
            weak = views.extras["weak"].bool()
            self.stores["student"].write_batch(student[0]["memory"][weak])
            self.stores["teacher"].write_batch(teacher[0]["memory"])
        if "group" in teacher[0]:
            mean = torch.cat([crop["group"] for crop in teacher]).float().mean(0)
            m = self.config.center_momentum
            self.center = m * self.center + (1 - m) * mean


Product = tuple[str, tuple[tuple[int, ...], ...], torch.dtype]


class ProductRecorder(TorchDispatchMode):
    """Counts matrix products by shape; attention and convolution are written as products."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [value for value in args if isinstance(value, Tensor)]
        if name in ("mm", "bmm"):
            self.add(name, tensors[0], tensors[1])
        elif name in ("addmm", "baddbmm"):
            self.add(name.removeprefix("add").removeprefix("badd"), tensors[1], tensors[2])
        elif name.startswith("_scaled_dot_product"):
            # Forward: scores and weighted values. Backward: a product for each of the values, the
            # weights, queries and keys.
            backward = "backward" in name
            query = tensors[1] if backward else tensors[0]
            flat = query.flatten(0, 1)
            scores = flat.new_empty(1).expand(len(flat), flat.shape[1], flat.shape[1])
            for _ in range(2 if backward else 1):
                self.add("bmm", flat, flat.mT)
                self.add("bmm", scores, flat)
        elif name in ("convolution", "convolution_backward"):
            # Of the patches; their pixels need no gradient, so the backward pass is one product.
            images, kernel = tensors[-2:] if "backward" in name else tensors[:2]
            patches = images.numel() // kernel[0].numel()
            inputs = images.new_empty(1).expand(patches, kernel[0].numel())
            if "backward" in name:
                self.add("mm", inputs.mT, images.new_empty(1).expand(patches, len(kernel)))
            else:
                self.add("mm", inputs, kernel.flatten(1).mT)
        return func(*args, **(kwargs or {}))

    def add(self, kind: str, one: Tensor, other: Tensor) -> None:
        self.found[kind, (tuple(one.shape), tuple(other.shape)), one.dtype] += 1


def time_products(step: Callable[[], object]) -> float:
    """Seconds of the matrix products of a step, each alone and on data that lie ready."""
    with ProductRecorder() as recorder:
        step()
    seconds = 0.0
    for (kind, shapes, dtype), count in recorder.found.items():
        one, other = (torch.randn(shape).to(dtype) for shape in shapes)
        product = getattr(torch, kind)
        product(one, other)
        start = time.perf_counter()
        for _ in range(count):
            product(one, other)
        seconds += time.perf_counter() - start
    return seconds
