"""The tiny Qwen3-VL of many skills: its data are what they claim, its training computes what it should."""

import functools
import json
import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.paths import TINY_VL
from helpers.tiny_vl import network, skills, start_training, tiny_vl
from PIL import Image
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from prunekit.errors import PruneKitError

ALL = tuple(skills.SIZES)
# What examples/tiny_vl/model answers without a mistake, of 200 held-out questions each
RATES = {
    "read": 0.96,
    "line": 0.965,
    "count": 0.995,
    "place": 1.0,
    "bars": 0.995,
    "add": 0.995,
    "add_text": 1.0,
    "copy": 0.965,
}


@pytest.fixture(scope="module")
def processor():
    return tiny_vl.build_processor()


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    return tiny_vl.build_model(processor).eval()


def scenes_of(skill, number=100):
    rng = np.random.default_rng(5)
    return [skills.plan(rng, skill) for _ in range(number)]


def test_the_model_is_deep_and_proportioned_like_real_ones(model):
    text, vision = model.config.text_config, model.config.vision_config
    assert text.num_hidden_layers >= 12 and vision.depth >= 8 and len(vision.deepstack_visual_indexes) == 3
    assert text.head_dim >= 32 and 4 <= text.num_key_value_heads < text.num_attention_heads
    assert text.head_dim != text.hidden_size // text.num_attention_heads
    assert sum(text.rope_parameters["mrope_section"]) * 2 == text.head_dim
    assert 4e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 8e6
    assert {"q_norm", "k_norm"} <= {name.split(".")[-2] for name, _ in model.named_parameters()}


def test_the_vocabulary_has_room_for_a_cut(model, processor):
    assert 2048 <= len(processor.tokenizer) == model.config.text_config.vocab_size <= 4096


