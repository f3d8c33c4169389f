"""schemathesis against the server's own OpenAPI document: nothing it can think of gives an undocumented answer."""

import os
import subprocess
import sys

import httpx
import pytest

from tests.stack import PROJECT, Stack


@pytest.mark.timeout(900)
def test_the_document_promises_what_the_server_does(stack: Stack) -> None:
    # Given the server's own document
    document = httpx.get(f"{stack.url}/openapi.json").json()
    assert {
        "/chat",
        "/usage",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/ai/v1/chat/completions",
    } <= set(document["paths"])
    # When requests are generated from it, good and bad ones, on every path
    done = subprocess.run(
        [
            str(PROJECT / ".venv/bin/schemathesis") if not sys.executable else f"{sys.prefix}/bin/schemathesis",
            "run",
            f"{stack.url}/openapi.json",
            "--header",
            f"Authorization: Bearer {stack.new_key('schemathesis')}",
            "--checks",
            "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
            "--max-examples",
            "20",
            "--seed",
            "1",
            "--request-timeout",
            "60",
            "--no-color",
        ],
        capture_output=True,
        text=True,
        timeout=880,
        cwd=PROJECT,
        env=os.environ | {"SCHEMATHESIS_HOOKS": "tests.schemathesis_hooks"},
    )
    # Then no answer is a 5xx, undocumented, or of another shape than documented
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    # And the service is as well as before
    assert httpx.get(f"{stack.url}/health").json()["status"] == "healthy"
