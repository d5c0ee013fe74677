"""LoRA on a sparse model: what was trained is what is merged, and the base's zeros are in both."""

import copy

import pytest
import torch
from helpers.sparse_trainings import rows, sparse, trainer_of, zeros_of
from helpers.tiny_models import load
from peft import LoraConfig, PeftModel, get_peft_model

from prunekit.checkpoint import append_history, history, write_json
from prunekit.checkpoint.provenance import model_record
from prunekit.errors import PruneKitError
from prunekit.training import publish as publishing
from prunekit.training.zeros import MASKS, KeepZeros
from prunekit.training.zeros_lora import mask_lora

pytestmark = pytest.mark.usefixtures("plain_trainer")

TARGETS = {"llama": "all-linear", "gpt2": ["c_attn", "c_proj", "c_fc"]}


def adapted(family: str, **settings) -> PeftModel:
    base = sparse(family)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS[family], init_lora_weights=False, **settings)
    return get_peft_model(base, config)


@torch.no_grad()
def outputs(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.stack([row["input_ids"] for row in rows(4)])).logits


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


@pytest.mark.parametrize("family", TARGETS)
def test_what_was_trained_is_what_is_merged_and_published(family, tmp_path, monkeypatch, capsys):
    base = sparse(family)
    base.save_pretrained(tmp_path / "base")
    zeros = zeros_of(base)
    append_history(tmp_path / "base", {"stage": "sparsify", "sparsity": {"sparsity": 0.5, "tensors": {}}})
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS[family]))
    trainer_of(tmp_path / "run", KeepZeros(), model=model).train()
    assert "zeros of the base are kept by its adapters" in capsys.readouterr().out
    assert not list((tmp_path / "run").rglob(MASKS)), "the base, which doesn't change, has them"
    model.save_pretrained(tmp_path / "adapter")
    trained = outputs(model)
    assert not same(trained, outputs(load(tmp_path / "base"))), "it has learned something"
    merged = copy.deepcopy(model).merge_and_unload()
    assert same(outputs(merged), trained)
    assert all(torch.equal((weight == 0) & zeros[n], zeros[n]) for n, weight in merged.named_parameters() if n in zeros)

    # By way of plain peft, as ms-swift merges: publishing puts the zeros back, or says that they are gone
    plain = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").merge_and_unload()
    assert not same(outputs(plain), trained)
    plain.save_pretrained(tmp_path / "weights")
    made_from = {"model": [model_record(tmp_path / "base")], "adapters": [{"path": str(tmp_path / "adapter")}]}
    write_json(tmp_path / "run/made_from.json", made_from)
    line = ["publish", "--run", "run", "--weights", "weights", "--base", "base", "--stage", "export_lora", "--out"]
    monkeypatch.chdir(tmp_path)
    for out, callbacks in (("plain", []), ("kept", ["keep_zeros"])):
        append_history("adapter", {"stage": "lora", "settings": {"callbacks": callbacks}})
        monkeypatch.setattr("sys.argv", [*line, out])
        publishing.main()
        assert ("fills zeros" in capsys.readouterr().err) == (out == "plain")
    assert same(outputs(load("plain")), outputs(plain))
    kept = load("kept")
    assert same(outputs(kept), trained) and history("kept")[-1]["settings"]["keep_zeros"] is True
    found = zeros_of(kept)
    assert all(torch.equal(found[name] & mask, mask) for name, mask in zeros.items())


def test_an_adapter_that_is_merged_for_a_while_comes_out_as_it_was():
    model = adapted("llama")
    assert mask_lora(model) == mask_lora(model) == sum(int(mask.sum()) for mask in zeros_of(model.base_model).values())
    before, answer = copy.deepcopy(model.state_dict()), outputs(model)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert same(outputs(model), answer)
        model.unmerge_adapter()
        assert all(torch.allclose(value, before[name], atol=1e-6) for name, value in model.state_dict().items())


def test_dora_and_quantised_weights_are_refused():
    with pytest.raises(PruneKitError, match="keep_zeros takes plain LoRA"):
        mask_lora(adapted("llama", use_dora=True))
    model = adapted("llama")
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    layer.weight = torch.nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(PruneKitError, match=r"layers\.0\.mlp\.up_proj: keep_zeros takes plain LoRA"):
        mask_lora(model)
