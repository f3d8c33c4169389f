"""LangChain's client of OpenAI, pointed here."""

from typing import Literal

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, SecretStr

from tests.dialogue import FRANCE, MODEL, PARIS, QUICK, RESULT, SUNNY, WEATHER
from tests.stack import Stack


@tool
def get_weather(location: str) -> str:
    """The weather in a city"""
    return RESULT


class Capital(BaseModel):
    """A country's capital."""

    city: Literal["Paris", "Tokyo"]


@pytest.fixture
def chat(stack: Stack, key: str) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL, base_url=f"{stack.url}/v1", api_key=SecretStr(key), temperature=0, extra_body=QUICK, max_retries=0
    )


def test_it_chats_and_streams(chat: ChatOpenAI) -> None:
    assert chat.invoke(FRANCE).content == PARIS
    assert "".join(str(chunk.content) for chunk in chat.stream(FRANCE)) == PARIS


def test_its_tools_are_called(chat: ChatOpenAI) -> None:
    bound = chat.bind_tools([get_weather])
    called = bound.invoke(WEATHER)
    assert isinstance(called, AIMessage)
    assert [(call["name"], call["args"]) for call in called.tool_calls] == [("get_weather", {"location": "Tokyo"})]
    result = ToolMessage(get_weather.invoke(called.tool_calls[0]["args"]), tool_call_id=called.tool_calls[0]["id"])
    assert bound.invoke([HumanMessage(WEATHER), called, result]).content == SUNNY


def test_its_structured_output_is_a_model(chat: ChatOpenAI) -> None:
    for method in ("json_schema", "function_calling"):
        structured = chat.with_structured_output(Capital, method=method)
        assert isinstance(structured.invoke(FRANCE), Capital)


def test_its_embeddings(stack: Stack, key: str) -> None:
    embeddings = OpenAIEmbeddings(
        model="qwen3-embedding-0.6b",
        base_url=f"{stack.url}/v1",
        api_key=SecretStr(key),
        check_embedding_ctx_length=False,
    )
    one, two = embeddings.embed_documents(["The cat sat.", "A feline was sitting."])
    other = embeddings.embed_query("Stock markets fell.")
    assert sum(a * b for a, b in zip(one, two, strict=True)) > 0.5
    assert sum(a * b for a, b in zip(one, other, strict=True)) < 0.3
