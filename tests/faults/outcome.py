"""What a campaign of faults found."""

from dataclasses import dataclass, field


@dataclass
class Outcome:
    """A row of `build/chaos.csv`; `complaints` says what each failure was."""

    name: str
    trials: int = 0
    complaints: list[str] = field(default_factory=list)
    note: str = ""

    def expect(self, fine: bool, complaint: str) -> None:
        """Note a failure unless all is fine."""
        if not fine:
            self.complaints.append(complaint)

    def row(self) -> dict[str, object]:
        """Columns of the table; the note ends with the first complaint."""
        first = f"; first failure: {self.complaints[0]}" if self.complaints else ""
        return {
            "name": self.name,
            "trials": self.trials,
            "failures": len(self.complaints),
            "note": self.note + first,
        }
