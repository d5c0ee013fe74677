"""Whether teacher, adapter and targets go with the model."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import EMBEDDED
from safetensors.numpy import save_file

from prunekit.checkpoint import layer_numbers, open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.training.preflight import check_adapter, check_targets, check_teacher, open_here


def change_json(file: Path, change) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def teacher_of(own, family: str, change=lambda tokenizer: None):
    folder = own(family)
    if not (folder / "tokenizer.json").exists():
        shutil.copy(EMBEDDED / "tokenizer.json", folder)
    change_json(folder / "tokenizer.json", change)
    return open_checkpoint(folder)


@pytest.fixture
def student(tmp_path, tiny):
    folder = shutil.copytree(tiny("qwen3"), tmp_path / "student")
    shutil.copy(EMBEDDED / "tokenizer.json", folder)
    return open_checkpoint(folder)


def swap(tokenizer):
    vocabulary = tokenizer["model"]["vocab"]
    first, second, *_ = vocabulary
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def test_a_teacher_with_other_words_by_the_same_numbers_is_refused(student, own):
    check_teacher(student, teacher_of(own, "llama", lambda tokenizer: None))
    with pytest.raises(PruneKitError, match=r"own-qwen3: another vocabulary .*: token \d+ is .*, not .*"):
        check_teacher(student, teacher_of(own, "qwen3", swap))


def test_a_teacher_that_knows_more_tokens_behind_the_students_passes(student, own):
    more = {"id": 5000, "content": "<think>"}
    check_teacher(student, teacher_of(own, "llama", lambda tokenizer: tokenizer["added_tokens"].append(more)))


def test_a_teacher_without_a_tokenizer_needs_as_large_a_vocabulary(student, own):
    teacher = own("llama")
    (teacher / "tokenizer.json").unlink(missing_ok=True)
    teacher = open_checkpoint(teacher)
    check_teacher(student, replace(teacher, config=teacher.config | {"vocab_size": student.config["vocab_size"]}))
    with pytest.raises(PruneKitError, match="own-llama: a vocabulary of 7 tokens"):
        check_teacher(student, replace(teacher, config=teacher.config | {"vocab_size": 7}))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": ["a"]}}'])
def test_a_tokenizer_that_cannot_be_read_is_a_users_error(student, own, content):
    teacher = own("qwen3")
    (teacher / "tokenizer.json").write_text(content)
    with pytest.raises(PruneKitError, match="tokenizer.json: "):
        check_teacher(student, open_checkpoint(teacher))


def test_a_teacher_must_see_as_its_student_does(tiny, own):
    student, same = open_checkpoint(tiny("qwen3_vl")), tiny("qwen3_vl_moe")
    check_teacher(student, open_checkpoint(same))
    blind = own("qwen3")
    change_json(
        blind / "config.json",
        lambda config: config.update(vocab_size=student.config["text_config"]["vocab_size"]),
    )
    with pytest.raises(PruneKitError, match="own-qwen3: sees no images"):
        check_teacher(student, open_checkpoint(blind))
    other = own("qwen3_vl")
    change_json(other / "config.json", lambda config: config["vision_config"].update(patch_size=7))
    with pytest.raises(PruneKitError, match="own-qwen3_vl: cuts images by patch_size 7"):
        check_teacher(student, open_checkpoint(other))


@pytest.fixture
def adapter(tmp_path):
    """adapter(name=shape, ...): a LoRA adapter with these matrices."""

    def write(matrices: dict[str, tuple[int, ...]], config='{"peft_type": "LORA"}') -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(config)
        tensors = {f"base_model.model.{name}.weight": np.zeros(shape, "f4") for name, shape in matrices.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return write


def fitting(base, layer: int = 0) -> dict[str, tuple[int, int]]:
    name = f"model.layers.{layer}.self_attn.q_proj"
    outputs, inputs = base.tensors[f"{name}.weight"].shape
    return {f"{name}.lora_A": (4, inputs), f"{name}.lora_B": (outputs, 4)}


def test_an_adapter_of_this_base_passes(tiny, adapter):
    base = open_checkpoint(tiny("qwen3"))
    check_adapter(adapter(fitting(base)), base)


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_an_adapter_of_another_width_is_refused(tiny, adapter, side):
    base = open_checkpoint(tiny("qwen3"))
    matrices = {name: (shape[0] + 1, shape[1] + 1) for name, shape in fitting(base).items() if side in name}
    with pytest.raises(
        PruneKitError, match=r"adapter: trained for model.layers.0.self_attn.q_proj of \d+ (in|out)puts"
    ):
        check_adapter(adapter(matrices), base)


def test_an_adapter_for_layers_that_are_gone_is_refused(tiny, adapter):
    base = open_checkpoint(tiny("qwen3"))
    last = len(layer_numbers(base, "text"))
    matrices = {name.replace(".0.", f".{last}."): shape for name, shape in fitting(base).items()}
    with pytest.raises(PruneKitError, match=rf"adapter: trained for text layer {last}, of which .* has {last}"):
        check_adapter(adapter(matrices), base)


def test_an_adapter_of_gpt2_whose_weights_lie_the_other_way_round_passes(tiny, adapter):
    base = open_checkpoint(tiny("gpt2"))
    [(name, tensor)] = [item for item in base.tensors.items() if re.search(r"\b0\.attn\.c_attn\.weight", item[0])]
    inputs, outputs = tensor.shape
    module = name.removesuffix(".weight")
    check_adapter(adapter({f"{module}.lora_A": (4, inputs), f"{module}.lora_B": (outputs, 4)}), base)


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj"], ["self_attn.q_proj"], ["nonesuch", "v_proj"]], ids=str)
def test_targets_that_are_there_pass(tiny, targets):
    check_targets(targets, open_checkpoint(tiny("qwen3")))


@pytest.mark.parametrize("targets", [["q_proj,v_proj"], ["proj"], ["layers"], ["model.q_proj"]], ids=str)
def test_targets_of_which_none_is_there_are_refused(tiny, targets):
    with pytest.raises(PruneKitError, match=r"--target_modules .*has no such module: .*like q_proj k_proj"):
        check_targets(targets, open_checkpoint(tiny("qwen3")))


@pytest.mark.parametrize("config", ["", "[]", "{}", '{"peft_type": 3}', "{"])
def test_an_adapter_without_a_config_is_refused(tiny, adapter, config):
    with pytest.raises(PruneKitError, match="adapter_config.json"):
        check_adapter(adapter({}, config), open_checkpoint(tiny("qwen3")))


@pytest.mark.parametrize("damage", ["missing", "empty", "torn", "no tensors"])
def test_an_adapter_with_damaged_weights_is_refused(tiny, adapter, damage):
    base = open_checkpoint(tiny("qwen3"))
    folder = adapter({} if damage == "no tensors" else fitting(base))
    weights = folder / "adapter_model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage != "no tensors":
        weights.write_bytes(b"" if damage == "empty" else weights.read_bytes()[:-5])
    with pytest.raises(PruneKitError, match="adapter_model.safetensors"):
        check_adapter(folder, base)


def test_a_hubs_name_is_refused_and_its_folder_in_the_cache_named(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prunekit.checkpoint.folder._from_hub_cache", lambda name: tiny("qwen3"))
    with pytest.raises(PruneKitError, match=f"org/model: ms-swift would fetch it .*give its folder, {tiny('qwen3')}"):
        open_here(Path("org/model"))
