"""A function on several ranks of this machine."""

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable

import torch
import torch.multiprocessing as mp

from mugs import distributed


def spawn(function: Callable[..., None], world: int, *args: object) -> None:
    """Run `function(rank, *args)` in `world` processes joined by gloo;
    an error of one ends all of them.

    It is raised here as a ProcessRaisedException that holds its traceback.
    """
    # One server imports the heavy modules once, and every rank is forked from it. A rank that is
    # started afresh imports them again, which takes longer than what most tests do with it.
    multiprocessing.set_forkserver_preload(["mugs.pretrain.train", "mugs.finetune.train"])
    # As bytes: torch would open a file for each tensor, and there may be too many.
    pickled = pickle.dumps(args)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    mp.start_processes(
        on_rank, args=(world, port, function, pickled), nprocs=world, start_method="forkserver"
    )


def on_rank(rank: int, world: int, port: int, function: Callable[..., None], args: bytes) -> None:
    """What each process does: join the others, run the function and leave.

    After an error it does not leave: the others would fail at once,
    and spawn might raise their errors, not the cause.
    """
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or it would be NCCL
    torch.set_num_threads(1)
    distributed.init_process_group(timeout_minutes=2)
    function(rank, *pickle.loads(args))
    distributed.destroy_process_group()
    assert distributed.world_size() == 1, "the group is left"
