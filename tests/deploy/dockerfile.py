"""The Dockerfile as data, for the tests: its stages, each with what it is made of."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path(__file__).parents[2]
DOCKERFILE = PROJECT / "deploy/docker/Dockerfile"
IMAGES = ["server", "archive", "chat-gpu", "chat-cpu", "embedding"]


@dataclass
class Stage:
    """`instructions` are (keyword, rest), those of the stages that it is built on first."""

    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, keyword: str) -> list[str]:
        return [rest for name, rest in self.instructions if name == keyword]

    def command(self, keyword: str) -> list[str]:
        """The last ENTRYPOINT or CMD, as a list: in its other form a shell would run it, and hear the signals."""
        words = json.loads(self.all(keyword)[-1])
        assert isinstance(words, list)
        return words

    @property
    def healthcheck(self) -> list[str]:
        words = json.loads(self.all("HEALTHCHECK")[-1].partition("CMD ")[2])
        assert isinstance(words, list)
        return words

    @property
    def environment(self) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S+)", " ".join(self.all("ENV"))))


def stages() -> dict[str, Stage]:
    """By name, in their order."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    result: dict[str, Stage] = {}
    current: Stage | None = None
    for keyword, _, rest in (line.strip().partition(" ") for line in lines if line.strip()):
        if keyword == "FROM":
            base, _, name = rest.partition(" AS ")
            built_on = result.get(base)
            current = result[name] = Stage(base, list(built_on.instructions) if built_on else [])
        elif current is not None:
            current.instructions.append((keyword, rest.strip()))
    return result


def tool(name: str) -> str:
    """A program of requirements/deploy.txt."""
    path = PROJECT / ".cache/deploy-tools/bin" / name
    assert path.exists(), f"{name} is not installed: `./test deploy` does that"
    return str(path)
