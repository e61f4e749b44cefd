"""Messages about options: in our words, with near names of options and of their values."""

from typing import Literal

import pytest
from pydantic import Field, ValidationError, field_validator

from perfedrec.core.mistakes import explain
from perfedrec.core.nearest import listing, nearest
from perfedrec.core.settings import Settings


class Options(Settings):
    kind: Literal["leave-one-out", "ratio"] = Field("ratio", description="a choice")
    length: float | None = Field(1.0, gt=0, description="a number or off")
    metric: str = Field("recall", description="with a check of its own")

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str) -> str:
        if metric != "recall":
            raise ValueError(f"expected recall{nearest(metric, ['recall'])}")
        return metric


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "rato"}, "a.kind: expected leave-one-out or ratio (given: 'rato'); did you mean ratio?"),
        (
            {"kind": "Leave_one_out"},
            "a.kind: expected leave-one-out or ratio (given: 'Leave_one_out'); did you mean leave-one-out?",
        ),
        ({"kind": "x"}, "a.kind: expected leave-one-out or ratio (given: 'x')"),
        ({"kind": 1}, "a.kind: expected leave-one-out or ratio (given: 1)"),
        ({"metric": "recal"}, "a.metric: expected recall (given: 'recal'); did you mean recall?"),
        ({"length": 0}, "a.length: expected more than 0 (given: 0)"),
        ({"length": "x"}, "a.length: expected a number or off (given: 'x')"),
        ({"lenght": 1}, "there is no option a.lenght; did you mean a.length?"),
    ],
)
def test_a_mistake_is_one_line_with_a_near_name_at_its_end(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Options.model_validate(given)
    assert explain(caught.value.errors(), Options, "a.") == said


def test_names_that_people_chose_are_quoted_where_one_would_not_see_their_ends() -> None:
    assert listing(["user", "item, title", "", "a b", 'a"b']) == 'user, "item, title", "", "a b", "a"b"'
    assert nearest("PerFedRec++", ["perfedrec", "perfedrec_pp"]) == "; did you mean perfedrec_pp?"
    assert nearest("gpu", ["auto", "cpu", "cuda"]) == "; did you mean cuda?"
    assert nearest("ware art", ["Ware, Art", "user"]) == '; did you mean "Ware, Art"?'
