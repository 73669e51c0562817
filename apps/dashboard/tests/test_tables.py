"""CSV downloads hold what the charts show."""

from __future__ import annotations

import csv
import io

import numpy as np

from blockell_dashboard import tables
from blockell_format.snapshots import LayerInfo, LayerSnapshot


def rows(data: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(data.decode())))


def test_topology_table_has_a_line_per_live_block(small_layer: LayerSnapshot) -> None:
    lines = rows(tables.to_csv(tables.topology_table(small_layer, LayerInfo("fc", 3, 4, 3, 16))))
    assert len(lines) == 6
    assert lines[1] == {
        "row": "0",
        "column": "1",
        "slot": "1",
        "weight_row_start": "0",
        "weight_row_stop": "16",
        "weight_column_start": "16",
        "weight_column_stop": "32",
        "age_steps": "0",
        "score": "1",
        "change": "born",
        "replaced_column": "3",
    }
    assert lines[3]["score"] == ""  # NaN
    assert lines[3]["replaced_column"] == "-1"


def test_age_table_adds_up() -> None:
    lines = rows(tables.to_csv(tables.age_table(np.array([0, 1, 9, 9]), 9.0)))
    assert sum(int(line["blocks"]) for line in lines) == 4
    assert lines[-1]["age_to_steps"] == "9"


def test_csv_cells() -> None:
    table = {"a,b": [1.5, float("nan"), float("inf")], "=x": ["=1+1", "plain", "-5"]}
    assert tables.to_csv(table).decode() == "\"a,b\",'=x\n1.5,'=1+1\n,plain\n,'-5\n"
    assert tables.to_csv({"flag": np.array([True, False])}) == b"flag\n1\n0\n"


def test_file_names_are_harmless() -> None:
    assert tables.file_name("../../etc/passwd", "a b/ü", "step-12") == "etc-passwd_a-b_step-12"
    assert tables.file_name("///") == "data"
    assert len(tables.file_name("x" * 999)) == 150
