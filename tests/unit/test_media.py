"""Media in messages: which model takes them, and where they may be fetched from."""

from collections.abc import Callable
from typing import Any

import pytest

from server.core.conversation import MEDIA
from server.core.errors import InvalidRequest
from server.core.registry import ModelSpec
from server.media import check_media
from tests.unit.fake_requests import DATA_URI, SEER, TALKER, refused, spec
from workers.transcript import asked

TEXT: dict[str, Any] = {"type": "text", "text": "What is this?"}


def openai(kind: str, url: str) -> dict[str, Any]:
    return {"type": kind, kind: {"url": url}}


def block(url: str) -> dict[str, Any]:
    """Anthropic's image, from a URL."""
    return {"type": "image", "source": {"type": "url", "url": url}}


def input_image(url: str) -> dict[str, Any]:
    return {"type": "input_image", "image_url": url, "detail": "auto"}


AUDIO = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
BASE64 = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
PARTS = [
    (openai("image_url", DATA_URI), "image"),
    (openai("audio_url", "data:audio/wav;base64,AAAA"), "audio"),
    (openai("video_url", "data:video/mp4;base64,AAAA"), "video"),
    (AUDIO, "audio"),
    (input_image(DATA_URI), "image"),
    (BASE64, "image"),
    (block(DATA_URI), "image"),
]


def check(part: dict[str, Any], model: ModelSpec = SEER, domains: list[str] | None = None) -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Look."}, {"role": "user", "content": [TEXT, part]}]
    check_media(messages, "messages", model, domains or [])


@pytest.mark.parametrize(("part", "kind"), PARTS, ids=lambda value: value if isinstance(value, str) else value["type"])
def test_a_model_is_sent_what_it_takes(part: dict[str, Any], kind: str) -> None:
    check(part)
    check(part, spec("one", modalities=("text", kind)))


@pytest.mark.parametrize(("part", "kind"), PARTS, ids=lambda value: value if isinstance(value, str) else value["type"])
def test_a_model_of_text_alone_is_not_and_the_part_is_named(part: dict[str, Any], kind: str) -> None:
    told = f"messages.1.content.1: talker takes text; it cannot read this {part['type']}."
    with refused(told, "messages.1.content.1"):
        check(part, TALKER)
    # And neither is a model that takes something else
    other = spec("other", modalities=("text", "video" if kind == "image" else "image"))
    with refused(f"messages.1.content.1: other takes text and {other.modalities[1]}; ", "messages.1.content.1"):
        check(part, other)


def test_text_is_for_every_model() -> None:
    for content in ("Hello!", [TEXT], [], None):
        check_media([{"role": "user", "content": content}], "messages", TALKER, [])
    check_media([{"type": "function_call_output", "output": "12:00"}], "input", TALKER, [])


def test_history_leaves_out_every_kind_of_part_that_is_checked() -> None:
    assert set(MEDIA) == {"image_url", "input_image", "image", "input_audio", "audio_url", "video_url"}
    for kind in MEDIA:
        said = {"messages": [{"role": "user", "content": [{"type": kind, kind: DATA_URI}]}]}
        assert asked("chat", said) == [{"role": "user", "content": [{"type": kind}]}]


PLACES: list[tuple[Callable[[str], dict[str, Any]], str]] = [
    (lambda url: openai("image_url", url), "image_url.url"),
    (lambda url: openai("audio_url", url), "audio_url.url"),
    (lambda url: openai("video_url", url), "video_url.url"),
    (input_image, "image_url"),
    (block, "source.url"),
]


@pytest.mark.parametrize(("make", "field"), PLACES)
def test_a_url_is_fetched_from_named_hosts_alone(make: Any, field: str) -> None:
    # Given a part with a URL, in each dialect
    part = make("https://media.example/cat.png")
    # Then it passes where its host is in the list, and is told by its place where not
    check(part, domains=["other.example", "media.example"])
    for domains in ([], ["other.example"]):
        with refused(f"messages.1.content.1.{field}: only data: URIs", f"messages.1.content.1.{field}"):
            check(part, domains=domains)


@pytest.mark.parametrize(
    "url",
    [
        "http://media.example/cat.png",
        "https://media.example",
        "https://media.example:8443/cat.png?size=1#top",
        "HTTPS://MEDIA.EXAMPLE/cat.png",
        "https://user:secret@media.example/cat.png",
    ],
)
def test_ways_to_write_a_named_host(url: str) -> None:
    check(openai("image_url", url), domains=["media.example"])


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.media.example/",
        "https://media.example.evil/",
        "https://xmedia.example/",
        "https://media.example./",
        "https://media.example@evil/",
        "https://media.example:secret@evil/",
        "https://media.example\\@evil/",
        "https://evil\\@media.example/",
        "https:\\\\evil\\@media.example/",
        "https://evil/media.example",
        "https://evil?media.example",
        "https://evil#@media.example/",
        "https://media%2eexample/",
        "//media.example/",
        "media.example",
        "https:media.example",
        "https:///media.example",
        "ftp://media.example/",
        "file://media.example/etc/passwd",
        "file:///etc/passwd",
        "/etc/passwd",
        "DATA:image/png;base64,AAAA",
        " data:image/png;base64,AAAA",
        "https://[::1/",
        "https://[media.example]/",
        "http://127.0.0.1/",
        "http://169.254.169.254/latest",
        "\x00",
        "?",
    ],
)
def test_nothing_else_is_fetched(url: str) -> None:
    for make, _ in PLACES:
        with pytest.raises(InvalidRequest, match="only data: URIs are read here"):
            check(make(url), domains=["media.example"])


def test_nothing_is_fetched_where_no_host_is_named() -> None:
    for url in ("https://", "http:///x", "https:"):
        with pytest.raises(InvalidRequest, match="ALLOWED_MEDIA_DOMAINS"):
            check(openai("image_url", url), domains=[])


@pytest.mark.parametrize("part", [BASE64, block("https://evil/")])
def test_a_tools_result_is_looked_into(part: dict[str, Any]) -> None:
    # Given a picture in a tool's result
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [TEXT, part]}
    # Then a model of text alone does not get it
    with refused("messages.1.content.1.content.1: talker takes text", "messages.1.content.1.content.1"):
        check(result, TALKER)
    # And another gets it as from anywhere else
    if part is BASE64:
        check(result)
    else:
        with refused("messages.1.content.1.content.1.source.url: only", "messages.1.content.1.content.1.source.url"):
            check(result)


def test_a_tools_result_without_parts() -> None:
    for content in ({"content": "12:00"}, {"content": [TEXT]}, {}):
        check({"type": "tool_result", "tool_use_id": "t1", **content}, TALKER)
