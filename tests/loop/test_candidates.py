"""What can be cut next: trials that are worth making, and candidates as scans and evaluations tell of them."""

import json

import pytest
from helpers.cuts import cut_width, first_experts
from helpers.tiny_words import save_speaking

from prunekit.checkpoint import fingerprint, open_checkpoint, statistics
from prunekit.errors import PruneKitError
from prunekit.loop.candidates import check_reachable, cut_lines, from_path, from_trials, list_trials, loss_by, sizes
from prunekit.loop.choice import Candidate, choose
from prunekit.loop.timing import Timing, part_sizes
from prunekit.surgery.cut import write_cut
from prunekit.surgery.experts import plan_experts
from prunekit.surgery.kv import cut_kv, plan_kv
from prunekit.surgery.vocabulary import cut_vocabulary, plan_vocabulary
from prunekit.surgery.width import plan_width

ALL = ("layers", "heads", "neurons", "kv")


@pytest.fixture
def model(tiny):
    return open_checkpoint(tiny("qwen3"))


def evaluation(file, losses):
    results = [{"model": str(model), "datasets": {"val": {"loss": loss}}} for model, loss in losses.items()]
    file.write_text(json.dumps(results))
    return file


def scan(file, model, *losses):
    path = [{"removed": ["text-01", "text-03"][:count], "loss": loss} for count, loss in enumerate(losses)]
    settings = {"fingerprint": fingerprint(model)}
    file.write_text(json.dumps({"settings": settings, "greedy": {"path": path}}))
    return file


def test_trials_are_of_the_kinds_that_are_allowed_and_save_what_is_wanted(model):
    most = sizes(model)["params"]
    found = list_trials(model, ALL, {"params": most / 4}, most)
    assert {name.rpartition("-")[0] for name, *_ in found} == {"heads", "neuron-share", "kv-heads"}
    assert {script for _, script, _ in list_trials(model, ("neurons",), {"params": most / 4}, most)} == {"width_cut.py"}
    assert {script for _, script, _ in list_trials(model, ALL, {"kv": 1}, most)} == {"kv_cut.py"}
    assert list_trials(model, ALL, {"params": most / 4}, 1) == [], "nothing is as small as that"


def test_trials_of_neurons_take_no_more_than_the_round_may(model):
    steps = [sizes(model)["params"] - sizes(plan_width(model, neurons=n).outline)["params"] for n in (40, 32)]
    for most in (steps[1], steps[1] - 1, steps[0] + 1):
        wish = {"params": sizes(model)["params"]}
        [*_, (_, _, flags)] = list_trials(model, ("neurons",), wish, most)
        outline = plan_width(model, neuron_share=float(flags[1])).outline
        best = max(step for step in steps if step <= most)
        assert sizes(model)["params"] - sizes(outline)["params"] == best, "as much as steps of 8 allow"


def test_behind_a_failed_round_trials_are_finer_and_none_is_repeated(model):
    now, wish = sizes(model)["params"], {"params": sizes(model)["params"]}
    names = ("heads", "neurons", "experts")
    before = list_trials(model, names, wish, 0.2 * now)
    known = [Candidate("", name, 0.1, {}, tuple(flags)) for name, _, flags in before]
    after = list_trials(model, names, wish, 0.1 * now, known=known)
    assert not {name for name, *_ in before} & {name for name, *_ in after}
    shares = [[float(flags[1]) for name, _, flags in each if "neuron" in name] for each in (before, after)]
    assert shares[1] and min(shares[1]) > max(shares[0])


def test_of_neurons_that_cannot_be_fewer_no_trial_is_made(model, tmp_path):
    cut_width(model.path, tmp_path / "narrow", neurons=8)
    assert list_trials(open_checkpoint(tmp_path / "narrow"), ("neurons",), {"params": 1}, 10**6) == []


def test_a_trial_is_named_as_its_flags_are(model):
    most = sizes(model)["params"]
    trials = list_trials(model, ALL, {"params": most / 4}, most)
    assert trials
    for name, _, flags in trials:
        assert f"{flags[0][2:]}-{flags[1]}" == name


def test_a_path_gives_a_candidate_for_each_of_its_sets(model, tmp_path):
    one, two = from_path(model, scan(tmp_path / "scan.json", model, 0.2, 0.25, 0.4))
    assert (one.name, one.cost, one.flags) == ("text-01", pytest.approx(0.05), ("--text", "1"))
    assert two.flags == ("--text", "1", "3") and two.saved["params"] == 2 * one.saved["params"]
    assert two.saved["kv"] == 2 * one.saved["kv"] > 0


