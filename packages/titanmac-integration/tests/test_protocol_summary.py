"""The measures of continual learning, records on disk, and what a summary chooses."""

import json
from pathlib import Path
from typing import Any

import pytest

from titanmac_integration._protocol import _measures as measures
from titanmac_integration._protocol._methods import Asked, parse_methods
from titanmac_integration._protocol._records import append_record, read_records, record_id
from titanmac_integration._protocol._summary import describe, summarise
from titanmac_integration._protocol._tables import retention_tables

# three tasks; the first is better after the second than when it was learned
MATRIX = [
    [0.1, 0.0, 0.2],
    [0.8, 0.1, 0.2],
    [0.9, 0.7, 0.3],
    [0.5, 0.6, 0.9],
]


def test_measures_of_the_field() -> None:
    assert measures.average_accuracy(MATRIX) == pytest.approx((0.5 + 0.6 + 0.9) / 3)
    assert measures.backward_transfer(MATRIX) == pytest.approx(((0.5 - 0.8) + (0.6 - 0.7)) / 2)
    assert measures.forward_transfer(MATRIX) == pytest.approx(((0.1 - 0.0) + (0.3 - 0.2)) / 2)
    # the best ever counts, not what it was right after learning
    assert measures.forgetting(MATRIX) == pytest.approx(((0.9 - 0.5) + (0.7 - 0.6)) / 2)
    joint = [[0.0] * 3, [0.8, 0.0, 0.0], [0.8, 0.8, 0.0], [0.8, 0.8, 1.0]]
    assert measures.intransigence(MATRIX, joint) == pytest.approx(((0.8 - 0.7) + (1.0 - 0.9)) / 2)


def record(
    method: str, dial: float | None, seed: int, kept: float, nats: float, **changes: Any
) -> dict[str, Any]:
    """Kept and nats on test data; on validation data `validation=(kept, nats)`, else the same."""
    on_validation = changes.pop("validation", (kept, nats))

    def matrix(value: float) -> list[list[float]]:
        return [[0.0, 8.0], [1.0, 7.9], [0.01 + 0.99 * value, 3.0]]

    def table(value: float) -> list[list[float]]:
        return [[5.0, 5.5], [0.0, 5.4], [0.7, value]]

    return {
        "id": record_id("tiny-0", Asked(method, "sparse", dial), seed),
        "setting": "tiny",
        "setting_key": "tiny-0",
        "method": method,
        "arch": "sparse",
        "dial": dial,
        "seed": seed,
        "failed": None,
        "tasks": ["arithmetic", "prose"],
        "metrics": ["exact_match", "bits_per_byte"],
        "chance": [0.01, 8.0],
        "perfect": [1.0, 0.0],
        "steps": [10, 20],
        "matrix": matrix(kept),
        "nats": table(nats),
        "validation_matrix": matrix(on_validation[0]),
        "validation_nats": table(on_validation[1]),
        "path": [[{"step": 10, "value": [0.25], "nats": [2.0]}]],
        "seconds": [3.0],
        "peak_bytes": None,
        "kept_bytes": 1000,
        "parameters": 5000,
        "device": "abacus",
        **changes,
    }


def test_a_cell_is_described() -> None:
    figures = describe(record("ours", None, 0, 0.9, 1.5))
    assert figures["relative_forgetting"] == pytest.approx(0.1)
    assert figures["first_lowest"] == 0.25, "the way counts, not only its end"
    assert figures["first_nats_change"] == pytest.approx(0.7)
    assert figures["new_nats"] == 1.5
    assert figures["kept"] == pytest.approx(0.9)
    assert figures["intransigence"] is None


