"""Text of others, as it may be printed: on one line, without control characters."""

import unicodedata
from collections.abc import Iterable

# Cc: control characters, such as ESC, which commands a terminal. Cf: what changes the direction of
# text or cannot be seen. Zl and Zp: separators that some programs take for the end of a line.
_REPLACED = ("Cc", "Cf", "Cs", "Zl", "Zp")


def clean_line(text: str) -> str:
    """Return a text with a question mark for every character that no name and number needs.

    A tab stays; of every other line end, only a space is left.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_clean, text))


def _clean(sign: str) -> str:
    if sign == "\t" or unicodedata.category(sign) not in _REPLACED:
        return sign
    return " " if sign in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029" else "?"


def join_equal(lines: Iterable[tuple[str, str]]) -> list[str]:
    """Return `names: text` for each text, with all names that have it, in order of first use."""
    names: dict[str, list[str]] = {}
    for name, text in lines:
        names.setdefault(text, []).append(name)
    return [f"{', '.join(found)}: {text}" for text, found in names.items()]


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun: 1 job, 2 jobs."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_amount(value: float) -> str:
    """Return a number with four digits, or all digits before the point: 0.1235, 16, 12,370."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
