"""The OpenAPI document has the headers that are read, and the answers that they cause."""

from typing import Any

import pytest

from server.app import create_app
from server.core.settings import Settings
from server.keyed import direct_routes
from tests.unit.fake_requests import REGISTRY


@pytest.fixture
def app(no_settings: None) -> Any:
    return create_app(Settings(), REGISTRY)


def headers(operation: dict[str, Any]) -> set[str]:
    return {told["name"] for told in operation.get("parameters", []) if told["in"] == "header"}


def test_what_is_made_once_says_so(app: Any) -> None:
    # Given the routes that heed an Idempotency-Key
    paths = {path for _, path in direct_routes(app.routes)}
    document = app.openapi()["paths"]
    kept = {path: document[path]["post"] for path in paths if path in document}
    assert len(kept) == len(paths) / 2  # each is served under a prefix too
    # Then each says so, and how that may fail, in the shape of its dialect
    for path, operation in kept.items():
        named = {"X-Client-Request-Id", "Idempotency-Key", "Last-Event-ID"}
        in_session = not path.endswith(("embeddings", "count_tokens"))
        assert headers(operation) == named | ({"X-Session-Id"} if in_session else set())
        for status in ("404", "422", "499"):
            assert operation["responses"][status]["content"] == operation["responses"]["400"]["content"]
        assert {"200", "503"} <= set(operation["responses"])
    # And no other does
    others = [one for path, methods in document.items() for one in methods.values() if path not in kept]
    assert not any("Idempotency-Key" in headers(one) or "422" in one["responses"] for one in others)
    assert headers(document["/v1/requests/{request_id}/events"]["get"]) == {"X-Client-Request-Id", "Last-Event-ID"}


def test_the_frameworks_own_error_is_nowhere(app: Any) -> None:
    assert "ValidationError" not in str(app.openapi())
