"""compose.yaml, as Docker's own `docker compose config` reads it: it refuses what is no compose file."""

import functools
import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

import server.__main__
import workers.__main__
from server.core.registry import load_registry
from server.core.settings import Settings, load_settings
from server.private import RABBITMQ_PATHS
from tests.deploy.dockerfile import DOCKERFILE, PROJECT, stages, tool

COMPOSE = PROJECT / "deploy/compose.yaml"
VERSION = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
ALWAYS = {"broker", "database", "migrate", "server", "archive"}
PROFILES = {"gpu": ALWAYS | {"chat-gpu", "embedding-gpu"}, "cpu": ALWAYS | {"chat-cpu", "embedding-cpu"}}
STORES = {"broker", "database"}
OTHERS_SETTINGS = {"HF_TOKEN"}
"""Of our processes' environment what is no setting of the service."""


@functools.cache
def composed(profile: str) -> dict[str, Any]:
    argv = [tool("docker-compose"), "-f", str(COMPOSE), "--profile", profile, "config", "--format", "json"]
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "level=warning" not in done.stderr, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def services(profile: str, *, ours: bool = True) -> dict[str, dict[str, Any]]:
    return {name: each for name, each in composed(profile)["services"].items() if not (ours and name in STORES)}


def seconds(text: str) -> float:
    return sum(float(n) * {"h": 3600, "m": 60, "s": 1}[unit] for n, unit in re.findall(r"([\d.]+)([hms])", text))


both = pytest.mark.parametrize("profile", list(PROFILES))


@both
def test_a_profile_is_the_whole_service(profile: str) -> None:
    assert set(services(profile, ours=False)) == PROFILES[profile]


@both
def test_images_are_built_from_the_dockerfile_and_named_by_version(profile: str) -> None:
    made = stages()
    for name, service in services(profile).items():
        build = service["build"]
        assert (Path(build["context"]), build["dockerfile"]) == (PROJECT, str(DOCKERFILE.relative_to(PROJECT)))
        assert build["target"] in made, name
        assert all(f"ARG {argument}=" in DOCKERFILE.read_text() for argument in build.get("args", {}))
        variant = f"-{build['args']['TORCH']}" if build.get("args") else ""
        assert service["image"] == f"qwen3-inference/{build['target']}:{VERSION}{variant}"
        # Whoever owns that name in a public registry is not asked for it.
        assert service["pull_policy"] == "build"
    for name in STORES:
        assert re.search(r":\d+\.\d+\.\d+", services(profile, ours=False)[name]["image"]), name


@both
def test_processes_may_do_nothing_but_their_work(profile: str) -> None:
    for name, service in services(profile, ours=False).items():
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "cap_add", "user", "pid", "network_mode"} & set(service), name
    for name, service in services(profile).items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert [mount.partition(":")[0] for mount in service["tmpfs"]] == ["/tmp"], name
        # What may be written to besides is what the image has made for its user.
        made = " ".join(stages()[service["build"]["target"]].all("RUN"))
        assert all(f" {volume['target']}" in made for volume in service.get("volumes", [])), name


@both
def test_only_the_api_is_reached_from_outside(profile: str) -> None:
    config = composed(profile)
    published = {name: service["ports"] for name, service in config["services"].items() if service.get("ports")}
    assert list(published) == ["server"]
    (port,) = published["server"]
    assert (port["host_ip"], port["published"], port["target"]) == ("127.0.0.1", "8000", 8000)
    assert config["services"]["server"]["environment"]["PORT"] == "8000"
    assert config["networks"]["stores"]["internal"] is True
    for name in STORES:
        assert list(config["services"][name]["networks"]) == ["stores"]


@both
def test_everything_waits_for_what_it_needs(profile: str) -> None:
    config = services(profile, ours=False)
    for service in config.values():
        for needed, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert config[needed]["healthcheck"]["test"][0] == "CMD", needed
            elif how["condition"] == "service_completed_successfully":
                assert needed == "migrate"
    for name in ("server", "archive"):
        assert config[name]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    assert config["migrate"]["depends_on"]["database"]["condition"] == "service_healthy"
    for name, service in services(profile).items():
        if "amqp_url" in secrets_of(service):
            assert service["depends_on"]["broker"]["condition"] == "service_healthy", name


@both
def test_the_stores_are_asked_by_programs_of_theirs(profile: str) -> None:
    config = services(profile, ours=False)
    # RabbitMQ's own tool says whether it has this command
    program, *arguments = config["broker"]["healthcheck"]["test"][1:]
    command = [str(Path(RABBITMQ_PATHS[0]).with_name(program)), "help", arguments[-1]]
    assert subprocess.run(command, capture_output=True).returncode == 0, arguments
    # And Postgres is asked as who it was made for
    program, *arguments = config["database"]["healthcheck"]["test"][1:]
    made_for = config["database"]["environment"]
    assert program == "pg_isready"
    assert {f"--username={made_for['POSTGRES_USER']}", f"--dbname={made_for['POSTGRES_DB']}"} <= {*arguments}


@both
def test_who_ends_is_started_again(profile: str) -> None:
    for name, service in services(profile, ours=False).items():
        assert service["restart"] == ("on-failure:5" if name == "migrate" else "unless-stopped"), name


