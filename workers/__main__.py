"""The workers' command line: `python -m workers chat|embedding|archive|download|smoke`."""

import argparse
import sys
from pathlib import Path

import uvloop

from server.core import logging as json_logging
from server.core import tracing
from server.core.errors import ServiceError
from server.core.registry import ModelSpec, ModelType, Registry, line_of_option, load_registry
from server.core.settings import BadSettings, Settings, load_settings


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m workers",
        description="One worker of the service. Settings come from the environment; the README lists them.",
    )
    types = top.add_subparsers(dest="type", required=True)
    for name, text in (("chat", "serve a chat model with vLLM"), ("embedding", "serve an embedding model")):
        command = types.add_parser(name, help=text, description=text)
        command.add_argument("--model", required=True, metavar="ID", help="an id of models.yaml")
        _common(command)
    text = "write finished chats, usage and vectors to Postgres"
    _common(types.add_parser("archive", help=text, description=text))
    text = "bring the weights of all models into the hub's cache"
    command = types.add_parser("download", help=text, description=text)
    command.add_argument("--models", type=Path, metavar="FILE", help="the models to bring (MODELS_FILE)")
    text = "make the tiny smoke model"
    smoke = types.add_parser("smoke", help=text, description=text)
    smoke.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to put it")
    return top


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--models", type=Path, metavar="FILE", help="the models to know (MODELS_FILE)")
    command.add_argument("--metrics-port", type=int, metavar="PORT", help="of /metrics and /health (METRICS_PORT)")


def _spec(registry: Registry, model: str, type_: ModelType) -> ModelSpec:
    for spec in registry.of_type(type_):
        if spec.id == model:
            return spec
    known = ", ".join(spec.id for spec in registry.of_type(type_)) or "none"
    raise BadSettings(f"--model {model}: no enabled {type_} model of this id. Known: {known}")


async def _run(args: argparse.Namespace, settings: Settings) -> int:
    registry = load_registry(settings.models_file)
    if args.type == "chat":
        from workers.chat import ChatWorker
        from workers.engine import UnknownOption

        try:
            return await ChatWorker(settings, _spec(registry, args.model, "chat")).run()
        except UnknownOption as exc:
            line = line_of_option(settings.models_file, args.model, exc.option)
            raise BadSettings(f"{settings.models_file}:{line}: {exc.message}") from exc
    if args.type == "embedding":
        from workers.embedding import EmbeddingWorker

        return await EmbeddingWorker(settings, _spec(registry, args.model, "embedding")).run()
    from workers.archive import Archivist

    return await Archivist(settings, registry).run()


def main() -> int:
    args = parser().parse_args()
    if args.type == "smoke":
        from workers.smoke import build

        build(args.out)
        return 0
    try:
        settings = load_settings(models_file=args.models, metrics_port=getattr(args, "metrics_port", None))
        json_logging.configure(settings.log_level, f"worker-{args.type}")
        if args.type == "download":
            from workers.download import download

            download(load_registry(settings.models_file))
            return 0
        for name in ("amqp_url", "database_url")[: 2 if args.type == "archive" else 1]:
            if not getattr(settings, name):
                raise BadSettings(f"{name.upper()} is not set. A worker needs it; ./run starts everything itself.")
        tracing.start(settings, f"worker-{args.type}")
        return uvloop.run(_run(args, settings))
    except ServiceError as exc:
        print(f"error: {exc.message}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
