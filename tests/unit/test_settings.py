"""Settings: where they come from, and what a person is told about wrong ones."""

from pathlib import Path

import pytest

from server.core.settings import BadSettings, load_settings

pytestmark = pytest.mark.usefixtures("no_settings")


def test_defaults_bind_to_this_machine_only() -> None:
    settings = load_settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.models_file == Path("models.yaml")
    assert settings.rate_limit_per_minute == 50
    assert settings.api_keys == []


def test_the_environment_wins_over_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "9001")
    monkeypatch.setenv("REQUEST_TIMEOUT_S", "2.5")
    monkeypatch.setenv("DATA_DIR", "/var/lib/qwen3")
    settings = load_settings()
    assert (settings.port, settings.request_timeout_s) == (9001, 2.5)
    assert settings.data_dir == Path("/var/lib/qwen3")


def test_the_command_line_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given both variables are set
    monkeypatch.setenv("PORT", "9001")
    monkeypatch.setenv("HOST", "10.0.0.1")
    # When only one is given on the command line (None: not given)
    settings = load_settings(port=9002, host=None)
    # Then it wins, and the other is the environment's
    assert (settings.port, settings.host) == (9002, "10.0.0.1")


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given what a compose file makes of `PORT: ${PORT}` without a PORT
    monkeypatch.setenv("PORT", "")
    monkeypatch.setenv("AMQP_URL", "")
    assert (load_settings().port, load_settings().amqp_url) == (8000, "")


def test_other_programs_variables_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUEUE_MAX", "lots")
    assert load_settings().queue_max_jobs == 512


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("PORT", "http", "valid integer"),
        ("PORT", "70000", "less than or equal to 65535"),
        ("PORT", "0", "greater than or equal to 1"),
        ("METRICS_PORT", "-1", "greater than or equal to 0"),
        ("MAX_BODY_BYTES", "10", "greater than or equal to 1024"),
        ("QUEUE_MAX_JOBS", "0", "greater than or equal to 1"),
        ("RATE_LIMIT_PER_MINUTE", "-5", "greater than or equal to 0"),
        ("REQUEST_TIMEOUT_S", "0", "greater than 0"),
        ("REQUEST_TIMEOUT_S", "nan", ""),
        ("LOG_LEVEL", "LOUD", "match pattern"),
    ],
)
def test_a_wrong_variable_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, why: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(BadSettings) as wrong:
        load_settings()
    assert wrong.value.message.startswith(f"Wrong settings: {name}: ")
    assert why in wrong.value.message
    assert f"(got {value!r})" in wrong.value.message


def test_every_wrong_variable_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "http")
    monkeypatch.setenv("LOG_LEVEL", "LOUD")
    with pytest.raises(BadSettings, match=r"PORT: .*; LOG_LEVEL: "):
        load_settings()


def test_a_wrong_argument_is_named_like_its_variable() -> None:
    with pytest.raises(BadSettings, match=r"PORT: .*\(got 99999\)"):
        load_settings(port=99999)


@pytest.mark.parametrize("name", ["REQUEST_TIMEOUT_S", "DRAIN_TIMEOUT_S"])
def test_no_time_is_endless(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # Given an endless time: JSON has no infinity, so a job's deadline would arrive as null and no worker
    # would take it; and uvicorn wants whole seconds to drain
    monkeypatch.setenv(name, "inf")
    # When the settings are loaded, then it is refused at start
    with pytest.raises(BadSettings, match=name):
        load_settings()


@pytest.mark.parametrize(
    ("given", "keys"),
    [
        ("one", ["one"]),
        ("one,two", ["one", "two"]),
        (" one , two ", ["one", "two"]),
        ("one,,two,", ["one", "two"]),
        (" , ", []),
        ("one\n", ["one"]),
    ],
)
def test_keys_are_split_at_commas(monkeypatch: pytest.MonkeyPatch, given: str, keys: list[str]) -> None:
    monkeypatch.setenv("API_KEY", given)
    assert load_settings().api_keys == keys


@pytest.mark.parametrize("given", ["schlüssel", "two words", "good,b\x07d", "good,tab\tbed"])
def test_a_key_no_header_could_carry_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("API_KEY", given)
    with pytest.raises(BadSettings, match=r"API_KEY: .*printable ASCII without spaces"):
        load_settings()


def test_keys_are_not_shown_when_one_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a good key next to one that no header could carry
    monkeypatch.setenv("API_KEY", "qk-very-secret,two words")
    # When the settings are refused, then the message, which lands in logs, shows neither
    with pytest.raises(BadSettings) as wrong:
        load_settings()
    assert "API_KEY" in wrong.value.message
    assert "qk-very-secret" not in wrong.value.message


def test_secrets_come_from_files_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Given files as containers mount them, with the line break that editors leave
    for name, content in [
        ("API_KEY", "one,two\nthree\n"),
        ("DATABASE_URL", "postgresql://x\n"),
        ("AMQP_URL", "amqp://y"),
    ]:
        (tmp_path / name).write_text(content)
        monkeypatch.setenv(f"{name}_FILE", str(tmp_path / name))
    settings = load_settings()
    assert settings.api_keys == ["one", "two", "three"]
    assert (settings.database_url, settings.amqp_url) == ("postgresql://x", "amqp://y")


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe secret", b"x" * 70_000, b"schl\xc3\xbcssel"])
def test_a_file_without_a_proper_secret_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("API_KEY_FILE", str(path))
    with pytest.raises(BadSettings, match="API_KEY") as wrong:
        load_settings()
    assert "secret" not in wrong.value.message
    assert "xxx" not in wrong.value.message


def test_a_secret_given_twice_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-the-file")
    monkeypatch.setenv("API_KEY_FILE", str(tmp_path / "key"))
    monkeypatch.setenv("API_KEY", "from-the-environment")
    with pytest.raises(BadSettings, match="API_KEY and API_KEY_FILE are both set") as wrong:
        load_settings()
    assert "from-the" not in wrong.value.message


def test_a_variable_that_was_emptied_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY_FILE", "")
    monkeypatch.setenv("API_KEY", "one")
    assert load_settings().api_keys == ["one"]


@pytest.mark.parametrize(
    "given", ["*", "https://a.example", "http://localhost:3000, https://b.example", "http://[::1]:80"]
)
def test_origins_are_as_browsers_say_them(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("CORS_ALLOWED_ORIGINS", given)
    assert load_settings().cors_origins == [part.strip() for part in given.split(",")]


@pytest.mark.parametrize(
    "given", ["a.example", "https://a.example/", "https://*.example", "ftp://a", "null", "https://A.example"]
)
def test_what_no_browser_would_say_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("CORS_ALLOWED_ORIGINS", given)
    with pytest.raises(BadSettings, match=r"CORS_ALLOWED_ORIGINS: .*is no origin"):
        load_settings()
