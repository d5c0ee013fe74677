"""Texts are tagged alike in every format, and what is found lies where it is said to lie."""

import importlib.util
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.tiny_taggers import KINDS, save_tagger, write_rows

from prunekit.checkpoint import open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.ner import main
from prunekit.serving.deploy import deploy
from prunekit.serving.tag import Tagger, Text, log_line, read_texts
from prunekit.serving.watch import read_log
from prunekit.tagger.rows import read_rows

TEXTS = ["Ana lives in Nice, they say.", "", "  ", "é\u0301 Bo (in) Rome", "cem " * 100, "x"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tagger made by hand: a word's first letter, and nothing else, says whether it is a person or a place."""
    folder = save_tagger("bert", tmp_path_factory.mktemp("trained") / "bert", layers=1)
    import transformers

    model = transformers.AutoModelForTokenClassification.from_pretrained(folder)
    kinds = {name[0]: kind for kind, names in KINDS.items() for name in names if kind}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        table = model.bert.embeddings.word_embeddings.weight
        table.zero_()
        for parameter in (*model.bert.encoder.parameters(), *model.bert.embeddings.position_embeddings.parameters(),
                          *model.bert.embeddings.token_type_embeddings.parameters()):  # fmt: skip
            parameter.zero_()
        for name, parameter in model.bert.encoder.named_parameters():
            if name.endswith("LayerNorm.weight"):
                parameter.fill_(1)
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
        for number in range(3):
            model.classifier.weight[(0, 3, 1)[number], number] = 3.0
        for token, at in tokenizer.get_vocab().items():
            if at < len(table):
                place = ["", "PER", "LOC"].index(kinds.get(token, ""))
                table[at, place] = 1.0
                table[at, place + 10] = -1.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["checkpoint", "onnx", "onnx-int8", "torchao-int8"])
def served(request, trained, tmp_path_factory):
    if request.param == "checkpoint":
        return trained
    if request.param.startswith("torchao") and not importlib.util.find_spec("torchao"):
        pytest.skip("torchao is not installed")
    out = tmp_path_factory.mktemp("served") / request.param
    deploy(open_checkpoint(trained), out, request.param)
    return out


def ner(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["ner", *map(str, arguments)])
    return main()


def test_entities_lie_where_they_are_said_to_lie_in_every_format(served):
    first, *empty, accents, long, _ = Tagger(served).tag(list(map(Text.of, TEXTS)))
    found = [(each["label"], each["text"], each["start"], each["end"]) for each in first.entities]
    assert found == [("PER", "Ana", 0, 3), ("LOC", "Nice", 13, 17)]
    assert all(0.8 < each["score"] < 1 for each in first.entities)
    assert [each.entities for each in empty] == [[], []]
    assert [each["text"] for each in accents.entities] == ["Bo", "Rome"]
    assert len(long.labels) == 100 and set(long.labels) == {"B-PER"}  # in several pieces
    for each in (first, accents, long):
        assert all(each.text[e["start"] : e["end"]] == e["text"] for e in each.entities)


def test_labels_that_are_types_alone_keep_their_first_letter(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "plain")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] |= {"1": "LOC", "3": "PER"}
    (folder / "config.json").write_text(json.dumps(config))
    (tagged,) = Tagger(folder).tag([Text.of("ana in nice rome")])
    assert [(each["label"], each["text"]) for each in tagged.entities] == [("PER", "ana"), ("LOC", "nice rome")]


def test_a_score_is_the_softmax_of_the_models_logits(trained):
    import transformers

    model = transformers.AutoModelForTokenClassification.from_pretrained(trained).eval()
    (tagged,) = Tagger(trained).tag([Text.of("is ana")])
    tokens = transformers.AutoTokenizer.from_pretrained(trained)(["is", "ana"], is_split_into_words=True)
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens["input_ids"]])).logits.softmax(-1)[0].max(-1).values
    assert tagged.confidence == pytest.approx(wanted[[1, 3]].tolist())  # [CLS] i ##s a ##n ##a [SEP]
    assert tagged.entities[0]["score"] == pytest.approx(float(wanted[3]))


