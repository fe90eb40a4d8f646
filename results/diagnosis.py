"""What may be why a number is lower: questions, their answers, and the causes, likeliest first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Cause:
    """Something that may explain a lower number.

    `likelihood` is between 0 and 1, and only orders causes: what was measured to be wrong comes
    before what merely differs.
    """

    likelihood: float
    what: str
    evidence: str
    remedy: str


@dataclass(frozen=True)
class Answer:
    """The answer to a question: causes, or what was seen without one, or why it is unknown."""

    question: str
    causes: tuple[Cause, ...] = ()
    seen: str = ""
    unknown: str = ""

    @property
    def state(self) -> Literal["cause", "unknown", "fine"]:
        """What the answer is."""
        if self.causes:
            return "cause"
        return "unknown" if self.unknown else "fine"

    @property
    def detail(self) -> str:
        """What was seen, or why the answer is unknown; "" if there are causes, which say it."""
        return self.unknown or self.seen


@dataclass(frozen=True)
class Diagnosis:
    """All answers about a run, in the order in which they were asked."""

    run: str
    number: str
    answers: tuple[Answer, ...]

    @property
    def causes(self) -> list[Cause]:
        """All causes, the likeliest first; equal ones stay in the order of the questions."""
        found = [cause for answer in self.answers for cause in answer.causes]
        return sorted(found, key=lambda cause: -cause.likelihood)

    def describe(self) -> Iterator[str]:
        """Yield the diagnosis line by line."""
        yield f"{self.run}: {self.number}"
        for number, cause in enumerate(self.causes, 1):
            yield f"{number}. {cause.what}"
            yield f"   seen: {cause.evidence}"
            yield f"   next: {cause.remedy}"
        if not self.causes:
            unknown = sum(answer.state == "unknown" for answer in self.answers)
            # Without a cause and without an answer, a run is not known to be fine.
            told = f"; {unknown} of {len(self.answers)} questions unknown" if unknown else ""
            yield f"no cause found{told}"
        for answer in self.answers:
            if answer.state != "cause":
                yield f"{answer.state:<8}{answer.question}: {answer.detail}"

    def to_json(self) -> dict[str, Any]:
        """Return it for programs."""
        return {
            "run": self.run,
            "number": self.number,
            "causes": [vars(cause) for cause in self.causes],
            "answers": [
                {"question": answer.question, "state": answer.state, "detail": answer.detail}
                for answer in self.answers
            ],
        }


def answer_question(question: str, causes: Sequence[Cause], seen: str) -> Answer:
    """Return the answer to a question: its causes, or what was seen if there are none."""
    return Answer(question, tuple(causes), "" if causes else seen)
