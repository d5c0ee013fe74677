"""The README.md that every checkpoint folder gets."""

import re
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import ModelCard
from tiny_models import FAMILIES, load

from prunekit.checkpoint import history, open_checkpoint, statistics, write_checkpoint
from prunekit.model_card import ROWS, model_card


@pytest.fixture(scope="module")
def stages(tiny, tmp_path_factory):
    """Folders of three stages in a row: layers dropped, KV heads merged, and published after training."""
    root = tmp_path_factory.mktemp("stages")
    drop = [
        "manual_select.py",
        "--model",
        tiny("qwen3_vl"),
        "--out",
        root / "1",
        "--text",
        "3",
        "--vision",
        "2",
    ]
    merge = ["kv_cut.py", "--model", root / "1", "--out", root / "2", "--kv-heads", "1"]
    train = [
        "-m",
        "prunekit.publish",
        "--run",
        root / "2",
        "--base",
        root / "2",
        "--out",
        root / "3",
        "--stage",
        "sft",
    ]
    for command in (drop, merge, train):
        subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    return [root / "1", root / "2", root / "3"]


def card(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def table(text):
    """{label: (before, now)} as written, without thousands separators."""
    rows = re.findall(r"^\| (.+?) \| ([\d,?]+) \| ([\d,]+) \| .*\|$", text, re.M)
    return {label: (old.replace(",", ""), new.replace(",", "")) for label, old, new in rows}


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_numbers_are_the_statistics_of_the_first_input_and_of_the_folder(stage, stages, tiny):
    before, now = statistics(tiny("qwen3_vl")), statistics(stages[stage])
    expected = {label: (str(before[key]), str(now[key])) for label, key in ROWS.items()}
    for part, count in now["parameters_by_component"].items():
        expected[f"parameters: {part}"] = (str(before["parameters_by_component"][part]), str(count))
    assert table(card(stages[stage])) == {k: v for k, v in expected.items() if v != ("0", "0")}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_entry_has_one_line_with_what_it_says(stage, stages):
    lines = re.findall(r"^\d+\. (.+)$", card(stages[stage]), re.M)
    entries = history(stages[stage])
    assert len(lines) == len(entries) == stage + 1
    for line, entry in zip(lines, entries):
        assert line.startswith(f"`{entry['stage']}` of `{entry['input']}`")
        assert f"`{entry['time']}`" in line and f'torch "{entry["versions"]["torch"]}"' in line
        for key in ("removed", "settings"):
            for name in entry[key] or ():
                assert re.search(rf"{key} `[^`]*{name} ", line)


def test_metrics_are_written_as_they_were_measured(tiny):
    entry = {"stage": "sft", "metrics": {"eval_loss": 0.123456789, "eval_token_acc": 1.0}}
    text = model_card({"model_type": "llama"}, statistics(tiny("llama")), [entry])
    assert "metrics `eval_loss 0.123456789, eval_token_acc 1.0`" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_the_card_is_valid_for_the_hub(family, tiny, tmp_path):
    write_checkpoint(open_checkpoint(tiny(family)), tmp_path / "out", {"stage": "copy"})
    data = ModelCard.load(tmp_path / "out/README.md").data.to_dict()
    assert data == front_matter(card(tmp_path / "out"))
    assert data["library_name"] == "transformers" and data["tags"] == ["prune-kit"]


def test_a_cut_model_is_tagged_pruned_after_later_stages_too(stages):
    assert all("pruned" in front_matter(card(folder))["tags"] for folder in stages)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_code_it_shows_loads_the_model(family, tiny, tmp_path):
    write_checkpoint(open_checkpoint(tiny(family)), tmp_path / "out", {"stage": "copy"})
    code = re.search(r"```python\n(.*?)```", card(tmp_path / "out"), re.S)[1]
    assert code.count("this/folder") == 1
    names = {}
    exec(code.replace("this/folder", str(tmp_path / "out")), names)
    assert type(names["model"]) is type(load(tiny(family)))


@pytest.mark.parametrize(
    "path, name",
    [
        ("/hub/models--Qwen--Qwen3-VL-8B-Instruct/snapshots/0c35", "Qwen/Qwen3-VL-8B-Instruct"),
        ("/hub/models--org--a--b.c_d/snapshots/0c35", "org/a--b.c_d"),
        ("/hub/models--gpt2/snapshots/0c35", None),
        ("checkpoints/base", None),
        ("/data/Qwen/Qwen3-8B", None),
    ],
)
def test_the_base_model_is_named_only_if_it_came_from_the_hub(path, name, tiny):
    text = model_card({"model_type": "llama"}, statistics(tiny("llama")), [{"stage": "x", "input": path}])
    assert ModelCard(text).data.get("base_model") == name
    assert f"Made from `{path}`" in text


@pytest.mark.parametrize(
    "path", ["a|b", "a`b``c", "a\n\n# b\n---\n", "</code><script>", "*a_b*", "`", "", "a\r\n| b |"]
)
def test_no_text_from_outside_breaks_the_page(path, tiny):
    def shape(text):
        entry = {"stage": text, "input": text, "removed": {text: text}, "metrics": {text: 1.5}, "time": text}
        lines = model_card({"model_type": "llama"}, statistics(tiny("llama")), [entry]).splitlines()
        return [line[:2] for line in lines], lines[-3:]

    assert shape(path) == shape("plain")


def test_a_history_without_earlier_sizes_gets_question_marks(tiny):
    text = model_card({"model_type": "llama"}, statistics(tiny("llama")), [{"stage": "old"}])
    assert table(text)["parameters"] == ("?", str(statistics(tiny("llama"))["parameters"]))
