"""The weights of all models from the hub into its cache, where workers that may not reach the hub read them."""

import logging

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from server.core.registry import Registry, is_folder
from server.core.settings import BadSettings

logger = logging.getLogger(__name__)

UNREAD = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.onnx", "*.gguf", "*.ot", "original/*"]
"""The same weights in other formats, of which no worker reads any: they take safetensors alone."""


def download(registry: Registry) -> None:
    """What is there already is left as it is. Raises BadSettings for a model that the hub does not give."""
    for spec in registry.models:
        if is_folder(spec.source):
            continue
        logger.info("downloading", extra={"action": "download", "model": spec.id})
        try:
            snapshot_download(spec.source, revision=spec.revision, ignore_patterns=UNREAD)
        except (HfHubHTTPError, OSError) as exc:
            what = f"{spec.source!r} could not be had from the hub ({type(exc).__name__})"
            raise BadSettings(f"model {spec.id!r}: source: {what}") from exc
        logger.info("downloaded", extra={"action": "download", "model": spec.id})
