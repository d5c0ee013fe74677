"""The embedded model reads, and its data are what they claim to be."""

import json
import string

import numpy as np
import pytest
import torch
from helpers.paths import EMBEDDED
from helpers.tiny_ocr import tiny_ocr
from PIL import Image
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from prunekit.errors import PruneKitError


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(EMBEDDED)


@pytest.fixture(scope="module")
def model():
    return Qwen3VLForConditionalGeneration.from_pretrained(EMBEDDED, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def held_out():
    """100 held-out words and their pictures."""
    words = tiny_ocr._words("test", 0, frozenset())
    return words[:100], tiny_ocr.pictures("test", words, 0, 0)[:100]


def test_the_model_is_a_qwen3_vl_with_gqa_qk_norm_and_deepstack():
    config = json.loads((EMBEDDED / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    assert config["model_type"] == "qwen3_vl"
    assert text["num_key_value_heads"] >= 4 and text["num_hidden_layers"] == 8 and vision["depth"] >= 6
    assert text["head_dim"] != text["hidden_size"] // text["num_attention_heads"]
    assert len(vision["deepstack_visual_indexes"]) == 3


def test_the_weights_are_bf16_safetensors_of_at_most_8_mb():
    from prunekit.checkpoint import open_checkpoint

    assert {tensor.dtype for tensor in open_checkpoint(EMBEDDED).tensors.values()} == {"BF16"}
    assert sum(file.stat().st_size for file in EMBEDDED.iterdir()) <= 8e6


def test_the_model_reads_held_out_words_by_generation(model, processor, held_out):
    words, pictures = held_out
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": tiny_ocr.PROMPT}]}]
    prompt = processor.apply_chat_template(message, add_generation_prompt=True)
    images = [Image.fromarray(picture) for picture in pictures]
    inputs = processor(text=[prompt] * len(words), images=images, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answers = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(answer.strip() == word for answer, word in zip(answers, words, strict=True))
    assert right >= 93  # 97% of all 1000; three standard deviations below on these 100


def test_training_inputs_are_what_the_processor_makes(model, processor, held_out):
    words, pictures = held_out
    batch = tiny_ocr.Batches(processor, model)(words[:2], pictures[:2])
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": tiny_ocr.PROMPT}]}]
    prompt = processor.apply_chat_template(message, add_generation_prompt=True)
    texts = [f"{prompt}{word}<|im_end|>\n" for word in words[:2]]
    images = [Image.fromarray(picture) for picture in pictures[:2]]
    encoded = processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="right")
    torch.testing.assert_close(batch["pixel_values"], encoded["pixel_values"])
    for row in range(2):
        length = int(encoded["attention_mask"][row].sum())
        assert batch["input_ids"][row, :length].tolist() == encoded["input_ids"][row, :length].tolist()
    positions, _ = model.model.get_rope_index(
        encoded["input_ids"],
        encoded["mm_token_type_ids"],
        image_grid_thw=encoded["image_grid_thw"],
        attention_mask=encoded["attention_mask"],
    )
    mask = encoded["attention_mask"].bool().expand(3, -1, -1)
    assert torch.equal(batch["position_ids"][mask], positions[mask])


def test_data_are_the_same_every_time(monkeypatch, tmp_path):
    small = {name: (3, *rest) for name, (_, *rest) in tiny_ocr.DATASETS.items()}
    monkeypatch.setattr(tiny_ocr, "DATASETS", small)
    for name in ("one", "two"):
        tiny_ocr.make_data(tmp_path / name, seed=0)
    for file in sorted((tmp_path / "one" / "images").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / "images" / file.name).read_bytes()
    rows = [(tmp_path / name / "rl_train.jsonl").read_text().replace(name, "") for name in ("one", "two")]
    assert rows[0] == rows[1]


def test_a_share_of_the_data_is_their_beginning(monkeypatch, tmp_path):
    small = {name: (4, *rest) for name, (_, *rest) in tiny_ocr.DATASETS.items()}
    monkeypatch.setattr(tiny_ocr, "DATASETS", small)
    tiny_ocr.make_data(tmp_path / "whole", seed=0)
    tiny_ocr.make_data(tmp_path / "part", seed=0, part=0.5)
    whole, part = (
        [json.loads(row) for row in (tmp_path / name / "val.jsonl").read_text().splitlines()]
        for name in ("whole", "part")
    )
    assert [row["solution"] for row in part] == [row["solution"] for row in whole[:2]]
    images = sorted((tmp_path / "part" / "images").iterdir())
    assert len(images) == 2 * len(small)
    for file in images:
        assert file.read_bytes() == (tmp_path / "whole" / "images" / file.name).read_bytes()


def test_a_training_that_couldnt_be_written_is_refused_before_it_begins(monkeypatch, tmp_path):
    (tmp_path / "notes.txt").touch()
    monkeypatch.setattr(tiny_ocr, "build_processor", lambda: pytest.fail("it has begun"))
    with pytest.raises(PruneKitError, match="isn't overwritten"):
        tiny_ocr.train(tmp_path, steps=1, batch_size=1, seed=0, overwrite=True)


def test_no_training_word_is_held_out():
    banned = tiny_ocr.held_out_words(0)
    for name in tiny_ocr.DATASETS.keys() - set(tiny_ocr.HELD_OUT):
        assert not banned.intersection(tiny_ocr._words(name, 0, banned))


def test_cyrillic_words_have_a_script_of_their_own():
    for word in tiny_ocr._words("cyrillic_val", 0, frozenset()):
        assert not set(word) & set(string.printable)
        assert sum(letter not in tiny_ocr.LOOKALIKES for letter in word) * 2 >= len(word)


@pytest.mark.parametrize("look", [tiny_ocr.PLAIN, tiny_ocr.HARD])
def test_every_word_fits_its_picture(look):
    rng = np.random.default_rng(0)
    for _ in range(50):
        word = tiny_ocr.make_word(rng, "latin", (9, 9))
        picture = tiny_ocr.render(rng, word, tiny_ocr.replace(look, noise=0.0, rotation=0.0)).astype(int)
        edges = np.concatenate([picture[:, 0], picture[:, -1]])
        assert np.ptp(edges) == 0
