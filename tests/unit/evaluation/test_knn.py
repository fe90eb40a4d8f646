"""k-NN in one pass equals a vote per k, within any memory budget."""

import pytest
import torch
import torch.nn.functional as F

from mugs.evaluation.knn import evaluate_knn, nearest

KS, TEMPERATURES = (1, 3, 10, 20), (0.05, 0.07)


@pytest.fixture
def data() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(200, 16, generator=generator), torch.randn(60, 16, generator=generator)
    labels = torch.randint(7, (260,), generator=generator)
    return bank, labels[:200], queries, labels[200:]


def naive(bank, bank_labels, queries, labels, k: int, temperature: float) -> float:
    correct = 0
    for query, label in zip(queries, labels, strict=True):
        cosine = F.cosine_similarity(query[None], bank)
        score = torch.zeros(7)
        for index in cosine.argsort(descending=True)[:k]:
            score[bank_labels[index]] += torch.exp(cosine[index] / temperature)
        correct += int(score.argmax() == label)
    return 100 * correct / len(labels)


@pytest.mark.parametrize("memory_mb", [1, 2048])
def test_equals_a_vote_per_k(data: tuple[torch.Tensor, ...], memory_mb: int) -> None:
    result = evaluate_knn(*data, num_classes=7, ks=KS, temperatures=TEMPERATURES, memory_mb=memory_mb)
    assert set(result) == {(k, t) for k in KS for t in TEMPERATURES}
    for (k, temperature), accuracy in result.items():
        assert accuracy["top1"] == pytest.approx(naive(*data, k, temperature), abs=1e-4)


def test_agrees_with_scikit_learn(data: tuple[torch.Tensor, ...]) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    bank, bank_labels, queries, labels = data
    ours = evaluate_knn(*data, num_classes=7, ks=(10,), temperatures=(0.07,))[10, 0.07]["top1"]
    model = KNeighborsClassifier(
        10, metric="cosine", weights=lambda distance: torch.exp((1 - torch.tensor(distance)) / 0.07).numpy()
    )
    model.fit(bank.numpy(), bank_labels.numpy())
    assert ours == pytest.approx(100 * model.score(queries.numpy(), labels.numpy()), abs=1e-4)


def test_blocks_do_not_change_the_neighbours(data: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    bank = torch.randn(5000, 8, generator=torch.Generator().manual_seed(1))
    whole, parts = (nearest(bank, bank[:300], 5, memory_mb=m) for m in (4096, 1))
    assert torch.equal(whole[1], parts[1])


def test_bad_input_is_refused(data: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(ValueError, match="200 images"):
        evaluate_knn(*data, num_classes=7, ks=(500,), temperatures=(0.07,))
    bad = (data[0].clone().fill_(float("nan")), *data[1:])
    with pytest.raises(ValueError, match="bank features are not finite"):
        evaluate_knn(*bad, num_classes=7, ks=(5,), temperatures=(0.07,))
