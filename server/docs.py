"""`/docs`: the OpenAPI document as one page of HTML.

Made here from the document, without a script and without anything from elsewhere: the framework's own pages load
theirs from a CDN, which a service on a closed network does not reach, and which would run in the page where people
type their keys. So the page's policy allows nothing but its one style sheet.
"""

import base64
import hashlib
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

router = APIRouter(include_in_schema=False)

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0 }
tr { border-top: 1px solid #8884 } code { font: .9em ui-monospace, monospace } h2 { margin-top: 2.5rem }
:root { color-scheme: light dark }
"""

POLICY = (
    "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
    f"style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'"
)

Schema = dict[str, Any]


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """Every endpoint and every field."""
    return HTMLResponse(page(request.app.openapi()), headers={"Content-Security-Policy": POLICY})


def page(document: Schema) -> str:
    """An OpenAPI document as HTML."""
    title = escape(document["info"]["title"])
    operations = "".join(
        _operation(document, f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    )
    types = "".join(
        f"<h2>{escape(name)}</h2><p>{escape(schema.get('description', ''))}</p>"
        + _table("Fields", list(_fields(document, schema)))
        for name, schema in document["components"]["schemas"].items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title} {escape(document['info']['version'])}</h1><p>Send your key as <code>Authorization: Bearer …"
        '</code> or as <code>x-api-key: …</code>. For programs: <a href="openapi.json">openapi.json</a>.</p>'
        f"{operations}{types}</html>"
    )


def _operation(document: Schema, name: str, operation: Schema) -> str:
    made = [f"<h2><code>{escape(name)}</code></h2><p>{escape(operation.get('description', ''))}</p>"]
    parameters = [(p["name"], p["schema"], p.get("required", False)) for p in operation.get("parameters", [])]
    made.append(_table("Parameters", [_row(document, *parameter) for parameter in parameters]))
    for kind, parts in [("Body", operation.get("requestBody")), ("Answer", operation["responses"].get("200"))]:
        content = (parts or {}).get("content", {})
        schema = content.get("application/json", {}).get("schema", {})
        made.append(_table(kind, list(_fields(document, schema))))
    failures = ((status, told) for status, told in operation["responses"].items() if status != "200")
    made.append(_table("Otherwise", [f"<td>{s}<td colspan=2>{escape(told['description'])}" for s, told in failures]))
    return "".join(made)


def _table(heading: str, rows: list[str]) -> str:
    lines = "".join(f"<tr>{row}" for row in rows)
    return f"<h3>{heading}</h3><table>{lines}</table>" if rows else ""


def _fields(document: Schema, schema: Schema) -> Iterator[str]:
    found = _resolved(document, schema)
    found = _resolved(document, found.get("items", found))
    for name, field in found.get("properties", {}).items():
        yield _row(document, name, field, name in found.get("required", []))


def _row(document: Schema, name: str, field: Schema, required: bool) -> str:
    told = [escape(field.get("description") or _resolved(document, field).get("description", ""))]
    if required:
        told.append("required")
    if "default" in field:
        told.append(f"default <code>{escape(repr(field['default']))}</code>")
    return f"<td><code>{escape(name)}</code><td>{escape(_type(field))}<td>{'; '.join(filter(None, told))}"


def _resolved(document: Schema, schema: Schema) -> Schema:
    name = schema.get("$ref", "").rpartition("/")[2]
    return document["components"]["schemas"][name] if name else schema


BOUNDS = {
    "minimum": "≥",
    "maximum": "≤",
    "minLength": "characters ≥",
    "maxLength": "characters ≤",
    "maxItems": "items ≤",
}


def _type(schema: Schema) -> str:
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if forms := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
        return " or ".join(dict.fromkeys(_type(form) for form in forms))
    if "enum" in schema or "const" in schema:
        return " | ".join(map(repr, schema.get("enum", [schema.get("const")])))
    bounds = [f"{sign} {str(schema[name]).removesuffix('.0')}" for name, sign in BOUNDS.items() if name in schema]
    kind = f"{schema.get('type', 'any')}{' of ' + _type(schema['items']) if 'items' in schema else ''}"
    return f"{kind} ({', '.join(bounds)})" if bounds else kind
