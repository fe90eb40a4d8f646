"""The command `notify`: one message when a reproduction is finished or stuck, never one per job."""

import json
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.text import clean_line
from slurm.status import RunStatus

MessageKind = Literal["slack", "json"]
# The environment, as an address is a password: command lines and files can be read by others.
ADDRESS_VARIABLE = "MUGS_WEBHOOK"
ATTEMPTS = 5
# Slack cuts a message off after 40,000 characters.
MOST_CHARACTERS = 30_000


class MessageError(Exception):
    """A message could not be sent."""


@dataclass(frozen=True)
class Message:
    """What happened to a reproduction: a line, the causes if it is stuck, and its tables."""

    reproduction: str
    finished: bool
    title: str
    causes: tuple[str, ...]
    states: Mapping[str, int]
    tables: str


def compose_message(reproduction: str, found: Sequence[RunStatus], tables: str) -> Message:
    """Return the message about runs of which none is running or queued any more."""
    states = Counter(status.state for status in found)
    finished = states["done"] == len(found)
    counted = ", ".join(f"{count} {state}" for state, count in states.most_common())
    title = f"{reproduction} is {'finished' if finished else 'stuck'}: {counted}"
    # A run that waits has no cause of its own.
    causes = tuple(
        clean_line(f"{status.run.name} {status.state}: {status.detail}")
        for status in found
        if status.state not in ("done", "waiting")
    )
    return Message(reproduction, finished, title, causes, dict(states), tables)


def format_message(message: Message, kind: MessageKind) -> dict[str, Any]:
    """Return the content that is posted."""
    if kind == "json":
        return {
            "reproduction": message.reproduction,
            "finished": message.finished,
            "title": message.title,
            "causes": list(message.causes),
            "states": dict(message.states),
            "tables": message.tables,
        }
    tables = message.tables
    if len(tables) > MOST_CHARACTERS:
        tables = f"{tables[:MOST_CHARACTERS]}\n... (`run_stage.py tables` prints all)"
    lines = [f"*{message.title}*", *message.causes]
    if tables:
        lines.append(f"```\n{tables}\n```")
    return {"text": "\n".join(lines)}


def send_message(
    address: str,
    content: Mapping[str, Any],
    *,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Post the content as JSON, again after a while if nobody answers.

    Raises:
        MessageError: it was refused, or nobody answered. The address is not part of the message.
    """
    if not address.startswith(("https://", "http://")):
        raise MessageError(f"{ADDRESS_VARIABLE} has to begin with https:// or http://")
    request = urllib.request.Request(
        address,
        data=json.dumps(content).encode(),
        headers={"Content-Type": "application/json"},
        method="POST",
    )
    why = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            pause(10.0 * 2**attempt)
        try:
            with urllib.request.urlopen(request, timeout=30):
                return
        except urllib.error.HTTPError as error:
            why = f"it answered {error.code}"
            # Another attempt would be refused, too.
            if error.code < 500:
                break
        except OSError as error:
            why = f"no answer: {getattr(error, 'reason', error)}"
    raise MessageError(f"the webhook of {ADDRESS_VARIABLE} did not take the message: {why}")
