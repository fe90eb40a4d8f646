"""One message when a reproduction is finished or stuck."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from commands import call_command_line

from pipeline import config
from pipeline.plan import build_plan
from slurm.notify import (
    MOST_CHARACTERS,
    Message,
    MessageError,
    compose_message,
    format_message,
    send_message,
)
from slurm.shared import queue
from slurm.shared.keeper_notes import find_keeper_folder, list_ended_keepers, list_open_keepers
from slurm.status import RunStatus
from slurm.watching import watch_until_over
from stages import STAGES


class Webhook:
    """A server that notes what is posted, and answers as it is told."""

    def __init__(self) -> None:
        self.answers: list[int] = []
        self.received: list[dict[str, Any]] = []
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                webhook.received.append(json.loads(body))
                self.send_response(webhook.answers.pop(0) if webhook.answers else 200)
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/services/secret"


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    hook = Webhook()
    thread = Thread(target=hook.server.serve_forever)
    thread.start()
    yield hook
    hook.server.shutdown()
    hook.server.server_close()
    thread.join()


def status(*states: tuple[str, str]) -> list[RunStatus]:
    runs = build_plan(config.load_reproduction("mini", STAGES))
    return [RunStatus(run, *state) for run, state in zip(runs, states, strict=False)]


def test_finished() -> None:
    message = compose_message("mini", status(("done", "1 s"), ("done", "2 s")), "| table |")
    assert message.finished
    assert message.title == "mini is finished: 2 done"
    assert message.causes == ()
    text = format_message(message, "slack")["text"]
    assert text == "*mini is finished: 2 done*\n```\n| table |\n```"


def test_stuck() -> None:
    """With the cause of each run that has one, on one line each."""
    found = status(("done", ""), ("failed", "ValueError: bad\nimage"), ("waiting", "for pretrain"))
    message = compose_message("mini", found, "")
    assert not message.finished
    assert message.title == "mini is stuck: 1 done, 1 failed, 1 waiting"
    (cause,) = message.causes
    assert cause.startswith("pretrain failed: ValueError: bad") and "\n" not in cause
    assert format_message(message, "json") == {
        "reproduction": "mini",
        "finished": False,
        "title": message.title,
        "causes": [cause],
        "states": {"done": 1, "failed": 1, "waiting": 1},
        "tables": "",
    }


def test_long_tables_are_cut_for_slack() -> None:
    message = Message("mini", True, "title", (), {}, "x" * (MOST_CHARACTERS + 10))
    text = format_message(message, "slack")["text"]
    assert len(text) < MOST_CHARACTERS + 100 and "prints all" in text


def test_it_is_sent_once(webhook: Webhook) -> None:
    send_message(webhook.address, {"text": "é"})
    assert webhook.received == [{"text": "é"}]


def test_it_is_sent_again_if_the_server_is_down(webhook: Webhook) -> None:
    webhook.answers = [503, 502]
    pauses: list[float] = []
    send_message(webhook.address, {"text": "x"}, pause=pauses.append)
    assert len(webhook.received) == 3
    assert pauses == [20.0, 40.0]


def test_a_refusal_is_final_and_names_no_address(webhook: Webhook) -> None:
    webhook.answers = [404]
    with pytest.raises(MessageError, match=r"MUGS_WEBHOOK did not take .*404") as error:
        send_message(webhook.address, {"text": "x"}, pause=lambda _: None)
    assert len(webhook.received) == 1
    assert "secret" not in str(error.value)
    webhook.server.server_close()
    with pytest.raises(MessageError, match="no answer"):
        send_message("http://127.0.0.1:1/secret", {"text": "x"}, pause=lambda _: None)
    with pytest.raises(MessageError, match="has to begin with https"):
        send_message("file:///etc/passwd", {})


def test_it_is_over_when_several_looks_are_quiet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not between two runs, nor while a keeper is in the queue or Slurm does not tell."""
    waiting, running = status(("waiting", "")), status(("running", ""))
    looks = iter([running, waiting, waiting, running, *[waiting] * 6])
    monkeypatch.setattr("slurm.watching.collect_status", lambda *_: next(looks))
    answers = iter([[], [], ["job"], queue.SlurmError("no answer"), [], [], []])

    def find_jobs(names: list[str]) -> list[str]:
        assert names == ["keeper"]
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("slurm.watching.list_open_keepers", lambda *_: ["keeper"])
    monkeypatch.setattr(queue, "find_jobs_named", find_jobs)
    seen = list(watch_until_over([], tmp_path, pause_s=0))
    assert len(seen) == 9
    assert list(answers) == []
    done = status(("done", ""))
    monkeypatch.setattr("slurm.watching.collect_status", lambda *_: done)
    assert list(watch_until_over([], tmp_path, pause_s=0)) == [done]


def test_keepers_that_have_not_ended(tmp_path: Path) -> None:
    (run,) = [found.run for found in status(("waiting", ""))]
    folder = find_keeper_folder(tmp_path)
    folder.mkdir(parents=True)
    note = {"runs": {f"convert/digits-{run.run_id}": "x"}}
    for name in ("keeper-one", "keeper-two"):
        (folder / f"{name}.json").write_text(json.dumps(note))
        (folder / f"{name}.progress.json").write_text("{}")
    (folder / "keeper-other.json").write_text('{"runs": {"convert/other-0": "x"}}')
    (folder / "keeper-two.end.json").write_text('{"state": "stuck", "reasons": ["why"]}')
    assert list_open_keepers([run], tmp_path) == ["keeper-one"]
    assert list(list_ended_keepers([run], tmp_path)) == []
    (folder / "keeper-one.json").unlink()
    assert list(list_ended_keepers([run], tmp_path)) == ["keeper: stuck: why"]


def test_command(webhook: Webhook, tmp_path: Path) -> None:
    """Of a reproduction that nobody started: it is stuck at once."""
    (tmp_path / "runs").mkdir()
    done = call_command_line(
        "notify", "mini", "--only", "digits", "--every", "0.1",
        folder=tmp_path, env={"MUGS_WEBHOOK": webhook.address},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [content["title"] for content in webhook.received] == ["mini is stuck: 1 waiting"]
    missing = call_command_line("notify", "mini", folder=tmp_path)
    assert missing.returncode == 2
    assert "set MUGS_WEBHOOK" in missing.stderr
