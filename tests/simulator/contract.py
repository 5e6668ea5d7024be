"""Checks requests and answers against DigitalOcean's OpenAPI document."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

from openapi_schema_validator import OAS30ReadValidator, OAS30WriteValidator, oas30_format_checker
from referencing import Registry
from referencing.jsonschema import DRAFT4

from .catalogue import Json

_BASE = "urn:api"
_PLACEHOLDER = re.compile(r"\{[^/]+\}")


class Contract:
    """Collects violations; without a document it checks nothing."""

    def __init__(self, document: Path | None) -> None:
        """Read the document."""
        self.violations: list[str] = []
        self._lock = threading.Lock()
        self._document: Json = json.loads(document.read_text(), object_hook=_with_base) if document else {}
        self._paths = [
            (re.compile(_PLACEHOLDER.sub("[^/]+", path)), operations)
            for path, operations in sorted(self._document.get("paths", {}).items(), key=lambda item: "{" in item[0])
        ]
        self._validators: dict[tuple[str, int], Any] = {}

    def check(self, method: str, path: str, query: dict[str, str], body: Any, status: int, answer: Any) -> None:
        """Check one call; a request that was refused need not be right."""
        if not self._document:
            return
        call = f"{method} {path}"
        operation = self._operation(method, path)
        if operation is None:
            self._violated(call, "no such call in the specification")
            return
        with self._lock:
            if status < 400:
                self._check_query(call, operation, query)
                self._check_body(call, operation, body)
            self._check_answer(call, operation, status, answer)

    def _operation(self, method: str, path: str) -> Json | None:
        for pattern, operations in self._paths:
            if pattern.fullmatch(path) and method.lower() in operations:
                return self._resolved(operations[method.lower()])
        return None

    def _resolved(self, node: Json) -> Json:
        """A node of the document, after its references."""
        while "$ref" in node:
            target: Any = self._document
            for part in node["$ref"].removeprefix(f"{_BASE}#/").split("/"):
                target = target[part]
            node = target
        return node

    def _check_query(self, call: str, operation: Json, query: dict[str, str]) -> None:
        parameters = [self._resolved(parameter) for parameter in operation.get("parameters", ())]
        schemas = {parameter["name"]: parameter for parameter in parameters if parameter["in"] == "query"}
        for name, text in query.items():
            if name not in schemas:
                self._violated(call, f"unknown query parameter {name}")
                continue
            schema = self._resolved(schemas[name]["schema"])
            value = int(text) if schema.get("type") == "integer" and text.isdecimal() else text
            self._validate(f"{call} query {name}", schema, value, writing=True)
        for name, parameter in schemas.items():
            if parameter.get("required") and name not in query:
                self._violated(call, f"missing query parameter {name}")

    def _check_body(self, call: str, operation: Json, body: Any) -> None:
        if "requestBody" not in operation:
            if body is not None:
                self._violated(call, "has a body")
            return
        request = self._resolved(operation["requestBody"])
        if body is None:
            if request.get("required"):
                self._violated(call, "has no body")
            return
        schema = request["content"]["application/json"]["schema"]
        self._validate(f"{call} request", schema, body, writing=True)
        known = self._properties(schema)
        for name in body if isinstance(body, dict) else ():
            if name not in known:
                self._violated(call, f"unknown property {name}")

    def _properties(self, schema: Json) -> set[str]:
        """All properties that a schema speaks of."""
        schema = self._resolved(schema)
        found = set(schema.get("properties", ()))
        for part in (*schema.get("allOf", ()), *schema.get("anyOf", ()), *schema.get("oneOf", ())):
            found |= self._properties(part)
        return found

    def _check_answer(self, call: str, operation: Json, status: int, answer: Any) -> None:
        responses = operation["responses"]
        found = responses.get(str(status)) or (responses.get("default") if status >= 400 else None)
        if found is None:
            self._violated(call, f"unknown status {status}")
            return
        content = self._resolved(found).get("content")
        if content is None:
            if answer is not None:
                self._violated(call, f"answer {status} should be empty")
            return
        schema = content["application/json"]["schema"]
        self._validate(f"{call} answer {status}", schema, answer, writing=False)

    def _validate(self, where: str, schema: Json, value: Any, *, writing: bool) -> None:
        for error in self._validator(schema, writing=writing).iter_errors(value):
            self._violated(where, f"{error.json_path}: {error.message[:300]}")

    def _validator(self, schema: Json, *, writing: bool) -> Any:
        key = (json.dumps(schema, sort_keys=True), int(writing))
        if key not in self._validators:
            registry: Any = Registry().with_resource(_BASE, DRAFT4.create_resource(self._document))
            kind = OAS30WriteValidator if writing else OAS30ReadValidator
            self._validators[key] = kind(schema, registry=registry, format_checker=oas30_format_checker)
        return self._validators[key]

    def _violated(self, where: str, what: str) -> None:
        self.violations.append(f"{where}: {what}")


def _with_base(node: Json) -> Json:
    """References name the document, so that any part of it can be used as a schema by itself."""
    if isinstance(node.get("$ref"), str):
        node["$ref"] = _BASE + node["$ref"]
    if "propertyName" in node:  # a discriminator
        node["mapping"] = {name: _BASE + target for name, target in node.get("mapping", {}).items()}
    return node
