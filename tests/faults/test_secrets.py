"""What must never be read anywhere but where it belongs: keys, passwords, what was said, and whose it was."""

import asyncio
import uuid
from typing import Any
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest

from tests.faults.guarded import ORIGIN, Guarded
from tests.faults.rig import MODEL, until

SAID = f"a secret told in confidence {uuid.uuid4().hex}"
HARDENED = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}


def say(content: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


async def dumped(database_url: str) -> str:
    """Every row of every table, as text."""
    async with await psycopg.AsyncConnection.connect(database_url) as conn:
        names = "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname !~ '^(pg_|information_)'"
        tables = [row[0] for row in await (await conn.execute(names)).fetchall()]
        assert any("api_keys" in table for table in tables)
        rows = []
        for table in tables:
            cursor = await conn.execute(f"SELECT t::text FROM {table} t")
            rows += [f"{table} {row[0]}" for row in await cursor.fetchall()]
        return "\n".join(rows)


async def test_keys_and_what_is_said_are_in_no_log_and_keys_in_no_table(guarded: Guarded) -> None:
    """At the level DEBUG, which has all others in it."""
    parts = guarded.parts
    unknown, revoked = "qk-" + "u" * 43, await parts.new_key("soon revoked")
    async with parts.store() as store:
        await store.revoke_key(next(row["id"] for row in await store.list_keys() if row["name"] == "soon revoked"))
    # Given requests of every end, with keys good and bad, in every place where one may stand or be put by mistake
    async with httpx.AsyncClient(base_url=guarded.url, trust_env=False, timeout=30) as client:
        for key in (guarded.key, unknown, revoked):
            for headers in ({"Authorization": f"Bearer {key}"}, {"x-api-key": key}, {"Authorization": f"Basic {key}"}):
                for path in ("/chat", "/v1/chat/completions", "/v1/messages", f"/v1/models/{key}", f"/{key}"):
                    await client.post(path, json=say(SAID), headers=headers)
                    await client.post(path, json=say(SAID, max_tokens=SAID), headers=headers)
                    await client.post(path, json=say(SAID, stream=True), headers=headers)
                    await client.post(path, content=SAID.encode(), headers=headers)
                    await client.get(f"/chat/history?session_id={key}", headers=headers)
                    await client.get(path, headers=headers | {"X-Request-Id": SAID, "traceparent": key})
    # And errors of the libraries, which quote their arguments
    broken = {"DATABASE_URL": "postgresql://nobody:hunter2@127.0.0.1:1/none", "LOG_LEVEL": "DEBUG"}
    failing = await parts.run("failing", "server", "serve", **broken)
    await asyncio.wait_for(failing.process.wait(), 60)
    assert failing.process.returncode
    # When all logs and all tables are read
    logs, tables = guarded.logs(), await dumped(parts.database_url)
    # Then no secret is in them
    assert "request answered" in logs  # so they do say something
    secrets = [parts.key, guarded.key, guarded.other_key, unknown, revoked, "hunter2"]
    secrets += [password for url in (parts.database_url, parts.amqp_url) if (password := urlsplit(url).password)]
    for secret in secrets:
        assert secret not in logs
        assert secret not in tables
    # Nor what was said, which is in the table of chats alone
    assert SAID not in logs
    assert {line.split(" ", 1)[0] for line in tables.split("\n") if SAID in line} <= {"public.chats"}


@pytest.mark.parametrize("path", ["/chat/history", "/chat/sessions", "/chat/stats", "/usage"])
async def test_another_keys_ids_look_exactly_like_unknown_ones(guarded: Guarded, path: str) -> None:
    parts = guarded.parts
    mine, unknown = f"mine-{uuid.uuid4().hex[:8]}", f"none-{uuid.uuid4().hex[:8]}"
    # Given a chat in a session of one key
    async with (
        parts.client(guarded.url, guarded.key) as ada,
        parts.client(guarded.url, await parts.new_key("x")) as eve,
    ):
        assert (await ada.post("/chat", json=say(SAID, session_id=mine))).status_code == 200

        async def kept() -> Any:
            return (await ada.get("/chat/history", params={"session_id": mine})).json()

        await until(kept)
        # When another asks for it by its name, and for one that nobody has
        foreign = await eve.get(path, params={"session_id": mine})
        nobodys = await eve.get(path, params={"session_id": unknown})
        # Then the answers are the same
        assert (foreign.status_code, foreign.content) == (nobodys.status_code, nobodys.content)
        told = ("date", "x-request-id", "x-ratelimit-remaining", "x-ratelimit-reset")
        assert {k: v for k, v in foreign.headers.items() if k not in told} == {
            k: v for k, v in nobodys.headers.items() if k not in told
        }
        # And to speak in a session of that name is to have one of one's own
        assert (await eve.post("/chat", json=say("mine", session_id=mine))).status_code == 200

        async def own() -> Any:
            return (await eve.get("/chat/history", params={"session_id": mine})).json()

        (entry,) = await until(own)
        assert entry["messages"][0]["content"] == "mine"
        assert len(await kept()) == 1


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/requests/{}"), ("DELETE", "/v1/requests/{}"), ("GET", "/v1/requests/{}/events")],
)
async def test_another_keys_request_looks_exactly_like_an_unknown_one(guarded: Guarded, method: str, path: str) -> None:
    parts = guarded.parts
    async with parts.client(guarded.url, guarded.key) as ada, parts.client(guarded.url, guarded.other_key) as eve:
        # Given a request of one key, and an id that nobody has
        asked = await ada.post("/chat", json=say("hi"), headers={"Idempotency-Key": uuid.uuid4().hex})
        mine, unknown = asked.headers["x-request-id"], uuid.uuid4().hex
        # When another asks for either
        foreign, nobodys = [await eve.request(method, path.format(id_)) for id_ in (mine, unknown)]
        # Then nothing but the id that was asked for tells the answers apart
        assert foreign.status_code == nobodys.status_code == 404
        assert foreign.text.replace(mine, "ID") == nobodys.text.replace(unknown, "ID")
        assert set(foreign.headers) == set(nobodys.headers)
        # And what cannot be an id is no different
        for odd in ("%00", "..%2fx", "x" * 200, "%F0%9F%98%80", "1'--"):
            assert (await eve.request(method, path.format(odd))).status_code in (404, 405)


