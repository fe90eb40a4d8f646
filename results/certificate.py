"""What a check of a bundle has shown, as JSON for programs and as a badge for a README."""

import json
from dataclasses import dataclass
from typing import Any

# In the head of both files, by which we know that they may be replaced.
MARK = "mugs-repro certificate"

NAMES = {
    0: "not verified",
    1: "tables regenerate",
    2: "evaluation repeated",
    3: "pretraining repeated",
    4: "repeated bitwise",
}
COLORS = {0: "#b3261e", 1: "#8a6d00", 2: "#3f6f21", 3: "#2e7d32", 4: "#00695c"}

# Of a letter of Verdana at 11 pixels, on average; the text is stretched to what follows from it.
_LETTER = 6.3
_LABEL = "reproduction"


@dataclass(frozen=True)
class Level:
    """A level, whether it was reached, and by what: a line each, or why not."""

    number: int
    reached: bool
    by: tuple[str, ...]


@dataclass(frozen=True)
class Certificate:
    """What was reached with one bundle; `code` is what checked it."""

    reproduction: str
    bundle_sha256: str
    levels: tuple[Level, ...]
    code: dict[str, Any]

    @property
    def level(self) -> int:
        """The highest level that was reached; 0 if the bundle itself is not intact."""
        reached = [level.number for level in self.levels if level.reached]
        return max(reached) if 1 in reached else 0

    def describe(self) -> list[str]:
        """Return a line for the level, and one for each of the four."""
        lines = [f"level {self.level} of 4: {NAMES[self.level]}"]
        for level in self.levels:
            state = "reached" if level.reached else "not reached"
            lines.append(f"  {level.number} {NAMES[level.number]}, {state}: {'; '.join(level.by)}")
        return lines

    def format_json(self) -> str:
        """Return the certificate for programs."""
        content = {
            "written_by": MARK,
            "level": self.level,
            "name": NAMES[self.level],
            "reproduction": self.reproduction,
            "bundle_sha256": self.bundle_sha256,
            "levels": [
                {
                    "level": level.number,
                    "name": NAMES[level.number],
                    "reached": level.reached,
                    "by": list(level.by),
                }
                for level in self.levels
            ],
            "code": self.code,
        }
        return json.dumps(content, indent=1) + "\n"

    def render_badge(self) -> str:
        """Return the badge as SVG."""
        text = f"level {self.level}: {NAMES[self.level]}" if self.level else NAMES[0]
        left = round(len(_LABEL) * _LETTER) + 10
        right = round(len(text) * _LETTER) + 10
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img"'
            f' aria-label="{_LABEL}: {text}">\n'
            f"<!-- {MARK} -->\n"
            f"<title>{_LABEL}: {text}</title>\n"
            f'<rect width="{left}" height="20" fill="#444"/>\n'
            f'<rect x="{left}" width="{right}" height="20" fill="{COLORS[self.level]}"/>\n'
            '<g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif"'
            ' font-size="11">\n'
            f'<text x="{left / 2:g}" y="14" textLength="{left - 10}">{_LABEL}</text>\n'
            f'<text x="{left + right / 2:g}" y="14" textLength="{right - 10}">{text}</text>\n'
            "</g>\n</svg>\n"
        )
