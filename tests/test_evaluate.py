"""What prunekit.evaluate says, against what a model whose every probability is known must get; rows that don't fit."""

import json
import math
import shutil
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers.parrot import CHARACTERS, SHARPNESS, SIZE, asked, following, save_parrot
from helpers.paths import EMBEDDED, ROOT
from helpers.quantised import write_fp8
from helpers.tiny_models import load
from PIL import Image

from prunekit import evaluate as evaluation
from prunekit.checkpoint import open_checkpoint
from prunekit.data.batches import calibrate
from prunekit.errors import PruneKitError
from prunekit.model.load import check_unpackable
from prunekit.model.scores import counted_states, logits_in_parts

SHORT, LONG = (
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]}
    for content in ("b", "b" * 100)
)


def test_rows_that_the_model_cant_take_are_left_out_and_counted(speaking, tmp_path, script):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in (SHORT, LONG, SHORT)))
    result = script("prunekit.evaluate", "--model", speaking, "--dataset", data, "--max-new-tokens", 2)
    assert result.returncode == 0, result.stderr
    assert "rows: 1 rows are longer than" in result.stderr
    assert "rows (2 rows)  token_acc" in result.stdout


def test_a_model_that_takes_none_of_the_rows_is_refused_in_one_line(speaking, tmp_path, script_here):
    (tmp_path / "rows.jsonl").write_text(json.dumps(LONG) + "\n")
    result = script_here("prunekit.evaluate", "--model", speaking, "--dataset", tmp_path / "rows.jsonl")
    assert (result.returncode, result.stdout) == (2, "")
    assert "all rows are longer" in result.stderr.splitlines()[-1]


def test_texts_calibrate_within_the_models_positions(speaking, tmp_path):
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": "a" * 100}) + "\n" for _ in range(8)))
    model = load(speaking)
    batches = calibrate(model, open_checkpoint(speaking), data).fit
    assert {batch["input_ids"].shape[1] for batch in batches} == {64}
    with torch.inference_mode():
        assert model(**batches[0]).loss.isfinite()


# --- a model whose answers are known ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    return save_parrot(tmp_path_factory.mktemp("parrot"))


def judged(parrot, folder, rows, *arguments):
    """What the script says of these rows."""
    data, found = folder / "rows.jsonl", folder / "found.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", "--model", parrot, "--dataset", data, "--json", found, "--device", "cpu"]
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # in this process: a new one imports ms-swift for as long as all of this
        patch.setattr(sys, "argv", [*map(str, [*command, "--max-new-tokens", 8, *arguments])])
        evaluation.main()
    [result] = json.loads(found.read_text())
    return result["datasets"]["rows"]


@pytest.fixture(scope="module")
def scores(parrot, tmp_path_factory):
    """Of rows that the model gets right, in part, and not at all; questions of several lengths, in batches of 2."""
    rows = [
        asked("cat", solution="cat"),
        asked("car", "and what is that?", solution="car"),
        asked("cats", "?", solution="cats"),
        asked(" cat\n", "now what is this one here?", solution=None),
        asked("dog", "what? " * 4, solution="dog"),
    ]
    plugins = [ROOT / "plugins" / name for name in ("gpt2_model.py", "ocr_rewards.py")]
    return judged(
        parrot, tmp_path_factory.mktemp("scores"), rows, "--batch-size", 2, "--plugins", *plugins,
        "--rewards", "ocr_perfect=2", "ocr_cer",
    )  # fmt: skip


def test_exact_match_is_the_share_of_answers_that_are_the_truth(scores):
    assert scores["exact_match"] == 2 / 5


def test_cer_is_edits_per_character_of_all_truths(scores):
    edits, characters = 0 + 1 + 1 + 0 + 3, 3 + 3 + 4 + 3 + 3
    assert scores["cer"] == pytest.approx(edits / characters)


def test_the_reward_is_the_weighted_sum_of_the_rows_mean(scores):
    perfect, right = [1, 0, 0], [1, 1 - 1 / 3, 1 - 1 / 4]  # where there is no truth, or nothing is right: 0
    assert scores["reward"] == pytest.approx((2 * sum(perfect) + sum(right)) / 5)


