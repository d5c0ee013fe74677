"""LoRA on encoders, for tokens and for texts: little is trained, and what is written is plain and computes the same."""

import json

import pytest
import torch
import transformers as hf
from helpers.cuts import drop_layers
from helpers.tiny_models import load
from helpers.tiny_taggers import QUICK, save_tagger, write_rows
from safetensors.torch import load_file

from prunekit.checkpoint import history, open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.ner import evaluate
from prunekit.tagger.lora import add_lora, head_modules, linear_layers
from prunekit.tagger.rows import TEXT_CLASSIFIER, load_tokenizer, read_rows
from prunekit.tagger.texts import TextData, classes_of, read_labelled
from prunekit.tagger.train import load_classifier

pytestmark = pytest.mark.usefixtures("plain_trainer")

LORA = ("--lora-rank", 4, "--max_steps", 4, "--learning_rate", 1e-2)


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """Texts whose label is said by one of their words."""
    file = tmp_path_factory.mktemp("reviews") / "reviews.jsonl"
    rows = [(f"it is {'ab' * (n % 4)} {word}", word) for n in range(24) for word in ("good", "bad", "zzz")]
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return file


@pytest.mark.parametrize("family", ["bert", "camembert", "distilbert"])
def test_a_lora_on_a_pruned_tagger_is_merged_into_a_plain_folder(family, tagger, tmp_path, ner_run):
    rows = write_rows(tmp_path / "rows.jsonl", 32)
    base = drop_layers(tagger(family), tmp_path / "base")
    ner_run("--model", base, "--out", tmp_path / "out", "--dataset", rows, "--val-dataset", rows, *LORA, *QUICK)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    within = open_checkpoint(base).family.text.within
    assert {name.rpartition(".")[0] for name in changed if within(name)} == set(
        linear_layers(load(base), open_checkpoint(base))
    )
    assert {name.partition(".")[0] for name in changed if not within(name)} == {"classifier"}
    entry = history(tmp_path / "out")[-1]
    assert entry["metrics"]["f1"] == pytest.approx(evaluate(tmp_path / "out", read_rows(rows))["f1"])
    assert entry["settings"]["lora_rank"] == 4
    assert entry["settings"]["label_counts"]["O"] == sum(row.tags.count("O") for row in read_rows(rows))
    difference = after["classifier.weight"] - before["classifier.weight"]
    assert difference.abs().max() > 0
    assert not (tmp_path / "out.run").exists() and not list((tmp_path / "out").glob("adapter*"))


@pytest.mark.parametrize("family", ["bert", "camembert", "distilbert"])
def test_a_lora_computes_the_same_until_it_is_trained_and_is_of_its_rank(family, tagger):
    checkpoint = open_checkpoint(tagger(family))
    model = load(tagger(family))
    with torch.inference_mode():
        ids = torch.tensor([[2, 7, 9, 3]])
        before = model(input_ids=ids).logits
        model = add_lora(model, checkpoint, 3, 6).eval()
        assert torch.equal(model(input_ids=ids).logits, before)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    lora = [value.shape for name, value in trained.items() if "lora_" in name]
    assert len(lora) == 2 * 3 * 6 and all(3 in shape for shape in lora)  # A and B, of 3 layers with 6 projections each
    assert {name.split(".")[2] for name in trained if "lora_" not in name} == {"classifier"}


