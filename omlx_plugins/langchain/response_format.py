"""What an answer must look like, as LangChain's users and agents write it, to a constraint of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass

from omlx_core.engine.constraints import JSONSchema
from omlx_core.errors import InvalidConstraintError
from omlx_plugins.schemas import close_objects

Schema = Mapping[str, Any] | type
"""A pydantic class, a typed dictionary, or a JSON schema or a function in OpenAI's form."""


def json_schema_of(schema: Schema) -> dict[str, Any]:
    """The JSON schema that is meant.

    Raises:
        InvalidConstraintError: nothing is.
    """
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        write = getattr(schema, "model_json_schema", None) or schema.schema  # type: ignore[attr-defined] # pydantic 1
        as_schema: dict[str, Any] = write()
        return as_schema
    if isinstance(schema, Mapping) and not schema.keys() & {"name", "function", "title", "toolSpec"}:
        return dict(schema)
    try:
        return convert_to_json_schema(schema)  # type: ignore[arg-type]
    except (TypeError, ValueError) as exc:
        raise InvalidConstraintError(
            f"schema={schema!r} is none ({exc}): give a pydantic class, a typed dictionary, or a JSON schema"
        ) from exc


def make_response_format(schema: Schema | None, *, strict: bool | None = None) -> dict[str, Any]:
    """The ``response_format`` in OpenAI's form: JSON of a schema, or any JSON object if there is none.

    Raises:
        InvalidConstraintError: the schema is none.
    """
    if schema is None:
        return {"type": "json_object"}
    as_schema = json_schema_of(schema)
    described: dict[str, Any] = {"name": as_schema.get("title", "answer"), "schema": as_schema}
    if strict is not None:
        described["strict"] = strict
    return {"type": "json_schema", "json_schema": described}


def convert_response_format(response_format: Any) -> JSONSchema | None:
    """The constraint for a ``response_format``.

    Args:
        response_format: in OpenAI's form, of type ``"json_schema"``, ``"json_object"`` or ``"text"``; or a schema.

    Returns:
        None if the answer may be any text.

    Raises:
        InvalidConstraintError: it is none of these.
    """
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return JSONSchema({"type": "object"})
    if kind != "json_schema":
        return JSONSchema(close_objects(json_schema_of(response_format)), strict=False)
    described = response_format.get("json_schema")
    if not isinstance(described, Mapping) or not isinstance(described.get("schema"), Mapping):
        raise InvalidConstraintError(
            f"response_format={response_format!r} has no schema: give "
            '{"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}'
        )
    return JSONSchema(close_objects(described["schema"]), strict=described.get("strict") is True)
