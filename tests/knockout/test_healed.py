"""Removals scored healed: as healing on its own leaves the model, and every weight is put back."""

import pytest
import torch
from helpers.calibration import data, self_labelled, text_batches
from helpers.tiny_models import load

from prunekit.checkpoint import open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.knockout.healed import HealedScanner
from prunekit.knockout.removal import Removal
from prunekit.knockout.scanner import Scanner
from prunekit.model.scores import score_batches
from prunekit.surgery.in_memory import removed
from prunekit.surgery.layers import plan_layers
from prunekit.surgery.layers_fit import fit_layers

FAMILIES = ["llama", "qwen3_vl", "qwen3_moe", "gpt2"]
SCORED = text_batches(2, seed=5)


def calibration(folder):
    """Rows whose labels are the uncut model's own answers: healing pays there."""
    return self_labelled(load(folder), data())


def healed_scanner(folder):
    return HealedScanner(Scanner(open_checkpoint(folder), load(folder), SCORED), calibration(folder))


def loss(records, name):
    scores = [record["scores"][name] for record in records]
    return sum(sum(s["loss"]) for s in scores) / sum(sum(s["tokens"]) for s in scores)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_gone_has_its_seams_healed_as_manual_select_heals_them(family, tiny):
    folder = tiny(family)
    records = healed_scanner(folder).measure([Removal("text", 2), Removal("text", 4)], [])
    model, plan = load(folder), plan_layers(open_checkpoint(folder), text=[2, 4])
    seams = fit_layers(plan, model, calibration(folder), quiet=True, behind=False).seams
    assert any(seam["refitted"] for seam in seams)
    with removed(model, plan):
        assert loss(records, "baseline") == pytest.approx(score_batches(model, SCORED)["loss"], rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_last_layer_s_candidate_is_what_healing_its_seam_gives(family, tiny):
    # Behind the last layer's seam nothing is left to refit: a candidate's seam is all of the healing
    folder = tiny(family)
    scanner = healed_scanner(folder)
    [found] = [loss(scanner.measure([], [Removal("text", 4)]), "text-04")]
    model, plan = load(folder), plan_layers(open_checkpoint(folder), text=[4])
    [seam] = fit_layers(plan, model, calibration(folder), quiet=True).seams
    with removed(model, plan):
        healed = score_batches(model, SCORED)["loss"]
    assert seam["refitted"]  # else healing has undone it
    assert found == pytest.approx(healed, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3_vl"])
def test_candidates_are_scored_alike_alone_and_among_others(family, tiny):
    folder, gone = tiny(family), [Removal("text", 1)]
    together = healed_scanner(folder).measure(gone, [Removal("text", i) for i in (0, 2, 3, 4)])
    for layer in (0, 3):
        alone = healed_scanner(folder).measure(gone, [Removal("text", layer)])
        name = f"text-{layer:02d}"
        assert loss(together, name) == pytest.approx(loss(alone, name), rel=1e-5)


def test_a_scan_leaves_the_healed_weights_and_the_uncut_ones_as_they_were(tiny):
    scanner, gone = healed_scanner(tiny("qwen3_vl")), [Removal("text", 1)]
    uncut = [p.clone() for p in scanner.model.parameters()]
    scanner.heal(gone)
    healed = [p.clone() for p in scanner.model.parameters()]
    scanner.measure(gone, [Removal("text", 2), Removal("text", 3)])
    assert all(torch.equal(a, b) for a, b in zip(healed, scanner.model.parameters(), strict=True))
    scanner.heal([])
    assert all(torch.equal(a, b) for a, b in zip(uncut, scanner.model.parameters(), strict=True))


def test_a_model_that_is_as_it_was_is_not_run_again(tiny, monkeypatch):
    scanner, runs = healed_scanner(tiny("llama")), []
    trace = scanner.scanner.trace
    monkeypatch.setattr(scanner.scanner, "trace", lambda batch, gone: runs.append(str(gone)) or trace(batch, gone))
    for gone in ([], [Removal("text", 1)]):
        scanner.measure(gone, [])
        scanner.measure(gone, [Removal("text", 2), Removal("text", 3)])
        scanner.measure(gone, [Removal("text", 4)])
    assert len(runs) == 2 * len(SCORED) and len(set(runs)) == 2


def test_candidates_that_come_later_are_scored_as_all_at_once(tiny):
    scanner, gone = healed_scanner(tiny("qwen3_vl")), [Removal("text", 1)]
    scanner.scanner.state_bytes = 4000  # few states are kept, and those in between found again
    first, last = Removal("text", 4), Removal("text", 2)
    found = [loss(scanner.measure(gone, [candidate]), str(candidate)) for candidate in (first, last)]
    together = healed_scanner(tiny("qwen3_vl")).measure(gone, [first, last])
    assert found == pytest.approx([loss(together, str(candidate)) for candidate in (first, last)], rel=1e-5)


def test_a_scan_keeps_its_room_for_states(tiny):
    scanner = HealedScanner(
        Scanner(open_checkpoint(tiny("llama")), load(tiny("llama")), text_batches(3, seed=5)),
        calibration(tiny("llama")),
    )
    scanner.scanner.state_bytes = room = 1000  # which doesn't divide by three
    scanner.measure([], [])
    assert scanner.scanner.state_bytes == room


def test_the_divergence_of_a_healed_model_is_the_one_from_the_uncut_model(tiny):
    scanner = healed_scanner(tiny("llama"))
    [first, _] = scanner.measure([Removal("text", 2)], [])
    plain = Scanner(open_checkpoint(tiny("llama")), load(tiny("llama")), SCORED)
    [cut] = [plain.measure([Removal("text", 2)], [], 0)]
    assert sum(first["scores"]["baseline"]["kl"]) > 0
    assert sum(first["scores"]["baseline"]["kl"]) != sum(cut["scores"]["baseline"]["kl"])


def test_a_family_that_can_t_be_healed_is_refused(tiny):
    with pytest.raises(PruneKitError, match="norms"):
        healed_scanner(tiny("gemma3_text")).measure([], [Removal("text", 2)])
