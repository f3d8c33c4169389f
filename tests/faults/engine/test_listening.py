"""What of a whole service another machine, or another user of this one, could reach or read."""

import stat
from contextlib import suppress
from urllib.parse import urlsplit

import psutil

from tests.faults.test_listening import beyond, listening
from tests.processes import marked, naming
from tests.stack import Stack, addresses


def test_nothing_of_the_whole_service_listens_beyond_this_machine(stack: Stack) -> None:
    # Given all of it, the engine included; when its sockets are looked at
    found = listening(marked(str(stack.folder)) + naming(stack.folder))
    # Then all are on loopback
    assert "beam.smp" in found
    assert beyond(found) == []


def test_no_secret_is_on_a_command_line_or_in_a_file_of_everybodys(stack: Stack) -> None:
    # Given the passwords of its broker and its database, and a key
    secrets = [stack.key, *(str(urlsplit(addresses(stack)[name]).password) for name in ("DATABASE_URL", "AMQP_URL"))]
    assert all(len(secret) > 16 for secret in secrets)
    # When all of its processes are looked at; then none was told them where everybody can read it
    commands = []
    for process in marked(str(stack.folder)) + naming(stack.folder):
        with suppress(psutil.Error):  # it has ended meanwhile
            commands.append(" ".join(process.cmdline()))
    assert any("beam.smp" in command for command in commands)
    assert not [command for command in commands for secret in secrets if secret in command]
    # And the file that has them is its owner's
    assert stat.S_IMODE((stack.folder / "addresses.json").stat().st_mode) == 0o600
