"""Token classifiers: words and their tags stay together, students learn from teachers, and what is written loads."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import transformers as hf
from helpers.cuts import drop_layers
from helpers.paths import ROOT
from helpers.tiny_models import load
from helpers.tiny_taggers import FAMILIES, LABELS, LETTERS, QUICK, save_tokenizer, write_rows
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from prunekit.checkpoint import history, open_checkpoint
from prunekit.checkpoint.provenance import data_record
from prunekit.checkpoint.write import write_checkpoint
from prunekit.errors import PruneKitError
from prunekit.ner import evaluate, main
from prunekit.serving.run import load_served, pad
from prunekit.tagger.rows import Row, encode, join, labels_of, load_tokenizer, read_rows, tag_numbers
from prunekit.tagger.scores import Data, entity_scores
from prunekit.tagger.train import check_teacher, load_classifier, matching_layers
from prunekit.training.publish import publish

pytestmark = pytest.mark.usefixtures("plain_trainer")


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", count=64)


def test_scores_are_seqevals_of_a_case_worked_by_hand():
    truth = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC", "O", "O"]]
    said = [["B-PER", "O", "O", "B-LOC"], ["O", "B-LOC", "B-PER", "O"]]
    scores = entity_scores(truth, said)  # 4 said, 2 of them right (half a name is none); 3 there
    assert (scores["precision"], scores["recall"]) == (0.5, pytest.approx(2 / 3))
    assert scores["f1"] == pytest.approx(4 / 7)
    assert scores["entities"]["LOC"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 2}
    assert scores["entities"]["PER"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}


@pytest.fixture(scope="session")
def tokenizer(tagger):
    return load_tokenizer(tagger("bert"))


words = st.lists(
    st.tuples(st.text(LETTERS, min_size=1, max_size=12), st.sampled_from(list(LABELS.values()))), min_size=1
)


@given(words, st.integers(8, 40))
def test_no_word_is_lost_or_counted_twice_however_a_row_is_cut(tokenizer, pairs, max_length):
    row = Row(*map(list, zip(*pairs)))
    features, truth = encode([row], tokenizer, LABELS, max_length)
    assert max(len(feature["input_ids"]) for feature in features) <= max_length
    labels = [label for feature in features for label in feature["labels"] if label != -100]
    assert truth == [row.tags]
    assert join(labels, LABELS, truth) == [row.tags]


def test_a_words_label_stands_at_its_first_sub_word(tokenizer):
    (feature,), _ = encode([Row(["ana", "is"], ["B-PER", "O"])], tokenizer, LABELS, 64)
    assert feature["labels"] == [-100, 3, -100, -100, 0, -100, -100]  # [CLS] a ##n ##a i ##s [SEP]


def test_conll_and_jsonl_give_the_same_rows(rows, tmp_path):
    conll = tmp_path / "rows.conll"
    text = "-DOCSTART- -X- O\n\n"
    for row in read_rows(rows):
        text += "".join(f"{word}\tNN {tag}\n" for word, tag in zip(row.words, row.tags)) + "\n"
    conll.write_text(text.rstrip("\n"))  # the last sentence has no empty line behind it
    assert read_rows(conll) == read_rows(rows)


def test_a_words_no_break_space_is_no_end_of_a_column(tmp_path):
    (tmp_path / "rows.conll").write_text("10\u00a0000 CD O\n\u00a0 SP O\nNice\tNNP\tB-LOC\n\u00a0\nAna B-PER\n")
    words = [row.words for row in read_rows(tmp_path / "rows.conll")]
    assert words == [["10\u00a0000", "\u00a0", "Nice"], ["Ana"]]


def test_a_byte_order_mark_is_no_part_of_the_first_word(tmp_path):
    (tmp_path / "rows.conll").write_text("Ana B-PER\n", encoding="utf-8-sig")
    assert read_rows(tmp_path / "rows.conll")[0].words == ["Ana"]


@pytest.mark.parametrize("end", ["", "\n"])
def test_rows_carry_the_record_of_their_file_which_was_opened_once(rows, tmp_path, opens, end):
    file = tmp_path / "same.jsonl"
    file.write_text(rows.read_text().rstrip() + end)
    count = opens(file)
    record = read_rows(file).record
    assert count() == 1
    assert record == data_record(file)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", '{"tokens": ["a"], "ner_tags": ["O", "O"]}', "line 1: 1 tokens and 2 ner_tags"),
        ("a.jsonl", '{"tokens": ["a"], "ner_tags": [1]}', 'line 1: needs "tokens" and "ner_tags"'),
        ("a.jsonl", '{"tokens": ["a"], "ner_tags": ["PER"]}', "line 1: 'PER' is no tag"),
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("a.jsonl", "[]", 'line 1: needs "tokens"'),
        ("a.txt", "ana B-PER\nis\n", "line 2: one column"),
        ("a.txt", "\n\n", "is empty"),
        ("a.txt", "ana \udcff", "is not UTF-8"),
    ],
)
def test_bad_rows_are_named_with_their_line(name, text, message, tmp_path):
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(PruneKitError, match=message):
        read_rows(tmp_path / name)


def test_a_student_is_matched_with_what_its_next_layer_saw_in_the_teacher():
    def entry(before, removed):
        return {"num_hidden_layers_before": before, "removed": removed}

    gone = [entry(6, None), entry(6, {"text": [1, 4]}), entry(4, {"text": [0]})]  # 2, 3 and 5 are left
    assert matching_layers(gone, 6, 3) == [(1, 3), (2, 5), (3, 6)]
    assert matching_layers([], 6, 3) == [(1, 2), (2, 4), (3, 6)]
    assert matching_layers([entry(12, {"text": [3]})], 6, 4) == [(1, 2), (2, 3), (3, 4), (4, 6)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_each_family_is_cut_distilled_and_loaded_by_plain_transformers(
    family, tagger, rows, tmp_path, ner_run
):
    student = drop_layers(tagger(family), tmp_path / "student")
    ner_run("--model", student, "--teacher", tagger(family), "--out", tmp_path / "out", "--dataset", rows,
            "--val-dataset", rows, "--hidden-weight", 1, "--max_steps", 4, "--learning_rate", 1e-2, *QUICK)  # fmt: skip
    model = load(tmp_path / "out")
    assert (model.config.num_hidden_layers, model.config.id2label) == (2, LABELS)
    stages = history(tmp_path / "out")
    assert [entry["stage"] for entry in stages] == ["manual_select", "ner"]
    assert stages[-1]["metrics"]["f1"] == pytest.approx(evaluate(tmp_path / "out", read_rows(rows))["f1"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "student"]
    pickles = [path.name for path in (tmp_path / "out").iterdir() if path.suffix in (".bin", ".pt", ".pth")]
    assert not pickles and (tmp_path / "out/curves.png").is_file()


def test_distillation_alone_brings_a_student_nearer_to_its_teacher(tagger, rows, tmp_path, ner_run):
    teacher, student = tagger("bert"), drop_layers(tagger("bert"), tmp_path / "student")
    ner_run("--model", student, "--teacher", teacher, "--hard-share", 0, "--out", tmp_path / "out",
            "--dataset", rows, "--num_train_epochs", 6, "--learning_rate", 5e-3, *QUICK)  # fmt: skip
    tokenizer = load_tokenizer(teacher)
    features, _ = encode(read_rows(rows), tokenizer, LABELS, 64)
    batch = pad([feature["input_ids"] for feature in features])

    def divergence(folder):
        mask = torch.from_numpy(batch["attention_mask"]).bool()
        ours, theirs = (torch.from_numpy(load_served(each)(batch))[mask].log_softmax(-1) for each in (folder, teacher))
        return float(torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True))

    assert divergence(tmp_path / "out") < 0.2 * divergence(student)


def test_labels_are_learned(tagger, rows, tmp_path, ner_run):
    ner_run("--model", tagger("distilbert"), "--out", tmp_path / "out", "--dataset", rows, "--num_train_epochs", 15,
            "--learning_rate", 5e-3, *QUICK)  # fmt: skip
    unseen = read_rows(write_rows(tmp_path / "test.jsonl", seed=1))
    assert evaluate(tagger("distilbert"), unseen)["f1"] < 0.3 < 0.75 < evaluate(tmp_path / "out", unseen)["f1"]


def test_scores_are_those_of_what_is_published_where_the_best_epoch_is_not_asked_for(tagger, rows, tmp_path, ner_run):
    ner_run("--model", tagger("distilbert"), "--out", tmp_path / "out", "--dataset", rows, "--val-dataset", rows,
            "--load_best_model_at_end", "false", "--metric_for_best_model", "loss", "--greater_is_better", "true",
            "--num_train_epochs", 10, "--learning_rate", 5e-3, *QUICK)  # fmt: skip
    f1 = evaluate(tmp_path / "out", read_rows(rows))["f1"]
    assert f1 > 0.3 and history(tmp_path / "out")[-1]["metrics"]["f1"] == pytest.approx(f1)


def test_zeros_are_kept_where_they_are(tagger, rows, tmp_path, ner_run):
    folder = drop_layers(tagger("bert"), tmp_path / "sparse")
    weights = load_file(folder / "model.safetensors")
    for name, values in weights.items():
        if "encoder.layer" in name and values.dim() == 2:
            values[values.abs() < values.abs().median()] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    ner_run(
        "--model",
        folder,
        "--out",
        tmp_path / "out",
        "--dataset",
        rows,
        "--max_steps",
        3,
        "--keep-zeros",
        *QUICK,
    )
    for name, values in load_file(tmp_path / "out/model.safetensors").items():
        zeros = weights[name] == 0
        if values.dim() == 2 and zeros.any() and "embeddings" not in name:
            assert not values[zeros].any() and not torch.equal(values, weights[name]), name


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertForTokenClassification"])
def test_a_new_head_is_for_the_datas_labels_on_the_old_layers(architecture, tmp_path, ner_run):
    torch.manual_seed(0)
    config = hf.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=4, max_position_embeddings=64, num_labels=5)  # fmt: skip
    getattr(hf, architecture)(config).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    (tmp_path / "a.txt").write_text("ana B-WHO\nin O\nrome B-WHERE\n")
    ner_run("--model", tmp_path / "base", "--out", tmp_path / "out", "--dataset", tmp_path / "a.txt", "--new-head",
            "--max_steps", 1, "--learning_rate", 0, *QUICK)  # fmt: skip
    model = load(tmp_path / "out")
    assert list(model.config.id2label.values()) == ["O", "B-WHERE", "I-WHERE", "B-WHO", "I-WHO"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    layer = "bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(before[layer], after[layer])
    assert not torch.equal(before.get("classifier.weight", torch.zeros(1)), after["classifier.weight"])


def test_a_killed_run_leaves_no_out_and_the_same_command_goes_on(tagger, rows, tmp_path, ner_run, capsys):
    arguments = ["--model", tagger("bert"), "--out", tmp_path / "out", "--dataset", rows, "--max_steps", 40,
                 "--save_strategy", "steps", "--save_steps", 1, *QUICK]  # fmt: skip
    command = [sys.executable, "ner_run.py", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not (tmp_path / "out.run/checkpoint-3").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with pytest.raises(PruneKitError, match="other settings"):
        ner_run(*arguments, "--learning_rate", 1e-3)
    ner_run(*arguments)
    assert "resuming from" in capsys.readouterr().out
    load(tmp_path / "out")
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize(
    ("flags", "written"),
    [(["--max_steps", 5], False), (["--max_steps", 5], True), (["--lora-rank", 4], False)],
    ids=["before", "after", "validated"],
)
def test_a_run_killed_around_its_publishing_is_published_as_one_that_was_not(
    flags, written, tagger, rows, tmp_path, ner_run, monkeypatch, capsys
):
    """Its training had ended: nothing is trained again, and what is recorded is what was measured."""
    if flags[0] == "--lora-rank":
        flags = [*flags, "--val-dataset", rows, "--num_train_epochs", 2]
    arguments = ["--model", tagger("bert"), "--dataset", rows, "--logging_steps", 1, *flags, *QUICK]
    ner_run(*arguments, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:

        def killed(*args, **kwargs):
            if written:
                write_checkpoint(*args, **kwargs)
            raise KeyboardInterrupt

        patch.setattr("prunekit.training.publish.write_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            ner_run(*arguments, "--out", tmp_path / "out")
    assert (tmp_path / "out").exists() == written
    capsys.readouterr()
    ner_run(*arguments, "--out", tmp_path / "out")
    assert "resuming" not in capsys.readouterr().out
    assert not (tmp_path / "out.run").exists()
    one, two = (history(tmp_path / name)[-1]["metrics"] for name in ("whole", "out"))
    assert one == two
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out")]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_models_are_compared_in_a_table_a_json_and_a_picture(tagger, rows, tmp_path, monkeypatch, capsys):
    folders = [str(tagger("bert")), str(tagger("distilbert"))]
    monkeypatch.setattr(
        sys, "argv",
        ["ner", "--model", *folders, "--dataset", str(rows), "--json", f"{tmp_path}/a.json", "--figure",
         f"{tmp_path}/a.png", "--min-f1", "0.99"],
    )  # fmt: skip
    code = main()
    said = capsys.readouterr()
    results = json.loads((tmp_path / "a.json").read_text())
    f1 = results[1]["f1"]
    assert (code, said.err) == (3, f"gate: {folders[1]}: f1 is {f1:.6g}, not >= 0.99\n")
    assert [result["model"] for result in results] == folders
    assert said.out.count("precision") == 2
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_labels_that_the_model_has_not_end_with_one_line(tagger, tmp_path, script_here):
    (tmp_path / "a.txt").write_text("acme B-ORG\n")
    done = script_here(
        "ner_run.py", "--model", tagger("bert"), "--out", tmp_path / "out", "--dataset", tmp_path / "a.txt"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: dataset {tmp_path}/a.txt: its tag B-ORG is none of the model's labels (B-LOC, B-PER, I-LOC, I-PER, "
        "O); rename the tags, or train a new head: ner_run.py --new-head\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--hard-share", 2], "--hard-share 2: choose 0 to 1"),
        (["--temperature", 0], "--temperature 0: choose"),
        (["--hidden-weight", 1], "--hidden-weight 1: is of what a teacher says; name one"),
        (["--hard-share", 0], "--hard-share 0: is of what a teacher says"),
        (["--max-length", 65], "--max-length 65: choose 8 to 64"),
        (["--no_such_flag", 1], "--no_such_flag: neither"),
        (["--save_strategy", "no"], "--save_strategy no"),
        (["--resume_from_checkpoint", "x"], "--resume_from_checkpoint x: leave it out"),
        (["--output_dir", "x"], "--output_dir: is"),
        (["--output-dir=x"], "--output_dir: is"),
        (["--val-dataset", "missing.jsonl"], "missing.jsonl is not there"),
        (["--keep-zeros", *QUICK], "no trained weight is zero"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_left(arguments, message, tagger, rows, tmp_path, ner_run):
    with pytest.raises(PruneKitError, match=message):
        ner_run("--model", tagger("bert"), "--out", tmp_path / "out", "--dataset", rows, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_new_head_is_refused_where_only_the_validation_rows_have_entities(tagger, rows, tmp_path, ner_run):
    (tmp_path / "plain.txt").write_text("in O\n")
    with pytest.raises(PruneKitError, match="dataset .*plain.txt: all tags of the rows are O: a tagger needs entities"):
        ner_run("--model", tagger("bert"), "--out", tmp_path / "out", "--dataset", tmp_path / "plain.txt",
                "--val-dataset", rows, "--new-head", "--max_steps", 1, *QUICK)  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["plain.txt"]


def test_a_used_out_and_a_decoder_are_refused(tagger, tiny, rows, tmp_path, ner_run):
    with pytest.raises(PruneKitError, match="exists; choose another OUT"):
        ner_run("--model", tagger("bert"), "--out", tagger("roberta"), "--dataset", rows)
    with pytest.raises(PruneKitError, match="llama is no encoder; full_run.sh trains it"):
        ner_run("--model", tiny("llama"), "--out", tmp_path / "out", "--dataset", rows)
    with pytest.raises(PruneKitError, match="no token classifier; train it with ner_run.py --new-head"):
        ner_run("--model", tiny("bert"), "--out", tmp_path / "out", "--dataset", rows)


def test_a_teacher_of_other_labels_or_sizes_is_refused(tagger):
    student = open_checkpoint(tagger("bert"))
    wide = replace(student, config=student.config | {"hidden_size": 64})
    with pytest.raises(PruneKitError, match="hidden_size 64, the student's is 32; leave out --hidden-weight"):
        check_teacher(wide, student, LABELS, hidden=True)
    check_teacher(wide, student, LABELS, hidden=False)
    swapped = {**LABELS, 1: LABELS[3], 3: LABELS[1]}
    with pytest.raises(PruneKitError, match="its labels are not the student's"):
        check_teacher(wide, student, swapped, hidden=False)


def test_a_new_head_does_not_excuse_other_layers(tagger, tmp_path):
    student = drop_layers(tagger("bert"), tmp_path / "student")
    with pytest.raises(PruneKitError, match=r"has no encoder\.layer\.2"):
        publish(student, tmp_path / "out", tagger("bert"), "ner", new_head={})


@pytest.fixture
def inside_only(tagger, tmp_path):
    """A tagger with labels as the common French model's: no B- among them."""
    labels = {0: "O", 1: "I-LOC", 2: "I-PER"}
    torch.manual_seed(0)  # whichever test came before, the head is drawn alike
    load_classifier(open_checkpoint(tagger("bert")), labels, new_head=True).save_pretrained(tmp_path / "inside")
    save_tokenizer(tmp_path / "inside")
    return tmp_path / "inside"