def test_a_set_without_a_number_is_no_candidate(model, tmp_path):
    assert [each.name for each in from_path(model, scan(tmp_path / "scan.json", model, 0.2, None, 0.4))] == [
        "text-01 text-03"
    ]


def test_a_path_of_another_model_or_none_is_refused(model, tiny, tmp_path):
    file = scan(tmp_path / "scan.json", open_checkpoint(tiny("llama")), 0.2, 0.3)
    with pytest.raises(PruneKitError, match="is of another model"):
        from_path(model, file)
    file.write_text('{"greedy": null}')
    with pytest.raises(PruneKitError, match="has no greedy path"):
        from_path(model, file)


def test_trials_are_candidates_by_what_their_history_says(model, tmp_path):
    cut_width(model.path, tmp_path / "a", heads_kept=4)
    cut_width(model.path, tmp_path / "b", neuron_share=0.5)
    write_cut(cut_kv(plan_kv(model, 1)), tmp_path / "c")
    losses = {model.path: 0.5, tmp_path / "a": 0.7, tmp_path / "b": 0.4, tmp_path / "c": float("inf")}
    file = evaluation(tmp_path / "trials.json", losses)
    assert "Infinity" in file.read_text(), "a trial that computes no numbers is no candidate"
    heads, neurons = from_trials(model, file)
    assert (heads.kind, heads.cost, heads.flags) == ("heads", pytest.approx(0.2), ("--heads", "4"))
    assert (neurons.kind, neurons.cost, neurons.flags) == ("neurons", pytest.approx(-0.1), ("--neuron-share", "0.5"))
    saved = statistics(model)["parameters"] - statistics(tmp_path / "b")["parameters"]
    assert neurons.saved["params"] == saved
    assert cut_lines([heads, neurons]) == [["width_cut.py", "--heads", "4", "--neuron-share", "0.5"]]


def test_a_trial_that_is_no_cut_of_this_model_or_of_several_kinds_is_refused(model, tmp_path):
    file = evaluation(tmp_path / "trials.json", {model.path: 0.5, "other": 0.6})
    with pytest.raises(PruneKitError, match="other is no cut of"):
        from_trials(model, file)
    cut_width(model.path, tmp_path / "both", heads_kept=4, neuron_share=0.5)
    with pytest.raises(PruneKitError, match="cut one kind a trial"):
        from_trials(model, evaluation(file, {model.path: 0.5, tmp_path / "both": 0.6}))


def test_of_experts_trials_are_made_that_take_half_of_what_is_of_use_and_all_of_it(tiny):
    model = open_checkpoint(tiny("mixtral"))
    now = sizes(model)
    saved = {n: now["params"] - sizes(plan_experts(model, n).outline)["params"] for n in (3, 4)}
    trials = list_trials(model, ("experts",), {"params": saved[4]}, saved[4])
    assert trials == [(f"experts-{n}", "expert_cut.py", ["--experts", f"{n}"]) for n in (5, 4)]
    most = now["params"]
    [*_, last] = list_trials(model, ("experts",), {"params": most}, most)
    assert last[2] == ["--experts", "3"], "half of them stay in a round"
    assert list_trials(model, ("experts",), {"kv": 1}, most) == [], "they have no cache"
    assert list_trials(model, ("experts",), {"params": 1}, 1) == [], "none is as small as that"
    check_reachable(model, ("experts",), {"params": now["params"] - saved[3]})
    with pytest.raises(PruneKitError, match="TARGET_PARAMS: is .* cuts of experts leave"):
        check_reachable(model, ("experts",), {"params": 0.1 * now["params"]})


