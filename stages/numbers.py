"""Numbers in settings: what is read as one, and what is refused."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field


def no_switch(value: Any) -> Any:
    """Refuse true and false, which count as 1 and 0 elsewhere.

    Raises:
        ValueError: the value is one of them.
    """
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def no_text(value: Any) -> Any:
    """Refuse what is no number but would be read as one: true, false and texts.

    Raises:
        ValueError: the value is one of them.
    """
    if isinstance(value, (str, bytes)):
        raise ValueError("must be a number, without quotes")
    return no_switch(value)


Whole = Annotated[int, BeforeValidator(no_text), Field(ge=0, le=2**53)]
Count = Annotated[int, BeforeValidator(no_text), Field(gt=0, le=2**53)]
Number = Annotated[float, BeforeValidator(no_text), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
Fraction = Annotated[Positive, Field(lt=1)]
