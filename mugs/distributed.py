"""Calls of torch.distributed that also work in a single process without a group."""

import atexit
import json
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel


class MainRankError(RuntimeError):
    """Rank 0 failed while the other ranks waited for it; the message is its error."""


class DeviceMismatchError(RuntimeError):
    """Some ranks see a GPU and others do not, so they would wait for each other for ever."""


def init_process_group(timeout_minutes: float = 30.0) -> torch.device:
    """Join the process group of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; return the device.

    The backend is NCCL with a GPU and gloo without. A single process joins nothing. On a GPU fp32
    products may use TF32, unless MUGS_TF32 is 0; so it is the same in all stages.

    Raises:
        DeviceMismatchError: only some of the ranks see a GPU.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        # Slurm may show each rank its own GPU only, which then is number 0: hence the remainder.
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        set_tf32(read_tf32_choice())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        agree_on_device(store, rank, world_size, cuda=cuda)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            # Otherwise a barrier guesses the device from the global rank.
            device_id=device if cuda else None,
        )
        # At a normal end only: a rank that fails leaves with `os._exit`, and must not wait here.
        atexit.register(destroy_process_group)
    return device


def read_tf32_choice() -> bool:
    """Return whether MUGS_TF32 allows TF32; it is allowed if unset, as in the release.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    choice = os.environ.get("MUGS_TF32", "1")
    if choice not in ("0", "1"):
        raise ValueError(f"MUGS_TF32 is {choice!r}; set it to 0 (strict fp32) or 1 (allow TF32)")
    return choice == "1"


def set_tf32(allowed: bool) -> None:
    """Allow TF32 in all fp32 matrix products and convolutions of the process, or in none."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def agree_on_device(store: Store, rank: int, world_size: int, *, cuda: bool) -> None:
    """Wait until every rank has said whether it sees a GPU; all or none of them must.

    Raises:
        DeviceMismatchError: names the ranks that see none, and their hosts.
    """
    store.set(f"device/{rank}", "cuda" if cuda else socket.gethostname())
    said = [store.get(f"device/{other}").decode() for other in range(world_size)]
    without = [f"{other} ({host})" for other, host in enumerate(said) if host != "cuda"]
    if 0 < len(without) < world_size:
        raise DeviceMismatchError(
            f"no CUDA device on ranks {', '.join(without)}, the other ranks have one"
        )


def destroy_process_group() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return the rank of this process, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is rank 0, the one that writes shared files."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_from_main(text: str) -> str:
    """Return rank 0's text on all ranks.

    It is sent as bytes. torch's own functions for objects send pickles, and who unpickles them
    runs the code that somebody else on the network may have put there.
    """
    if world_size() == 1:
        return text
    device = find_collective_device()
    content = list(text.encode(errors="surrogatepass")) if is_main() else []
    length = torch.tensor([len(content)], device=device)
    dist.broadcast(length, 0)
    shared = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if is_main():
        shared.copy_(torch.tensor(content, dtype=torch.uint8))
    dist.broadcast(shared, 0)
    return bytes(shared.tolist()).decode(errors="surrogatepass")


def find_collective_device() -> torch.device:
    """Return where tensors must be that travel: NCCL has no collectives for memory of the CPU."""
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def run_on_main(work: Callable[[], object]) -> str:
    """Run `work` on rank 0 while the others wait; return the text of its result on all ranks.

    An error of `work` is raised on rank 0, and as MainRankError with the same message on the
    others.
    """
    answer = ""
    failure: Exception | None = None
    if is_main():
        try:
            # "+" and "-" tell success from failure. The others must hear of a failure, or they wait
            # for rank 0 until the collective times out.
            answer = f"+{work()}"
        except Exception as error:
            answer = f"-{type(error).__name__}: {error}"
            failure = error
    answer = broadcast_from_main(answer)
    if failure is not None:
        raise failure
    if answer.startswith("-"):
        raise MainRankError(f"rank 0: {answer[1:]}")
    return answer[1:]


def share_tensors_of_main(tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Return rank 0's tensors, in memory of the CPU, on all ranks; the others give None.

    They travel one by one, by way of the GPU where there is one: NCCL sends nothing else.
    """
    if world_size() == 1:
        return tensors or {}
    own = [
        (name, tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for name, value in (tensors or {}).items()
    ]
    device = find_collective_device()
    received = {}
    for name, shape, dtype in json.loads(broadcast_from_main(json.dumps(own))):
        value = (
            torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            if tensors is None
            else tensors[name].to(device)
        )
        dist.broadcast(value, src=0)
        received[name] = value.cpu() if tensors is None else tensors[name]
    return received


def wrap_data_parallel(model: nn.Module) -> nn.Module:
    """Return the model with gradients averaged over ranks, if there are several.

    Buffers are not broadcast: all ranks change them in the same way.
    """
    if world_size() == 1:
        return model
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    wrapped.broadcast_buffers = False  # an argument of that name is deprecated from torch 2.15 on
    return wrapped


def all_gather_rows(rows: Tensor) -> Tensor:
    """Return (world_size * n, ...) in rank order, from (n, ...) on each rank."""
    if world_size() == 1:
        return rows
    gathered = rows.new_empty((world_size() * len(rows), *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


def all_gather_uneven_rows(rows: Tensor) -> Tensor:
    """Return the rows of all ranks in rank order; their numbers may differ."""
    if world_size() == 1:
        return rows
    # Collectives need equal sizes: pad to the largest, cut after the gather.
    counts = all_gather_rows(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = all_gather_rows(padded).view(world_size(), *padded.shape)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


def all_reduce_mean(value: Tensor) -> Tensor:
    """Return the mean over ranks."""
    return value if world_size() == 1 else mean_with_grad(value.detach())


def mean_with_grad(value: Tensor) -> Tensor:
    """Return the mean over ranks; gradients flow back to all of them."""
    return sum_with_grad(value) / world_size()


def sum_with_grad(value: Tensor) -> Tensor:
    """Return the sum over ranks; gradients flow back to all of them."""
    if world_size() == 1:
        return value
    total: Tensor = SumOverRanks.apply(value)
    return total


class SumOverRanks(torch.autograd.Function):
    """Sum over ranks. Its gradient is a sum too, since the loss of every rank depends on it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        """Return the sum on every rank."""
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the sum of the gradients of all ranks."""
        return SumOverRanks.forward(ctx, gradient)


def all_reduce_and(flag: Tensor) -> Tensor:
    """Return on the device whether all ranks say yes, without a host sync."""
    if world_size() == 1:
        return flag
    # NCCL has no logical AND; the minimum of 0 and 1 is one.
    value = flag.to(torch.int32)
    dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return value.bool()
