"""Log lines: one JSON object each, with the fields they were given, and without what looks like a secret."""

import json
import logging

import pytest

from server.core.logging import configure

KEY = "qk-" + "aB3_-" * 8


@pytest.mark.usefixtures("logging_as_it_was")
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"key {KEY} is unknown", "key [hidden] is unknown"),
        (f"headers: {{'authorization': 'Bearer {KEY}x'}}", "headers: {'authorization': 'Bearer [hidden]'}"),
        ("Authorization: bearer own-key-of-mine, and more", "Authorization: bearer [hidden], and more"),
        ("postgresql://ada:hunter2@db:5432/x failed", "postgresql://[hidden]@db:5432/x failed"),
        ("amqp://guest:p%2F@mq/", "amqp://[hidden]@mq/"),
        ("see https://example.com/a?b=c@d", "see https://example.com/a?b=c@d"),
        ("qk-short, a bear, mail@example.com", "qk-short, a bear, mail@example.com"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(capsys: pytest.CaptureFixture[str], text: str, shown: str) -> None:
    configure("INFO", "test")
    # When it is in the message, in a field, and in an exception
    try:
        raise ValueError(text)
    except ValueError:
        logging.getLogger("x").exception(text, extra={"action": "test", "given": text})
    # Then it is hidden in all of them, and the line is the JSON it would have been
    line = capsys.readouterr().err
    told = json.loads(line)
    assert (told["action"], told["level"], told["process"]) == ("test", "ERROR", "test")
    assert told["message"] == told["given"] == shown
    assert f"ValueError: {shown}" in told["exc_info"]
    assert KEY not in line
    assert "hunter2" not in line
