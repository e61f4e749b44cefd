"""The base class of options: what it takes as a number."""

from typing import Any

import pytest
from pydantic import Field, ValidationError

from perfedrec.core.settings import Settings


class Options(Settings):
    whole: int = Field(1, description="a number")
    several: tuple[float, ...] = Field((1.0,), description="numbers")
    perhaps: float | None = Field(None, description="a number or off")
    switch: bool = Field(False, description="a switch")
    any: bool | int = Field(0, description="a switch or a number")
    free: dict[str, bool | float] = Field({}, description="switches and numbers by name")


@pytest.mark.parametrize(("name", "value"), [("whole", True), ("several", [0.5, False]), ("perhaps", False)])
def test_true_and_false_are_no_numbers(name: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        Options.model_validate({name: value})
    assert [each["type"] for each in caught.value.errors()] == ["int_type" if name == "whole" else "float_type"]


def test_true_and_false_are_taken_where_they_may_be_meant() -> None:
    given = Options.model_validate({"switch": True, "any": True, "free": {"a": True, "b": 2.0}, "whole": "3"})
    assert (given.switch, given.any, given.free, given.whole) == (True, True, {"a": True, "b": 2.0}, 3)
