"""k-NN in one pass equals a vote per k and scikit-learn's, within its memory and over ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import spawn
from sklearn.neighbors import KNeighborsClassifier
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mugs.data.loading.evaluation import iter_eval_batches
from mugs.data.mini.digits import materialize_digits
from mugs.data.sources.folder import FolderSource
from mugs.evaluation import knn
from mugs.evaluation.features import build_feature_function, extract_features
from mugs.evaluation.knn import evaluate_knn, find_nearest, grouped_topk
from mugs.models.vit import build_vit

KS, TEMPERATURES = (1, 3, 10, 15, 20, 50, 100, 200), (0.04, 0.05, 0.07)
Data = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def random_features() -> Data:
    generator = torch.Generator().manual_seed(0)
    bank, queries = (
        torch.randn(700, 16, generator=generator),
        torch.randn(130, 16, generator=generator),
    )
    labels = torch.randint(10, (830,), generator=generator)
    return bank, labels[:700], queries, labels[700:]


@pytest.fixture(scope="module")
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Data:
    if request.param == "random":
        return random_features()
    root = tmp_path_factory.mktemp("digits") / "images"
    materialize_digits(root)
    torch.manual_seed(0)
    model, splits = build_feature_function(build_vit("vit_mini").eval(), "cls"), []
    for split in ("train", "val"):
        batches = iter_eval_batches(FolderSource(root / split), resize=32, crop=32, threads=1)
        splits += extract_features(model, batches, device=torch.device("cpu"))[:2]
    bank, bank_labels, queries, labels = splits
    mean = bank.mean(
        dim=0
    )  # an untrained network's features are nearly the same; rounding would decide
    return bank - mean, bank_labels, queries - mean, labels


both = pytest.mark.parametrize("data", ["random", "mini"], indirect=True)


def naive(data: Data, k: int, temperature: float) -> float:
    """One query after the other, all cosines sorted, votes added up."""
    bank, bank_labels, queries, labels = data
    correct = 0
    for query, label in zip(F.normalize(queries, dim=1), labels, strict=True):
        cosine = F.normalize(bank, dim=1) @ query
        score = torch.zeros(10)
        for index in cosine.argsort(descending=True)[:k]:
            score[bank_labels[index]] += torch.exp(cosine[index] / temperature)
        correct += int(score.argmax() == label)
    return 100 * correct / len(labels)


@both
@pytest.mark.parametrize("memory_mb", [1, 2048])
def test_equals_scikit_learn(data: Data, memory_mb: int) -> None:
    bank, bank_labels, queries, labels = data
    ks = (*KS, len(bank))
    ours = evaluate_knn(
        *data, num_classes=10, ks=ks, temperatures=TEMPERATURES, memory_mb=memory_mb
    )
    assert set(ours) == {(k, t) for k in ks for t in TEMPERATURES}
    for (k, t), accuracy in ours.items():
        weights = lambda distance, t=t: torch.exp((1 - torch.tensor(distance)) / t).numpy()  # noqa: E731
        model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
        model.fit(bank.double().numpy(), bank_labels.numpy())
        assert accuracy["top1"] == pytest.approx(
            100 * model.score(queries.double().numpy(), labels.numpy()), abs=1e-9
        )


@both
def test_equals_a_vote_per_k(data: Data) -> None:
    some: Data = (data[0], data[1], data[2][:100], data[3][:100])
    ours = evaluate_knn(*some, num_classes=10, ks=KS, temperatures=(0.05, 0.07))
    for k, t in ours:
        if k <= 20:
            assert ours[k, t]["top1"] == naive(some, k, t), (k, t)
            alone = evaluate_knn(*some, num_classes=10, ks=(k,), temperatures=(t,))
            assert alone == {(k, t): ours[k, t]}


@pytest.mark.parametrize(
    ("columns", "k"), [(10, 10), (16, 1), (1000, 3), (1003, 7), (5000, 200), (16384, 200)]
)
def test_largest_is_topk(columns: int, k: int) -> None:
    values = torch.randn(20, columns, generator=torch.Generator().manual_seed(columns))
    values[3] = values[3].sort().values
    values[4] = values[4].sort(descending=True).values
    best, index = grouped_topk(values, k)
    assert torch.equal(best, values.topk(k, dim=1).values) and torch.equal(
        values.gather(1, index), best
    )
    assert all(len(set(row)) == k for row in index.tolist())


@pytest.mark.parametrize("quantile", [0.0, 0.9, 0.999, 1.0])
def test_largest_above_a_value_leaves_out_none_of_them(quantile: float) -> None:
    values = torch.randn(20, 5003, generator=torch.Generator().manual_seed(0))
    above = values.quantile(quantile, dim=1, keepdim=True)
    best, index = grouped_topk(values, 100, above)
    assert torch.equal(values.gather(1, index), best)
    for row, wanted, limit in zip(best, values.topk(100, dim=1).values, above, strict=True):
        assert torch.equal(row[row > limit], wanted[wanted > limit])


def test_blocks_do_not_change_the_neighbors(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = torch.randn(5000, 8, generator=torch.Generator().manual_seed(1))
    whole = find_nearest(bank, bank[:300], 5, memory_mb=4096)
    monkeypatch.setattr(knn, "BANK_ROWS", 700)
    parts = find_nearest(bank, bank[:300], 5, memory_mb=1)
    assert torch.equal(whole[1], parts[1])
    torch.testing.assert_close(whole[0], parts[0])


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [
            t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, torch.Tensor)
        ]
        self.bytes = max([self.bytes, *sizes])
        return out


@pytest.mark.parametrize("memory_mb", [1, 4, 16])
def test_memory_follows_the_setting(memory_mb: int) -> None:
    """Of 3000 x 6000 cosines, 72 MB."""
    bank, labels = torch.zeros(6000, 4), torch.zeros(6000, dtype=torch.int64)
    bank[:, 0] = 1
    with Largest() as seen:
        rest = {"num_classes": 9, "ks": (5,), "temperatures": (1.0,), "memory_mb": memory_mb}
        evaluate_knn(bank, labels, bank[:3000], labels[:3000], **rest)
    assert seen.bytes <= max(memory_mb * 2**20 / 4, bank.nbytes * 2)


def on_rank(_rank: int, expected: dict[Any, Any]) -> None:
    found = evaluate_knn(*random_features(), num_classes=10, ks=KS, temperatures=TEMPERATURES)
    assert found == expected


@pytest.mark.slow
def test_over_ranks(tmp_path: Path) -> None:
    expected = evaluate_knn(*random_features(), num_classes=10, ks=KS, temperatures=TEMPERATURES)
    spawn(on_rank, 2, expected)


def test_bad_input_is_refused() -> None:
    data = random_features()
    evaluate_knn(*data, num_classes=10, ks=(1, 700), temperatures=(0.07,))
    for ks in ((701,), (0, 5), ()):
        with pytest.raises(ValueError, match="700 images"):
            evaluate_knn(*data, num_classes=10, ks=ks, temperatures=(0.07,))
    bad = (data[0].clone().fill_(float("nan")), *data[1:])
    with pytest.raises(ValueError, match="bank features are not finite"):
        evaluate_knn(*bad, num_classes=10, ks=(5,), temperatures=(0.07,))