def apart(path, begin, count=64):
    """Sentences with names of one and two words, never two beside each other; a name begins with B- or I-."""
    lines, rest = [], {"PER": ["ana", "bo", "cem"], "LOC": ["oslo", "rome", "york"]}
    for n in range(count):
        words, tags = ["in"], ["O"]
        for kind in ("PER", "LOC") if n % 2 else ("LOC",):
            long = 1 + n % 3 % 2
            words += [*(rest[kind] * 2)[n % 3 : n % 3 + long], "is"]
            tags += [f"{begin}-{kind}", f"I-{kind}"][:long] + ["O"]
        lines.append(json.dumps({"tokens": words, "ner_tags": tags}) + "\n")
    path.write_text("".join(lines))
    return path


def test_a_model_without_b_labels_learns_and_is_scored_alike_on_data_with_them(inside_only, tmp_path, ner_run):
    with_b, without = apart(tmp_path / "b.jsonl", "B"), apart(tmp_path / "i.jsonl", "I")
    assert read_rows(with_b) != read_rows(without)
    ner_run("--model", inside_only, "--out", tmp_path / "out", "--dataset", with_b, "--val-dataset", with_b,
            "--num_train_epochs", 12, "--learning_rate", 5e-3, *QUICK)  # fmt: skip
    scores = [evaluate(tmp_path / "out", read_rows(data)) for data in (with_b, without)]
    assert scores[0] == scores[1] and scores[0]["f1"] > 0.9
    assert history(tmp_path / "out")[-1]["metrics"]["f1"] == pytest.approx(scores[0]["f1"])
    assert history(tmp_path / "out")[-1]["settings"]["label_counts"].keys() == {"O", "I-LOC", "I-PER"}


