"""The README.md that every checkpoint folder gets."""

import re
import subprocess
import sys

import pytest
import yaml
from helpers.tiny_models import FAMILIES, load
from huggingface_hub import ModelCard

from prunekit.checkpoint import history, open_checkpoint, statistics, write_checkpoint
from prunekit.checkpoint.card import ROWS, model_card


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
        "prunekit.training.publish",
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
    rows = re.findall(r"^\| (.+?) \| ([\d,?]+) \| ([\d,]+) \| .*\|$", text.split("## Stages")[0], re.M)
    return {label: (old.replace(",", ""), new.replace(",", "")) for label, old, new in rows}


def stage_rows(text):
    """The cells of the table of stages, a list a stage."""
    part = text.split("## Stages")[1].split("## Use")[0]
    return [re.split(r" ?(?<!\\)\| ?", line)[1:-1] for line in part.splitlines() if re.match(r"\| \d", line)]


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_numbers_are_the_statistics_of_the_first_input_and_of_the_folder(stage, stages, tiny):
    before, now = statistics(tiny("qwen3_vl")), statistics(stages[stage])
    expected = {label: (str(before[key]), str(now[key])) for label, key in ROWS.items()}
    for part, count in now["parameters_by_component"].items():
        expected[f"parameters: {part}"] = (str(before["parameters_by_component"][part]), str(count))
    assert table(card(stages[stage])) == {
        label: pair for label, pair in expected.items() if pair not in (("0", "0"), ("None", "None"))
    }


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_entry_has_a_row_with_its_sizes_after_it(stage, stages):
    rows = stage_rows(card(stages[stage]))
    entries = history(stages[stage])
    assert len(rows) == len(entries) == stage + 1
    for number, (row, entry) in enumerate(zip(rows, entries), 1):
        assert row[:3] == [str(number), f"`{entry['stage']}`", f"`{entry['input']}`"]
        assert row[4:6] == [f"{entry['parameters']:,}", f"{entry['kv_bytes_per_token']:,}"]


def test_what_was_cut_is_said_in_words(stages):
    rows = stage_rows(card(stages[2]))
    assert [row[3] for row in rows] == ["`text 3; vision 2`", "`kv_heads 3`", ""]


def test_of_taps_those_that_moved_or_went_are_named(tiny):
    removed = {"text": [2, 7], "taps": [[1, 1], [3, None], [4, 3]], "weights": 12345}
    text = model_card({"model_type": "llama"}, statistics(tiny("llama")), [{"removed": removed}])
    assert stage_rows(text)[0][3] == "`text 2, 7; taps 3 gone, 4 to 3; weights 12,345`"


def test_of_a_trainers_numbers_only_those_that_matter_are_shown(tiny):
    metrics = {
        "train_runtime": 812.5,
        "loss": 0.5,
        "token_acc": 0.5,
        "eval_loss": 0.123456789,
        "eval_token_acc": 1.0,
    }
    entry = {"stage": "sft", "metrics": metrics | {"grad_norm": 1.0, "epoch": 2.0, "memory(GiB)": 4.0}}
    text = model_card({"model_type": "llama"}, statistics(tiny("llama")), [entry])
    assert stage_rows(text)[0][6] == "eval_token_acc 1, eval_loss 0.1235"
    assert "train_runtime" not in text and "grad_norm" not in text


def test_what_a_stage_warned_of_is_on_the_page(tiny):
    entry = {"stage": "manual_select", "warnings": ["5 of 8 text layers at once"]}
    text = model_card({"model_type": "llama"}, statistics(tiny("llama")), [{"stage": "copy"}, entry])
    assert "\nStage 2: `5 of 8 text layers at once`\n" in text


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


def test_an_adapters_card_names_its_rank_and_base_and_loads_by_peft(tiny):
    entries = [{"stage": "kv_cut", "input": "ckpt/a"}, {"stage": "lora", "input": "ckpt/mqa"}]
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    text = model_card(config, statistics(tiny("llama")), entries, adapter={"r": 32, "lora_alpha": 64})
    assert ModelCard(text).data.library_name == "peft" and "lora" in ModelCard(text).data.tags
    assert "Rank `32`, alpha `64`, for `ckpt/mqa`" in text
    assert [row[1] for row in stage_rows(text)] == ["`kv_cut`", "`lora`"]
    assert 'PeftModel.from_pretrained(base, "this/folder")' in text and "AutoModelForCausalLM" in text


@pytest.mark.parametrize("junk", [7, "x", [1], [[]], {"a": {"b": [None]}}, True, None, 1e400])
def test_a_history_of_the_wrong_shape_still_makes_a_card(junk, tiny):
    keys = [
        "stage",
        "input",
        "removed",
        "metrics",
        "warnings",
        "parameters",
        "parameters_by_component_before",
        "time",
    ]
    entries = [
        dict.fromkeys(keys, junk),
        {"removed": {"taps": junk, "text": junk}, "metrics": {"loss": junk}},
    ]
    text = model_card({"model_type": "llama"}, statistics(tiny("llama")), entries, adapter={"r": junk})
    assert len(stage_rows(text)) == 2
