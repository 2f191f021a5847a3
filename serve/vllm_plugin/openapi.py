"""The OpenAPI document of what the server answers: every route of credence.serve.routes, from the models that read and write it.

vLLM's own document names routes that the gate does not let through, and knows nothing of ``uncertainty``. This one is served in its
place at /openapi.json, printed by ``credence openapi``, and committed as docs/openapi.json.
"""

import functools
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.tokenize.protocol import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
    TokenizeResponse,
)

from credence.serve.routes import SCORE_PATH, Access, find
from credence.serve.vllm_plugin.openapi_models import (
    Adapter,
    Adapters,
    ChatCompletion,
    ChatCompletionBody,
    ChatCompletionChunk,
    Completion,
    CompletionBody,
    CompletionChunk,
    LoadAdapter,
    Models,
    PromoteAdapter,
    Score,
    ScoreBody,
    Status,
    Version,
)  # fmt: skip

JSON, EVENTS, TEXT, PAGE = "application/json", "text/event-stream", "text/plain", "text/html"
REFERENCE = "#/components/schemas/{model}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one route.

    Attributes:
        request: models of which a body is one; empty for none.
        answers: (content type, model or None) by status.
        errors: statuses with an error body, beside those that every route of its access has.
        query: (name, schema, description) of each query parameter.
    """

    path: str
    method: str
    summary: str
    answers: dict[int, tuple[tuple[str, type[BaseModel] | None], ...]]
    request: tuple[type[BaseModel], ...] = ()
    errors: tuple[int, ...] = ()
    query: tuple[tuple[str, dict[str, Any], str], ...] = ()


def _json(model: type[BaseModel]) -> dict[int, tuple[tuple[str, type[BaseModel] | None], ...]]:
    return {200: ((JSON, model),)}


ASK_QUERY = (("uncertainty", {"type": "boolean"}, "The same as the body's field, without options."),)
ASK_ERRORS = (400, 404, 413, 429, 500, 503)
ADMIN_ERRORS = (400, 403, 404, 409, 413, 422, 503)

OPERATIONS = (
    Operation(
        path="/v1/completions",
        method="POST",
        summary="Completions, with their uncertainty if it is asked for",
        request=(CompletionBody,),
        answers={200: ((JSON, Completion), (EVENTS, CompletionChunk))},
        errors=ASK_ERRORS,
        query=ASK_QUERY,
    ),
    Operation(
        path="/v1/chat/completions",
        method="POST",
        summary="Chat completions, with their uncertainty if it is asked for",
        request=(ChatCompletionBody,),
        answers={200: ((JSON, ChatCompletion), (EVENTS, ChatCompletionChunk))},
        errors=ASK_ERRORS,
        query=ASK_QUERY,
    ),
    Operation(
        path=SCORE_PATH,
        method="POST",
        summary="The uncertainty of a text that the caller has",
        request=(ScoreBody,),
        answers=_json(Score),
        errors=ASK_ERRORS,
    ),
    Operation(path="/v1/models", method="GET", summary="Models and their posteriors", answers=_json(Models)),
    Operation(
        path="/tokenize",
        method="POST",
        summary="Tokens of a text or a conversation",
        request=(TokenizeCompletionRequest, TokenizeChatRequest),
        answers=_json(TokenizeResponse),
        errors=(400, 404, 413, 503),
    ),
    Operation(
        path="/detokenize",
        method="POST",
        summary="Text of tokens",
        request=(DetokenizeRequest,),
        answers=_json(DetokenizeResponse),
        errors=(400, 404, 413, 503),
    ),
    Operation(path="/version", method="GET", summary="Version of vLLM", answers=_json(Version)),
    Operation(path="/openapi.json", method="GET", summary="This document", answers={200: ((JSON, None),)}),
    Operation(path="/health", method="GET", summary="vLLM's health check", answers={200: (), 503: ()}),
    Operation(path="/ping", method="GET", summary="vLLM's health check", answers={200: (), 503: ()}),
    Operation(path="/ping", method="POST", summary="vLLM's health check", answers={200: (), 503: ()}),
    Operation(path="/livez", method="GET", summary="The process answers", answers=_json(Status)),
    Operation(
        path="/readyz",
        method="GET",
        summary="The engine answers ensembles; 503 says why not",
        answers={200: ((JSON, Status),), 503: ((JSON, Status),)},
    ),
    Operation(path="/metrics", method="GET", summary="Prometheus metrics", answers={200: ((TEXT, None),)}),
    Operation(
        path="/playground", method="GET", summary="A page to try it on", answers={200: ((PAGE, None),)}, errors=(404,)
    ),
    Operation(
        path="/playground/{file}",
        method="GET",
        summary="A file of the page",
        answers={200: (("*/*", None),)},
        errors=(404,),
    ),
    Operation(
        path="/admin/v1/adapters",
        method="GET",
        summary="All adapters, in every state",
        answers=_json(Adapters),
        errors=(404,),
    ),
    Operation(
        path="/admin/v1/adapters",
        method="POST",
        summary="Verify an artifact and serve it; 201 if the name is new",
        request=(LoadAdapter,),
        answers={200: ((JSON, Adapter),), 201: ((JSON, Adapter),)},
        errors=ADMIN_ERRORS,
    ),
    Operation(
        path="/admin/v1/adapters/{name}", method="GET", summary="One adapter", answers=_json(Adapter), errors=(400, 404)
    ),
    Operation(
        path="/admin/v1/adapters/{name}",
        method="DELETE",
        summary="Take no new requests, let those under way end, and remove it",
        answers=_json(Adapter),
        errors=ADMIN_ERRORS,
        query=(("drain_s", {"type": "number", "minimum": 0, "maximum": 3600}, "Seconds for requests under way."),),
    ),
    Operation(
        path="/admin/v1/adapters/{name}/promote",
        method="POST",
        summary="Have an alias answered by another adapter, in one step",
        request=(PromoteAdapter,),
        answers=_json(Adapter),
        errors=ADMIN_ERRORS,
    ),
)

REASONS = {
    400: "The request cannot be served as asked; `param` names the field.",
    401: "A key is missing or wrong.",
    403: "The key may not do this.",
    404: "No such model, adapter or route.",
    405: "The route has no such method.",
    409: "The name is served already, or is in use.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    422: "The artifact was refused; `code` is the reason.",
    429: "The key's rate is used up; `Retry-After` says when to come back.",
    500: "The engine did not deliver what an exact answer needs.",
    503: "Overloaded or shutting down; `Retry-After` says when to come back.",
}
RETRY = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 0}}}


@functools.cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Credence",
            "version": version("credence"),
            "description": "vLLM's OpenAI server with the uncertainty of Bayesian adapters. Fields are described in docs/http-api.md.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "A key of the server; none if it has none."},
                "adminKey": {"type": "http", "scheme": "bearer", "description": "The administrator's key."},
            },
        },
    }


def _operation(operation: Operation) -> dict[str, Any]:
    route = find(operation.path)
    assert route is not None and operation.method in route.methods, operation.path
    described: dict[str, Any] = {"summary": operation.summary, "operationId": _identity(operation)}
    parameters = [
        {"name": part[1:-1], "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for part in operation.path.split("/")
        if part.startswith("{")
    ]
    parameters += [
        {"name": name, "in": "query", "schema": schema, "description": text} for name, schema, text in operation.query
    ]
    if parameters:
        described["parameters"] = parameters
    if operation.request:
        schemas = [_reference(model) for model in operation.request]
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    responses: dict[str, Any] = {}
    for status, contents in operation.answers.items():
        responses[str(status)] = {"description": "Done." if status < 400 else REASONS[status]}
        if contents:
            responses[str(status)]["content"] = {kind: _content(kind, model) for kind, model in contents}
        if status == 503:
            responses[str(status)]["headers"] = RETRY
    errors = {*operation.errors, *(() if route.access is Access.OPEN else (401,))} - set(operation.answers)
    for status in sorted(errors):
        responses[str(status)] = {
            "description": REASONS[status],
            "content": {JSON: {"schema": {"$ref": REFERENCE.format(model="ErrorResponse")}}},
        }
        if status in (429, 503):
            responses[str(status)]["headers"] = RETRY
    described["responses"] = responses
    if route.access is not Access.OPEN:
        # An empty requirement: a server without keys asks for none.
        described["security"] = [{"adminKey": []}] if route.access is Access.ADMIN else [{"key": []}, {}]
    return described


def _content(kind: str, model: type[BaseModel] | None) -> dict[str, Any]:
    if kind == EVENTS and model is not None:
        text = f"Lines `data: <{model.__name__} as JSON>`, at last `data: [DONE]`; an error is an event of its own."
        return {"schema": {"description": text, "x-event": _reference(model)}}
    if model is None:
        return {"schema": {"type": "object"} if kind == JSON else {"type": "string"}}
    return {"schema": _reference(model)}


def _identity(operation: Operation) -> str:
    words = operation.path.replace("{", "").replace("}", "").replace(".", "/").strip("/").split("/")
    return "_".join([operation.method.lower(), *words])


def _schemas() -> dict[str, Any]:
    inputs = {model for operation in OPERATIONS for model in operation.request}
    outputs = {
        model for operation in OPERATIONS for contents in operation.answers.values() for _, model in contents if model
    }
    modes: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        *((model, "validation") for model in sorted(inputs, key=lambda model: model.__name__)),
        *((model, "serialization") for model in sorted({*outputs, ErrorResponse}, key=lambda model: model.__name__)),
    ]
    _, definitions = models_json_schema(modes, ref_template=REFERENCE)
    schemas: dict[str, Any] = definitions["$defs"]
    return dict(sorted(schemas.items()))


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REFERENCE.format(model=model.__name__)}
