"""InfoNCE over the rows of the batch, on one rank and on two."""

import pytest
import torch
from ranks import spawn
from torch import Tensor

from mugs import distributed
from mugs.losses.batch_info_nce import batch_info_nce_loss

ROWS = torch.arange(1, 21, dtype=torch.float64)[:, None]
COLUMNS = torch.arange(1, 17, dtype=torch.float64)
QUERIES = torch.sin(0.1 * ROWS * COLUMNS)
KEYS = torch.cos(0.07 * ROWS * (COLUMNS + 1))
WEIGHTS = torch.arange(1, 11).repeat(2).float()
IGNORED = torch.arange(20) % 7 == 3


def ignored_one_by_one() -> float:
    """The mean of losses among the rows that are left."""
    keep = ~IGNORED
    return batch_info_nce_loss(QUERIES[keep], KEYS[keep], 0.1).item()


CASES = [({}, 2.808174), ({"weights_n": WEIGHTS}, 2.636070), ({"ignored_n": IGNORED}, None)]


@pytest.mark.parametrize(("options", "expected"), CASES)
def test_released_values(options: dict[str, Tensor], expected: float | None) -> None:
    loss = batch_info_nce_loss(QUERIES, KEYS, 0.1, **options).item()
    assert loss == pytest.approx(expected or ignored_one_by_one(), abs=2e-6)


def test_released_cosine() -> None:
    """Of the pairs that belong together, so that the loss above is that of these rows."""
    assert torch.cosine_similarity(QUERIES, KEYS).mean().item() == pytest.approx(0.291957, abs=1e-6)


def on_rank(rank: int) -> None:
    mine = slice(10 * rank, 10 * rank + 10)
    for options, _ in CASES:
        whole = QUERIES.float().requires_grad_()
        reference = torch.nn.functional.normalize(whole, dim=-1)
        logits = reference @ torch.nn.functional.normalize(KEYS.float(), dim=-1).T / 0.1
        weights = options.get("weights_n", torch.ones(20))
        if "ignored_n" in options:
            weights = (~IGNORED).float()
            logits = logits.masked_fill(IGNORED, -torch.inf)
        each = -torch.log_softmax(logits, -1).diagonal()
        expected = (torch.where(weights > 0, each, 0.0) * weights).sum() / weights.sum()
        expected.backward()

        queries = QUERIES[mine].float().requires_grad_()
        shares = {name: value[mine] for name, value in options.items()}
        loss = batch_info_nce_loss(queries, KEYS[mine].float(), 0.1, **shares)
        loss.backward()
        mean = distributed.all_reduce_mean(loss)
        torch.testing.assert_close(mean, expected.detach(), atol=1e-6, rtol=0)
        # Gradients are averaged over ranks, so this rank's rows have twice theirs.
        torch.testing.assert_close(queries.grad / 2, whole.grad[mine], atol=1e-6, rtol=1e-5)


def test_two_ranks_equal_one() -> None:
    spawn(on_rank, 2)
