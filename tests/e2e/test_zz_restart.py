"""The last tests of the session: the stack is stopped, leaves nothing behind, and comes back with its data."""

import signal

import httpx

from tests.stack import Stack, eventually, say


def test_ctrl_c_stops_everything_and_a_second_start_has_the_data(stack: Stack) -> None:
    # Given a chat, said with the key of the first start
    key = stack.key
    with stack.client() as client:
        client.post("/chat", json=say("Hello!", session_id="before"))
        eventually(lambda: client.get("/chat/history?session_id=before").json())
    # When it is stopped as from a terminal
    assert stack.stop(signal.SIGINT) == 0
    # Then no process of it is left
    assert stack.left_behind() == []
    # And when it is started again
    stack.start()
    # Then the key is not shown again, but works, and the chat is there
    assert key not in stack.output
    assert "the one shown at the first start" in stack.output
    assert "Database schema" not in stack.output
    assert "Teaching" not in stack.output
    with stack.client() as client:
        (entry,) = client.get("/chat/history?session_id=before").json()
        assert entry["messages"][0]["content"] == "Hello!"
        assert client.post("/chat", json=say("Hello!")).status_code == 200


def test_a_second_up_on_the_same_data_says_why_not(stack: Stack) -> None:
    import subprocess
    import sys

    from tests.stack import PROJECT

    done = subprocess.run(
        [sys.executable, "-m", "server", "up", "--data-dir", str(stack.folder)],
        cwd=PROJECT,
        env=stack.environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert "Another ./run uses" in done.stderr
    assert httpx.get(f"{stack.url}/health").status_code == 200
