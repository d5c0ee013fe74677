"""A checkpoint in a folder of any name is taught with the chat template that it was trained with."""

import contextlib
import json

import pytest
from helpers.bad_input import run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prunekit.checkpoint import open_checkpoint
from prunekit.data.templates import find_template, load_template
from prunekit.errors import PruneKitError
from prunekit.msswift.extend import load_plugins

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
ASSISTANT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
HYBRID = CHATML.replace("m.content", "('<think>\n\n</think>\n\n' if m.role == 'assistant' else '') + m.content")
HYBRID += ASSISTANT + "{% if add_generation_prompt and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
THINKING = CHATML + ASSISTANT.replace("assistant\n", "assistant\n<think>\n")
SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
HEADERS = (
    "<|begin_of_text|>{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content"
    " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}"
)

INST = "<s>{% for m in messages %}{{ ' [/INST] ' if m.role == 'assistant' else '[INST] ' }}{{ m.content }}{% endfor %}"


@pytest.fixture
def chatting(tiny, tmp_path):
    """chatting(family, chat_template, name) is a copy of a tiny checkpoint with a tokenizer that has this template."""

    def make(family, chat_template, name="pruned"):
        folder = tmp_path / name
        folder.mkdir()
        for file in tiny(family).iterdir():
            (folder / file.name).symlink_to(file)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<s>"]
        trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        tokenizer.train_from_iterator(["a chat"], trainer)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
        fast.chat_template = chat_template
        fast.save_pretrained(folder)
        return folder

    return make


def preflight(folder):
    """What preflight says: (exit code, template, messages)."""
    code, out, err = run(
        "prunekit.training.preflight", "--model", folder, "--out", folder.parent / "out", within=contextlib.nullcontext
    )
    answers = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
    return code, answers.get("TEMPLATE"), err


@pytest.mark.parametrize(
    "family, chat_template, name",
    [
        ("qwen3", HYBRID, "qwen3"),
        ("qwen3", CHATML + ASSISTANT, "qwen3_nothinking"),
        ("qwen3", THINKING, "qwen3_thinking"),
        ("qwen2", SYSTEM + CHATML + ASSISTANT, "qwen2_5"),
        ("llama", HEADERS, "llama3"),
        ("llama", CHATML + ASSISTANT, "chatml"),
        ("mistral", CHATML + ASSISTANT, "chatml"),
        ("mixtral", CHATML + ASSISTANT, "chatml"),
        ("gemma3_text", CHATML + ASSISTANT, "chatml"),
    ],
)  # fmt: skip
def test_the_template_is_the_one_that_writes_as_the_checkpoints_own(family, chat_template, name, chatting, capsys):
    assert find_template(open_checkpoint(chatting(family, chat_template))) == name
    assert f"chat template {name}, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("chat_template", "name", "answer"),
    [(HYBRID, "qwen3", "5."), (THINKING, "qwen3_thinking", "<think>\n5.")],
)
def test_what_a_template_says_before_an_answer_is_no_part_of_it(chatting, chat_template, name, answer):
    load_plugins()
    template = load_template(open_checkpoint(chatting("qwen3", chat_template)), 100)
    assert template.template_meta.template_type == name
    assert template.decode_generate_ids(template.tokenizer.encode("5.")) == answer, "thoughts begin with it"


def test_preflight_answers_with_it(chatting):
    code, found, said = preflight(chatting("qwen3", CHATML + ASSISTANT))
    assert (code, found) == (0, "qwen3_nothinking"), said
    assert "chat template qwen3_nothinking, " in said


def test_what_the_training_said_comes_before_what_looks_alike(chatting):
    folder = chatting("qwen3", HYBRID)
    (folder / "args.json").write_text(json.dumps({"template": "qwen3_thinking"}))
    assert preflight(folder)[:2] == (0, "qwen3_thinking")


def test_a_template_of_a_plugin_that_is_not_here_is_named_with_the_mend(chatting):
    folder = chatting("qwen3", HYBRID)
    (folder / "args.json").write_text(json.dumps({"template": "of_a_plugin"}))
    with pytest.raises(PruneKitError, match="the template in its args.json is none .* choose one by --template"):
        load_template(open_checkpoint(folder), 64)


def test_a_name_of_the_hub_is_left_to_swift(chatting):
    assert find_template(open_checkpoint(chatting("qwen3", HYBRID, "Qwen3-8B"))) is None


@pytest.mark.parametrize("chat_template", [INST, HEADERS], ids=["without its system message", "like none"])
def test_where_swift_has_one_alone_it_is_taken_and_a_checkpoint_that_writes_otherwise_warned_of(
    chat_template, chatting, capsys
):
    assert find_template(open_checkpoint(chatting("mistral", chat_template))) == "llama"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("warning: ") and "chat template llama, " in said[0] and "as it was taught" in said[0]


def test_where_swift_has_one_alone_and_the_checkpoint_none_it_is_left_to_swift(chatting, capsys):
    assert find_template(open_checkpoint(chatting("mistral", None))) is None
    assert not capsys.readouterr().err


def test_of_texts_no_template_is_warned_of(chatting, capsys):
    assert find_template(open_checkpoint(chatting("mistral", INST)), chat=False) == "llama"
    assert not capsys.readouterr().err.startswith("warning: ")


def test_a_template_that_cant_be_told_is_asked_for_in_one_line(chatting):
    code, _, said = preflight(chatting("llama", None))
    assert code == 2
    assert (
        "has no chat template, and ms-swift several" in said.splitlines()[-1] and "TEMPLATE=" in said.splitlines()[-1]
    )


def test_a_template_that_fails_is_named_with_those_to_choose_from(chatting):
    with pytest.raises(PruneKitError, match="its chat template fails.*TEMPLATE=") as refused:
        find_template(open_checkpoint(chatting("llama", "{{ raise_exception('no') }}")))
    assert len(str(refused.value).splitlines()) == 1


def test_architectures_of_one_template_are_those_that_swift_has_one_for():
    from swift.model import MODEL_MAPPING

    from prunekit.families import FAMILIES

    known = {name: MODEL_MAPPING[name] for name, row in FAMILIES.items() if row.one_template and name in MODEL_MAPPING}
    assert {"qwen3_vl", "qwen3_vl_moe"} <= known.keys()
    for name, meta in known.items():
        assert meta.template or len(meta.candidate_templates) == 1, name
