"""docs/openapi.json is the document of the code, and the document of the code names what the server answers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from credence.serve.routes import ROUTES

COMMITTED = Path(__file__).parents[2] / "docs" / "openapi.json"


@pytest.fixture(scope="module")
def document() -> Any:
    return json.loads(COMMITTED.read_text())


def test_the_committed_document_is_that_of_the_code() -> None:
    program = "from credence.cli.main import main; main()"
    command = [sys.executable, "-c", program, "openapi"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout == COMMITTED.read_text(), (
        "the models or routes have changed: credence openapi > docs/openapi.json"
    )


def test_every_route_of_the_gate_is_described_and_no_other(document: Any) -> None:
    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    assert described == {(route.path, method) for route in ROUTES for method in route.methods}


def test_schemas_are_valid_and_every_reference_leads_somewhere(document: Any) -> None:
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)

    def references(part: Any) -> set[str]:
        if isinstance(part, dict):
            own = {part["$ref"]} if isinstance(part.get("$ref"), str) else set()
            return own.union(*map(references, part.values()))
        return set().union(*map(references, part)) if isinstance(part, list) else set()

    assert references(document) == {f"#/components/schemas/{name}" for name in schemas}


def test_uncertainty_is_in_requests_and_answers(document: Any) -> None:
    schemas = document["components"]["schemas"]
    for name in ("CompletionBody", "ChatCompletionBody", "ScoreBody"):
        asked = schemas[name]["properties"]["uncertainty"]["anyOf"]
        assert {"$ref": "#/components/schemas/UncertaintyOptions"} in asked and {"type": "boolean"} in asked
    assert schemas["UncertaintyOptions"]["additionalProperties"] is False
    for name in ("CompletionChoice", "ChatChoice", "Score"):
        assert "Uncertainty" in json.dumps(schemas[name]["properties"]["uncertainty"])


@pytest.mark.parametrize("status", ["400", "404", "413", "429", "503"])
def test_errors_of_questions_are_described(document: Any, status: str) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/uncertainty/score"):
        response = document["paths"][path]["post"]["responses"][status]
        assert response["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorResponse"}
        assert ("Retry-After" in response.get("headers", {})) == (status in ("429", "503"))


def test_the_wrong_answer_would_be_seen(document: Any) -> None:
    """The schema of an uncertainty refuses an object without its numbers."""
    schema = {"$ref": "#/components/schemas/Uncertainty", "components": document["components"]}
    with pytest.raises(jsonschema.ValidationError, match="required property"):
        jsonschema.validate({"mode": "ensemble"}, schema)