def test_a_byte_order_mark_is_no_part_of_the_first_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfAna\n")
    assert read_texts(tmp_path / "a.txt") == [Text("Ana", [(0, 3)])]


def test_words_of_rows_are_kept_as_they_are(tagger, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", 8)
    for text, row in zip(read_texts(file), read_rows(file)):
        assert [text.text[start:end] for start, end in text.words] == row.words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("L'Île-de-France.", ["L", "'", "Île-de-France", "."]),
        ("a.b@c.org, 3.5€ (ok)", ["a.b@c.org", ",", "3.5", "€", "(", "ok", ")"]),
        ("\n tab\t- x", ["tab", "-", "x"]),
        ("cafe\u0301 हिन्दी, می\u200cروم", ["cafe\u0301", "हिन्दी", ",", "می\u200cروم"]),
    ],
)
def test_words_of_a_text_are_those_of_the_data(text, words):
    assert [text[start:end] for start, end in Text.of(text).words] == words


def test_a_file_gives_a_line_for_each_text_in_its_order_and_a_log_without_texts(trained, tmp_path, monkeypatch, capsys):
    texts = [f"{'is ' * (n * 7 % 11)}ana {n}" for n in range(40)]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    arguments = ("--model", trained, "--file", tmp_path / "texts.txt", "--batch-size", 4, "--log", tmp_path / "log")
    assert ner(monkeypatch, "tag", *arguments) is None
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == texts
    assert all([entity["text"] for entity in row["entities"]] == ["ana"] for row in rows)
    records = read_log(tmp_path / "log")
    assert [record["words"] for record in records] == [len(text.split()) for text in texts]
    assert all(record["labels"]["B-PER"] == 1 and record["together"] == 4 for record in records)
    assert all(0 < record["lowest"] <= record["confidence"] < 1 and record["latency"] > 0 for record in records)
    assert "ana" not in (tmp_path / "log").read_text().replace(str(trained), "")


def test_texts_on_the_command_line_are_tagged(trained, monkeypatch, capsys):
    ner(monkeypatch, "tag", "--model", trained, "Ana lives in Nice", "")
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert [entity["label"] for entity in first["entities"]] == ["PER", "LOC"]
    assert second == {"text": "", "entities": []}


def test_threads_may_share_a_tagger(trained):
    shared, texts = Tagger(trained), [[Text.of(f"ana {'in rome ' * n}")] for n in range(16)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(shared.tag, texts))
    assert [len(each[0].entities) for each in found] == [1 + n for n in range(16)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"{", "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[]', 'line 2: needs "text"'),
        ("a.jsonl", b'{"tokens": ["a", ""]}', 'line 1: needs "text"'),
        ("a.jsonl", rb'{"text": "\ud800"}', "line 1 is not UTF-8 text, or has half"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\xff", "is not UTF-8"),
    ],
)
def test_bad_texts_are_named_with_their_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PruneKitError, match=message):
        read_texts(tmp_path / name)


def test_bad_command_lines_are_refused(tagger, tiny, tmp_path, monkeypatch):
    for arguments, message in (
        (["--model", tagger("bert")], "give texts, or --file"),
        (["--model", tagger("bert"), "a", "--file", "b"], "give texts, or --file"),
        (["--model", tagger("bert"), "a\ud800"], "has a lone surrogate"),
        (["--model", tiny("bert"), "a"], "no token classifier"),
    ):
        with pytest.raises(PruneKitError, match=message):
            ner(monkeypatch, "tag", *arguments)


def test_a_line_of_log_is_json_without_the_text(tmp_path):
    from prunekit.serving.tag import Tagged

    tagged = Tagged("secret", [{"text": "secret"}], ["O", "B-PER", "O"], [0.9, 0.6, 0.9])
    record = json.loads(log_line(tmp_path, tagged, 0.25, 2))
    assert record.pop("time").endswith("+00:00")
    assert record == {
        "model": str(tmp_path), "latency": 0.25, "together": 2, "words": 3, "labels": {"O": 2, "B-PER": 1},
        "confidence": pytest.approx(0.8), "lowest": 0.6,
    }  # fmt: skip
