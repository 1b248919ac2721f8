"""The JSON Schema of a spec, for editors: `specs/schema.json`."""

from __future__ import annotations

import json
from typing import Any

from adaptc.spec import VERSION, Spec


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a spec, with the options of every registered method."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:adaptc:spec:{VERSION}",
        **Spec.model_json_schema(),
        "title": f"adaptc spec, version {VERSION}",
    }


def schema_text() -> str:
    """The schema as it is kept in `specs/schema.json`."""
    return json.dumps(schema(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
