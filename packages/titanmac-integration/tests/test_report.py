"""The tables of the command line."""

import pytest

from titanmac_integration import ContinualResult, PhaseReport
from titanmac_integration._report import format_table, model_table, retention_table


def result(matrix: list[list[float]], rates: list[float]) -> ContinualResult:
    phase = PhaseReport("arithmetic", 10, 4.0, 0.5, 0.1, 1000, 0.5, rates)
    return ContinualResult(
        model="block-sparse" if rates else "dense",
        parameters=123_456,
        tasks=["arithmetic", "prose"],
        metrics=["exact_match", "bits_per_byte"],
        chance=[0.01, 8.0],
        matrix=matrix,
        phases=[phase, phase],
        column_entropy=0.9 if rates else None,
        density=0.5 if rates else None,
        swap_rates=rates,
    )


def test_columns_are_aligned() -> None:
    table = format_table(("name", "n"), [("a", "1"), ("long name", "100")])
    assert table.splitlines() == [
        "name         n",
        "---------  ---",
        "a            1",
        "long name  100",
    ]


@pytest.mark.parametrize(
    ("learned", "end", "shown"),
    [(1.0, 0.01, "100.0%"), (1.0, 1.0, "0.0%"), (0.505, 0.257, "50.1%"), (0.02, 0.0, "not learn")],
)
def test_forgetting_is_shown_where_something_was_learned(
    learned: float, end: float, shown: str
) -> None:
    table = retention_table([result([[0.0, 8.0], [learned, 9.0], [end, 3.1]], [0.01])])
    arithmetic, prose = table.splitlines()[2:]
    assert shown in arithmetic
    assert prose.split()[-3:] == ["3.10", "3.10", "-"]


def test_the_topology_is_summed_up() -> None:
    matrix = [[0.0, 8.0], [1.0, 9.0], [0.5, 3.1]]
    table = model_table([result(matrix, [0.01, 0.03]), result(matrix, [])]).splitlines()
    assert "1.0% / 2.0% / 3.0%" in table[2]
    assert "123,456" in table[2]
    assert table[2].split()[-2:] == ["0.900", "2.5%"]
    assert table[3].split()[-4:] == ["-", "-", "-", "-"]
