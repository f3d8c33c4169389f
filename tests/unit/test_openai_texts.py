"""OpenAI's dialect besides chats: plain completions, vectors, and the list of models."""

import asyncio
import base64
from typing import Any

import numpy as np
import orjson
import pytest

from server.core.errors import UnknownModel
from server.core.messages import EmbeddingResult, encode_embeddings
from server.core.registry import Registry
from server.dialects import openai
from server.dispatch import Call
from server.schemas.embeddings import MAX_TEXTS
from server.schemas.openai import CompletionsRequest, EmbeddingsRequest
from tests.unit.fake_requests import (
    REGISTRY,
    VECTORS,
    FakeDispatcher,
    FakeTicket,
    body_of,
    frame,
    refused,
    request_of,
)

USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


async def completed(**fields: Any) -> tuple[Any, FakeDispatcher]:
    dispatcher = FakeDispatcher(frame("result", {"choices": [], "usage": USAGE}, elapsed_s=4.0))
    body = CompletionsRequest.model_validate({"prompt": "Once", **fields})
    return orjson.loads((await openai.completions(request_of(dispatcher), body)).body), dispatcher


@pytest.mark.parametrize("prompt", ["Once", "", ["Once", "Twice"], [1, 2, 3], [[1, 2], [3]]])
async def test_a_plain_completion(prompt: Any) -> None:
    # When a text is to be gone on with, given in any form
    fields = {"prompt": prompt, "max_tokens": 5, "echo": True, "top_k": 1, "min_p": 0.5, "stop": ["x"], "n": 2}
    answer, dispatcher = await completed(**fields, user="ada")
    # Then the engine is asked just that, and the answer has the counts
    (call,) = dispatcher.calls
    assert (call.api, call.body) == ("completions", {"model": "talker", "stream": False, **fields})
    assert answer["usage"] == USAGE | {"reasoning_tokens": 0, "output_tokens": 2, "tokens_per_second": 0.5}
    # And the work is over
    assert [ticket.closed for ticket in dispatcher.tickets] == [True]


