"""OpenAI's own SDK, pointed here: it needs a base URL and a key, and nothing else."""

import base64
import struct
from typing import Any, Literal

import httpx
import numpy as np
import openai
import pytest
from pydantic import BaseModel

from tests.dialogue import FRANCE, MODEL, PARIS, QUICK, RESULT, SUNNY, TOOL, WEATHER, user
from tests.stack import Stack

GREEDY: Any = {"model": MODEL, "temperature": 0, "extra_body": QUICK}
EMBEDDING = "qwen3-embedding-0.6b"


def test_a_chat(openai_client: openai.OpenAI) -> None:
    # When the SDK asks
    completion = openai_client.chat.completions.create(messages=[user(FRANCE)], **GREEDY)
    # Then it gets an answer it understands
    assert completion.choices[0].message.content == PARIS
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 8
    # And the counts that other clients look for
    counts = completion.usage.model_dump()
    assert counts["output_tokens"] == 8
    assert counts["reasoning_tokens"] == 0
    assert counts["tokens_per_second"] > 0


async def test_an_asynchronous_chat(stack: Stack, key: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=key) as client:
        completion = await client.chat.completions.create(messages=[user(FRANCE)], **GREEDY)
        assert completion.choices[0].message.content == PARIS
        stream = await client.chat.completions.create(messages=[user(FRANCE)], stream=True, **GREEDY)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == PARIS


def test_the_streaming_helper(openai_client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    with openai_client.chat.completions.stream(messages=[user(FRANCE)], stream_options=options, **GREEDY) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == PARIS
    assert final.usage is not None
    assert final.usage.completion_tokens == 8


@pytest.mark.parametrize("streamed", [False, True])
def test_thoughts_have_both_names(openai_client: openai.OpenAI, streamed: bool) -> None:
    # When a model is asked by the name that lets it think
    asked: Any = {"model": f"{MODEL}-thinking", "messages": [user(FRANCE)], "temperature": 0}
    if streamed:
        deltas = [c.choices[0].delta.model_dump() for c in openai_client.chat.completions.create(stream=True, **asked)]
    else:
        deltas = [openai_client.chat.completions.create(**asked).choices[0].message.model_dump()]
    # Then the thought comes under both names, apart from the answer
    for name in ("reasoning", "reasoning_content"):
        assert "It is Paris" in "".join(delta.get(name) or "" for delta in deltas)
    assert "".join(delta.get("content") or "" for delta in deltas).strip() == PARIS


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_thoughts_are_taken_back(openai_client: openai.OpenAI, name: str) -> None:
    thought = {"role": "assistant", "content": PARIS, name: "Easy."}
    messages: Any = [user(FRANCE), thought, user("What is the capital of Japan?")]
    completion = openai_client.chat.completions.create(messages=messages, **GREEDY)
    assert completion.choices[0].message.content == "The capital of Japan is Tokyo."


class Weather(BaseModel):
    city: Literal["Tokyo", "Paris"]
    degrees: Literal[20, 21]


@pytest.mark.parametrize("thinking", [False, True])
def test_parse_gives_a_pydantic_model(openai_client: openai.OpenAI, thinking: bool) -> None:
    body = {"enable_thinking": thinking}
    completion = openai_client.chat.completions.parse(
        model=MODEL, messages=[user(FRANCE)], response_format=Weather, temperature=0, extra_body=body
    )
    parsed = completion.choices[0].message.parsed
    assert isinstance(parsed, Weather)
    assert parsed.city in ("Tokyo", "Paris")


def test_a_tool_loop_until_it_is_done(openai_client: openai.OpenAI) -> None:
    # Given a question that wants a tool
    messages: list[Any] = [user(WEATHER)]
    for _ in range(4):
        completion = openai_client.chat.completions.create(messages=messages, tools=[TOOL], **GREEDY)
        message = completion.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            break
        # When each call is answered
        for call in message.tool_calls:
            messages.append({"role": "tool", "tool_call_id": call.id, "content": RESULT})
    # Then the answer is made of the result
    assert messages[-1]["content"] == SUNNY
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]


