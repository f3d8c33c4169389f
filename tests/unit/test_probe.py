"""What a worker's own port says to probes, over HTTP."""

from collections.abc import AsyncIterator
from types import SimpleNamespace

import httpx
import pytest

from server.core.watchdog import SILENT_S
from workers import probe as probe_module
from workers.probe import HUNG_S, Probe


@pytest.fixture
async def probe() -> AsyncIterator[Probe]:
    made = Probe("127.0.0.1", 0)
    await made.start()
    yield made
    await made.stop()


async def statuses(probe: Probe) -> dict[str, int]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{probe.port}", trust_env=False) as client:
        return {name: (await client.get(f"/health/{name}")).status_code for name in ("startup", "live", "ready")}


async def test_one_that_loads_is_alive_and_has_not_started(probe: Probe) -> None:
    assert await statuses(probe) == {"startup": 503, "live": 200, "ready": 503}


async def test_one_that_serves_and_one_that_drains(probe: Probe) -> None:
    probe.beat()
    probe.ready = True
    assert await statuses(probe) == {"startup": 200, "live": 200, "ready": 200}
    probe.ready = False
    assert await statuses(probe) == {"startup": 200, "live": 200, "ready": 503}


async def test_a_model_that_hangs_and_does_not_end(probe: Probe) -> None:
    probe.beat()
    probe.hung_s = HUNG_S - 1
    assert (await statuses(probe))["live"] == 200
    probe.hung_s = HUNG_S
    assert await statuses(probe) == {"startup": 200, "live": 503, "ready": 503}


async def test_a_loop_that_is_not_heard_of(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(probe_module, "time", SimpleNamespace(monotonic=lambda: now))
    probe.beat()
    now += SILENT_S - 1
    assert (await statuses(probe))["live"] == 200
    now += 1
    assert await statuses(probe) == {"startup": 200, "live": 503, "ready": 503}
    # And it is alive again when it is
    probe.beat()
    assert (await statuses(probe))["live"] == 200
