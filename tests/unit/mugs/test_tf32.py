"""One setting allows TF32 in all stages or in none."""

import pytest
import torch

from mugs.distributed import read_tf32_choice, set_tf32


@pytest.mark.parametrize(("value", "allowed"), [(None, True), ("1", True), ("0", False)])
def test_the_choice(value: str | None, allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("MUGS_TF32", raising=False)
    else:
        monkeypatch.setenv("MUGS_TF32", value)
    assert read_tf32_choice() == allowed


def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUGS_TF32", "no")
    with pytest.raises(ValueError, match="MUGS_TF32 is 'no'; set it to 0"):
        read_tf32_choice()


@pytest.mark.parametrize("allowed", [True, False])
def test_products_and_convolutions_are_treated_alike(allowed: bool) -> None:
    before = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    try:
        set_tf32(allowed)
        assert (torch.get_float32_matmul_precision() != "highest") == allowed
        assert torch.backends.cudnn.allow_tf32 == allowed
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
