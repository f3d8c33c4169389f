"""The rig itself: without a fault, a chat is answered and recorded."""

from tests.faults.rig import MODEL, Rig, until


async def test_a_chat_through_the_rig(parts: Rig) -> None:
    url, _ = await parts.server()
    await parts.echo()
    await parts.archive()
    async with parts.client(url) as client:

        async def get(path: str) -> object:
            return (await client.get(path)).json()

        async def healthy() -> bool:
            return (await client.get("/health")).json()["status"] == "healthy"

        await until(healthy)
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        (kept,) = await until(lambda: get("/chat/history"))  # type: ignore[misc]
        assert kept["messages"][0] == body["messages"][0]