async def test_every_answer_is_hardened_and_named(guarded: Guarded) -> None:
    parts = guarded.parts
    names = set()
    async with parts.client(guarded.url, guarded.key) as client:
        for method, path, status in [
            ("GET", "/health/live", 200),
            ("GET", "/metrics", 200),
            ("GET", "/openapi.json", 200),
            ("GET", "/docs", 200),
            ("GET", "/models", 200),
            ("GET", "/chat/history", 200),
            ("GET", "/nope", 404),
            ("PUT", "/chat", 405),
            ("POST", "/chat", 400),
            ("POST", "/v1/messages", 400),
            ("OPTIONS", "/chat", 405),
        ]:
            answer = await client.request(method, path, headers={"X-Request-Id": "proxy-7f3a"})
            assert answer.status_code == status, path
            assert HARDENED.items() <= dict(answer.headers).items(), path
            assert "server" not in answer.headers
            assert answer.headers["content-security-policy"].startswith("default-src 'none'; frame-ancestors 'none'")
            # The server's name for the request is its own each time; the client's stands beside it
            assert answer.headers["x-client-request-id"] == "proxy-7f3a"
            names.add(answer.headers["x-request-id"])
        assert len(names) == 11
        assert "proxy-7f3a" not in names
        stream = await client.post("/chat", json=say("hi", stream=True), headers={"X-Request-Id": "a b"})
        assert HARDENED.items() <= dict(stream.headers).items()
        assert "x-client-request-id" not in stream.headers
        # Both are in the log, next to each other
        assert '"client_request_id": "proxy-7f3a"' in guarded.logs()
        assert f'"request_id": "{names.pop()}"' in guarded.logs()
        # The page of the documentation runs no script and loads nothing
        docs = await client.get("/docs")
        assert "script" not in docs.headers["content-security-policy"]
        assert "<script" not in docs.text
        assert "src=" not in docs.text
        assert "/v1/chat/completions" in docs.text
        assert "max_completion_tokens" in docs.text


async def test_without_the_setting_no_other_origin_is_let_in(guarded: Guarded) -> None:
    # Given a server of the same service, as it is by default
    url, server = await guarded.parts.server("closed")
    try:
        async with guarded.parts.client(url, guarded.key) as client:
            asking = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
            answers = [
                await client.options("/v1/chat/completions", headers=asking),
                await client.get("/models", headers={"Origin": ORIGIN}),
                await client.post("/chat", json=say("hi"), headers={"Origin": "null"}),
            ]
        # Then it says nothing that a browser would take for leave
        assert [answer.status_code for answer in answers] == [405, 200, 200]
        assert not [name for answer in answers for name in answer.headers if name.startswith("access-control")]
    finally:
        await server.stop(timeout_s=20)


SDK_HEADERS = (
    "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-retry-count,x-stainless-timeout,"
    "anthropic-version,anthropic-dangerous-direct-browser-access,x-api-key,openai-organization"
)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat", "/v1/messages", "/chat/history"])
async def test_an_allowed_origin_is_let_in_and_no_other(guarded: Guarded, path: str) -> None:
    async with httpx.AsyncClient(base_url=guarded.url, trust_env=False) as client:
        # Given what a browser asks before it sends what an SDK in a page wants to send
        asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": SDK_HEADERS}
        leave = await client.options(path, headers=asking | {"Origin": ORIGIN})
        # Then it gets leave, without a key, for all of the headers
        assert leave.status_code == 200
        assert leave.headers["access-control-allow-origin"] == ORIGIN
        allowed = leave.headers["access-control-allow-headers"].lower().replace(" ", "")
        assert set(SDK_HEADERS.split(",")) <= set(allowed.split(","))
        assert "POST" in leave.headers["access-control-allow-methods"]
        assert "access-control-allow-credentials" not in leave.headers
        assert HARDENED.items() <= dict(leave.headers).items()
        # And the page may read the answer, be it an error, and the headers that matter
        answer = await client.post(path, json=say("hi"), headers={"Origin": ORIGIN})
        assert answer.status_code in (401, 405)
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        # But no other origin does
        for origin in ("https://evil.example.com", "http://chat.example.com", f"{ORIGIN}.evil.com", "null"):
            refused = await client.options(path, headers=asking | {"Origin": origin})
            assert refused.status_code == 400
            assert "access-control-allow-origin" not in refused.headers
            answer = await client.post(path, json=say("hi"), headers={"Origin": origin})
            assert "access-control-allow-origin" not in answer.headers
