"""What the private Postgres is given of a machine's memory."""

import pytest

from server.private import GIB, MIB, postgres_conf


@pytest.mark.parametrize(
    ("memory", "buffers_mb", "cache_mb"),
    [(512 * MIB, 128, 512), (8 * GIB, 1024, 4096), (24 * GIB, 3072, 12288), (512 * GIB, 4096, 262144)],
)
def test_postgres_takes_an_eighth_within_bounds(memory: int, buffers_mb: int, cache_mb: int) -> None:
    lines = postgres_conf(memory).splitlines()
    assert f"shared_buffers = {buffers_mb}MB" in lines
    assert f"maintenance_work_mem = {buffers_mb}MB" in lines
    assert f"effective_cache_size = {cache_mb}MB" in lines
