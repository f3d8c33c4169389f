"""One stack for the whole session: an engine takes a minute to start."""

from collections.abc import Iterator

import anthropic
import httpx
import openai
import pytest

from tests.otlp import Receiver, receiving
from tests.stack import Stack, whole_stack


@pytest.fixture(scope="session")
def collector() -> Iterator[Receiver]:
    """Gets the traces of those requests whose client asks for one."""
    with receiving() as made:
        yield made


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, collector: Receiver) -> Iterator[Stack]:
    settings = collector.environment | {"OTEL_TRACES_SAMPLER": "parentbased_always_off"}
    with whole_stack(tmp_path_factory.mktemp("stack"), **settings) as running:
        yield running


@pytest.fixture(scope="module")
def key(stack: Stack, request: pytest.FixtureRequest) -> str:
    """A key of this test module's own: what it counts, no other module has done."""
    return stack.new_key(request.module.__name__)


@pytest.fixture
def client(stack: Stack, key: str) -> Iterator[httpx.Client]:
    with stack.client(key) as made:
        yield made


@pytest.fixture
def openai_client(stack: Stack, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key, max_retries=0) as made:
        yield made


@pytest.fixture
def anthropic_client(stack: Stack, key: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=stack.url, api_key=key, max_retries=0) as made:
        yield made
