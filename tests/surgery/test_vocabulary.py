"""Fewer tokens: what stays, what is renumbered, and that nothing else changes."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers.checkpoints import assert_same_weights, weights
from helpers.tiny_models import FAMILIES, VISION, load
from helpers.tiny_words import CHAT, KINDS, SPECIAL, save_speaking, texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import CONFIG_MAPPING, AutoTokenizer

from prunekit.checkpoint import fingerprint, open_checkpoint, statistics
from prunekit.data.rows import Rows
from prunekit.errors import PruneKitError
from prunekit.families import FAMILIES as ROWS
from prunekit.surgery.cut import write_cut
from prunekit.surgery.vocabulary import gains, plan_vocabulary
from prunekit.surgery.vocabulary_files import closure, ids_in
from prunekit.surgery.vocabulary_fit import count_uses, fit_vocabulary, texts_of
from prunekit.training.preflight import check_teacher

ANY = st.text() | st.text("abdeilnorstu ") | st.lists(st.sampled_from(texts()[0].split()), max_size=8).map(" ".join)
FAMILY_OF = {"bytes": "llama", "fallback": "mistral", "wordpiece": "bert", "unigram": "camembert"}


@pytest.fixture(scope="session")
def speaking_of(tmp_path_factory):
    """speaking_of(family): the folder of a tiny model with a trained tokenizer, made on first use. Read only."""
    root, made = tmp_path_factory.mktemp("speaking"), {}

    def folder(family: str, **kwargs):
        key = family + "-".join(map(str, kwargs.values()))
        if key not in made:
            made[key] = save_speaking(family, root / key, **kwargs)
        return made[key]

    return folder


@pytest.fixture
def own(speaking_of, tmp_path):
    """own(family): a copy of it, to be changed."""
    return lambda family: shutil.copytree(speaking_of(family), tmp_path / "own")


@pytest.fixture(scope="session")
def cuts(speaking_of, tmp_path_factory):
    """cuts(family): (the cut to 352 rows on `texts`, its folder), made on first use."""
    root, made = tmp_path_factory.mktemp("cut"), {}

    def cut(family: str):
        if family not in made:
            found = cut_of(speaking_of(family))
            write_cut(found, root / family)
            made[family] = found, root / family
        return made[family]

    return cut


@pytest.fixture(scope="session")
def encoders(cuts):
    """encoders(kind): (new ids by old ones, the tokenizer before the cut, the one that was written)."""
    made = {}

    def both(kind: str):
        if kind not in made:
            cut, folder = cuts(FAMILY_OF[kind])
            new = {old: number for number, old in enumerate(cut.kept)}
            made[kind] = new, cut.plan.tokenizer.encoder(), Tokenizer.from_file(str(folder / "tokenizer.json"))
        return made[kind]

    return both


def rows_of(said):
    return Rows("said", [{"text": text} for text in said])


def cut_of(folder, size=352, said=None, **kwargs):
    plan = plan_vocabulary(open_checkpoint(folder), size, **{"multiple": 8} | kwargs)
    return fit_vocabulary(plan, [rows_of(said or texts(1))])


def read(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def put(folder, name, value):
    (folder / name).write_text(json.dumps(value))


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=ANY)
def test_any_text_is_read_back_as_before(kind, text, encoders):
    _, before, after = encoders(kind)
    read_back = after.decode(after.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
    expected = before.decode(before.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
    assert read_back == expected


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=ANY)
def test_what_takes_tokens_that_stay_is_encoded_as_before(kind, text, encoders):
    new, *both = encoders(kind)
    before, after = (each.encode(text, add_special_tokens=False).ids for each in both)
    if all(number in new for number in before):
        assert after == [new[number] for number in before]
    else:
        assert len(after) >= len(before)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_the_datas_kind_take_nearly_as_few_tokens(kind, cuts):
    metrics = cuts(FAMILY_OF[kind])[0].metrics
    assert metrics["tokens_per_byte_before"] <= metrics["tokens_per_byte"] < 1.5 * metrics["tokens_per_byte_before"]


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_every_token_is_made_of_tokens_that_are_there(kind, cuts):
    tokenizer = cuts(FAMILY_OF[kind])[0].tokenizer
    assert tokenizer.merges
    made = {token for _, token in tokenizer.merges}
    assert all(each in tokenizer.ids for pair, token in tokenizer.merges for each in (*pair, token))
    special = {each["content"] for each in tokenizer.added}
    assert {token for token in tokenizer.ids if len(token) > 1 and not token.startswith("<")} <= made | special


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_a_cut_of_the_texts_alone_keeps_what_they_use(kind, speaking_of):
    """More tokens than they need: those of the text, and not the others, take what they took."""
    said = ["ab ab abd", "abd abd ab", "an an an", "abd", "ab"] * 4
    cut = cut_of(speaking_of(FAMILY_OF[kind]), 320, said)
    assert cut.metrics["tokens_per_byte"] == cut.metrics["tokens_per_byte_before"]


def applied(tokenizer, word) -> Counter:
    """How often BPE applies which merge on a word, told by doing so."""
    ranks = {pair: rank for rank, (pair, _) in enumerate(tokenizer.merges)}
    symbols, done = list(word), Counter()
    while True:
        pairs = [(ranks[pair], place) for place, pair in enumerate(zip(symbols, symbols[1:])) if pair in ranks]
        if not pairs:
            return done
        _, place = min(pairs)
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
        done[tokenizer.ids[symbols[place]]] += 1


def test_a_tokens_gain_is_how_often_its_merge_is_applied(speaking_of):
    tokenizer = plan_vocabulary(open_checkpoint(speaking_of("llama")), 352, multiple=8).tokenizer
    said = texts(3, rows=5)
    expected = Counter()
    for text in said:
        for word, _ in tokenizer.encoder().pre_tokenizer.pre_tokenize_str(text):
            expected += applied(tokenizer, word)
    found = gains(tokenizer, count_uses(tokenizer, said)[0])
    assert {number: count for number, count in found.items() if number in tokenizer.parts} == expected


def test_of_several_merges_that_make_a_token_the_one_that_bpe_takes_counts(speaking_of):
    tokenizer = plan_vocabulary(open_checkpoint(speaking_of("llama")), 352, multiple=8).tokenizer
    pair, token = next(
        (pair, token) for pair, token in tokenizer.merges if len(token) == 3 and token[:1] in tokenizer.ids
    )
    other = (token[:1], token[1:]) if pair != (token[:1], token[1:]) else (token[:2], token[2:])
    content = json.loads(json.dumps(tokenizer.content))
    content["model"]["vocab"].setdefault("".join(other[0]), len(tokenizer.tokens))
    content["model"]["vocab"].setdefault("".join(other[1]), len(tokenizer.tokens) + 1)
    content["model"]["merges"].insert(0, list(other))  # which comes first, but whose part nothing makes
    doubled = type(tokenizer)(tokenizer.folder, content, "BPE")
    assert [doubled.tokens[part] for part in doubled.parts[doubled.ids[token]]] == list(pair)


# --- what stays -------------------------------------------------------------------------------------------------------


def test_bytes_special_added_and_named_tokens_and_the_templates_words_stay(speaking_of):
    plan = plan_vocabulary(open_checkpoint(speaking_of("qwen3_vl")), 320, multiple=8)
    stay = {plan.tokenizer.tokens[number] for number in plan.stays}
    assert {*SPECIAL["bytes"], "zebra word"} <= stay
    assert sum(len(token) == 1 for token in stay) == 256
    for word in ("Call the zq function:", "assistant", "system", "<|im_end|>\n"):
        assert plan.tokenizer.ids_of([word]) <= plan.stays
    assert all(closure(plan.tokenizer, number, ()) <= plan.stays for number in plan.stays)


def test_what_a_template_with_a_name_writes_stays(own):
    folder = own("llama")
    plan = plan_vocabulary(open_checkpoint(folder), 352, multiple=8)
    number = max(number for number in plan.tokenizer.parts if number not in plan.stays)
    word = plan.tokenizer.encoder().decode([number])
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text(f"{{{{ '{word}' }}}}")
    assert number in plan_vocabulary(open_checkpoint(folder), 352, multiple=8).stays


def test_a_token_that_only_a_config_names_stays(own):
    folder = own("llama")
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    number = max(number for token, number in tokens.items() if token not in SPECIAL["bytes"])
    put(folder, "generation_config.json", {"suppress_tokens": [number], "eos_token_id": 3})
    cut = cut_of(folder, 304)
    assert number in cut.kept
    content = json.loads(cut.result.files["generation_config.json"])
    assert content["suppress_tokens"] == [cut.kept.index(number)]


def test_messages_are_read_as_the_models_own_template_writes_them(speaking_of):
    tokenizer = plan_vocabulary(open_checkpoint(speaking_of("llama")), 352, multiple=8).tokenizer
    messages = [{"role": "user", "content": "<image>ab"}, {"role": "assistant", "content": "an"}]
    row = {"messages": messages, "text": "a column of another use"}
    assert [*texts_of(tokenizer, Rows("said", [row]))] == [
        "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\nan<|im_end|>\n"
    ]


def test_messages_that_the_template_refuses_are_read_as_they_are(own):
    folder = own("llama")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}" + CHAT)
    tokenizer = plan_vocabulary(open_checkpoint(folder), 352, multiple=8).tokenizer
    rows = Rows("said", [{"messages": [{"role": "user", "content": [{"text": "ab"}]}, {"role": "x", "content": None}]}])
    assert [*texts_of(tokenizer, rows)] == ["ab\n"]


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_tokens_that_stay_are_as_before(family, speaking_of, cuts):
    cut, folder = cuts(family)
    before, after = load(speaking_of(family)), load(folder)
    new = {old: number for number, old in enumerate(cut.kept)}
    special = {each["id"] for each in cut.plan.tokenizer.added}
    ids = [old for old in cut.kept if old not in special and old in cut.plan.tokenizer.tokens][::29]
    with torch.no_grad():
        one = before(input_ids=torch.tensor([ids])).logits
        other = after(input_ids=torch.tensor([[new[old] for old in ids]])).logits
    labels = "TokenClassification" in type(before).__name__
    torch.testing.assert_close(other, one if labels else one[..., cut.kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "bert", "gpt2"])
def test_rows_are_the_same_bits_and_all_other_tensors_as_before(family, speaking_of, cuts):
    cut, folder = cuts(family)
    before, after = weights(speaking_of(family)), weights(folder)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].shape != after[name].shape}
    assert changed and all(re.fullmatch(ROWS[family].vocabulary, name) for name in changed)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor[cut.kept] if name in changed else tensor)


def test_shards_and_dtypes_make_no_difference(speaking_of, tmp_path):
    folder = speaking_of("qwen3", max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    write_cut(cut_of(folder), tmp_path / "many")
    write_cut(cut_of(speaking_of("qwen3")), tmp_path / "one")
    assert_same_weights(tmp_path / "one", tmp_path / "many")


@pytest.mark.parametrize("family", ["llama", "qwen3_vl", "bert"])
def test_sizes_are_the_plans_and_the_model_is_another(family, speaking_of, cuts):
    cut, folder = cuts(family)
    told = statistics(folder)
    assert told == statistics(cut.plan.outline) and told["vocab_size"] == 352
    assert fingerprint(open_checkpoint(folder)) != fingerprint(open_checkpoint(speaking_of(family)))


def test_rows_without_a_token_go_first_and_pad_where_tokens_are_too_few(speaking_of):
    source = open_checkpoint(speaking_of("llama"))  # 428 tokens and 5 rows more
    count = len(plan_vocabulary(source, 352, multiple=8).tokenizer.tokens)
    assert max(cut_of(source.path, count, multiple=1).kept) == count - 1
    padded = cut_of(source.path, count + 1, multiple=1)
    assert padded.kept == list(range(count + 1)) and len(padded.tokenizer.tokens) == count


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", VISION)
def test_ids_in_nested_configs_are_those_of_the_same_tokens(family, speaking_of, cuts):
    before, after = (read(folder) for folder in (speaking_of(family), cuts(family)[1]))
    tokens = [Tokenizer.from_file(str(f / "tokenizer.json")) for f in (speaking_of(family), cuts(family)[1])]
    assert len(ids_in(before)) > 4
    for one, other in ((before, after), (before["text_config"], after["text_config"])):
        for key, number in one.items():
            if key.endswith("_token_id") and number is not None:
                assert tokens[0].id_to_token(number) == tokens[1].id_to_token(other[key]), key
    assert after["text_config"]["vocab_size"] == 352 and 433 not in after.values()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mistral", "camembert"])
def test_transformers_tokenizer_agrees_with_the_file(family, speaking_of, cuts):
    cut, folder = cuts(family)
    own, old = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(speaking_of(family))
    new = {before: number for number, before in enumerate(cut.kept)}
    for text in texts(5, rows=5):
        assert own(text)["input_ids"] == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
        assert own.decode(own(text)["input_ids"]) == old.decode(old(text)["input_ids"])
    assert [new[number] for number in old("")["input_ids"]] == own("")["input_ids"]  # what is put around texts
    assert [new[number] for number in old.all_special_ids] == own.all_special_ids
    generation = folder / "generation_config.json"
    if family == "llama":
        assert read(folder, generation.name)["eos_token_id"] == [own.eos_token_id, own.pad_token_id]


def test_a_tokenizers_other_files_say_the_same(own, tmp_path):
    folder = own("llama")
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens.model.save(str(folder))  # vocab.json, merges.txt
    number = tokens.token_to_id("<|im_end|>")
    put(folder, "added_tokens.json", {"<|im_end|>": number})
    decoder = {str(number): {"content": "<|im_end|>"}}
    put(folder, "tokenizer_config.json", read(folder, "tokenizer_config.json") | {"added_tokens_decoder": decoder})
    others = ("tokenizer.model", "tokenizer.model.v3", "qwen.tiktoken")
    for name in others:
        (folder / name).write_text("the old numbers")
    write_cut(cut_of(folder), out := tmp_path / "out")
    content = read(out, "tokenizer.json")
    now = Tokenizer.from_file(str(out / "tokenizer.json")).token_to_id("<|im_end|>")
    assert now != number and read(out, "added_tokens.json") == {"<|im_end|>": now}
    assert read(out, "tokenizer_config.json")["added_tokens_decoder"] == {str(now): {"content": "<|im_end|>"}}
    assert read(out, "vocab.json") == content["model"]["vocab"]
    lines = (out / "merges.txt").read_text().splitlines()
    assert [line.split(" ") for line in lines if not line.startswith("#version")] == content["model"]["merges"]
    assert not any((out / name).exists() for name in others)


def test_a_wordpieces_list_has_a_line_a_token(own, tmp_path):
    folder = own("bert")
    content = read(folder, "tokenizer.json")
    content["model"]["vocab"] = {
        "\u2028\x85" if number == 50 else token: number for token, number in content["model"]["vocab"].items()
    }
    put(folder, "tokenizer.json", content)
    Tokenizer.from_file(str(folder / "tokenizer.json")).model.save(str(folder))
    write_cut(cut_of(folder), out := tmp_path / "out")
    lines = (out / "vocab.txt").read_text().removesuffix("\n").split("\n")
    assert {token: number for number, token in enumerate(lines)} == read(out, "tokenizer.json")["model"]["vocab"]


def test_padding_from_whose_number_on_positions_are_counted_keeps_it(own, tmp_path):
    """CamemBERT's token 0 is one that nothing uses."""
    folder = own("camembert")
    content = read(folder, "tokenizer.json")
    content["model"]["vocab"][0] = ["ssttss", -20.0]
    content |= {"added_tokens": content["added_tokens"][1:], "post_processor": None}
    put(folder, "tokenizer.json", content)
    put(folder, "config.json", read(folder) | {"bos_token_id": 2})
    few = len(plan_vocabulary(open_checkpoint(folder), 352, multiple=8).stays | {0}) + 9
    write_cut(cut := cut_of(folder, few, multiple=1), tmp_path / "out")
    assert read(tmp_path / "out")["pad_token_id"] == read(folder)["pad_token_id"] == 1
    ids = [old for old in cut.kept if old > 4][:9]
    one = load(folder)(torch.tensor([ids])).logits
    other = load(tmp_path / "out")(torch.tensor([[cut.kept.index(old) for old in ids]])).logits
    torch.testing.assert_close(other, one[..., cut.kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_that_transformers_takes_unsaid_are_known(family):
    config = CONFIG_MAPPING[family]().to_dict()
    inner = config.get("text_config", {})
    said = {key: value for part in (config, inner) for key, value in part.items() if str(key).endswith("_token_id")}
    assert {key: value for key, value in said.items() if value is not None} == ROWS[family].token_ids


def test_an_id_that_the_config_leaves_to_transformers_is_written_down(own, monkeypatch):
    folder = own("gpt2")
    put(folder, "config.json", {key: value for key, value in read(folder).items() if key != "eos_token_id"})
    (folder / "generation_config.json").unlink()
    assert "eos_token_id" not in cut_of(folder).result.config  # 50256, which this model has no row for
    monkeypatch.setitem(ROWS, "gpt2", replace(ROWS["gpt2"], token_ids={"eos_token_id": 421}))
    cut = cut_of(folder)
    assert cut.result.config["eos_token_id"] == cut.kept.index(421) != 421


def test_a_teacher_that_was_not_cut_alike_is_refused(speaking_of, cuts, tmp_path):
    student, teacher = open_checkpoint(cuts("llama")[1]), open_checkpoint(speaking_of("llama"))
    with pytest.raises(PruneKitError, match="another vocabulary"):
        check_teacher(student, teacher)
    write_cut(cut_of(speaking_of("llama")), tmp_path / "alike")
    check_teacher(student, open_checkpoint(tmp_path / "alike"))


@pytest.fixture
def one_too_many(cuts, tmp_path):
    """A folder whose rows all have tokens, and that has one more, as Gemma 3's 1B has for its sisters' images."""
    folder = shutil.copytree(cuts("llama")[1], tmp_path / "own")
    content = read(folder, "tokenizer.json")
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": 352, "content": "one too many"})
    put(folder, "tokenizer.json", content)
    return folder


def test_an_added_token_that_has_no_row_and_that_nothing_writes_still_has_none(one_too_many, tmp_path):
    put(one_too_many, "generation_config.json", {"suppress_tokens": [352]})
    write_cut(cut_of(one_too_many, 304), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("one too many", add_special_tokens=False).input_ids == [304]
    assert read(tmp_path / "out", "generation_config.json")["suppress_tokens"] == [304]
    assert statistics(tmp_path / "out")["vocab_size"] == 304 == load(tmp_path / "out").config.vocab_size


def test_a_token_that_has_no_row_and_that_the_template_writes_is_refused(one_too_many):
    (one_too_many / "chat_template.jinja").write_text("one too many")
    with pytest.raises(PruneKitError, match="'one too many' is token 352, the model has rows for 352"):
        cut_of(one_too_many, 304)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted, message",
    [
        ({"size": 200}, "--size 200: 27[0-9] tokens must stay"),
        ({"size": 433}, "--size 433: the model has 433 tokens; nothing to cut"),
        ({"size": 430, "multiple": 64}, "rounded up to a multiple of 64 that is 448"),
        ({"share": 1.0}, "--keep-share 1: the model has 433"),
        ({"share": 0.1}, "tokens must stay"),
        ({}, "--size or --keep-share"),
        ({"size": 300, "share": 0.5}, "--size or --keep-share"),
    ],
)
def test_numbers_that_are_no_good_are_refused(wanted, message, speaking_of):
    with pytest.raises(PruneKitError, match=message) as caught:
        plan_vocabulary(open_checkpoint(speaking_of("llama")), **{"multiple": 1} | wanted)
    assert "\n" not in str(caught.value)


def break_kind(folder):
    Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))


def break_vocabulary(folder):
    put(folder, "vocab.json", {"a": 5000})


def break_rows(folder):
    content = read(folder, "tokenizer.json")
    content["model"]["vocab"]["one too many"] = 433
    put(folder, "tokenizer.json", content)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda folder: put(folder, "tokenizer.json", {"model": 5}), "no tokenizer that can be read"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "can't be read as JSON"),
        (lambda folder: break_kind(folder), "of the kind WordLevel"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{% 'a"), "its chat template can't be read"),
        (break_vocabulary, "tokenizer.json hasn't"),
        (break_rows, "'one too many' is token 433, the model has rows for 433"),
        (lambda folder: put(folder, "vocab.json", [1]), "isn't an object of tokens"),
    ],
)
def test_a_tokenizer_that_cannot_be_cut_is_refused(spoil, message, own):
    folder = own("llama")
    spoil(folder)
    with pytest.raises(PruneKitError, match=re.escape(message)) as caught:
        cut_of(folder)
    assert "\n" not in str(caught.value)