def test_token_acc_and_loss_are_those_of_the_known_probabilities(scores):
    known = following()
    right = []
    for answer in ("cat", "car", "cats", " cat\n", "dog"):
        tokens = [CHARACTERS.index(c) for c in ["\n", *answer, "[EOS]"]]
        right += [known.get(before) == token for before, token in zip(tokens, tokens[1:])]
    # LayerNorm makes of a unit vector one large entry and equal small ones
    apart = SHARPNESS / math.sqrt((1 - 1 / SIZE) / SIZE + 1e-5)
    likeliest = math.log1p((SIZE - 1) * math.exp(-apart))
    assert scores["token_acc"] == pytest.approx(sum(right) / len(right))
    assert scores["loss"] == pytest.approx(likeliest + apart * right.count(False) / len(right), rel=1e-5)


def test_of_texts_the_loss_of_all_tokens_but_each_windows_first_is_said_as_perplexity_too(parrot, tmp_path):
    """Windows of 4: of "\\ncat dog" they are "\\ncat", " dog", of "\\ncar?" "\\ncar" and nothing of one character."""
    rows = [{"text": "\ncat dog", "of": "a"}, {"text": "\ncar?", "of": "b"}, {"text": "c", "of": "c"}]
    found = judged(parrot, tmp_path, rows, "--max-length", 4, "--by", "of")
    apart = SHARPNESS / math.sqrt((1 - 1 / SIZE) / SIZE + 1e-5)
    likeliest = math.log1p((SIZE - 1) * math.exp(-apart))
    known, right = following(), []
    for window in ("\ncat", " dog", "\ncar"):
        tokens = [CHARACTERS.index(c) for c in window]
        right += [known.get(before) == token for before, token in zip(tokens, tokens[1:])]
    loss = likeliest + apart * right.count(False) / len(right)
    assert found["loss"] == pytest.approx(loss, rel=1e-5) and found["token_acc"] == pytest.approx(5 / 9)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert set(found) == {"token_acc", "loss", "perplexity", "tokens", "groups"} and set(found["groups"]) == {"a", "b"}
    assert found["groups"]["b"]["perplexity"] < found["perplexity"] < found["groups"]["a"]["perplexity"]


@pytest.mark.parametrize(
    ("rows", "arguments", "said"),
    [
        ([{"text": "a"}, asked("cat")], (), "rows.jsonl line 2: rows must all be"),
        ([{"text": "a"}], ("--rewards", "x"), "ask nothing: leave them out"),
        ([{"text": "a"}], (), "all rows are shorter than two tokens"),
    ],
)
def test_texts_that_cant_be_judged_are_refused(parrot, tmp_path, rows, arguments, said):
    with pytest.raises(PruneKitError, match=said):
        judged(parrot, tmp_path, rows, *arguments)


def test_the_rows_are_read_once(parrot, tmp_path, opens):
    count = opens(tmp_path / "rows.jsonl")
    judged(parrot, tmp_path, [asked("cat")])
    assert count() == 2  # the test's own writing, and that reading


def test_answers_are_given_to_the_questions_alone(parrot, tmp_path):
    """The last message is the answer to compare with: a model that saw it would go on from there."""
    assert judged(parrot, tmp_path, [asked("dog")])["exact_match"] == 0
    assert judged(parrot, tmp_path, [asked("cat")])["exact_match"] == 1


def test_no_more_rows_than_the_limit_are_judged(parrot, tmp_path):
    assert judged(parrot, tmp_path, [asked("cat"), asked("dog"), asked("dog")], "--limit", 2)["exact_match"] == 0.5


def test_without_generation_only_what_is_teacher_forced_is_said(parrot, tmp_path):
    assert set(judged(parrot, tmp_path, [asked("cat")], "--no-generate")) == {"token_acc", "loss", "tokens"}


def test_the_next_models_are_judged_on_the_rows_that_the_first_could_take(parrot, tmp_path, capsys):
    short = shutil.copytree(parrot, tmp_path / "short")
    model = load(short)
    model.config.n_positions = 72
    model.transformer.wpe.weight = torch.nn.Parameter(model.transformer.wpe.weight[:72].clone())
    model.save_pretrained(short)
    rows = [asked("cat"), asked("cat", "what? " * 8), asked("dog")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys,
            "argv",
            ["evaluate", "--model", str(short), str(parrot), "--dataset", str(data), "--device", "cpu",
             "--require", "exact_match>=0.97", "--require", "exact_match>=0.5"],
        )  # fmt: skip
        assert evaluation.main() == 3
    said, line = capsys.readouterr()
    assert line.endswith(f"gate: {parrot} rows: exact_match is 0.5, not >= 0.97\n")
    assert said.count("rows (2 rows)") == 2 and said.count("exact_match 0.5000") == 2


