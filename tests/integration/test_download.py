"""Weights brought from a hub: its own client against a small server that speaks as much of its API as is needed."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "1_Pooling/config.json": b'{"pooling_mode_lasttoken": true}',
    "pytorch_model.bin": b"a program that somebody pickled",
    "onnx/model.onnx": b"the same weights again",
}
MODELS = """
models:
  - {id: small, name: Small, type: chat, source: acme/small, context_length: 64, description: A model}
"""


def etag(content: bytes) -> str:
    return sha256(content).hexdigest()[:40]


class Hub(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        info = {"id": "acme/small", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
        tree = [{"type": "file", "path": n, "size": len(b), "oid": etag(b)} for n, b in FILES.items()]
        body, status = b'{"error": "not found"}', 404
        if path == "/api/models/acme/small/revision/main":
            body, status = json.dumps(info).encode(), 200
        elif path == f"/api/models/acme/small/tree/{COMMIT}":
            body, status = json.dumps(tree).encode(), 200
        elif path.startswith(f"/acme/small/resolve/{COMMIT}/"):
            body, status = FILES[path.removeprefix(f"/acme/small/resolve/{COMMIT}/")], 200
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{etag(body)}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def download(folder: Path, models: str, endpoint: str) -> subprocess.CompletedProcess[str]:
    file = folder / "models.yaml"
    file.write_text(models)
    cache = str(folder / "cache")
    given = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": cache, "HF_HOME": cache, "NO_PROXY": "*"}
    command = [sys.executable, "-m", "workers", "download", "--models", str(file)]
    return subprocess.run(command, env=os.environ | given, capture_output=True, text=True, check=False, timeout=60)


def test_what_workers_read_is_brought_and_nothing_else(tmp_path: Path) -> None:
    with hub() as endpoint:
        done = download(tmp_path, MODELS, endpoint)
    assert done.returncode == 0, done.stderr
    snapshot = tmp_path / "cache" / "models--acme--small" / "snapshots" / COMMIT
    brought = {str(path.relative_to(snapshot)): path.read_bytes() for path in snapshot.rglob("*") if path.is_file()}
    assert brought == {name: FILES[name] for name in ("config.json", "model.safetensors", "1_Pooling/config.json")}


def test_a_model_that_the_hub_does_not_have_is_named(tmp_path: Path) -> None:
    with hub() as endpoint:
        done = download(tmp_path, MODELS.replace("acme/small", "acme/other"), endpoint)
    assert done.returncode == 1
    assert "model 'small': source: 'acme/other' could not be had from the hub" in done.stderr
    assert "Traceback" not in done.stderr