@both
def test_where_images_write_something_is_mounted(profile: str) -> None:
    for name, service in services(profile).items():
        written = {path for path in stages()[service["build"]["target"]].environment.values() if path.startswith("/")}
        mounted = {volume["target"] for volume in service.get("volumes", [])} | {"/tmp"}
        for path in (path for path in written if not path.startswith("/opt/")):
            assert any(path == at or path.startswith(f"{at}/") for at in mounted), f"{name}: {path}"


@both
def test_health_is_asked_where_it_is_told(profile: str) -> None:
    for name, service in services(profile).items():
        if name == "migrate":
            continue
        asked = service["healthcheck"]["test"][1:]
        image = stages()[service["build"]["target"]]
        assert asked[:-1] == image.healthcheck[:-1], name
        assert asked[-1] == ("/health" if name == "server" else "/health/ready"), name


@both
def test_what_runs_may_finish(profile: str) -> None:
    for name, service in services(profile).items():
        settings = Settings(
            **{key.lower(): value for key, value in service["environment"].items() if "FILE" not in key}
        )
        assert seconds(service["stop_grace_period"]) >= settings.drain_timeout_s + 20, name


@both
def test_commands_and_settings_are_those_that_the_programs_have(profile: str) -> None:
    registry = load_registry(PROJECT / "models.yaml")
    for name, service in services(profile).items():
        program, *arguments = service["command"] or stages()[service["build"]["target"]].command("CMD")
        parser = {"server": server.__main__.parser, "workers": workers.__main__.parser}[program]()
        args = parser.parse_args(arguments)
        if program == "workers" and args.type != "archive":
            assert args.model in {spec.id for spec in registry.of_type(args.type)}, name
        known = {field.upper() for field in Settings.model_fields} | OTHERS_SETTINGS
        assert set(service["environment"]) <= known, name
        assert {"source": "models", "target": "/app/models.yaml"} in service["configs"], name


def secrets_of(service: dict[str, Any]) -> dict[str, str]:
    return {secret["source"]: secret["target"] for secret in service.get("secrets", [])}


@both
def test_secrets_are_files_that_only_those_have_who_need_them(profile: str) -> None:
    for name, service in services(profile, ours=False).items():
        given = secrets_of(service)
        for variable, value in service.get("environment", {}).items():
            assert "://" not in (value or ""), f"{name}: {variable}"
            if variable.endswith("_FILE"):
                assert value == f"/run/secrets/{variable.removesuffix('_FILE').lower()}"
                assert value in given.values(), f"{name}: {variable}"
    holders = {name: set(secrets_of(service)) for name, service in services(profile).items()}
    assert holders.pop("server") == {"amqp_url", "database_url", "api_key"}
    assert holders.pop("archive") == {"amqp_url", "database_url"}
    assert holders.pop("migrate") == {"database_url"}
    assert all(held == {"amqp_url"} for held in holders.values())


def test_no_secret_can_be_committed() -> None:
    for path in ("deploy/secrets/api_key", "deploy/settings.env"):
        assert subprocess.run(["git", "check-ignore", "-q", path], cwd=PROJECT).returncode == 0, path


def test_secrets_are_made_once_and_fit_each_other(tmp_path: Path) -> None:
    # Given no secrets
    folder = tmp_path / "secrets"

    def make() -> dict[str, str]:
        environment = {"PATH": os.environ["PATH"], "SECRETS_DIR": str(folder)}
        subprocess.run([PROJECT / "deploy/docker/secrets"], check=True, capture_output=True, env=environment)
        return {path.name: path.read_text() for path in folder.iterdir()}

    # When they are made, twice
    made = make()
    assert make() == made

    # Then they are those that compose.yaml mounts, in a folder that is closed to others
    assert set(made) == set(composed("gpu")["secrets"])
    assert folder.stat().st_mode & 0o777 == 0o700
    # And the service reads them as those of the broker and the database that are started
    files = {f"{name}_file": str(folder / name) for name in ("amqp_url", "database_url", "api_key")}
    settings = load_settings(**files)
    password = made["postgres_password"].strip()
    assert settings.database_url == f"postgresql://qwen3:{password}@database:5432/qwen3"
    user, broker_password = re.findall(r"^default_\w+ = (\S+)$", made["rabbitmq_user"], re.MULTILINE)
    assert settings.amqp_url == f"amqp://{user}:{broker_password}@broker:5672/%2F"
    assert len({password, broker_password, *settings.api_keys}) == 3
    database = services("gpu", ours=False)["database"]["environment"]
    assert (database["POSTGRES_USER"], database["POSTGRES_DB"]) == ("qwen3", "qwen3")


def test_a_gpu_is_shared_in_turns_and_in_parts() -> None:
    # The engine takes its part of the memory at its start, of what is free then: nobody else may be starting.
    config = services("gpu")
    assert config["embedding-gpu"]["depends_on"]["chat-gpu"]["condition"] == "service_healthy"
    devices = [config[name]["deploy"]["resources"]["reservations"]["devices"] for name in ("chat-gpu", "embedding-gpu")]
    assert devices[0] == devices[1] == [{"driver": "nvidia", "device_ids": ["0"], "capabilities": ["gpu"]}]
    chat = load_registry(PROJECT / "models.yaml").default("chat")
    assert chat is not None
    assert chat.engine["gpu_memory_utilization"] <= 0.8
