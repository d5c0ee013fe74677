"""Plain texts as blocks of tokens, by ms-swift's own template."""

import math

import pytest
from helpers.tiny_words import save_speaking
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.training.texts import Blocks, into_blocks

TEXTS = [{"text": f"the {'quick ' * n}fox"} for n in range(12)]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=9), max_size=9), st.integers(1, 12))
def test_blocks_are_the_texts_one_behind_the_other_and_all_but_the_last_are_full(texts, length):
    blocks, ids = into_blocks(texts, length), [token for text in texts for token in text]
    assert all(len(block) == length for block in blocks[:-1]) and all(len(block) > 1 for block in blocks)
    if length > 1:
        flat = [token for block in blocks for token in block]
        assert flat == ids[: len(flat)] and len(ids) - len(flat) <= 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_of_ms_swifts_template_blocks_have_each_text_and_its_end_and_every_label_but_a_first(family, tmp_path):
    from transformers import AutoTokenizer

    from prunekit.msswift.extend import load_plugins

    load_plugins()
    from swift import get_processor, get_template

    folder = save_speaking(family, tmp_path / family)
    template = get_template(
        get_processor(str(folder), model_type=family), max_length=8, template_type="default", use_chat_template=False,
        truncation_strategy="split", loss_scale="all",
    )  # fmt: skip
    template.set_mode("train")
    # As ms-swift reads rows {"text": ..., "prompt": ...}: what is no text isn't learned
    rows = [[{"role": "user", "content": "a prompt"}, {"role": "assistant", "content": row["text"]}] for row in TEXTS]
    found = Blocks(template=template).batched_preprocess({"messages": rows}, strict=True, ignore_max_length_error=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [token for row in TEXTS for token in [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]]
    blocks = found["input_ids"]
    assert [token for block in blocks for token in block] in (ids, ids[:-1])
    assert found["labels"] == [[-100, *block[1:]] for block in blocks]
    assert found["lengths"] == [[len(block)] for block in blocks] and len(blocks[0]) == 8


def test_an_evaluations_loss_is_logged_as_perplexity_too(monkeypatch):
    from prunekit.training.texts_trainer import Seq2SeqTrainer, TextsTrainer

    logged = []
    monkeypatch.setattr(Seq2SeqTrainer, "log", lambda _, logs: logged.append(logs))
    for logs in ({"loss": 3.0}, {"eval_loss": 2.0}, {"eval_loss": 1e6}):
        TextsTrainer.log(object.__new__(TextsTrainer), logs)
    assert logged[:2] == [{"loss": 3.0}, {"eval_loss": 2.0, "eval_perplexity": math.exp(2)}]
    assert math.isfinite(logged[2]["eval_perplexity"])
