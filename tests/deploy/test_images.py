"""The images: what they are made of and how their processes are started, watched and stopped."""

import asyncio
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pathspec
import pytest

import server.__main__
import workers.__main__
from server.core.registry import load_registry
from server.routes import health
from tests.deploy.dockerfile import DOCKERFILE, IMAGES, PROJECT, stages, tool
from workers.probe import Probe

DOCKER = DOCKERFILE.parent
VERSION = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
COMPILERS = re.compile(r"\b(gcc|g\+\+|clang|build-essential|make|cmake|rustc|cargo|go)\b")
HEALTHCHECK = ["python", "-I", "-S", "/app/healthcheck.py"]


def test_hadolint_has_no_complaint() -> None:
    done = subprocess.run([tool("hadolint"), str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_each_process_has_an_image() -> None:
    assert [name for name in IMAGES if name not in stages()] == []
    assert f"qwen3-inference/server:{VERSION}" in DOCKERFILE.read_text()


@pytest.mark.parametrize("image", IMAGES)
def test_processes_run_as_a_user_without_rights_who_has_no_compiler(image: str) -> None:
    stage = stages()[image]
    # By number: Kubernetes cannot tell of a name that it is not root's.
    assert stage.instructions[-1][0] == "CMD"
    assert stage.all("USER") == ["10001:10001"]
    # What is installed as root before does not include a compiler; that of other stages is not copied.
    assert [run for run in stage.all("RUN") if COMPILERS.search(run)] == []
    copied = [copy.split() for copy in stage.all("COPY")]
    assert all(words[0].startswith("--from=") for words in copied)
    allowed = {"/opt/venv", "/app"} | ({"/opt/triton"} if image == "chat-gpu" else set())
    assert {word for words in copied for word in words[1:]} == allowed


@pytest.mark.parametrize("image", IMAGES)
def test_a_process_hears_signals_and_tells_its_health(image: str) -> None:
    stage = stages()[image]
    assert stage.command("ENTRYPOINT") == ["/usr/bin/tini", "--", "python", "-m"]
    assert stage.all("STOPSIGNAL") == ["SIGTERM"]
    *script, variable, path = stage.healthcheck
    assert script == HEALTHCHECK
    if image == "server":
        assert (variable, path) == ("PORT", "/health")
        assert path in {route.path for route in health.router.routes}  # type: ignore[attr-defined]
    else:
        assert (variable, path) == ("METRICS_PORT", "/health/live")
        assert 0 < int(stage.environment["METRICS_PORT"]) < 65536
    assert stage.environment["HOST"] == "0.0.0.0"


@pytest.mark.parametrize("image", IMAGES)
def test_the_command_is_one_that_the_program_has(image: str) -> None:
    # Given what an image runs if nothing else is said
    program, *arguments = stages()[image].command("CMD")

    # When the program itself reads it (it exits on what it does not know)
    parser = {"server": server.__main__.parser, "workers": workers.__main__.parser}[program]()
    args = parser.parse_args(arguments)

    # Then it is for a model that is served
    registry = load_registry(PROJECT / "models.yaml")
    if model := getattr(args, "model", None):
        assert model in {spec.id for spec in registry.of_type(args.type)}


def test_what_is_copied_is_there_and_is_sent_to_the_builder() -> None:
    # Given all that the Dockerfile takes from the folder it is built from
    sources = re.findall(r"source=([^, ]+)", DOCKERFILE.read_text())
    for stage in stages().values():
        for copy in stage.all("COPY"):
            words = [word for word in copy.split() if not word.startswith("--chmod")]
            if not words[0].startswith("--from="):
                sources += words[:-1]
    assert len(set(sources)) >= 9

    # Then it is there, and the ignore file lets each of its files in
    tracked = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True)
    files = tracked.stdout.splitlines()
    for source in sources:
        of_source = [file for file in files if file == source or file.startswith(source.rstrip("/") + "/")]
        assert of_source, f"{source} is not there"
        assert [file for file in of_source if not sent(file)] == [], f"{source} is kept from the builder"


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".data/addresses.json",
        ".venv/bin/python",
        "deploy/secrets/api_key",
        "deploy/settings.env",
        "server/__pycache__/app.cpython-311.pyc",
        "tests/stack.py",
    ],
)
def test_what_no_image_needs_is_not_sent(path: str) -> None:
    assert not sent(path)


def sent(path: str) -> bool:
    """The last pattern that fits decides."""
    result = True
    for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = pathspec.GitIgnoreSpec.from_lines([line.removeprefix("!")])
            if pattern.match_file(path):
                result = line.startswith("!")
    return result


async def check(port: int, path: str) -> int:
    argv = ["-I", "-S", str(DOCKER / "healthcheck.py"), "METRICS_PORT", path]
    process = await asyncio.create_subprocess_exec(sys.executable, *argv, env={"METRICS_PORT": str(port)})
    return await process.wait()


async def test_the_health_check_asks_the_workers_port() -> None:
    # Given a worker's port that is open while the worker is not ready
    probe = Probe("127.0.0.1", 0)
    await probe.start()
    try:
        # Then it lives
        assert await check(probe.port, "/health/live") == 0
        assert await check(probe.port, "/health/ready") == 1
        # And once it is ready, it is
        probe.ready = True
        assert await check(probe.port, "/health/ready") == 0
    finally:
        await probe.stop()
    # And where nobody answers, it does not
    assert await check(probe.port, "/health/live") == 1


def test_triton_gets_its_driver_from_the_place_of_a_compiler_and_nobody_else_anything(tmp_path: Path) -> None:
    # Given what the image has where Triton looks for a compiler
    shutil.copy(DOCKER / "triton/cc", tmp_path)
    (tmp_path / "cuda_utils.c").write_text("int driver;")
    (tmp_path / "cuda_utils.so").write_bytes(b"compiled")
    assert stages()["chat-gpu"].environment["CC"] == "/opt/triton/cc"

    def cc(source: str) -> tuple[int, Path]:
        file, output = tmp_path / "main.c", tmp_path / "out.so"
        output.unlink(missing_ok=True)
        file.write_text(source)
        # When it is called as triton/runtime/build.py does
        argv = [tmp_path / "cc", file, "-O3", "-shared", "-fPIC", "-Wno-psabi", "-o", output, "-l:libcuda.so.1"]
        return subprocess.run([*argv, "-L/lib", f"-I{tmp_path}"], capture_output=True).returncode, output

    # Then the driver that was compiled with the image is handed out, and for another program nothing
    status, output = cc("int driver;")
    assert (status, output.read_bytes()) == (0, b"compiled")
    status, output = cc("int other;")
    assert (status, output.exists()) == (1, False)
