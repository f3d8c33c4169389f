"""Images, audio and video in messages: only where the model takes them, and from nowhere it may not be fetched."""

from typing import Any
from urllib.parse import urlsplit

from server.core.conversation import MEDIA
from server.core.errors import InvalidRequest
from server.core.registry import ModelSpec


def check_media(messages: list[dict[str, Any]], field: str, spec: ModelSpec, domains: list[str]) -> None:
    """Raise InvalidRequest for a part the model cannot take, or whose URL is not to be fetched.

    `messages` are as the engine will get them; `field` is their name in the request.
    """
    for index, message in enumerate(messages):
        _check_parts(message.get("content"), f"{field}.{index}.content", spec, domains)


def _check_parts(content: Any, where: str, spec: ModelSpec, domains: list[str]) -> None:
    if not isinstance(content, list):
        return
    for index, part in enumerate(content):
        at = f"{where}.{index}"
        kind = MEDIA.get(part["type"])
        if kind is not None:
            if kind not in spec.modalities:
                taken = " and ".join(spec.modalities)
                raise InvalidRequest(f"{at}: {spec.id} takes {taken}; it cannot read this {part['type']}.", param=at)
            _check_url(part, at, domains)
        if part["type"] == "tool_result":
            _check_parts(part.get("content"), f"{at}.content", spec, domains)


def _check_url(part: dict[str, Any], at: str, domains: list[str]) -> None:
    if part["type"] == "image":
        url, at = part["source"].get("url"), f"{at}.source.url"
    elif part["type"] == "input_image":
        url, at = part["image_url"], f"{at}.image_url"
    elif part["type"] == "input_audio":
        url = None
    else:
        url, at = part[part["type"]]["url"], f"{at}.{part['type']}.url"
    if url is None or url.startswith("data:"):
        return
    try:
        parsed = urlsplit(url)
        # A backslash ends the host for some readers of URLs and not for others: the engine's might be one of those.
        fetched = parsed.scheme in ("http", "https") and (parsed.hostname or "") in domains and "\\" not in url
    except ValueError:
        fetched = False
    if not fetched:
        raise InvalidRequest(
            f"{at}: only data: URIs are read here. Whoever runs this server can name hosts to fetch from in "
            f"ALLOWED_MEDIA_DOMAINS.",
            param=at,
        )