@pytest.mark.parametrize("cap", [None, 5.0])
def test_logits_of_many_states_are_those_of_each_capped_where_the_model_caps_them(cap):
    torch.manual_seed(0)
    head, states = torch.nn.Linear(8, 20), torch.randn(300, 8) * 9
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(final_logit_softcapping=cap))
    model = SimpleNamespace(get_output_embeddings=lambda: head, config=config)
    found = torch.full((300, 20), torch.nan)
    for part, logits in logits_in_parts(model, states):
        found[part] = logits
    expected = head(states)
    torch.testing.assert_close(found, 5 * torch.tanh(expected / 5) if cap else expected)


def test_a_state_counts_if_a_label_follows_it_and_is_of_its_row():
    states = torch.arange(8.0).view(2, 4, 1)
    labels = torch.tensor([[5, -100, 6, 7], [-100, 8, -100, -100]])
    found, next_labels, rows = counted_states(states, labels)
    assert (found[:, 0].tolist(), next_labels.tolist(), rows.tolist()) == ([1, 2, 4], [6, 7, 8], [0, 0, 1])


def test_models_that_have_other_tokens_are_named_as_not_comparable(tmp_path, capsys):
    model = open_checkpoint(EMBEDDED)
    again, other = (open_checkpoint(shutil.copytree(EMBEDDED, tmp_path / name)) for name in ("again", "other"))
    content = json.loads((other.path / "tokenizer.json").read_text())
    (one, first), (two, second), *rest = content["model"]["vocab"].items()
    content["model"]["vocab"] = {one: second, two: first, **dict(rest)}
    (other.path / "tokenizer.json").write_text(json.dumps(content))
    evaluation.warn_of_other_tokens([model, again, other])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{other.path} has other tokens than {EMBEDDED}: token_acc, loss" in said


def test_a_model_that_is_none_of_the_type_given_is_refused(parrot, tmp_path):
    with pytest.raises(PruneKitError, match="--model-type qwen3_vl: .*parrot"):
        judged(parrot, tmp_path, [asked("cat")], "--model-type", "qwen3_vl")


# --- answers that are cut


@pytest.mark.parametrize("tokens, cut", [(3, 2), (4, 0)])
def test_answers_are_cut_that_have_all_tokens_and_no_end(parrot, tmp_path, tokens, cut, capsys):
    found = judged(parrot, tmp_path, [asked("cat"), asked("dog")], "--max-new-tokens", tokens)
    assert (found["n_cut"], found["cut_share"]) == (cut, cut / 2)
    said = capsys.readouterr()
    assert ("2 of 2 answers" in said.err and "raise --max-new-tokens" in said.err) == bool(cut)
    assert f"n_cut {cut}  cut_share" in said.out


# --- several models and data sets


def test_a_model_is_gone_when_the_next_one_is_loaded(parrot, tmp_path, monkeypatch):
    before, load_engine = [], evaluation.load_engine

    def load_one(*arguments):
        assert [model() for model in before] == [None] * len(before)
        engine = load_engine(*arguments)
        before.append(weakref.ref(engine.model))
        return engine

    monkeypatch.setattr(evaluation, "load_engine", load_one)
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(asked("cat")) + "\n")
    models = ["--model", parrot, parrot, parrot]
    monkeypatch.setattr(sys, "argv", [*map(str, ["evaluate", *models, "--dataset", data, "--device", "cpu"])])
    evaluation.main()
    assert len(before) == 3


