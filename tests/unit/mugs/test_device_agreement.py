"""All ranks have a GPU, or none: told before any of them starts to train."""

import pytest
import torch.distributed as dist

from mugs.distributed import DeviceMismatchError, agree_on_device


@pytest.mark.parametrize(("others", "mine"), [(["cuda", "cuda"], True), (["n0", "n1"], False)])
def test_ranks_that_are_alike_go_on(others: list[str], mine: bool) -> None:
    store = dist.HashStore()
    for rank, said in enumerate(others):
        store.set(f"device/{rank}", said)
    agree_on_device(store, 2, 3, cuda=mine)


@pytest.mark.parametrize(("others", "mine"), [(["cuda", "n1"], True), (["n0", "cuda"], False)])
def test_a_rank_without_a_gpu_is_named(others: list[str], mine: bool) -> None:
    store = dist.HashStore()
    for rank, said in enumerate(others):
        store.set(f"device/{rank}", said)
    lost = others.index("n1" if mine else "n0")
    with pytest.raises(DeviceMismatchError, match=rf"no CUDA device on ranks {lost} \("):
        agree_on_device(store, 2, 3, cuda=mine)