def test_dials_are_chosen_on_validation_and_stated_on_test() -> None:
    records = [
        record("fine-tuning", 1e-3, 0, 0.0, 1.50),
        record("fine-tuning", 3e-3, 0, 0.0, 1.40, validation=(0.0, 1.60)),
        # looks best on test data, but not on validation data
        record("ewc", 10.0, 0, 0.95, 1.51, validation=(0.2, 1.52)),
        record("ewc", 100.0, 0, 0.6, 1.58, validation=(0.7, 1.53)),
        record("ewc", 1000.0, 0, 0.99, 2.5),
    ]
    summary = summarise(records)["settings"]["tiny-0"]
    curves = {curve["method"]: curve for curve in summary["curves"]}
    ewc = curves["ewc"]
    assert ewc["reference_nats"] == 1.50, "of the fine-tuning that is best on validation data"
    assert ewc["kept_within_0.05_nats"]["mean"] == pytest.approx(0.6)
    assert ewc["new_nats_at_90%_kept"]["mean"] == 2.5
    assert ewc["dial_at_90%_kept"] == 1000.0
    assert curves["fine-tuning"]["new_nats_at_90%_kept"] is None


def test_seeds_are_averaged_and_worst_cases_kept() -> None:
    records = [record("ours", None, seed, kept, 1.5) for seed, kept in enumerate((1.0, 0.9, 0.8))]
    row = summarise(records)["settings"]["tiny-0"]["rows"][0]
    assert row["kept"] == {
        "mean": pytest.approx(0.9),
        "sd": pytest.approx(0.1),
        "min": pytest.approx(0.8),
        "max": pytest.approx(1.0),
        "n": 3,
    }
    assert row["seeds"] == [0, 1, 2]
    table = retention_tables(summarise(records))
    assert "90.1 ± 9.9%   25.0%  10.0 ± 10.0%" in table


def test_a_first_task_that_was_not_learned_makes_the_comparison_void() -> None:
    poor = record("ours", None, 4, 0.9, 1.5)
    poor["matrix"][1][0] = 0.9
    summary = summarise([record("ours", None, 0, 0.9, 1.5), poor])
    assert summary["settings"]["tiny-0"]["rows"][0]["void"] == [4]
    assert "not learned to 95% before the next task by ours@sparse, seed 4" in shown(
        *(record("ours", None, 0, 0.9, 1.5), poor)
    )
    assert "Void" not in shown(record("ours", None, 0, 0.9, 1.5))


def test_records_survive_a_kill(tmp_path: Path) -> None:
    first, second = record("ours", None, 0, 1.0, 1.5), record("ours", None, 1, 1.0, 1.6)
    append_record(tmp_path, first)
    with (tmp_path / "retention.jsonl").open("a") as file:
        file.write('{"version": 1, "id": "torn')
    assert [r["id"] for r in read_records([tmp_path])] == [first["id"]]
    append_record(tmp_path, second)
    assert [r["id"] for r in read_records([tmp_path])] == [first["id"], second["id"]]
    append_record(tmp_path, {**first, "nats": "newer"})
    assert read_records([tmp_path])[0]["nats"] == "newer"
    with (tmp_path / "retention.jsonl").open("a") as file:
        file.write(json.dumps({"version": 99}) + "\n")
    with pytest.raises(ValueError, match="line 5 must be a record of version 1"):
        read_records([tmp_path])


def test_rates_of_one_method_are_rows_of_their_own() -> None:
    rows = summarise(
        [
            record("ours", None, 0, 0.9, 1.5),
            record("ours", None, 0, 0.95, 1.4, rate=2e-3),
            record("ours", None, 1, 0.93, 1.4, rate=2e-3),
        ]
    )["settings"]["tiny-0"]
    assert [(row["rate"], row["seeds"]) for row in rows["rows"]] == [(None, [0]), (2e-3, [0, 1])]
    assert rows["curves"][0]["rate_at_90%_kept"] == 2e-3
    assert "ours@sparse:0.002 " in retention_tables({"settings": {"tiny-0": rows}})