def test_data_sets_of_the_same_name_are_all_in_the_result(parrot, tmp_path, monkeypatch):
    for folder, answer in (("a", "cat"), ("b", "dog")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").write_text(json.dumps(asked(answer)) + "\n")
    names = [str(tmp_path / folder / "test.jsonl") for folder in "ab"]
    out = tmp_path / "found.json"
    monkeypatch.setattr(
        sys,
        "argv",
        ["evaluate", "--model", str(parrot), "--dataset", *names, "--json", str(out), "--device", "cpu"],
    )
    evaluation.main()
    [result] = json.loads(out.read_text())
    assert [result["datasets"][name]["exact_match"] for name in names] == [1, 0]


# --- groups of rows

SKILLED = [asked("cat", skill="name"), asked("dog", "? " * 9, skill="name"), asked("cats", skill="count")]


@pytest.fixture(scope="module")
def by_skill(parrot, tmp_path_factory):
    return judged(parrot, tmp_path_factory.mktemp("by"), SKILLED, "--by", "skill")


@pytest.mark.parametrize("skill", ["count", "name"])
def test_a_groups_scores_are_those_of_its_rows_alone(parrot, tmp_path, by_skill, skill):
    mine = [row for row in SKILLED if row["skill"] == skill]
    alone = judged(parrot, tmp_path, mine)
    group = by_skill["groups"][skill]
    assert group["samples"] == len(mine)
    for key in ("token_acc", "loss", "exact_match", "cer"):
        assert group[key] == pytest.approx(alone[key], rel=1e-5), key


def test_groups_change_nothing_of_the_whole(parrot, tmp_path, by_skill):
    whole = judged(parrot, tmp_path, SKILLED)
    assert by_skill.keys() - whole.keys() == {"groups"}
    assert {key: by_skill[key] for key in whole} == pytest.approx(whole, rel=1e-5)


def test_a_score_that_is_no_number_is_null(tmp_path):
    parrot = save_parrot(tmp_path / "parrot")
    model = load(parrot)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    model.save_pretrained(parrot)
    assert judged(parrot, tmp_path, [asked("cat")], "--no-generate")["loss"] is None


# --- what is refused, before a model is loaded


@pytest.fixture
def refused(parrot, tmp_path, monkeypatch):
    """refused(*arguments, model=..., rows=...): the one line, asserting that no model was loaded."""
    monkeypatch.setattr(evaluation, "load_engine", lambda *_: pytest.fail("a model was loaded"))

    def run(*arguments, model=parrot, rows=None):
        with pytest.raises(PruneKitError) as error:
            judged(model, tmp_path, rows or [asked("cat")], *arguments)
        assert "\n" not in str(error.value)
        return str(error.value)

    return run


@pytest.mark.parametrize(
    "arguments",
    [
        ("--device", "gpu"), ("--batch-size", "0"), ("--batch-size", "x"), ("--limit", "0"), ("--limit", "-1"),
        ("--max-new-tokens", "0"), ("--rewards", "ocr_cer=abc"), ("--rewards", "ocr_cer=nan"),
        ("--rewards", "no_such_one"),
        ("--json", "/no/such/folder/x.json"), ("--model-type", "no_such_type"), ("--template", "no_such_template"),
        ("--dataset", "org/name"), ("--dataset", "nowhere.jsonl"), ("--plugins", "nowhere.py"), ("--model", "nowhere"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_bad_argument_is_refused_in_one_line(refused, arguments):
    value = arguments[-1].rpartition("=")[2]
    assert value[:15] in refused(*arguments)


@pytest.mark.parametrize(
    ("flag", "needed"),
    [
        (("--apply-chat-template",), "tasks"),
        (("--metadata", '{"a": 1}'), "tasks"),
        (("--dataset-args", '{"a": 1}'), "benchmarks"),
    ],
)
def test_a_flag_of_tasks_without_them_is_refused(refused, flag, needed):
    assert f"{flag[0]}: is for --{needed}; give that, too, or leave it out" in refused(*flag)


@pytest.mark.parametrize("arguments", [("--tasks", "rows"), ("--tasks", "gsm8k", "--benchmarks", "gsm8k")])
def test_a_task_is_not_called_like_a_data_set_or_another_task(refused, arguments):
    assert f"{arguments[-1]}: two of this name are asked for" in refused(*arguments)


@pytest.mark.parametrize(
    ("arguments", "name"), [((), "f1"), ((), "reward"), ((), "groups.x.cer"), (("--no-generate",), "exact_match")]
)
def test_a_bound_on_what_is_not_measured_is_refused(refused, arguments, name):
    assert f"--require {name}: no such metric here" in refused(*arguments, "--require", f"{name}>=0")


def test_a_reward_whose_column_is_missing_is_refused(refused):
    plugins = [ROOT / "plugins" / name for name in ("gpt2_model.py", "ocr_rewards.py")]
    assert "'solution'" in refused("--plugins", *plugins, "--rewards", "ocr_cer")


def test_a_column_that_a_row_lacks_is_refused(refused):
    assert "row 2 has no column 'skill'" in refused("--by", "skill", rows=[asked("cat", skill="name"), asked("cat")])


@pytest.mark.parametrize("damage", ["gone", "damaged"])
def test_a_model_without_a_whole_tokenizer_is_refused(refused, parrot, tmp_path, damage):
    folder = shutil.copytree(parrot, tmp_path / "copy")
    (folder / "tokenizer.json").unlink() if damage == "gone" else (folder / "tokenizer.json").write_text("{")
    assert "copy the tokenizer's files of the original model" in refused(model=folder)


def change_tokenizer(folder, *gone):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in gone}))
    return folder


def test_a_tokenizer_that_can_neither_pad_nor_end_is_refused(refused, parrot, tmp_path):
    folder = change_tokenizer(shutil.copytree(parrot, tmp_path / "copy"), "pad_token", "eos_token")
    assert "neither a padding token nor one that ends a text" in refused(model=folder)


def test_a_tokenizer_without_a_padding_token_pads_with_the_end(parrot, tmp_path):
    folder = change_tokenizer(shutil.copytree(parrot, tmp_path / "copy"), "pad_token")
    rows = [asked("cat"), asked("dog", "and this?")]
    assert judged(folder, tmp_path, rows)["exact_match"] == 0.5


def test_texts_need_no_padding_token_at_all(parrot, tmp_path):
    folder = change_tokenizer(shutil.copytree(parrot, tmp_path / "copy"), "pad_token", "eos_token")
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": "a" * n}) + "\n" for n in range(2, 12)))
    assert calibrate(load(folder), open_checkpoint(folder), data).fit


def test_an_image_that_breaks_while_it_is_decoded_is_named(tmp_path):
    image = tmp_path / "image.png"
    Image.effect_noise((64, 64), 50).save(image)
    whole = image.read_bytes()
    image.write_bytes(whole[:200] + bytes(500) + whole[700:])  # whole at both ends
    row = asked("a", "<image>?", images=[str(image)])
    with pytest.raises(PruneKitError, match="image.png"):
        judged(EMBEDDED, tmp_path, [row])


def test_an_answer_without_a_question_is_refused(refused):
    assert "has no question before its answer" in refused(rows=[{"messages": asked("cat")["messages"][1:]}])


def test_messages_that_ms_swift_can_t_encode_are_shown(parrot, tmp_path):
    row = {"messages": [{"role": "boss", "content": "a"}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(PruneKitError, match="a row can't be encoded by ms-swift") as error:
        judged(parrot, tmp_path, [row])
    assert '"role": "assistant"' in str(error.value)


def test_a_quantised_folder_is_measured_beside_its_source(answers, tmp_path, monkeypatch):
    quantised, found = write_fp8(EMBEDDED, tmp_path / "fp8"), tmp_path / "found.json"
    flags = ["--no-generate", "--device", "cpu", "--json", found, "--dataset", answers]
    monkeypatch.setattr(sys, "argv", [*map(str, ["evaluate", "--model", EMBEDDED, quantised, *flags])])
    evaluation.main()
    one, other = json.loads(found.read_text())
    assert one["parameters"] == other["parameters"]
    losses = [each["datasets"]["answers"]["loss"] for each in (one, other)]
    assert 0 < abs(losses[0] - losses[1]) < 0.1 * losses[0]


def test_quantised_weights_need_what_unpacks_them(tiny, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(write_fp8(tiny("llama"), tmp_path / "fp8"), quantised=True)
    check_unpackable(checkpoint)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PruneKitError, match=r"compressed_tensors is not installed: pip install -e '.\[quantise\]'"):
        check_unpackable(checkpoint)


@pytest.mark.parametrize("flags", [["--tasks", "arc_easy"], ["--benchmarks", "mmmu"]])
def test_tasks_of_the_field_need_their_packages(flags, tiny, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate", "--model", str(tiny("llama")), *flags])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PruneKitError, match=r"(lm_eval|evalscope) is not installed: pip install -e '.\[eval\]'"):
        evaluation.main()


def test_something_to_measure_on_must_be_named(tiny, monkeypatch):
    for flags in ([], ["--metadata", "[1]", "--tasks", "x"]):
        monkeypatch.setattr(sys, "argv", ["evaluate", "--model", str(tiny("llama")), *flags])
        with pytest.raises(PruneKitError, match="--dataset, --tasks or --benchmarks|--metadata: invalid"):
            evaluation.main()