def test_the_pre_tokenizer_is_qwens(processor):
    pieces = json.loads(processor.tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"]
    assert pieces[0]["pattern"]["Regex"] == (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@pytest.mark.parametrize("text", ["Read the text.", "Ünï 123\n\n漢字 🙂", "Жёлтый  круг", " a\tb", "user assistant"])
def test_any_text_comes_back_from_its_tokens(processor, text):
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("skill", ["read", "line", "cyrillic"])
def test_what_is_read_comes_a_letter_a_token(processor, skill):
    for scene in scenes_of(skill):
        answer = scene.turns[0][1]
        assert len(processor.tokenizer(answer)["input_ids"]) == len(answer)


def test_the_merges_are_as_bpe_has_them(processor):
    """Every merge makes a new token of two that there are already."""
    merges = json.loads(processor.tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    known = set(ByteLevel.alphabet())
    for one, two in merges:
        assert {one, two} <= known and one + two not in known
        known.add(one + two)
    assert len(merges) > 1500


def test_held_out_scenes_share_no_key_with_what_is_trained_on(monkeypatch):
    monkeypatch.setattr(skills, "draw", lambda *_: None)  # of scenes alone
    banned = tiny_vl.held_out_keys(0)
    for name in ("rl_train", "cyrillic_train"):
        assert not any(scene.keys & banned for scene in tiny_vl.plan_rows(name, 0, banned))
    for skill in ALL:
        for number in range(20):
            scenes, _ = tiny_vl.draw_batch((0, number, 0), skill, -1)
            assert not any(scene.keys & banned for scene in scenes)


def test_a_sum_that_is_held_out_in_a_picture_is_held_out_in_text():
    assert (
        skills._plan_add(np.random.default_rng(1), 99).keys == skills._plan_add_text(np.random.default_rng(1), 99).keys
    )


@pytest.fixture
def small(monkeypatch):
    """small(rows): have data sets of so few rows, and hold out what is in those."""

    def shrink(rows):
        monkeypatch.setattr(tiny_vl, "DATASETS", {name: (rows, *rest) for name, (_, *rest) in tiny_vl.DATASETS.items()})
        monkeypatch.setattr(tiny_vl, "held_out_keys", functools.cache(tiny_vl.held_out_keys.__wrapped__))

    return shrink


def test_data_are_the_same_every_time(small, tmp_path):
    small(9)
    for name in ("one", "two"):
        tiny_vl.make_data(tmp_path / name, seed=0)
    pictures = sorted((tmp_path / "one" / "images").iterdir())
    assert pictures
    for file in pictures:
        assert file.read_bytes() == (tmp_path / "two" / "images" / file.name).read_bytes()
    for file in (tmp_path / "one").glob("*.jsonl"):
        assert file.read_text().replace("/one/", "/two/") == (tmp_path / "two" / file.name).read_text()
        for row in map(json.loads, file.read_text().splitlines()):
            assert row["messages"][1]["content"] == row["solution"] and row["skill"] in ALL
            assert len(row["images"]) == row["messages"][0]["content"].count("<image>")


def test_rows_of_rl_are_the_hard_ones_and_for_a_quarter_cyrillic_ones(small, tmp_path):
    small(12)
    tiny_vl.make_data(tmp_path / "data", seed=0)
    hard, cyrillic, mixed = (
        [json.loads(row) for row in (tmp_path / f"data/{name}.jsonl").read_text().splitlines()]
        for name in ("rl_train", "cyrillic_train", "rl_mixed")
    )
    assert mixed == hard + cyrillic[:4]
    assert [row["skill"] for row in mixed].count("cyrillic") == len(mixed) / 4


def test_a_share_of_the_data_is_their_beginning(small, tmp_path):
    small(18)
    for name, part in (("whole", 1.0), ("part", 0.5)):
        tiny_vl.make_data(tmp_path / name, seed=0, part=part)
    whole, part = (
        [json.loads(row) for row in (tmp_path / name / "val.jsonl").read_text().splitlines()]
        for name in ("whole", "part")
    )
    assert [row["messages"] for row in part] == [row["messages"] for row in whole[:9]]
    for file in (tmp_path / "part" / "images").iterdir():
        assert file.read_bytes() == (tmp_path / "whole" / "images" / file.name).read_bytes()


def test_batches_are_the_same_every_time():
    for skill in ALL:
        (one, drawn), (two, again) = (tiny_vl.draw_batch((0, 3, 1), skill, -1) for _ in range(2))
        assert one == two and (drawn is None or np.array_equal(drawn, again))
        other = tiny_vl.draw_batch((1, 3, 1), skill, -1)[0]
        assert [scene.turns for scene in other] != [scene.turns for scene in one]


def test_counts_are_of_what_is_there():
    for scene in scenes_of("count"):
        for prompt, answer in scene.turns:
            name = re.fullmatch(r"How many (\w+?)(?:s| shapes) are there\?", prompt.replace("crosses", "crosss"))[1]
            assert int(answer) == sum(name in (thing["colour"], thing["shape"]) for thing in scene.content["things"])


def test_places_are_where_things_are():
    beside = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
    rows, columns = ("top", "middle", "bottom"), ("left", "centre", "right")
    kinds = set()
    for scene in scenes_of("place", 300):
        things = {f"{thing['colour']} {thing['shape']}": thing for thing in scene.content["things"]}
        cells = {(thing["row"], thing["column"]): name for name, thing in things.items()}
        for prompt, answer in scene.turns:
            if match := re.fullmatch(r"What is (left of|right of|above|below) the (.*)\?", prompt):
                down, right = beside[match[1]]
                assert cells[things[match[2]]["row"] + down, things[match[2]]["column"] + right] == answer
            elif match := re.fullmatch(r"Where is the (.*)\?", prompt):
                assert answer == f"{rows[things[match[1]]['row']]} {columns[things[match[1]]['column']]}"
            elif match := re.fullmatch(r"What is in the (\w+) (\w+)\?", prompt):
                assert cells[rows.index(match[1]), columns.index(match[2])] == answer
            else:
                shape = re.fullmatch(r"What colour is the (\w+)\?", prompt)[1]
                assert [name.split()[0] for name in things if name.endswith(shape)] == [answer]
            kinds.add(prompt.split(" the ")[0])
    assert len(kinds) == 7


def test_bars_have_the_asked_heights():
    for scene in scenes_of("bars"):
        heights = dict(zip("ABCDE", scene.content["heights"], strict=False))
        assert len(set(heights.values())) == len(heights)
        for prompt, answer in scene.turns:
            if match := re.fullmatch(r"What is the value of bar (\w)\?", prompt):
                assert int(answer) == heights[match[1]]
            else:
                best = max if prompt == "Which bar is the highest?" else min
                assert answer == best(heights, key=heights.get)


@pytest.mark.parametrize("skill", ["add", "add_text"])
def test_sums_are_right(skill):
    for scene in scenes_of(skill):
        prompt, answer = scene.turns[0]
        text = scene.content["lines"][0] if skill == "add" else prompt
        one, two = map(int, re.findall(r"\d+", text))
        assert int(answer) == one + two


def test_a_line_is_the_one_at_its_place():
    for scene in scenes_of("line"):
        for prompt, answer in scene.turns:
            place = ("first", "second", "third").index(re.fullmatch(r"Read the (\w+) line\.", prompt)[1])
            assert scene.content["lines"][place] == answer


def test_the_colour_of_a_thing_is_in_its_cell():
    """Without light, noise and blur: most of a cell's middle is of the colour that its record names."""
    look = skills.PLAIN.eased(0.0)
    for scene in scenes_of("place", 30):
        picture = skills.draw(np.random.default_rng(0), scene, look).astype(int)
        for thing in scene.content["things"]:
            middle = picture[thing["row"] * 32 + 14 : thing["row"] * 32 + 18, thing["column"] * 32 + 14 :][:, :4]
            distance = {name: abs(middle - rgb).sum(-1).mean() for name, rgb in skills.COLOURS.items()}
            assert min(distance, key=distance.get) == thing["colour"]


@pytest.mark.parametrize("look", [skills.PLAIN, skills.HARD])
def test_every_line_of_text_fits_its_picture(look):
    calm = skills.replace(look, noise=0.0, rotation=0.0, stains=0, blur=0.0)
    rng = np.random.default_rng(0)
    for skill in ("read", "line", "add", "cyrillic"):
        for scene in scenes_of(skill, 50):
            picture = skills.draw(rng, scene, calm).astype(int)
            edges = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
            assert np.ptp(edges, axis=0).max() == 0


def test_a_larger_size_of_spoiling_is_a_harder_look():
    plain, hard = (skills.PLAIN.eased(ease) for ease in (0.0, 1.0))
    assert (plain.noise, plain.blur, plain.stains) == (0, 0, 0) and hard == skills.PLAIN


@pytest.mark.parametrize("skill", ["read", "place", "copy"])
def test_the_network_computes_what_transformers_does(model, processor, skill):
    scenes, drawn = tiny_vl.draw_batch((0, 0, 0), skill, -1)
    batch = tiny_vl.Batches(processor, "cpu")(scenes[:3], None if drawn is None else drawn[:3], 1)
    labels, _ = batch.pop("labels"), batch.pop("owner")
    logits = iter(network.Network(model)(**batch))
    tokens = iter(labels.tolist())
    for row, scene in enumerate(scenes[:3]):
        prompt, answer = scene.turns[0]
        asked = [{"type": "text", "text": prompt}]
        images = None
        if drawn is not None:
            asked, images = [{"type": "image"}, *asked], [Image.fromarray(drawn[row])]
        start = [{"role": "user", "content": asked}]
        text = processor.apply_chat_template(start, add_generation_prompt=True)
        encoded = processor(text=[f"{text}{answer}<|im_end|>\n"], images=images, return_tensors="pt")
        with torch.no_grad():
            theirs = model(**encoded).logits[0]
        said = len(processor.tokenizer(answer)["input_ids"]) + 2
        for place in range(said):
            torch.testing.assert_close(next(logits), theirs[place - said - 1], atol=1e-5, rtol=1e-4)
            assert next(tokens) == encoded["input_ids"][0, place - said]


def test_a_question_is_right_if_all_its_tokens_are(processor):
    scenes, drawn = tiny_vl.draw_batch((0, 0, 0), "count", -1)
    batch = tiny_vl.Batches(processor, "cpu")(scenes, drawn, 3)
    labels, owner = batch["labels"], batch["owner"]
    logits = torch.nn.functional.one_hot(labels.clamp(min=0), len(processor.tokenizer)).float()
    right = tiny_vl.right_answers(logits, labels, owner)
    assert len(right) == 3 * len(scenes) and right.all()
    logits[5] = 0.0  # the end of the second answer
    assert (tiny_vl.right_answers(logits, labels, owner) != right).nonzero().tolist() == [[1]]


def test_a_model_in_bf16_keeps_the_positions_of_the_one_in_fp32(processor):
    halved = tiny_vl.build_model(processor)
    before = {name: buffer.clone() for name, buffer in halved.named_buffers()}
    tiny_vl.halve(halved)
    assert {parameter.dtype for parameter in halved.parameters()} == {torch.bfloat16}
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in halved.named_buffers())


def test_further_questions_follow_as_the_chat_template_has_them(processor):
    scenes, drawn = tiny_vl.draw_batch((0, 0, 0), "line", -1)
    batch = tiny_vl.Batches(processor, "cpu")(scenes[:1], drawn[:1], 3)
    messages = []
    for number, (prompt, answer) in enumerate(scenes[0].turns):
        image = [] if number else [{"type": "image"}]
        messages += [{"role": "user", "content": [*image, {"type": "text", "text": prompt}]}]
        messages += [{"role": "assistant", "content": answer}]
    text = processor.apply_chat_template(messages)
    encoded = processor(text=[text], images=[Image.fromarray(drawn[0])], return_tensors="pt")
    theirs = encoded["input_ids"][0, :-1].tolist()
    assert batch["ids"][0].tolist()[: len(theirs)] == theirs
    torch.testing.assert_close(encoded["pixel_values"], batch["patches"][0])


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile makes C++ of it")
def test_compiled_layers_have_the_gradients_of_plain_ones(model, processor):
    batch = tiny_vl.Batches(processor, "cpu")(*tiny_vl.draw_batch((0, 0, 0), "read", -1), 1)
    labels, _ = batch.pop("labels"), batch.pop("owner")
    gradients = []
    for compiled in (False, True):
        model.zero_grad()
        torch.nn.functional.cross_entropy(network.Network(model, compiled)(**batch), labels).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    plain, compiled = gradients
    assert plain.keys() == compiled.keys() and len(plain) > 200
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, atol=1e-6, rtol=1e-3)


def test_the_optimizer_steps_as_torchs_muon_and_adamw(processor):
    """To the precision of bf16 in Muon's iterations."""
    layers = {"matrix": torch.nn.Linear(16, 24, bias=False), "embed": torch.nn.Embedding(5, 16)}
    ours = torch.nn.ModuleDict(layers)
    theirs = torch.nn.ModuleDict({"matrix": torch.nn.Linear(16, 24, bias=False), "embed": torch.nn.Embedding(5, 16)})
    theirs.load_state_dict(ours.state_dict())
    optimizer = tiny_vl.Optimizer(ours, 0, 1)
    muon = torch.optim.Muon(theirs["matrix"].parameters(), lr=tiny_vl.MUON_RATE, momentum=0.95, weight_decay=0.01)
    adamw = torch.optim.AdamW(theirs["embed"].parameters(), lr=tiny_vl.ADAMW_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    for number in range(3):
        torch.manual_seed(number)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.collect()
        optimizer.step(number, 1, 1.0)
        muon.step()
        adamw.step()
    torch.testing.assert_close(ours["embed"].weight, theirs["embed"].weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours["matrix"].weight, theirs["matrix"].weight, atol=2e-3, rtol=0)


def test_a_skill_moves_up_when_it_is_known_and_is_asked_less():
    curriculum = tiny_vl.Curriculum.begin(False)
    before = curriculum.shares()
    assert before["line"] == before["add"] == before["cyrillic"] == 0
    asked = dict.fromkeys(skills.SIZES, 100)
    for _ in range(8):
        curriculum.review(asked | {"copy": 0}, asked, 0.1)
    assert curriculum.levels["read"] == len(skills.LEVELS["read"]) - 1 and curriculum.levels["copy"] == 0
    shares = curriculum.shares()
    assert sum(shares.values()) == pytest.approx(1) and shares["cyrillic"] == tiny_vl.CYRILLIC_SHARE
    assert shares["count"] < shares["copy"] and shares["line"] > 0


def test_the_last_two_fifths_are_of_the_tests_difficulty():
    curriculum = tiny_vl.Curriculum.begin(False)
    nothing = dict.fromkeys(skills.SIZES, 0)
    for done in np.linspace(0, 0.6, 20):
        curriculum.review(nothing, dict.fromkeys(skills.SIZES, 100), float(done))
    assert all(curriculum.levels[skill] == len(levels) - 1 for skill, levels in skills.LEVELS.items())


def test_skills_are_picked_as_often_as_their_shares_say():
    shares = {skill: 1 / 8 for skill in skills.SKILLS} | {"cyrillic": 0.0}
    assert sorted(tiny_vl.pick_skills(shares, 8, 0, 0)) == sorted(skills.SKILLS)
    many = [skill for step in range(400) for skill in tiny_vl.pick_skills(shares, 5, 0, step)]
    assert "cyrillic" not in many and all(abs(many.count(skill) - 250) < 50 for skill in skills.SKILLS)


def test_processes_share_out_all_micro_batches_and_none_has_only_the_dearest():
    shares = [tiny_vl.places_of(rank, 2, 8) for rank in range(2)]
    assert shares == [[0, 3, 4, 7], [1, 2, 5, 6]]
    assert sorted(sum((tiny_vl.places_of(rank, 3, 6) for rank in range(3)), [])) == list(range(6))


def test_the_rate_of_learning_warms_up_and_goes_down():
    rates = [tiny_vl.learning_rate(step, 6000, 1.0) for step in range(6000)]
    assert all(one < two for one, two in pairwise(rates[:60])) and rates[60] == pytest.approx(0.99, abs=1e-3)
    assert all(one > two for one, two in pairwise(rates[60:])) and rates[3000] == pytest.approx(0.505, abs=1e-3)
    assert rates[-1] == pytest.approx(0.01, abs=1e-3)


def test_an_out_that_is_used_is_refused(tmp_path, monkeypatch):
    used = tmp_path / "used"
    used.mkdir()
    (used / "precious").write_text("")
    monkeypatch.setattr("sys.argv", ["tiny_vl.py", "train", "--out", str(used)])
    with pytest.raises(PruneKitError, match="is in use"):
        tiny_vl.main()
    assert [file.name for file in used.iterdir()] == ["precious"]


def weights(out):
    return load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The OUT of a training that nothing disturbed."""
    out = tmp_path_factory.mktemp("trained") / "out"
    training = start_training(out)
    assert training.wait() == 0, training.stderr.read()
    return out


@pytest.mark.slow
@pytest.mark.ci
def test_a_killed_training_goes_on_to_the_same_weights(trained, tmp_path):
    out = tmp_path / "out"
    killed = start_training(out)
    for line in killed.stdout:
        if line.startswith("4/8"):
            killed.kill()
            break
    killed.wait()
    assert not (out / "model").exists()
    other = start_training(out, "--seed", "1")
    assert other.wait() == 2 and "other settings" in other.stderr.read()
    again = start_training(out)
    assert again.wait() == 0, again.stderr.read()
    assert "\n2/8" not in f"\n{again.stdout.read()}"
    one, two = weights(trained), weights(out)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    steps = [[json.loads(line)["step"] for line in (each / "log.jsonl").open()] for each in (trained, out)]
    assert steps == [[2, 4, 6, 8]] * 2


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes_compute_what_one_does(trained, tmp_path):
    training = start_training(tmp_path / "out", processes=2)
    assert training.wait() == 0, training.stderr.read()
    one, two = weights(trained), weights(tmp_path / "out")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-3, rtol=0.02)


@pytest.mark.slow
@pytest.mark.ci
def test_the_saved_model_answers_as_the_training_measured(trained):
    """What a training says of its model holds for who loads it: here for the first tokens of answers."""
    loaded = Qwen3VLForConditionalGeneration.from_pretrained(trained / "model", dtype=torch.float32).eval()
    saved = AutoProcessor.from_pretrained(trained / "model")
    scenes, drawn = tiny_vl.draw_batch((0, 0, 0), "read", -1)
    batch = tiny_vl.Batches(saved, "cpu")(scenes, drawn, 1)
    del batch["labels"], batch["owner"]
    ours = network.Network(loaded)(**batch)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": scenes[0].turns[0][0]}]}]
    text = saved.apply_chat_template(messages, add_generation_prompt=True)
    with torch.no_grad():
        theirs = loaded(**saved(text=[text], images=[Image.fromarray(drawn[0])], return_tensors="pt")).logits[0, -1]
    torch.testing.assert_close(ours[0], theirs, atol=1e-4, rtol=1e-4)


# --- the committed model ---


def test_the_committed_weights_are_bf16_safetensors_of_at_most_16_mb():
    from prunekit.checkpoint import open_checkpoint

    assert {tensor.dtype for tensor in open_checkpoint(TINY_VL).tensors.values()} == {"BF16"}
    assert sum(file.stat().st_size for file in TINY_VL.iterdir()) <= 16e6


def test_the_committed_model_is_the_one_that_the_script_builds(model, processor):
    loaded = Qwen3VLForConditionalGeneration.from_pretrained(TINY_VL)
    assert {name: each.shape for name, each in loaded.named_parameters()} == {
        name: each.shape for name, each in model.named_parameters()
    }
    saved = AutoProcessor.from_pretrained(TINY_VL).tokenizer
    assert saved.get_vocab() == processor.tokenizer.get_vocab()


@pytest.mark.parametrize("skill", skills.SKILLS)
def test_the_committed_model_has_every_skill(committed, skill):
    """On 48 held-out questions of each, three standard errors below what it has on all 200."""
    scenes, drawn, embedded, batches = committed
    rows = [number for number, scene in enumerate(scenes) if scene.skill == skill][:48]
    stack = None if skills.SIZES[skill] is None else np.stack([drawn[number] for number in rows])
    batch = batches([scenes[number] for number in rows], stack, 1)
    labels, owner = batch.pop("labels"), batch.pop("owner")
    with torch.no_grad():
        right = tiny_vl.right_answers(embedded(**batch), labels, owner).float().mean().item()
    rate = min(RATES[skill], 0.97)
    assert right >= rate - 3 * (rate * (1 - rate) / 48) ** 0.5


@pytest.fixture(scope="module")
def committed():
    """The first held-out questions and their pictures, and the committed model to answer them."""
    loaded = Qwen3VLForConditionalGeneration.from_pretrained(TINY_VL, dtype=torch.float32).eval()
    scenes = tiny_vl.plan_rows("test", 0, frozenset())[: 48 * len(skills.SKILLS)]
    drawn = tiny_vl.pictures("test", scenes, 0, 0)
    batches = tiny_vl.Batches(AutoProcessor.from_pretrained(TINY_VL), torch.device("cpu"))
    return scenes, drawn, network.Network(loaded), batches


def test_it_generates_what_it_answers_teacher_forced(committed):
    """A few of each skill, by transformers' own generation."""
    scenes, drawn, _, _ = committed
    loaded = Qwen3VLForConditionalGeneration.from_pretrained(TINY_VL, dtype=torch.float32).eval()
    saved = AutoProcessor.from_pretrained(TINY_VL)
    right = 0
    for scene, picture in list(zip(scenes, drawn, strict=True))[:24]:
        prompt, answer = scene.turns[0]
        content = [{"type": "text", "text": prompt}]
        images = {} if picture is None else {"images": [Image.fromarray(picture)]}
        text = saved.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, *content] if images else content}],
            add_generation_prompt=True,
        )
        inputs = saved(text=[text], return_tensors="pt", **images)
        made = loaded.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        right += saved.decode(made, skip_special_tokens=True) == answer
    assert right >= 19  # of 24, at .95 each in 999 of 1000 cases
