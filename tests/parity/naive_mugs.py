"""Mugs written loop by loop from the recipe: one crop at a time, one pair at a time, plain AdamW.

It shares the layers with the product (and nothing of its losses, memories, clipping, schedules or
batching), runs the whole global batch in one process, and is slow on purpose: an oracle and the
baseline of benchmarks.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mugs.data.loading.batch import Views
from mugs.methods.config import MugsConfig
from mugs.methods.mugs import Mugs


class NaiveMemory:
    """Rows and a pointer that moves as released (twice after a write that stays inside)
    or first-in first-out.
    """

    def __init__(self, keys: Tensor, values: Tensor, pointer: int, rule: str) -> None:
        self.keys = keys.clone()
        self.values = values.clone()
        self.pointer = pointer
        self.rule = rule

    def find_neighbors(self, query: Tensor, num: int) -> Tensor:
        cosines = [F.cosine_similarity(q[None], self.keys, dim=1) for q in query]
        return torch.stack([self.values[c.argsort(descending=True)[:num]] for c in cosines])

    def write(self, rows: list[Tensor]) -> None:
        size, inside = len(self.keys), self.pointer + len(rows) <= len(self.keys)
        for offset, row in enumerate(rows):
            self.keys[(self.pointer + offset) % size] = row
            self.values[(self.pointer + offset) % size] = row
        moved = 2 * len(rows) if inside and self.rule == "released" else len(rows)
        self.pointer = (self.pointer + moved) % size


class NaiveMugs:
    """Starts from the weights and state of a `Mugs` and repeats its training steps naively."""

    def __init__(self, method: Mugs, *, clip: float, patch_lr_scale: float = 0.2) -> None:
        self.config: MugsConfig = method.config
        self.student, self.teacher = method.student, method.teacher
        state = method.extra_state
        self.queues = {
            name: [row.clone() for row in queue.rows]
            for name, queue in (
                ("instance", state.instance_queue),
                ("local_group", state.local_group_queue),
            )
            if queue is not None
        }
        self.queue_pointer = dict.fromkeys(self.queues, 0)
        self.memories: dict[str, NaiveMemory] = {}
        for name, memory in (("student", state.student_memory), ("teacher", state.teacher_memory)):
            if memory is not None:
                values = memory.keys if memory.values is None else memory.values
                self.memories[name] = NaiveMemory(
                    memory.keys, values, int(memory.pointer), memory.pointer_rule
                )
        self.center = state.center.clone()
        self.clip, self.patch_lr_scale = clip, patch_lr_scale
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p], "name": n}
                for n, p in self.student.named_parameters()
                if p.requires_grad
            ],
            lr=0.0,
            foreach=False,
        )

    def memory(self, who: str) -> NaiveMemory | None:
        return self.memories.get(who, self.memories.get("teacher"))

    def crop(self, who: str, images: Tensor) -> dict[str, Tensor]:
        """What the heads get of one crop of all images."""
        net = self.student if who == "student" else self.teacher
        tokens = net.backbone.tokens(images)
        normed = net.backbone.norm(tokens)
        out: dict[str, Tensor] = {}
        if net.instance_head is not None:
            out["instance"] = normed[:, 0]
        if net.group_head is not None:
            out["group"] = normed[:, 0]
        memory = self.memory(who)
        if net.local_group_head is not None and memory is not None:
            out["memory"] = normed[:, 1:].mean(1).detach()
            query = (
                tokens.mean(1)
                if self.config.local_group_token == "released"
                else normed[:, 1:].mean(1)
            )
            x = torch.cat(
                [query[:, None], memory.find_neighbors(query.detach(), self.config.num_neighbours)],
                1,
            )
            for block in net.backbone.relation_blocks:
                x = block(x)
            out["local_group"] = net.backbone.norm(x)[:, 0]
        return out

    def heads(self, who: str, crops: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Head outputs crop by crop,
        or of all crops at once where batch normalization mixes them.
        """
        net = self.student if who == "student" else self.teacher
        for name in [n for n in crops[0] if n != "memory"]:
            head, inputs = getattr(net, f"{name}_head"), [crop[name] for crop in crops]
            if self.config.head_norm == "batch":
                outputs = head(torch.cat(inputs)).split(len(inputs[0]))
            else:
                outputs = [head(x) for x in inputs]
            for crop, output in zip(crops, outputs, strict=True):
                crop[name] = output
        return crops

    def pair_loss(self, name: str, student: Tensor, teacher: Tensor, epoch: int) -> Tensor:
        """Loss of one pair of crops, image by image."""
        config, losses = self.config, []
        if name == "group":
            temperature = self.teacher_temperature(epoch)
            for s, t in zip(student, teacher, strict=True):
                q = torch.softmax((t - self.center) / temperature, -1)
                losses.append(
                    -(q * torch.log_softmax(s / config.group_student_temperature, -1)).sum()
                )
            return torch.stack(losses).mean()
        tau = config.instance_temperature if name == "instance" else config.local_group_temperature
        queue = torch.stack(self.queues[name])
        for s, t in zip(student, teacher, strict=True):
            logits = torch.cat([(s * t).sum()[None], queue @ s]) / tau
            losses.append(
                F.cross_entropy(logits[None], torch.zeros(1, dtype=torch.long, device=s.device))
            )
        return torch.stack(losses).mean()

    def teacher_temperature(self, epoch: int) -> float:
        start, end = self.config.group_teacher_temperature
        count = self.config.group_teacher_warmup_epochs
        return (
            float(torch.linspace(start, end, count, dtype=torch.float64)[epoch])
            if epoch < count
            else end
        )

    def losses(
        self, views: Views, epoch: int
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], list[dict[str, Tensor]]]:
        """Losses by name, and the outputs of student and teacher crops."""
        with torch.no_grad():
            teacher = self.heads("teacher", [self.crop("teacher", views.large[i]) for i in (0, 1)])
        student = [self.crop("student", views.large[i]) for i in (2, 3)]
        student = self.heads(
            "student", student + [self.crop("student", crop) for crop in views.small]
        )
        result = {}
        for name in [n for n in ("instance", "local_group", "group") if n in teacher[0]]:
            large, small = [], []
            for t in range(2):
                for s in range(len(student)):
                    if s != t:
                        value = self.pair_loss(
                            name, student[s][name], teacher[t][name].detach(), epoch
                        )
                        (large if s < 2 else small).append(value)
            if self.config.pair_average == "uniform" or not small:
                result[name] = sum(large + small) / len(large + small)
            else:
                result[name] = 0.5 * sum(large) / len(large) + 0.5 * sum(small) / len(small)
        return result, student, teacher

    def step(
        self,
        views: Views,
        *,
        epoch: int,
        lr: float,
        wd: float,
        momentum: float,
        frozen: bool = False,
    ) -> dict[str, float]:
        """One training step; returns the losses."""
        losses, student, teacher = self.losses(views, epoch)
        weights = dict(
            zip(("instance", "local_group", "group"), self.config.loss_weights, strict=True)
        )
        factors = weights if self.config.loss_sum == "weighted" else dict.fromkeys(weights, 1.0)
        total = sum(factors[n] * v for n, v in losses.items()) / sum(weights[n] for n in losses)
        self.refresh(views, student, teacher)
        self.optimizer.zero_grad()
        total.backward()
        self.update(lr, wd, frozen)
        with torch.no_grad():
            mine = dict(self.student.named_parameters())
            for name, parameter in self.teacher.named_parameters():
                parameter.copy_(momentum * parameter + (1 - momentum) * mine[name])
        return {"total": total.item(), **{n: v.item() for n, v in losses.items()}}

    def update(self, lr: float, wd: float, frozen: bool) -> None:
        for group in self.optimizer.param_groups:
            (parameter,), name = group["params"], group["name"]
            factor = self.clip / (parameter.grad.norm().item() + 1e-6)
            if self.clip and factor < 1:
                parameter.grad.mul_(factor)
            if frozen and "last_layer" in name:
                parameter.grad = None
            group["lr"] = lr * (self.patch_lr_scale if "patch_embed" in name else 1.0)
            group["weight_decay"] = 0.0 if name.endswith("bias") or parameter.ndim == 1 else wd
        self.optimizer.step()

    @torch.no_grad()
    def refresh(
        self, views: Views, student: list[dict[str, Tensor]], teacher: list[dict[str, Tensor]]
    ) -> None:
        for name, queue in self.queues.items():
            for crop in teacher:
                for row in crop[name]:
                    queue[self.queue_pointer[name]] = row.detach()
                    self.queue_pointer[name] = (self.queue_pointer[name] + 1) % len(queue)
        if "memory" in teacher[0]:
            if "student" in self.memories:
                rows = [
                    row
                    for row, weak in zip(student[0]["memory"], views.extras["weak"], strict=True)
                    if weak
                ]
                self.memories["student"].write(rows)
            self.memories["teacher"].write(list(teacher[0]["memory"]))
            if "student" not in self.memories:
                self.memories["teacher"].write(list(student[0]["memory"]))
        if "group" in teacher[0]:
            mean = torch.cat([crop["group"] for crop in teacher]).mean(0)
            m = self.config.center_momentum
            self.center = m * self.center + (1 - m) * mean


def naive_rates(
    step: int, *, steps_per_epoch: int, epochs: int, warmup: int, peak: float, low: float
) -> float:
    """Learning rate of a step, from the recipe's tables."""
    total, first = steps_per_epoch * epochs, steps_per_epoch * warmup
    table = list(torch.linspace(0, peak, first, dtype=torch.float64)) if first else []
    table += [
        low + 0.5 * (peak - low) * (1 + math.cos(math.pi * j / (total - first)))
        for j in range(total - first)
    ]
    return float(table[step])
