"""What travels with weights: side files, the history."""

import json

import pytest
from helpers.checkpoints import copy_whole
from helpers.tiny_words import train
from transformers import PreTrainedTokenizerFast

from prunekit.checkpoint import HISTORY, append_history, history, history_entry, statistics
from prunekit.checkpoint.records import RECORDS
from prunekit.errors import PruneKitError


def test_side_files_travel_and_a_trainers_traces_do_not(own, tmp_path):
    folder = own("llama")
    kept = [
        "tokenizer.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "merges.txt",
        "generation_config.json",
    ]
    left = ["optimizer.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json", "README.md", ".hidden",
            "latest", "zero_to_fp32.py", "zero_to_torch.py", "args.json", "logging.jsonl", "command.sh", "curves.png",
             "heads.png", "pytorch_model.bin.index.json", "params.json",
            "rust_model.ot", "64.tflite", "model.onnx_data"]  # fmt: skip
    for name in kept + left:
        (folder / name).write_text("{}")
    (folder / "global_step3").mkdir()
    out = copy_whole(folder, tmp_path / "out")
    assert {file.name for file in out.iterdir()} == {
        *kept,
        "config.json",
        "model.safetensors",
        HISTORY,
        "README.md",
    }


def test_chat_templates_that_have_names_travel_too(own, tmp_path):
    """As transformers saves them: the default one in the folder, the others in a folder of their own."""
    folder, templates = own("llama"), {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train("bytes"), chat_template=templates)
    tokenizer.save_pretrained(folder)
    assert (folder / "additional_chat_templates").is_dir()
    out = copy_whole(copy_whole(folder, tmp_path / "one"), tmp_path / "two")
    assert PreTrainedTokenizerFast.from_pretrained(out).chat_template == templates


def test_history_grows_by_one_entry_a_stage(tiny, tmp_path):
    copy_whole(copy_whole(tiny("llama"), tmp_path / "one"), tmp_path / "two")
    append_history(tmp_path / "two", {"stage": "more"})
    assert [e["stage"] for e in history(tmp_path / "two")] == ["copy", "copy", "more"]


def test_a_history_entry_says_what_changed_and_with_what(tiny):
    numbers = statistics(tiny("llama"))
    entry = history_entry("x", tiny("llama"), numbers, numbers | {"parameters": 1}, metrics={"a": 1})
    assert (entry["parameters_before"], entry["parameters"]) == (numbers["parameters"], 1)
    assert {"prunekit", "torch", "transformers", "ms-swift"} <= entry["versions"].keys()
    json.dumps(entry)


@pytest.mark.parametrize("content", ["[]", '{"history": 1}', '{"history": [1]}'])
def test_a_damaged_history_is_refused_before_anything_is_written(content, own, tmp_path):
    folder = own("llama")
    (folder / HISTORY).write_text(content)
    with pytest.raises(PruneKitError, match="pruning_info.json: .* not an? (?:list|object); mend it"):
        copy_whole(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", RECORDS)
def test_no_record_of_a_stage_is_carried_into_the_next_ones_folder(tiny, tmp_path, name):
    source = copy_whole(tiny("llama"), tmp_path / "source")
    for file in (name, "notes.txt"):
        (source / file).write_text("of this stage")
    found = copy_whole(source, tmp_path / "out")
    assert not (found / name).exists() and (found / "notes.txt").exists()


def test_what_sentence_transformers_puts_behind_a_model_travels(own, tmp_path):
    folder = own("bert")
    (folder / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Normalize"}, {"path": 3}]')
    for name in ("1_Pooling/config.json", "onnx/model.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    out = copy_whole(copy_whole(folder, tmp_path / "one"), tmp_path / "two")
    assert (out / "1_Pooling/config.json").is_file() and not (out / "onnx").exists()