def test_methods_are_asked_for_by_name() -> None:
    assert parse_methods(["ours", "ewc=1e3,1e4", "ours-grown=0.02", "fine-tuning@dense"]) == [
        Asked("ours", "sparse", None),
        Asked("ewc", "sparse", 1e3),
        Asked("ewc", "sparse", 1e4),
        Asked("ours-grown", "spare", 0.02),
        Asked("fine-tuning", "dense", None),
    ]
    assert parse_methods(["ours:1e-3,2e-3=auto,0.01", "ewc@dense:5e-3=1"]) == [
        Asked("ours", "sparse", None, 1e-3),
        Asked("ours", "sparse", 0.01, 1e-3),
        Asked("ours", "sparse", None, 2e-3),
        Asked("ours", "sparse", 0.01, 2e-3),
        Asked("ewc", "dense", 1.0, 5e-3),
    ]
    assert record_id("tiny-0", Asked("ours", "sparse", None, 2e-3), 3) == (
        "tiny-0/ours@sparse:0.002=auto/seed3"
    )
    assert Asked("ours", "sparse", None, 2e-3).make().learning_rate == 2e-3
    assert len(parse_methods(["l2=sweep"])) == 10
    assert len(parse_methods(["ours", "ours", "ours=auto"])) == 1
    for wrong, message in (
        ("magic", r"method \(='magic'\) must be one of fine-tuning, "),
        ("ours@wide", r"architecture \(='wide'\) must be one of sparse, "),
        ("ewc=much", r"dial \(='much'\) of method ewc must be a number"),
        ("ewc:fast", r"learning rate \(='fast'\) of method ewc must be a number"),
        ("fine-tuning:1e-3", r"learning rate \(='1e-3'\) of method fine-tuning is its dial"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_methods([wrong])


def test_a_text_as_the_first_task_is_shown_in_nats() -> None:
    """Its worst value is the highest, and the table says in which unit."""
    text = record(
        "ours",
        None,
        0,
        0.9,
        1.5,
        tasks=["code", "prose"],
        metrics=["bits_per_byte", "bits_per_byte"],
        chance=[8.0, 8.0],
        perfect=[0.0, 0.0],
        matrix=[[8.1, 8.0], [2.4, 7.9], [2.6, 3.0]],
        path=[[{"step": 10, "value": [2.7], "nats": [2.0]}]],
    )
    text["nats"] = [[5.6, 5.5], [1.5, 5.4], [1.6, 1.7]]
    lines = retention_tables(summarise([text])).splitlines()
    assert lines[2] == "code, nats per byte"
    assert lines[3].split() == ["method", "learned", "at", "the", "end", "highest", "forgotten"]
    assert lines[5].split() == ["ours@sparse", "1.500", "1.600", "2.000", "3.6%"]


def shown(*records: dict[str, Any]) -> str:
    """The tables on one line."""
    return " ".join(retention_tables(summarise(records)).split())


def test_tables_fit_a_terminal() -> None:
    """Also with seeds, three tasks and a method's own rate and dial."""
    three = {
        "tasks": ["arithmetic", "letters", "prose"],
        "metrics": ["exact_match", "exact_match", "bits_per_byte"],
        "chance": [0.01, 0.01, 8.0],
        "perfect": [1.0, 1.0, 0.0],
        "steps": [1200, 800, 800],
        "matrix": [[0.0, 0.0, 8.0], [1.0, 0.0, 7.0], [0.9, 1.0, 7.0], [0.8, 0.7, 3.0]],
        "nats": [[5.0, 5.0, 5.5], [0.0, 5.0, 5.0], [0.1, 0.2, 5.0], [0.3, 0.4, 1.6]],
        "validation_nats": [[5.0] * 3] * 4,
        "validation_matrix": [[0.5, 0.5, 8.0]] * 4,
        "path": [
            [{"step": 10, "value": [0.6], "nats": [2.0]}],
            [{"step": 10, "value": [0.85, 0.5], "nats": [2.0, 1.0]}],
        ],
        "device": "x86_64",
    }
    records = [
        {**record("ours-damped", dial, seed, 0.9, 1.5, rate=9e-3), **three}
        for seed in range(3)
        for dial in (1e-3, 1e-2)
    ]
    text = retention_tables(summarise(records))
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "ours-damped@sparse:0.009=0.001 100.0 ± 0.0% 80.0 ± 0.0% 60.0% 20.2 ± 0.0%",
        "letters, right answers",
        "ours-damped@sparse:0.009=0.001 100.0 ± 0.0% 70.0 ± 0.0% 50.0% 30.3 ± 0.0%",
        "prose, nats per byte method learned",
        "ours-damped@sparse:0.009=0.001 1.600 ± 0.000",
        "ours-damped@sparse:0.009=0.001 0,1,2 0.707 ± 0.000 3 0.00 5,000",
        "ours-damped forgot more than 10% of arithmetic, letters.",
    ):
        assert words in " ".join(text.split()), words


def test_of_a_task_that_was_hardly_learned_nothing_is_forgotten() -> None:
    """The quotient would be noise over noise; a text counts as hardly learned, too."""
    poor = record("ours", None, 0, 0.0, 1.5, matrix=[[0.0, 8.0], [0.03, 7.9], [0.01, 3.0]])
    row = summarise([poor])["settings"]["tiny-0"]["rows"][0]
    assert "relative_forgetting" not in row["tasks"][0]
    assert "25.0% not learned" in shown(poor).replace("1.0% 1.0%", "25.0%")
    changes = {"metrics": ["bits_per_byte"] * 2, "chance": [8.0, 8.0], "perfect": [0.0, 0.0]}
    for bits, void in ((7.7, True), (5.0, False)):
        text = record("ours", None, 0, 0.0, 1.5, **changes)
        text["matrix"] = [[8.0, 8.0], [bits, 7.9], [7.9, 3.0]]
        assert ("Void: arithmetic was hardly learned before the next task" in shown(text)) is void


def test_a_handful_of_held_out_questions_is_said() -> None:
    assert "Tested coarsely" not in shown(record("ours", None, 0, 1.0, 1.5))
    for counts, few in (([5, 9], True), ([50, 9], False)):
        one = record("ours", None, 0, 1.0, 1.5, tested_on=counts)
        assert ("Tested coarsely: arithmetic on 5 questions. A tenth" in shown(one)) is few


def test_what_was_not_learned_or_not_kept_is_said() -> None:
    def second(method: str, share: float, kept: float = 1.0) -> dict[str, Any]:
        """A second task of answers, whose loss hardly tells."""
        changes = {"metrics": ["exact_match"] * 2, "chance": [0.01, 0.5], "perfect": [1.0, 1.0]}
        one = record(method, None, 0, kept, 1.5, **changes)
        one["matrix"] = [[0.0, 0.5], [1.0, 0.5], [0.01 + 0.99 * kept, share]]
        return one

    plain = second("fine-tuning", 1.0, 0.0)
    assert "ours learned much less of prose" in shown(plain, second("ours", 0.94))
    assert "learned much less" not in shown(plain, second("ours", 0.96))
    assert "forgot more" not in shown(plain, second("ours", 0.9, 0.91))
    assert "ours forgot more than 10% of arithmetic" in shown(plain, second("ours", 0.9, 0.85))
    assert "by any method" not in shown(plain)
    poor = second("fine-tuning", 0.6, 0.0)
    assert "Not learned to 95% by any method: prose (at most 60.0%)." in shown(poor)
    chance = shown(second("fine-tuning", 0.54, 0.0), second("ours", 0.5))
    assert "learned much less" not in chance, "fine-tuning has learned nothing either"


def test_a_method_that_learned_little_is_pointed_to_rehearsal() -> None:
    def table(nats: float, method: str = "ours") -> str:
        records = [record("fine-tuning", None, 0, 0.0, 1.6), record(method, None, 0, 1.0, nats)]
        return shown(*records)

    assert "ours learned much less of prose than fine-tuning." in table(3.0)
    assert "--methods ours-releasing" in table(3.0)
    assert "ours-rehearsing learned much less of prose than fine-tuning." in table(
        3.0, "ours-rehearsing"
    )
    assert "learned much less" not in table(1.9)
    assert "learned much less" not in table(3.0, "ours-releasing")
    assert "learned much less" not in retention_tables(
        summarise([record("ours", None, 0, 1.0, 3.0)])  # nothing to compare with
    )
