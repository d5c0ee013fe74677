"""The picture of weights before and after: what is counted, where thresholds are, what isn't comparable."""

import pytest
import torch
from helpers.cuts import cut_width, sparsify
from helpers.tiny_models import tensors_of

from prunekit.checkpoint import open_checkpoint
from prunekit.distributions import main
from prunekit.errors import PruneKitError
from prunekit.report.distributions import BINS, weight_distributions


def parts(found, column):
    return list(found.columns[column].values())


def test_counts_are_those_of_the_weights_and_thresholds_are_where_they_went(tiny, tmp_path):
    sparsify(tiny("llama"), tmp_path / "out", sparsity=0.4)
    dense, sparse = tensors_of(tiny("llama")), tensors_of(tmp_path / "out")
    found = weight_distributions(open_checkpoint(tiny("llama")), open_checkpoint(tmp_path / "out"))
    for layer in range(5):
        part = found.columns["text, MLP"][layer]
        names = [name for name in dense if f"layers.{layer}.mlp." in name]
        old, new = (torch.cat([each[name].flatten() for name in names]) for each in (dense, sparse))
        reach = found.reach["text, MLP"]
        assert part.weights == len(old) and part.zeros_after == int((new == 0).sum())
        for counts, values in ((part.before, old), (part.after, new[new != 0])):
            assert counts.tolist() == torch.histc(values.float(), BINS, -reach, reach).tolist()
            assert 0.97 * len(values) < counts.sum() <= len(values)
    gone = [(old := dense[name].abs())[(sparse[name] == 0)].max() for name in dense if "proj" in name]
    levels = [level for column in found.columns for part in parts(found, column) for level in part.thresholds]
    assert sorted(levels) == sorted(map(float, gone)) and len(levels) == 7 * 5
    stays = min(float(values[values != 0].abs().min()) for name, values in sparse.items() if "proj" in name)
    assert max(levels) <= stays


def test_where_something_else_than_size_chose_there_is_no_threshold(tiny, tmp_path):
    sparsify(tiny("llama"), tmp_path / "out", pattern=(2, 4))
    found = weight_distributions(open_checkpoint(tiny("llama")), open_checkpoint(tmp_path / "out"))
    assert not any(part.thresholds for column in found.columns for part in parts(found, column))
    assert all(2 * part.zeros_after == part.weights for column in found.columns for part in parts(found, column))


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_moe", "gpt2", "bert", "distilbert", "gemma3_text"])
def test_all_projections_of_every_family_are_counted_once(family, tiny):
    found = weight_distributions(open_checkpoint(tiny(family)))
    stacks = {column.partition(",")[0] for column in found.columns}
    assert set(found.columns) == {f"{stack}, {part}" for stack in stacks for part in ("attention", "MLP")}
    row = open_checkpoint(tiny(family)).family
    projections = [
        values.numel()
        for name, values in tensors_of(tiny(family)).items()
        if values.dim() > 1
        and any(stack.within(name) for stack in row.stacks.values())
        and not name.endswith("mlp.gate.weight")
    ]
    assert sum(part.weights for column in found.columns for part in parts(found, column)) == sum(projections)


def test_a_narrower_model_of_the_same_layers_is_compared_too(tiny, tmp_path):
    cut_width(tiny("llama"), tmp_path / "out", neurons=24)
    found = weight_distributions(open_checkpoint(tiny("llama")), open_checkpoint(tmp_path / "out"))
    assert all(part.weights_after < part.weights and not part.gone for part in parts(found, "text, MLP"))


def test_models_of_other_layers_and_families_are_refused(tiny, pruned):
    with pytest.raises(PruneKitError, match="has other layers"):
        weight_distributions(open_checkpoint(tiny("qwen3_vl")), open_checkpoint(pruned))
    with pytest.raises(PruneKitError, match="is gpt2, .* llama"):
        weight_distributions(open_checkpoint(tiny("llama")), open_checkpoint(tiny("gpt2")))


def test_the_command_draws_one_model_what_an_amount_would_make_of_it_and_two(tiny, tmp_path, monkeypatch, capsys):
    sparsify(tiny("llama"), tmp_path / "sparse", sparsity=0.5)
    shown = []
    for words in ([], ["--sparsity", "0.5"], [tmp_path / "sparse"]):
        line = ["distributions", tiny("llama"), *words, "--out", tmp_path / "w.png"]
        monkeypatch.setattr("sys.argv", [str(word) for word in line])
        main()
        assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "w.png").unlink()
        shown.append(capsys.readouterr().out)
    assert shown[1] == shown[2] and "threshold" in shown[1] and "text, MLP: 0.0% zero\n" in shown[0]
    assert [path.name for path in tmp_path.iterdir()] == ["sparse"]
    monkeypatch.setattr("sys.argv", [*map(str, line), "--sparsity", "0.5"])
    with pytest.raises(PruneKitError, match="leave one of them out"):
        main()
