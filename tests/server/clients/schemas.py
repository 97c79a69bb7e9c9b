"""What clients ask for."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["MESSAGES", "TOKENS", "City", "Go", "city_tool"]

MESSAGES: Any = [{"role": "user", "content": "a"}]
TOKENS = 90


class City(BaseModel):
    """A city."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=4)]
    size: Annotated[int, Field(ge=0, le=9)]


class Go(BaseModel):
    """Go on."""

    model_config = ConfigDict(extra="forbid")


def city_tool() -> dict[str, Any]:
    """`City` as a tool of OpenAI's."""
    return {"type": "function", "function": {"name": "City", "parameters": City.model_json_schema()}}