@pytest.mark.parametrize("family", ["bert", "camembert", "distilbert"])
def test_texts_are_classified_by_a_new_head_on_a_pruned_encoder(family, tagger, reviews, tmp_path, ner_run):
    base = drop_layers(tagger(family), tmp_path / "base")
    ner_run("--model", base, "--out", tmp_path / "out", "--task", "text-classification", "--new-head", "--dataset",
            reviews, "--val-dataset", reviews, *LORA, *QUICK)  # fmt: skip
    model = load(tmp_path / "out")
    assert type(model).__name__.endswith(TEXT_CLASSIFIER)
    assert model.config.id2label == {0: "bad", 1: "good", 2: "zzz"}
    tokenizer, texts = load_tokenizer(tmp_path / "out"), read_labelled(reviews)
    data = TextData.encoded(texts, tokenizer, classes_of(texts), 64)
    with torch.inference_mode():
        said = [int(model(torch.tensor([feature["input_ids"]])).logits.argmax()) for feature in data.features]
    metrics = history(tmp_path / "out")[-1]["metrics"]
    assert metrics["accuracy"] == pytest.approx(data.scores(said)["accuracy"])
    assert history(tmp_path / "out")[-1]["settings"]["label_counts"] == {"bad": 24, "good": 24, "zzz": 24}
    if family == "bert":  # and goes on from there, the whole model, taught by itself
        out = tmp_path / "out"
        ner_run("--model", out, "--teacher", out, "--hidden-weight", 1, "--task", "text-classification", "--out",
                tmp_path / "more", "--dataset", reviews, "--max_steps", 1, *QUICK)  # fmt: skip
        load(tmp_path / "more")


def test_a_lora_learns_labels(tagger, reviews, tmp_path, ner_run):
    ner_run("--model", tagger("bert"), "--out", tmp_path / "out", "--task", "text-classification", "--new-head",
            "--dataset", reviews, "--val-dataset", reviews, "--lora-rank", 8, "--num_train_epochs", 8,
            "--learning_rate", 1e-2, *QUICK)  # fmt: skip
    assert history(tmp_path / "out")[-1]["metrics"]["accuracy"] > 0.9


def test_a_pooler_that_is_new_is_trained_with_the_head(tmp_path):
    save_tagger("bert", tmp_path / "bert")  # of tokens: has no pooler
    checkpoint = open_checkpoint(tmp_path / "bert")
    model = load_classifier(checkpoint, {0: "a", 1: "b"}, True, TEXT_CLASSIFIER)
    assert head_modules(model) == ["bert.pooler", "classifier"]
    roberta = hf.RobertaForSequenceClassification(hf.RobertaConfig(hidden_size=32, num_hidden_layers=1,
              num_attention_heads=4, intermediate_size=48, vocab_size=64))  # fmt: skip
    assert head_modules(roberta) == ["classifier"]


def test_scores_of_texts_are_those_of_a_case_worked_by_hand():
    data = TextData([{"labels": 0}, {"labels": 0}, {"labels": 1}, {"labels": 1}], {0: "a", 1: "b", 2: "c"})
    scores = data.scores([0, 1, 1, 1])
    assert scores["accuracy"] == 0.75
    assert scores["f1"] == pytest.approx((2 / 3 + 0.8) / 2)  # no text is of c, and none is said to be
    assert scores["entities"]["b"] == {"precision": pytest.approx(2 / 3), "recall": 1.0, "f1": 0.8, "support": 2}
    assert data.scores([0, 0, 1, 1])["accuracy"] == data.scores([0, 0, 1, 1])["f1"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        (["--lora-alpha", 4], None, "--lora-alpha is of a LoRA"),
        (["--lora-rank", 4, "--keep-zeros"], None, "--keep-zeros: merging a LoRA fills zeros"),
        (["--task", "text-classification"], None, "no text classifier; train it with ner_run.py --new-head"),
        (["--task", "text-classification", "--new-head"], '{"text": "a", "label": "x"}', "all rows have the label 'x'"),
        (["--task", "text-classification", "--new-head"], '{"text": "a", "label": 1}', 'line 1: needs "text" and'),
        (["--task", "text-classification", "--new-head"], '{"text": "\\ud800", "label": "x"}', "line 1 is not UTF-8"),
        (["--task", "text-classification", "--new-head"], "", "is empty"),
    ],
)
def test_what_cant_be_is_refused_and_nothing_is_left(arguments, content, message, tagger, reviews, tmp_path, ner_run):
    file = tmp_path / "rows.jsonl"
    file.write_text(reviews.read_text() if content is None else content)
    with pytest.raises(PruneKitError, match=message):
        ner_run("--model", tagger("bert"), "--out", tmp_path / "out", "--dataset", file, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
