"""Fields of dashboards that Grafana does not know: what its own types lose in reading and writing a file again.

Run with the Python of .cache/deploy-tools, which has them: `python tests/deploy/grafana_fields.py FILE…`
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard


def lost(before: Any, after: Any, path: str) -> Iterator[str]:
    """Where `after` has less than `before`; defaults may have come to it."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name, value in before.items():
            yield from lost(value, after.get(name), f"{path}.{name}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from lost(one, other, f"{path}[{index}]")
    elif before != after:
        yield f"{path}: {before!r}"


def main() -> int:
    register_default_plugins()
    found = []
    for name in sys.argv[1:]:
        dashboard = json.loads(Path(name).read_text())
        read = json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))
        found += lost(dashboard, read, Path(name).name)
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
