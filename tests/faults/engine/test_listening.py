"""Nothing of a whole service can be reached from another machine."""

from tests.faults.test_listening import beyond, listening
from tests.processes import marked, naming
from tests.stack import Stack


def test_nothing_of_the_whole_service_listens_beyond_this_machine(stack: Stack) -> None:
    # Given all of it, the engine included; when its sockets are looked at
    found = listening(marked(str(stack.folder)) + naming(stack.folder))
    # Then all are on loopback
    assert "beam.smp" in found
    assert beyond(found) == []
