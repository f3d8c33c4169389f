"""What the private services are given of a machine: its memory, and its ports."""

import socket
from pathlib import Path

import pytest

from server import private
from server.private import GIB, MIB, OUTGOING_PORTS, free_port, postgres_conf


def test_a_free_port_is_no_outgoing_connections() -> None:
    # Given the ports that outgoing connections get
    first, _ = map(int, OUTGOING_PORTS.read_text().split())
    # When many are asked for; then each is another, none of theirs, and nobody has it
    ports = [free_port() for _ in range(300)]
    assert len(set(ports)) == len(ports)
    assert max(ports) < first
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_a_free_port_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a machine of which one port is not for outgoing connections, and somebody listens there
    with socket.create_server(("127.0.0.1", free_port())) as other:
        taken: int = other.getsockname()[1]
        theirs = tmp_path / "range"
        theirs.write_text(f"{taken + 1}\t60999\n")
        monkeypatch.setattr(private, "OUTGOING_PORTS", theirs)
        monkeypatch.setattr(private, "FIRST_PORT", taken)
        monkeypatch.setattr(private, "_given", set())
        # Then it is given to nobody else, and an outgoing connection's is better than none
        assert free_port() > taken
    # And it is given once it is free
    assert free_port() == taken


@pytest.mark.parametrize(
    ("memory", "buffers_mb", "cache_mb"),
    [(512 * MIB, 128, 512), (8 * GIB, 1024, 4096), (24 * GIB, 3072, 12288), (512 * GIB, 4096, 262144)],
)
def test_postgres_takes_an_eighth_within_bounds(memory: int, buffers_mb: int, cache_mb: int) -> None:
    lines = postgres_conf(memory).splitlines()
    assert f"shared_buffers = {buffers_mb}MB" in lines
    assert f"maintenance_work_mem = {buffers_mb}MB" in lines
    assert f"effective_cache_size = {cache_mb}MB" in lines
