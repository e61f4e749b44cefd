"""What a federation needs for its items."""

from __future__ import annotations

import pytest

from perfedrec.core.errors import ConfigError
from perfedrec.federation import sizing
from perfedrec.federation.sizing import MB, Needs, needs
from perfedrec.runs.config import load

MEASURED = [  # docs/deployment.md: items, dimensions, up, down, memory of coordinator with SuperLink, memory of a node
    (50_000, 64, 25.5, 115, 1_110 + 371, 929),
    (200_000, 64, 102, 461, 2_768 + 731, 2_120),
    (500_000, 32, 128, 578, 3_354 + 865, 2_440),
]


@pytest.mark.parametrize(("items", "dim", "up", "down", "coordinator", "node"), MEASURED)
def test_the_figures_are_those_that_were_measured(
    items: int, dim: int, up: float, down: float, coordinator: float, node: float
) -> None:
    found = Needs(items, dim)
    assert (found.up / MB, found.down / MB) == pytest.approx((up, down), rel=0.02)
    assert (found.node / MB, found.coordinator / MB) == pytest.approx((node, coordinator), rel=0.1)


def test_the_line_names_all_figures() -> None:
    found = needs(load("recommended", privacy="secure").build(), 50_000)  # type: ignore[arg-type]
    assert found is not None
    assert found.line() == (
        "50,000 items of 64 dimensions: expect about 916.0 MB of memory for each node and 1.4 GB here; a round sends "
        "up to 115.2 MB to a node and 25.6 MB back"
    )


def test_a_machine_is_refused_only_where_the_tables_alone_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Needs(50_000, 64)
    tables = 3 * 130 * 50_000 * 64 + 230 * 50_000 * 64  # bytes of three nodes and the coordinator
    monkeypatch.setattr(sizing, "memory", lambda: tables)
    found.check_memory(3)
    with pytest.raises(ConfigError, match=r"^4 nodes with 50,000 items .* need about 2\.4 GB .* has 2\.0 GB; expected"):
        found.check_memory(4)
    monkeypatch.setattr(sizing, "memory", lambda: None)
    found.check_memory(10**9)


def test_this_machine_has_memory() -> None:
    assert (sizing.memory() or MB) >= MB