@pytest.mark.parametrize(
    ("fields", "told", "param"),
    [
        ({"model": "talker-thinking"}, "model: plain completions have no -thinking", "model"),
        ({"model": "talker-search"}, "model: plain completions have no -thinking", "model"),
        ({"echo": True, "logprobs": 0}, "logprobs: not with echo", "logprobs"),
        ({"suffix": "x"}, "suffix: not accepted", "suffix"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x: ", "logit_bias"),
    ],
)
async def test_what_a_plain_completion_refuses(fields: dict[str, Any], told: str, param: str) -> None:
    with refused(told, param):
        await completed(**fields)


ROWS = np.array([[0.6, 0.0, 0.8], [0.0, 0.0, 1.0]], dtype="<f4")


async def embedded(rows: Any = ROWS, **fields: Any) -> tuple[Any, Any, FakeDispatcher]:
    result = encode_embeddings(EmbeddingResult("vectors", 3, 5, rows.tobytes()))
    dispatcher = FakeDispatcher(frame("result", result))
    body = EmbeddingsRequest.model_validate({"input": ["one", "two"], **fields})
    response = await openai.embeddings(request_of(dispatcher), body)
    return orjson.loads(await body_of(response)), response.headers, dispatcher


async def test_vectors_in_openais_list() -> None:
    answer, headers, dispatcher = await embedded(user="ada", metadata=None)
    assert [item["index"] for item in answer["data"]] == [0, 1]
    assert np.array([item["embedding"] for item in answer["data"]], "f4").tobytes() == ROWS.tobytes()
    assert (answer["object"], answer["model"]) == ("list", "vectors")
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert headers["x-ignored-fields"] == "user"
    assert dispatcher.calls[0].body == {
        "input": ["one", "two"],
        "first": 0,
        "input_type": "document",
        "space": VECTORS.vector_space,
        "truncate": False,
    }


async def test_vectors_in_base64_are_little_endian_floats() -> None:
    answer, *_ = await embedded(encoding_format="base64")
    assert [base64.b64decode(item["embedding"]) for item in answer["data"]] == [row.tobytes() for row in ROWS]


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_vectors_that_are_cut_have_length_one_again(encoding: str) -> None:
    # Given a vector of which nothing is left
    answer, *_ = await embedded(dimensions=2, encoding_format=encoding)
    cut = [item["embedding"] for item in answer["data"]]
    if encoding == "base64":
        cut = [np.frombuffer(base64.b64decode(vector), "<f4").tolist() for vector in cut]
    # Then it stays without direction, and is no division by zero
    assert cut == [[1.0, 0.0], [0.0, 0.0]]


async def test_vectors_cannot_grow() -> None:
    assert (await embedded(dimensions=3))[0]["data"][1]["embedding"] == [0, 0, 1]
    with refused("dimensions: vectors has 3, so 4 are too many", "dimensions"):
        await embedded(dimensions=4)


@pytest.mark.parametrize(
    ("given", "texts"),
    [("one", ["one"]), ([1, 2], [[1, 2]]), ([[1, 2], [3]], [[1, 2], [3]]), (["one"], ["one"])],
)
async def test_texts_and_tokens_one_and_many(given: Any, texts: list[Any]) -> None:
    _, _, dispatcher = await embedded(rows=ROWS[: len(texts)], input=given, input_type="query")
    assert (dispatcher.calls[0].body["input"], dispatcher.calls[0].body["input_type"]) == (texts, "query")


class SlowFirst(FakeDispatcher):
    """Gives each text its own number as vector; the first jobs end last."""

    async def submit(self, call: Call) -> FakeTicket:
        await super().submit(call)
        for _ in range(MAX_TEXTS * 4 - call.body["first"]):
            await asyncio.sleep(0)
        rows = np.array([[float(text)] for text in call.body["input"]], "<f4")
        return FakeTicket(frame("result", encode_embeddings(EmbeddingResult("vectors", 1, 5, rows.tobytes()))))


async def test_more_texts_than_a_job_holds_are_several_in_order() -> None:
    # Given texts for two jobs and a bit
    texts = [str(index) for index in range(2 * MAX_TEXTS + 2)]
    dispatcher = SlowFirst()
    response = await openai.embeddings(request_of(dispatcher), EmbeddingsRequest.model_validate({"input": texts}))
    # Then each job has its share, a name of its own, and says where it starts
    starts = [(call.request_id, call.body["first"]) for call in dispatcher.calls]
    assert starts == [("r1", 0), ("r1.1", MAX_TEXTS), ("r1.2", 2 * MAX_TEXTS)]
    assert [text for call in dispatcher.calls for text in call.body["input"]] == texts
    # And the answer is in the order of the texts, whatever job ended first, and what they cost is added up
    answer = orjson.loads(response.body)
    assert [item["embedding"] for item in answer["data"]] == [[float(text)] for text in texts]
    assert [item["index"] for item in answer["data"]] == list(range(len(texts)))
    assert answer["usage"]["prompt_tokens"] == 15


@pytest.mark.parametrize("model", ["talker", "vectors-thinking", "nobody"])
async def test_a_model_without_vectors_is_unknown(model: str) -> None:
    with pytest.raises(UnknownModel):
        await embedded(model=model)


async def test_an_embedding_refuses_by_name_too() -> None:
    with refused("truncate_prompt_tokens: not accepted", "truncate_prompt_tokens"):
        await embedded(truncate_prompt_tokens=5)


def test_the_models_and_their_variants() -> None:
    listed = openai.models(REGISTRY, 1, variants=True)
    suffixes = ("", "-search", "-thinking", "-thinking-search")
    names = [name + suffix for name in ("talker", "seer") for suffix in suffixes]
    assert [model["id"] for model in listed["data"]] == [*names, "vectors"]
    assert (listed["object"], listed["first_id"], listed["last_id"]) == ("list", "talker", "vectors")
    # And each is found by its name, as it stands in the list
    assert [openai.find_model(REGISTRY, 1, model["id"]) for model in listed["data"]] == listed["data"]
    assert {model["upstream_id"] for model in listed["data"]} == {"talker", "seer", "vectors"}
    # And a simple list has ids alone, and an empty one no first
    assert [m["id"] for m in openai.models(REGISTRY, 1, variants=False)["data"]] == ["talker", "seer", "vectors"]
    assert openai.models(Registry(()), 1, variants=True) == {"object": "list", "data": [], "has_more": False}


@pytest.mark.parametrize("name", ["nobody", "", "talker-fast", "vectors-thinking"])
def test_a_name_without_a_model_is_not_found(name: str) -> None:
    with pytest.raises(UnknownModel):
        openai.find_model(REGISTRY, 1, name)
