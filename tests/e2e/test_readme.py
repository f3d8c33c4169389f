"""What the README shows works as it is written."""

import json
import re
import subprocess
import sys

import pytest

from server.core.settings import Settings
from server.schemas.anthropic import MessagesRequest
from server.schemas.openai import ChatCompletionsRequest, CompletionsRequest, EmbeddingsRequest
from server.schemas.parameters import SamplingParameters
from server.schemas.responses import ResponsesRequest
from tests.stack import PROJECT, Stack, eventually

README = (PROJECT / "README.md").read_text()
EXAMPLES = [block for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if "curl" in block]


def run(stack: Stack, key: str, example: str) -> str:
    script = example.replace("http://127.0.0.1:8000", stack.url)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env={"KEY": key, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def outputs(stack: Stack, key: str) -> list[str]:
    """Each example's output, run in the README's order; the vector of the first chat is waited for."""
    made = []
    for example in EXAMPLES:
        if "similar" in example:
            eventually(lambda example=example: "Paris" in run(stack, key, example))
        made.append(run(stack, key, example))
    return made


def test_each_example_gives_what_it_says(outputs: list[str]) -> None:
    chat, stream, embedding, similar, read = outputs
    assert json.loads(chat)["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert json.loads(chat)["session_id"] == "tour"
    assert '"reasoning":' in stream
    assert stream.strip().endswith("data: [DONE]")
    assert len(json.loads(embedding)["data"][0]["embedding"]) == 384
    assert json.loads(similar)[0]["messages"][1]["content"] == "The capital of France is Paris."
    history, usage = re.split(r"(?<=\])(?=\{)", read)
    assert json.loads(history)[0]["session_id"] == "tour"
    assert json.loads(usage)["total_requests"] >= 3


def test_the_settings_table_is_the_settings() -> None:
    # Given the README's rows: variable, default, meaning
    rows = re.findall(r"^\| `([A-Z_]+)` \| (?:`(.*?)`)? ?\| (.*?) \|$", README, re.MULTILINE)
    # Then they are the settings, in their order
    fields = Settings.model_fields
    assert [row[0] for row in rows] == [name.upper() for name in fields]
    for (_, default, meaning), field in zip(rows, fields.values(), strict=True):
        assert default == str(field.default)
        assert meaning == field.description


def test_the_options_of_run_are_in_its_help() -> None:
    help_text = subprocess.run([PROJECT / "run", "--help"], capture_output=True, text=True, check=True).stdout
    for option in ("--models", "--host", "--port", "--data-dir", "--setup-only"):
        assert option in help_text


def test_every_endpoint_is_in_the_table(stack: Stack) -> None:
    import httpx

    documented = set(httpx.get(f"{stack.url}/openapi.json").json()["paths"]) - {"/health/live", "/health/ready"}
    assert set(re.findall(r"^\| `(?:GET|POST) (/\S+)` ", README, re.MULTILINE)) == documented


PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("program", PROGRAMS, ids=[program.split("\n")[0].strip("# ") for program in PROGRAMS])
def test_each_program_runs_and_gets_its_answer(stack: Stack, key: str, program: str) -> None:
    # When a program of the README is run as it is written, against this stack
    script = program.replace("http://127.0.0.1:8000", stack.url)
    environment = {"KEY": key, "PATH": "/usr/bin:/bin", "HOME": str(stack.folder)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Then it prints what the model was taught
    assert "The capital of France is Paris." in done.stdout
    if "responses" in program:
        assert done.stdout.endswith("The capital of Japan is Tokyo.\n64\n")


def test_every_honoured_field_is_in_the_table() -> None:
    for schema, row in [
        (ChatCompletionsRequest, "| `/v1/chat/completions`, `/kawai"),
        (CompletionsRequest, "| `/v1/completions` | `prompt`"),
        (ResponsesRequest, "| `/v1/responses` | `input`"),
        (EmbeddingsRequest, "| `/v1/embeddings` | `input`"),
        (MessagesRequest, "| `/v1/messages`, `…"),
    ]:
        line = next(line for line in README.split("\n") if line.startswith(row))
        known = set(schema.model_fields)
        if schema is CompletionsRequest:
            known -= set(ChatCompletionsRequest.model_fields) - {"logprobs", "top_k", "min_p"}
        known -= set(SamplingParameters.model_fields)
        for field in known:
            assert f"`{field}" in line, f"{field} of {row}"
    parameters = README.split("On `/chat` and the chats of OpenAI's form:")[1].split("\n\n")[0]
    for field in SamplingParameters.model_fields:
        assert f"`{field}`" in parameters
