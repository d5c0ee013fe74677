"""Whatever pruning_info.json says, its readers take it or refuse it in one line."""

import json

import pytest
from helpers.bad_input import contents, put, words

HISTORY_READERS = {
    "prunekit.inspect": (),
    "prunekit.critical": (),
    "prunekit.summary": (),
    "prunekit.report.__main__": (),
    "manual_select.py": ("--text", "3", "--dry-run"),
}


@pytest.mark.parametrize("name", HISTORY_READERS)
def test_any_history_is_taken_or_refused(name, pruned, tmp_path, tries):
    [entry] = json.loads((pruned / "pruning_info.json").read_text())["history"]
    entry |= {"metrics": {"eval_token_acc": 0.5}, "settings": {"heal": "x"},
              "sparsity": {"zeros": 1, "weights": 2, "sparsity": 0.5, "of_all_parameters": 0.1,
                           "tensors": {"model.layers.0.mlp.up_proj.weight": 0.5}}}  # fmt: skip
    document = {"history": [entry]}
    for what, content in contents(document):
        put(pruned / "pruning_info.json", content)
        argv = (pruned,) if name == "prunekit.report.__main__" else words(name, pruned)
        tries.survived(what, name, *argv)
        for figure in pruned.glob("*.png"):
            figure.unlink()
    tries.check()


def test_a_history_that_is_no_list_of_entries_is_refused_before_a_cut(pruned, tmp_path, tries):
    [entry] = json.loads((pruned / "pruning_info.json").read_text())["history"]
    for key in ("removed", "parameters_by_component_before", "stage", "num_hidden_layers_before", "settings"):
        for value in ([5], "5", 5.5, {"text": "4"}, {"text": [0.5]}):
            if key == "stage" and value == "5" or key == "settings" and isinstance(value, dict):
                continue
            put(pruned / "pruning_info.json", {"history": [entry | {key: value}]})
            tries.refused(
                f"{key} = {value}", "manual_select.py", "--model", pruned, "--text", "3", "--out", tmp_path / "o"
            )
            tries.refused(f"{key} = {value}", "prunekit.critical", pruned)
    tries.check()
