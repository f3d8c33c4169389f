"""The server's command line: `python -m server serve|up|keys|migrate`."""

import argparse
import asyncio
import json
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import uvloop

from server.auth import hash_key, new_key
from server.core import logging as json_logging
from server.core import tracing
from server.core.errors import ServiceError
from server.core.registry import load_registry
from server.core.settings import BadSettings, Settings, load_settings
from server.core.signals import stop_event
from server.db.pool import migrate
from server.processes import ServerProcesses
from server.supervisor import Supervisor, open_store

TELL_S = 1.0
"""For the clients of answers that could not be finished to hear so, before their connections are ended."""

WEIGHT = "its share of the turns where several keys wait, from 1 to 100"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m server",
        description="The Qwen3 inference service. Settings come from the environment; the README lists them.",
    )
    commands = top.add_subparsers(dest="command", required=True)
    text = "start everything on this machine"
    up = commands.add_parser("up", help=text, description=text)
    up.add_argument("--data-dir", type=Path, metavar="DIR", help="database, broker, logs, made models (DATA_DIR)")
    text = "serve the API; workers, broker and database run elsewhere"
    serve = commands.add_parser("serve", help=text, description=text)
    for command in (up, serve):
        command.add_argument("--models", type=Path, metavar="FILE", help="the models to serve (MODELS_FILE)")
        command.add_argument("--host", help="address to listen on (HOST)")
        command.add_argument("--port", type=int, help="port to listen on (PORT)")
        command.add_argument("--workers", type=int, metavar="N", help="processes of the API (SERVER_WORKERS)")
    serve.add_argument("--fd", type=int, metavar="N", help="serve on this listening socket, which was inherited")
    text = "make, list, weigh and revoke API keys"
    keys = commands.add_parser("keys", help=text, description=text)
    keys.add_argument("--data-dir", type=Path, metavar="DIR", help="of the ./run whose keys these are (DATA_DIR)")
    actions = keys.add_subparsers(dest="action", required=True)
    create = actions.add_parser("create", help="make a key and print it, once")
    create.add_argument("name", help="whose key it is")
    create.add_argument("--weight", type=_weight, default=1, metavar="N", help=f"{WEIGHT} (1)")
    actions.add_parser("list", help="every key, without the key itself")
    revoke = actions.add_parser("revoke", help="let a key in no longer")
    revoke.add_argument("id", type=int)
    weigh = actions.add_parser("weigh", help="give a key another weight")
    weigh.add_argument("id", type=int)
    weigh.add_argument("weight", type=_weight, help=WEIGHT)
    text = "bring the database's schema up to date"
    migration = commands.add_parser("migrate", help=text, description=text)
    migration.add_argument("--data-dir", type=Path, metavar="DIR", help="of the ./run to migrate (DATA_DIR)")
    return top


def _weight(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"a whole number from 1 to 100, not {text!r}")
    return int(text)


def _database_url(settings: Settings) -> str:
    """DATABASE_URL, or that of the service running over the data directory. Raises BadSettings."""
    if settings.database_url:
        return settings.database_url
    path = settings.data_dir / "addresses.json"
    try:
        return str(json.loads(path.read_text())["database_url"])
    except (OSError, ValueError, KeyError) as exc:
        raise BadSettings(f"DATABASE_URL is not set, and no ./run has left its address in {path}.") from exc


async def _keys(args: argparse.Namespace, settings: Settings) -> int:
    async with open_store(_database_url(settings)) as store:
        if args.action == "create":
            key = new_key()
            key_id = await store.create_key(args.name, hash_key(key), weight=args.weight)
            print(f"{key}\nKey {key_id} for {args.name}. It is shown this once: only its hash is kept.")
        elif args.action == "list":
            for row in await store.list_keys():
                state = f"revoked {row['revoked_at']:%Y-%m-%d}" if row["revoked_at"] else "valid"
                role = "admin" if row["is_admin"] else "user"
                told = f"{row['id']:6}  {state:18}  {role:6}  weight {row['weight']:3}"
                print(f"{told}  {row['created_at']:%Y-%m-%d}  {row['name']}")
        elif args.action == "weigh":
            if not await store.weigh_key(args.id, args.weight):
                raise BadSettings(f"There is no key {args.id}: see `python -m server keys list`.")
        elif not await store.revoke_key(args.id):
            raise BadSettings(f"There is no key {args.id}: see `python -m server keys list`.")
    return 0


def _serve(settings: Settings, fd: int | None) -> int:
    for name in ("database_url", "amqp_url"):
        if not getattr(settings, name):
            raise BadSettings(f"{name.upper()} is not set. The server needs it; ./run starts everything itself.")
    if settings.server_workers > 1 and fd is None:
        return asyncio.run(ServerProcesses(settings).run())
    if fd is not None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until it serves: no traceback of one that is stopped before
    # Here, because no other command needs the half of it, and the process that keeps several of these none.
    from server.app import create_app
    from server.core.http import Bounds, HttpServer, Shared
    from server.errors import refusal

    tracing.start(settings, "server")
    app = create_app(settings, load_registry(settings.models_file))
    bounds = Bounds(settings.max_connections, settings.receive_timeout_s, settings.stalled_reader_s)
    shared = Shared(bounds, refusal)
    server = HttpServer(app, settings.host, settings.port, settings.drain_timeout_s, shared)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each connection is a file, and shells allow few
    sockets = None if fd is None else [socket.socket(fileno=fd)]

    async def until_stopped() -> None:
        serving, stopping = asyncio.create_task(server.serve(sockets)), stop_event()
        stopped = asyncio.create_task(stopping.wait())
        await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if server.started and not serving.done():
            app.state.draining, app.state.drained_by = True, time.monotonic() + settings.drain_timeout_s
            asyncio.get_running_loop().call_later(settings.drain_timeout_s, app.state.dispatcher.give_up)
            alone = fd is not None and stopping.number == signal.SIGTERM  # the others go on (server/processes.py)
            await server.drain(settings.drain_timeout_s + TELL_S, shared=alone)
        server.should_exit = True
        await serving

    uvloop.run(until_stopped())
    return 0 if server.started else 1


def main() -> int:
    args = parser().parse_args()
    given = {name: getattr(args, name, None) for name in ("host", "port", "data_dir")}
    try:
        renamed = {"models_file": getattr(args, "models", None), "server_workers": getattr(args, "workers", None)}
        settings = load_settings(**given, **renamed)
        if args.command == "up":
            json_logging.configure("ERROR", "up")
            return asyncio.run(Supervisor(settings).run())
        json_logging.configure(settings.log_level, "server")
        if args.command == "serve":
            return _serve(settings, args.fd)
        if args.command == "keys":
            return asyncio.run(_keys(args, settings))
        print("\n".join(migrate(_database_url(settings))) or "The schema is up to date.")
        return 0
    except ServiceError as exc:
        print(f"error: {exc.message}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
