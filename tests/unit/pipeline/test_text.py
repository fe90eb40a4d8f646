"""Texts for terminals."""

import pytest

from pipeline.text import format_amount, join_equal


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12346, "0.1235"), (16.0, "16"), (999.96, "1000"), (12370.4, "12,370"), (0.0, "0")],
)
def test_amounts_have_no_exponent(value: float, text: str) -> None:
    assert format_amount(value) == text


def test_names_with_one_text_share_its_line() -> None:
    lines = [("a", "same"), ("b", "other"), ("c", "same")]
    assert join_equal(lines) == ["a, c: same", "b: other"]