def test_several_answers_logprobs_stop_and_seed(openai_client: openai.OpenAI) -> None:
    ask = openai_client.chat.completions.create
    several = ask(messages=[user(FRANCE)], n=3, **GREEDY | {"temperature": 0.1})
    assert [choice.message.content for choice in several.choices] == [PARIS] * 3
    stopped = ask(messages=[user(FRANCE)], stop=[" of"], **GREEDY)
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("The capital", "stop")
    with_logprobs = ask(messages=[user(FRANCE)], logprobs=True, top_logprobs=2, **GREEDY)
    logprobs = with_logprobs.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(token.token for token in logprobs.content[:-1]) == PARIS
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in logprobs.content)
    hot = {**GREEDY, "temperature": 2}
    seeded = [ask(messages=[user("Hello!")], seed=7, max_tokens=20, **hot).choices[0].message.content for _ in "ab"]
    assert seeded[0] == seeded[1]


def test_a_bias_changes_the_choice(openai_client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "prompt": "The capital", "max_tokens": 3, "temperature": 0}
    plain = openai_client.completions.create(**asked).choices[0].text
    # When a token is made certain
    forced = [
        openai_client.completions.create(logit_bias={token: 100}, **asked).choices[0].text for token in ("300", "301")
    ]
    # Then it is all that is said
    assert len({plain, *forced}) == 3
    assert all(text == text[: len(text) // 3] * 3 for text in forced)
    # And one that the model does not have is refused by name
    with pytest.raises(openai.BadRequestError) as refused:
        openai_client.completions.create(logit_bias={"99999": 1}, **asked)
    assert refused.value.param == "logit_bias"


def test_plain_completions(openai_client: openai.OpenAI) -> None:
    prompt = f"<|im_start|>user\n{FRANCE}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    asked: Any = {"model": MODEL, "temperature": 0, "max_tokens": 20}
    whole = openai_client.completions.create(prompt=prompt, **asked)
    assert whole.choices[0].text == PARIS
    streamed = openai_client.completions.create(prompt=prompt, stream=True, **asked)
    assert "".join(chunk.choices[0].text for chunk in streamed) == PARIS
    both = openai_client.completions.create(prompt=[prompt, prompt], **asked)
    assert [choice.text for choice in both.choices] == [PARIS] * 2


@pytest.mark.parametrize("effort", ["none", "low"])
def test_responses(openai_client: openai.OpenAI, effort: Any) -> None:
    asked: Any = {"model": MODEL, "temperature": 0, "reasoning": {"effort": effort}, "instructions": "Be brief."}
    # When a response is asked for, whole and streamed
    whole = openai_client.responses.create(input=FRANCE, **asked)
    with openai_client.responses.stream(input=[user(FRANCE)], **asked) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    # Then both say the same
    assert whole.output_text.strip() == PARIS
    assert "".join(deltas) == final.output_text == whole.output_text
    assert whole.status == final.status == "completed"
    thinks = effort != "none"
    assert any(item.type == "reasoning" for item in whole.output) == thinks
    assert any(item.type == "reasoning" for item in final.output) == thinks


def test_parse_of_a_response(openai_client: openai.OpenAI) -> None:
    response = openai_client.responses.parse(
        model=MODEL, input=WEATHER, text_format=Weather, temperature=0, reasoning={"effort": "none"}
    )
    assert isinstance(response.output_parsed, Weather)


def test_embeddings(openai_client: openai.OpenAI, client: httpx.Client) -> None:
    # Given the vectors of the service's own dialect
    texts = ["one", "two", "three"]
    own = [row["embedding"] for row in client.post("/embeddings", json={"input": texts}).json()["data"]]
    # When OpenAI's SDK asks for them (as base64, which it decodes)
    vectors = [row.embedding for row in openai_client.embeddings.create(model=EMBEDDING, input=texts).data]
    # Then they are the same
    assert np.allclose(vectors, own, atol=1e-6)
    # And cut ones are as long as ever
    cut = openai_client.embeddings.create(model=EMBEDDING, input=texts, dimensions=16).data[0].embedding
    assert len(cut) == 16
    assert np.linalg.norm(cut) == pytest.approx(1, abs=1e-5)
    head = np.array(own[0][:16])
    assert np.allclose(cut, head / np.linalg.norm(head), atol=1e-5)


def test_embeddings_as_floats_and_as_base64(client: httpx.Client) -> None:
    def vector(encoding: str) -> Any:
        body = {"input": "one", "encoding_format": encoding}
        return client.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]

    plain, encoded = vector("float"), base64.b64decode(vector("base64"))
    assert np.allclose(struct.unpack(f"<{len(encoded) // 4}f", encoded), plain, atol=1e-6)


def test_token_ids_are_embedded_as_their_text(client: httpx.Client) -> None:
    # Given the ids of "hello world" in the model's vocabulary
    ids = [7592, 2088]
    body = {"input": [ids, ids], "encoding_format": "float"}
    by_ids = client.post("/v1/embeddings", json=body).json()["data"]
    by_text = client.post("/v1/embeddings", json={"input": "hello world"}).json()["data"][0]["embedding"]
    assert np.allclose(by_ids[0]["embedding"], by_text, atol=1e-5)
    assert np.allclose(by_ids[1]["embedding"], by_text, atol=1e-5)
    # And one that is no token is refused by its place
    refused = client.post("/v1/embeddings", json={"input": [ids, [10**6]]})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "input.1"


def test_more_texts_than_a_job_holds_come_back_in_order(openai_client: openai.OpenAI, client: httpx.Client) -> None:
    before = client.get("/usage").json()["total_requests"]
    texts = [f"number {index}" for index in range(600)]
    data = openai_client.embeddings.create(model=EMBEDDING, input=texts).data
    assert [row.index for row in data] == list(range(600))
    for index in (0, 255, 256, 511, 512, 599):
        alone = openai_client.embeddings.create(model=EMBEDDING, input=texts[index]).data[0].embedding
        assert np.allclose(data[index].embedding, alone, atol=1e-3)
    # And they count as one request
    from tests.stack import eventually

    eventually(lambda: client.get("/usage").json()["total_requests"] == before + 7)


def test_models_are_listed_and_found(openai_client: openai.OpenAI, client: httpx.Client) -> None:
    listed = [model.id for model in openai_client.models.list()]
    variants = [f"qwen3-smoke{suffix}" for suffix in ("", "-search", "-thinking", "-thinking-search")]
    assert listed == [*variants, "minilm-smoke"]
    assert openai_client.models.retrieve("qwen3-smoke-thinking").id == "qwen3-smoke-thinking"
    with pytest.raises(openai.NotFoundError) as refused:
        openai_client.models.retrieve("qwen3-smoke-dreaming")
    assert refused.value.code == "model_not_found"
    # And the bare list of the service's own dialect is still there
    assert [model["id"] for model in client.get("/models").json()] == ["qwen3-smoke", "minilm-smoke"]


def test_errors_are_the_sdk_s_own(stack: Stack, openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        openai_client.chat.completions.create(model=MODEL, messages=[user(FRANCE)], n=5)
    assert refused.value.param == "n"
    assert "less than or equal to 4 (got 5)" in refused.value.message
    with pytest.raises(openai.BadRequestError) as too_long:
        openai_client.chat.completions.create(model=MODEL, messages=[user("a b " * 3000)])
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as unknown:
        openai_client.chat.completions.create(model="gpt-6", messages=[user(FRANCE)])
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    stranger = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="qk-nobody", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as nobody:
        stranger.models.list()
    assert nobody.value.code == "invalid_api_key"


def test_what_does_not_fit_is_counted_in_tokens(openai_client: openai.OpenAI) -> None:
    # Given few characters that are many tokens
    with pytest.raises(openai.BadRequestError, match="550 tokens do not fit") as refused:
        openai_client.chat.completions.create(messages=[user("🎉" * 380)], max_tokens=550, **GREEDY)
    assert refused.value.code == "context_length_exceeded"


def test_no_key_learns_from_the_cache_what_another_has_sent(stack: Stack) -> None:
    asked = {"input": "Something only I would say. " * 20, "max_output_tokens": 2}
    cached = []
    for key in [first := stack.new_key("first"), first, stack.new_key("second")]:
        with stack.client(key) as client:
            usage = client.post("/v1/responses", json=asked).json()["usage"]
            cached.append(usage["input_tokens_details"]["cached_tokens"] > 0)
    assert cached == [False, True, False]


def test_headers(client: httpx.Client) -> None:
    response = client.post("/v1/chat/completions", json={"messages": [user(FRANCE)], "user": "me", "store": True})
    assert response.json()["id"] == f"chatcmpl-{response.headers['x-request-id']}"
    assert int(response.headers["openai-processing-ms"]) > 0
    assert response.headers["x-ignored-fields"] == "user, store"
