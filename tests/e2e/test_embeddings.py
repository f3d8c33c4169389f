"""`/embeddings` against the real model."""

import math

import httpx
import pytest


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_the_documented_example_gets_the_documented_shape(client: httpx.Client) -> None:
    response = client.post("/embeddings", json={"text": "Sample text for embedding", "model": "qwen3-embedding-0.6b"})
    answer = response.json()
    assert response.status_code == 200
    assert set(answer) == {"object", "data", "model", "usage"}
    assert answer["object"] == "embedding"
    (entry,) = answer["data"]
    assert entry["object"] == "embedding"
    assert entry["index"] == 0
    assert len(entry["embedding"]) == 384
    assert math.isclose(cosine(entry["embedding"], entry["embedding"]), 1, abs_tol=1e-5)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 0
    assert answer["model"] == response.headers["x-stand-in"] == "minilm-smoke"


def test_a_list_keeps_its_order_and_its_meaning(client: httpx.Client) -> None:
    # Given three texts, two of one meaning
    texts = ["A cat sleeps on the sofa.", "Quarterly revenue rose.", "A kitten naps on the couch."]
    many = client.post("/embeddings", json={"input": texts}).json()["data"]
    assert [entry["index"] for entry in many] == [0, 1, 2]
    # Then each is what it is alone
    for text, entry in zip(texts, many, strict=True):
        alone = client.post("/embeddings", json={"text": text}).json()["data"][0]["embedding"]
        assert cosine(alone, entry["embedding"]) > 0.9999
    # And the two are closer to each other than to the third
    cat, revenue, kitten = (entry["embedding"] for entry in many)
    assert cosine(cat, kitten) > 0.5 > 0.2 > cosine(cat, revenue)


@pytest.mark.parametrize("body", [{"text": "one"}, {"input": "one"}, {"input": ["one"]}])
def test_text_and_input_are_the_same(client: httpx.Client, body: dict[str, object]) -> None:
    vector = client.post("/embeddings", json=body).json()["data"][0]["embedding"]
    assert vector == pytest.approx(
        client.post("/embeddings", json={"text": "one"}).json()["data"][0]["embedding"], abs=1e-5
    )
