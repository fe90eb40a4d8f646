"""Losses in blocks of rows equal the plain formulas, value and gradient, whatever the block."""

import pytest
import torch
from torch.nn.functional import normalize

from mugs.losses import blocked
from mugs.losses.clustering import clustering_loss
from mugs.losses.info_nce import info_nce_loss
from mugs.losses.pairs import pair_weights


@pytest.fixture(params=[1, 100, 1 << 24])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setitem(blocked.BLOCK_ELEMENTS, "cpu", request.param)


def compare(ours: torch.Tensor, plain: torch.Tensor, inputs: torch.Tensor) -> None:
    mine, theirs = (
        torch.autograd.grad(3 * ours, inputs)[0],
        torch.autograd.grad(3 * plain, inputs)[0],
    )
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("block")
def test_clustering() -> None:
    student, teacher = torch.randn(5, 7, 33, requires_grad=True), torch.randn(2, 7, 33)
    center, weights = torch.randn(33), pair_weights(2, 5, 2, "released")
    assigned = torch.softmax((teacher - center) / 0.04, -1)
    log_p = torch.log_softmax(student / 0.1, -1)
    plain = -(torch.einsum("tnk,pnk->tp", assigned, log_p) / 7 * weights).sum()
    ours = clustering_loss(
        student, teacher, center, weights, student_temperature=0.1, teacher_temperature=0.04
    )
    compare(ours, plain, student)


@pytest.mark.usefixtures("block")
def test_clustering_with_a_weight_per_row() -> None:
    student, teacher = torch.randn(11, 33, requires_grad=True), torch.randn(11, 33)
    center, weights = torch.randn(33), torch.rand(11)
    assigned = torch.softmax((teacher - center) / 0.04, -1)
    plain = -(weights * (assigned * torch.log_softmax(student / 0.1, -1)).sum(-1)).sum()
    ours = clustering_loss(
        student[None],
        teacher[None],
        center,
        torch.ones(1, 1),
        student_temperature=0.1,
        teacher_temperature=0.04,
        image_weights_N=weights,
    )
    compare(ours, plain, student)


def test_no_rows_are_no_loss() -> None:
    student = torch.zeros(1, 0, 9, requires_grad=True)
    options = {"student_temperature": 0.1, "teacher_temperature": 0.04}
    loss = clustering_loss(
        student,
        torch.zeros(1, 0, 9),
        torch.zeros(9),
        torch.ones(1, 1),
        **options,
        image_weights_N=torch.zeros(0),
    )
    loss.backward()
    assert loss.item() == 0
    assert student.grad.shape == (1, 0, 9)


@pytest.mark.usefixtures("block")
def test_info_nce() -> None:
    student, teacher, queue = (
        normalize(torch.randn(*shape, 6), dim=-1) for shape in ((5, 7), (2, 7), (33,))
    )
    student.requires_grad_()
    weights = pair_weights(2, 5, 2, "uniform")
    positive = torch.einsum("tnd,pnd->tpn", teacher, student)[..., None]
    logits = torch.cat([positive, (student @ queue.T).expand(2, -1, -1, -1)], -1) / 0.2
    plain = -(torch.log_softmax(logits, -1)[..., 0].mean(-1) * weights).sum()
    compare(info_nce_loss(student, teacher, queue, weights, 0.2), plain, student)


def test_without_gradient() -> None:
    logits = torch.randn(3, 4, 9)
    weights, options = (
        pair_weights(2, 3, 2, "uniform"),
        {"student_temperature": 0.1, "teacher_temperature": 0.04},
    )
    with torch.no_grad():
        loss = clustering_loss(logits, logits[:2], torch.zeros(9), weights, **options)
    assert torch.equal(
        loss,
        clustering_loss(logits.requires_grad_(), logits[:2], torch.zeros(9), weights, **options),
    )


def test_bf16_logits_keep_their_precision_in_the_gradient() -> None:
    logits = torch.randn(3, 4, 9).bfloat16().requires_grad_()
    weights = pair_weights(2, 3, 2, "uniform")
    options = {"student_temperature": 0.1, "teacher_temperature": 0.04}
    loss = clustering_loss(logits, torch.randn(2, 4, 9), torch.zeros(9), weights, **options)
    loss.backward()
    assert (loss.dtype, logits.grad.dtype) == (torch.float32, torch.bfloat16)