def test_tags_are_learned_as_the_labels_that_there_are():
    inside = {0: "O", 1: "I-LOC", 2: "I-PER"}
    assert tag_numbers(inside) == {"O": 0, "I-LOC": 1, "B-LOC": 1, "I-PER": 2, "B-PER": 2}
    assert tag_numbers(LABELS) == {name: number for number, name in LABELS.items()}


def test_two_names_beside_each_other_are_none_that_a_model_without_b_labels_finds():
    truth = [["B-PER", "B-PER", "O"]]
    assert entity_scores(truth, [["I-PER", "I-PER", "O"]])["f1"] == 0
    assert entity_scores(truth, [["B-PER", "B-PER", "O"]])["f1"] == 1


def test_labels_of_rows_are_a_whole_scheme():
    assert labels_of([Row(["a"], ["I-B"]), Row(["a"], ["B-A"])]) == dict(enumerate(["O", "B-A", "I-A", "B-B", "I-B"]))


def test_rows_without_an_entity_need_no_head():
    with pytest.raises(PruneKitError, match="all tags of the rows are O"):
        labels_of([Row(["a"], ["O"])])


def test_predictions_go_back_to_their_words_through_batches(tagger, rows):
    folder, tokenizer = tagger("bert"), load_tokenizer(tagger("bert"))
    data = Data(*encode(read_rows(rows), tokenizer, LABELS, 8), LABELS)
    run, alone = load_served(folder), []
    for feature in data.features:
        best = run(pad([feature["input_ids"]]))[0].argmax(-1)
        alone += [int(b) for b, label in zip(best, feature["labels"]) if label != -100]
    from prunekit.serving.run import predict_labels

    assert predict_labels(run, data.features, 0, size=7) == alone