def test_of_a_model_without_experts_or_one_that_uses_all_no_trial_is_made(model, own):
    assert list_trials(model, ("experts",), {"params": 10**6}, 10**6) == []
    folder = own("mixtral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 6}))
    assert list_trials(open_checkpoint(folder), ("experts",), {"params": 10**6}, 10**6) == []


def test_a_cut_of_experts_is_a_candidate_and_is_made_before_heads_and_neurons(tiny, tmp_path):
    model = open_checkpoint(tiny("mixtral"))
    write_cut(first_experts(model.path, 4), tmp_path / "a")
    cut_width(model.path, tmp_path / "b", neuron_share=0.5)
    losses = {model.path: 0.5, tmp_path / "b": 0.6, tmp_path / "a": 0.7}
    found = from_trials(model, evaluation(tmp_path / "trials.json", losses))
    experts = found[1]
    assert (experts.kind, experts.name, experts.cost) == ("experts", "experts 4", pytest.approx(0.2))
    assert experts.saved["params"] == statistics(model)["parameters"] - statistics(tmp_path / "a")["parameters"]
    assert cut_lines(choose(found, {"params": 10**6}, 10**6)) == [
        ["expert_cut.py", "--experts", "4"], ["width_cut.py", "--neuron-share", "0.5"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "removed", "heals"),
    [("qwen3", "text-01 text-03", True), ("qwen3", "text-00 text-01", False), ("gemma3_text", "text-01", False)],
)
def test_layers_are_cut_with_heal_where_manual_select_would_take_it(tiny, family, removed, heals):
    layers = Candidate("layers", removed, 0.1, {}, ("--text", "1"))
    model = open_checkpoint(tiny(family))
    assert cut_lines([layers], model) == [["manual_select.py", "--text", "1", *["--heal"] * heals]]
    assert cut_lines([layers]) == [["manual_select.py", "--text", "1"]]


def test_of_a_vocabulary_trials_are_made_that_take_what_is_of_use(tmp_path):
    model = open_checkpoint(save_speaking("llama", tmp_path / "speaking"))
    now, rows = sizes(model), statistics(model)["vocab_size"]
    most = now["params"] - sizes(plan_vocabulary(model, 352).outline)["params"]
    trials = list_trials(model, ("vocabulary",), {"params": most}, most)
    assert trials and all(script == "vocab_cut.py" and flags[0] == "--size" for _, script, flags in trials)
    kept = [int(flags[1]) for _, _, flags in trials]
    assert kept == [384] and rows == 433, "half of it would be less than a step of 64"
    assert list_trials(model, ("vocabulary",), {"kv": 1}, most) == [], "it saves no cache"
    with pytest.raises(PruneKitError, match="TARGET_PARAMS: is"):
        check_reachable(model, ("vocabulary",), {"params": 0.1 * now["params"]})
    check_reachable(model, ("vocabulary",), {"params": now["params"] - most})


def test_a_cut_of_the_vocabulary_costs_what_it_adds_to_the_loss_of_the_same_text(tmp_path):
    model = open_checkpoint(save_speaking("llama", tmp_path / "speaking"))
    write_cut(cut_vocabulary(plan_vocabulary(model, 352), {}), tmp_path / "cut")
    file = tmp_path / "trials.json"
    scores = {model.path: {"loss": 0.5, "tokens": 100}, tmp_path / "cut": {"loss": 0.4, "tokens": 150}}
    file.write_text(json.dumps([{"model": str(name), "datasets": {"val": each}} for name, each in scores.items()]))
    [found] = from_trials(model, file)
    assert found.kind == "vocabulary" and found.cost == pytest.approx(0.4 * 1.5 - 0.5)
    assert found.flags == ("--size", str(statistics(tmp_path / "cut")["vocab_size"]))
    assert loss_by({"loss": 0.4}, 100) == 0.4, "an evaluation that doesn't count tokens"


def test_with_a_timing_candidates_save_seconds_and_a_speed_can_be_out_of_reach(model, tmp_path):
    timing = Timing({"attention": 0.4, "mlp": 0.4, "rest": 0.2}, part_sizes(model))
    one, two = from_path(model, scan(tmp_path / "scan.json", model, 0.2, 0.25, 0.4), timing)
    assert two.saved["speed"] == pytest.approx(2 * one.saved["speed"]) and one.saved["speed"] > 0
    most = sizes(model)["params"]
    kinds = {name.rpartition("-")[0] for name, *_ in list_trials(model, ALL, {"speed": 0.1}, most, timing)}
    assert kinds == {"heads", "neuron-share", "kv-heads"}
    check_reachable(model, ("layers",), {"speed": 0.5}, timing)
    with pytest.raises(PruneKitError, match="TARGET_SPEED: is 10.0% of the base's seconds of 100.0%.*by the estimate"):
        check_reachable(model, ("layers",), {"speed": 0.1}, timing)


def test_a_target_that_the_kinds_cannot_reach_is_refused(model):
    now = sizes(model)
    check_reachable(model, ("layers",), {"params": 0.6 * now["params"], "kv": 0.5 * now["kv"]})
    check_reachable(model, ("kv",), {"kv": 0.5 * now["kv"]})
    with pytest.raises(PruneKitError, match="TARGET_KV: is .*cuts of heads, neurons leave"):
        check_reachable(model, ("heads", "neurons"), {"kv": 0.5 * now["kv"]})
    with pytest.raises(PruneKitError, match="TARGET_PARAMS"):
        check_reachable(model, ("kv",), {"params": 0.2 * now["params"]})
