"""What a log says is what was logged, and drift is what the index of population stability says of it."""

import json
import math
import sys
from collections import Counter

import pytest
from helpers.tiny_taggers import write_rows

from prunekit.errors import PruneKitError
from prunekit.ner import main
from prunekit.serving.tag import Tagged, log_line
from prunekit.serving.watch import METRICS, by_type, psi, read_log, reference_of, summary, table


@pytest.fixture
def log(tmp_path):
    """log(labels of each text, model): a log file with a line for each, the n-th of which took n seconds."""

    def write(texts, model="model"):
        with (tmp_path / "tagged.log").open("a") as file:
            for number, labels in enumerate(texts, 1):
                tagged = Tagged("", [], labels, [1 / (n + 1) for n in range(len(labels))])
                file.write(log_line(tmp_path / model, tagged, float(number)))
        return tmp_path / "tagged.log"

    return write


def watch(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["ner", "watch", *map(str, arguments)])
    return main()


def test_the_index_is_that_of_a_case_worked_by_hand():
    parts = psi({"O": 59, "PER": 39}, {"O": 29, "PER": 69})  # with half a word more: 59.5, 39.5 and 29.5, 69.5 of 99
    assert parts["O"] == pytest.approx((29.5 - 59.5) / 99 * math.log(29.5 / 59.5))
    assert sum(parts.values()) == pytest.approx(30 / 99 * (math.log(59.5 / 29.5) + math.log(69.5 / 39.5)))
    assert sum(psi({"O": 7, "A": 3}, {"O": 7, "A": 3}).values()) == 0
    assert 0 < psi({"O": 100}, {"O": 100, "NEW": 1})["NEW"] < 0.1  # what was never there has no index of infinity


def test_begins_and_insides_are_of_one_type():
    assert by_type({"O": 4, "B-PER": 2, "I-PER": 1, "I-B-X": 1, "B-Y": 0}) == {"O": 4, "PER": 3, "B-X": 1}
    assert by_type({"S-PER": 2, "B-PER": 1, "E-PER": 1}) == {"PER": 4}  # of a model that marks ends, too


def test_a_summary_counts_all_texts(log):
    found = summary(read_log(log([["O", "B-PER"], [], ["O"] * 4])), Counter({"O": 8, "PER": 2}))
    assert (found["texts"], found["words"]) == (3, 6)
    assert found["latency"] == pytest.approx({"p50": 2, "p95": 2.9, "p99": 2.98})
    assert found["confidence"] == pytest.approx((1 + 1 / 2 + 1 + 1 / 2 + 1 / 3 + 1 / 4) / 6)
    assert found["unsure"] == pytest.approx(1 / 3)  # a text without words is not unsure
    assert found["labels"]["PER"]["share"] == pytest.approx(1 / 6)
    assert found["labels"]["PER"]["reference"] == 0.2
    assert found["psi"] == pytest.approx(sum(psi({"O": 8, "PER": 2}, {"O": 5, "PER": 1}).values()))
    assert found["psi_by_chance"] == pytest.approx(1 / 6 + 1 / 10)
    assert {*found} - {"model", "since", "until"} == {*METRICS}
    assert table(found).splitlines()[-1].split()[1] == f"{found['psi']:.4f}"


def test_a_text_with_a_word_that_the_model_cant_read_is_unsure(tmp_path):
    (tmp_path / "log").write_text(log_line(tmp_path, Tagged("", [], ["O", "O"], [1.0, 0.0]), 1.0))
    assert summary(read_log(tmp_path / "log"), None)["unsure"] == 1


def test_a_log_of_empty_texts_has_a_summary(log):
    found = summary(read_log(log([[], []])), Counter({"O": 1}))
    assert (found["words"], found["confidence"], "psi" in found) == (0, None, False)
    assert "2 texts" in table(found)


def test_only_the_latest_model_counts_and_of_it_the_last_texts(log):
    log([["O"]] * 5, "old")
    file = log([["O"], ["B-PER"], ["B-LOC"]], "new")
    assert [list(record["labels"]) for record in read_log(file)] == [["O"], ["B-PER"], ["B-LOC"]]
    assert [list(record["labels"]) for record in read_log(file, last=2)] == [["B-PER"], ["B-LOC"]]


def test_a_line_that_is_being_written_is_left_out_and_another_file_refused(log, tmp_path):
    file = log([["O"]])
    file.write_text(file.read_text() + '{"time": "2')
    assert len(read_log(file)) == 1
    for content in ("{}\n", "5\n", "[]\n", "x\n", "\n", file.read_text().replace('"O": 1', '"O": -1') + "\n"):
        (tmp_path / "other").write_text(content)
        with pytest.raises(PruneKitError, match="line 1: is none of prunekit.ner tag --log|is empty"):
            read_log(tmp_path / "other")


def test_drift_is_a_gate(log, tmp_path, monkeypatch, capsys):
    rows = write_rows(tmp_path / "rows.jsonl")
    counts = reference_of(rows)
    alike = log([["O"] * counts["O"] + ["B-PER"] * counts["PER"] + ["B-LOC"] * counts["LOC"]])
    assert watch(monkeypatch, alike, "--reference", rows, "--max-psi", 0.01) == 0
    other = log([["O"] * 5 + ["B-PER"] * 5], "next")
    given = (other, "--reference", rows, "--json", tmp_path / "out.json")
    assert watch(monkeypatch, *given, "--max-psi", 0.2, "--require", "latency.p95<=2") == 3
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["psi"] > 0.2
    assert capsys.readouterr().err == f"gate: {other}: psi is {found['psi']:.6g}, not <= 0.2\n"


def test_without_a_reference_drift_cant_be_judged(log, monkeypatch, capsys):
    assert watch(monkeypatch, log([["O"]])) == 0
    assert "no reference" in capsys.readouterr().err
    with pytest.raises(PruneKitError, match="model: its history has no labels|model"):
        watch(monkeypatch, log([["O"]]), "--max-psi", 0.2)
