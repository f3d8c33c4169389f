"""What several of these tests need: a process without the caller's settings, and models.yaml files."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.core.settings import Settings

WriteModels = Callable[[str], Path]


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment in which no setting of the service is set."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def write_models(tmp_path: Path) -> WriteModels:
    """Writes a models.yaml into the test's folder."""

    def write(text: str) -> Path:
        path = tmp_path / "models.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """Undoes what a test has configured."""
    root = logging.getLogger()
    handlers, level, pika = root.handlers[:], root.level, logging.getLogger("pika").level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("pika").setLevel(pika)
