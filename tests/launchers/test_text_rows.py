"""Launchers know texts from messages by their rows, and mixed ones are refused."""

import json

import pytest
from helpers.lab import check_flags, values

TEXTS = [{"text": f"the {'quick ' * n}fox"} for n in range(12)]
CHATS = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}]}]
MIXED = 'rows must all be {"text": ...}, or all have "messages"'


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("launcher", ["full_run.sh", "lora.sh"])
def test_launchers_train_on_texts_as_in_pre_training(lab, parsers, launcher):
    for name in ("train", "val"):
        write(lab.folder / f"{name}.jsonl", TEXTS)
    result = lab.run(launcher, GPUS="", STUB_FAIL_AT=1)
    [call] = lab.calls()
    argv = call["argv"]
    wanted = {
        "use_chat_template": "false",
        "loss_scale": "all",
        "truncation_strategy": "split",
        "lazy_tokenize": "false",
    }
    assert {name: values(argv, f"--{name}") for name in wanted} == {name: [value] for name, value in wanted.items()}
    assert values(argv, "--external_plugins")[-1].endswith("plugins/texts.py")
    assert values(argv, "--max_length") == ["128"], "the model's positions"
    assert "--max_length 128: the model has no more positions" in result.stderr
    check_flags(parsers["sft"], argv[1:])


@pytest.mark.parametrize(
    ("train", "val", "said"),
    [
        ([*TEXTS, *CHATS], TEXTS, f"dataset train.jsonl line 13: {MIXED}"),
        ([*CHATS, *TEXTS], CHATS, f"dataset train.jsonl line 2: {MIXED}"),
        (TEXTS, CHATS, 'train.jsonl has rows {"text": ...}, val.jsonl has messages: train and evaluate on one kind'),
        ([{"text": " "}], TEXTS, "dataset train.jsonl line 1 has no text"),
    ],
)
def test_mixed_rows_are_refused_in_one_line(lab, train, val, said):
    write(lab.folder / "train.jsonl", train)
    write(lab.folder / "val.jsonl", val)
    result = lab.run("full_run.sh", GPUS="")
    assert (result.returncode, result.stderr.count("\n"), lab.calls()) == (2, 1, [])
    assert said in result.stderr


def test_where_a_training_begins_at_questions_texts_are_refused(lab):
    write(lab.folder / "train.jsonl", TEXTS)
    result = lab.run("rl_run.sh", GPUS="", VAL_DATASET="")
    assert (result.returncode, lab.calls()) == (2, [])
    assert 'train.jsonl: rows {"text": ...} ask nothing; full_run.sh' in result.stderr
