"""Healing: what linear least squares can give back is given back, and nothing is ever made worse."""

import json

import pytest
import torch
import transformers as hf
from helpers.calibration import data, picture_batches, self_labelled, write_texts
from helpers.llama_sides import sides_of
from helpers.paths import EMBEDDED
from helpers.tiny_models import FAMILIES, TEXT, build, load, logits

from prunekit.checkpoint import open_checkpoint
from prunekit.checkpoint.provenance import data_record
from prunekit.data.batches import Calibration, calibrate, draw_rows, read_calibration
from prunekit.data.encode import Encoder, encoder_of
from prunekit.data.rows import Rows
from prunekit.errors import PruneKitError
from prunekit.families import FAMILIES as ROWS
from prunekit.model.load import load_model
from prunekit.model.scores import score_batches
from prunekit.surgery import layers_fit as healing
from prunekit.surgery.cut import write_cut
from prunekit.surgery.in_memory import removed
from prunekit.surgery.layers import check_healable, cut_layers, find_seams, plan_layers
from prunekit.surgery.layers_fit import fit_layers
from prunekit.surgery.sides import LeastSquares

HEALABLE = [family for family in FAMILIES if ROWS[family].text.plain_residual]
CAUSAL = [family for family in HEALABLE if ROWS[family].causal]


def test_a_layer_that_only_adds_a_constant_is_made_good_exactly(tmp_path):
    model = build("gpt2")
    with torch.no_grad():
        block = model.transformer.h[2]
        for projection in (block.attn.c_proj, block.mlp.c_proj):
            projection.weight.zero_()
        block.attn.c_proj.bias.zero_()
        block.mlp.c_proj.bias.normal_(generator=torch.Generator().manual_seed(3))
    model.save_pretrained(tmp_path / "model")
    before = logits(model)
    plan = plan_layers(open_checkpoint(tmp_path / "model"), text=[2])
    calibration = self_labelled(model, data())
    cut = fit_layers(plan, model, calibration)
    write_cut(cut, tmp_path / "healed")
    write_cut(cut_layers(plan), tmp_path / "unhealed")
    unhealed = (logits(load(tmp_path / "unhealed")) - before).abs().max()
    assert unhealed > 0.5
    assert (logits(load(tmp_path / "healed")) - before).abs().max() < 0.05 * unhealed


def test_a_seam_behind_refits_taken_back_is_healed_as_if_they_had_not_been_tried(tmp_path, monkeypatch):
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT | {"num_hidden_layers": 7})).save_pretrained(tmp_path)
    # Of layer 0, layers 2 and 3, layer 4 and layer 6; only layer 4, the one before the second seam, is accepted
    losses = iter([1.0, 2.0, 2.0, 0.5, 2.0])
    monkeypatch.setattr(healing, "loss_by_row", lambda *_: torch.tensor([next(losses)]))
    model, calibration = load(tmp_path), data()
    seams = fit_layers(plan_layers(open_checkpoint(tmp_path), text=[1, 5]), model, calibration).seams
    assert [seam["refitted"] for seam in seams] == [[], [4]]
    alone = load(tmp_path)
    with torch.inference_mode():
        sides = sides_of(alone, tmp_path, calibration, [1, 5])
        sides.refit(4, sides.targets(4))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


@pytest.mark.parametrize("family", CAUSAL)
def test_what_is_written_has_the_held_out_loss_that_was_measured(family, tiny, tmp_path):
    model = load(tiny(family))
    calibration = self_labelled(model, data())
    cut = fit_layers(plan_layers(open_checkpoint(tiny(family)), text=[1, 3]), model, calibration)
    write_cut(cut, tmp_path / "out")
    loss = score_batches(load(tmp_path / "out"), calibration.held_out)["loss"]
    assert loss == pytest.approx(cut.seams[-1]["loss_after"], rel=1e-5)
    assert any(seam["refitted"] for seam in cut.seams), "nothing was healed, so that nothing was tested"


def test_both_stacks_of_one_model_are_healed_each_on_its_own_states(tiny, tmp_path):
    model = load(tiny("qwen3_vl"))
    calibration = self_labelled(model, Calibration(picture_batches(12, 0), picture_batches(4, 1), 700))
    plan = plan_layers(open_checkpoint(tiny("qwen3_vl")), text=[2], vision=[2])
    cut = fit_layers(plan, model, calibration)
    assert [(seam["stack"], seam["layer"]) for seam in cut.seams] == [("vision", 1), ("text", 1)]
    assert all(seam["refitted"] for seam in cut.seams)
    write_cut(cut, tmp_path / "out")
    loss = score_batches(load(tmp_path / "out"), calibration.held_out)["loss"]
    assert loss == pytest.approx(cut.seams[-1]["loss_after"], rel=1e-5)


@pytest.mark.parametrize(
    ("before_seam", "behind", "refitted"),
    [
        ([1.5, 0.9, 0.9, 0.9], [1.5, 0.9, 0.9, 0.8], [0, 2, 3, 4]),
        ([1.5, 0.9, 0.9, 0.9], [1.5, 0.9, 0.9, 0.91], [0]),
        ([1.5, 1.4, 1.5, 1.4], [1.5, 1.4, 1.5, 1.5], []),
        ([1.5, 1.4, 1.5, 1.4], [1.0, 1.0, 1.0, 0.9], [2, 3, 4]),
    ],
    ids=["the rows can't tell, then better", "the rows can't tell, then worse", "clearly worse", "only behind it"],
)
def test_before_a_seam_what_is_clearly_worse_is_taken_back_and_behind_it_what_is_not_better(
    tmp_path, monkeypatch, before_seam, behind, refitted
):
    hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT | {"num_hidden_layers": 5})).save_pretrained(tmp_path)
    losses = iter([[1.0] * 4, before_seam, behind])
    monkeypatch.setattr(healing, "loss_by_row", lambda *_: torch.tensor(next(losses)))
    cut = fit_layers(plan_layers(open_checkpoint(tmp_path), text=[1]), load(tmp_path), data())
    assert cut.seams[0]["refitted"] == refitted


@pytest.mark.parametrize("family", CAUSAL)
def test_only_output_projections_of_refitted_layers_change(family, tiny):
    checkpoint = open_checkpoint(tiny(family))
    model = load(tiny(family))
    cut = fit_layers(plan_layers(checkpoint, text=[1, 3]), model, self_labelled(model, data()))
    row = checkpoint.family.text
    kept = [0, 2, 4]
    refitted = [kept.index(layer) for seam in cut.seams for layer in seam["refitted"]]
    wanted = [(layer, output) for layer in refitted for output in (*row.mixers, row.mlp[-1])]
    allowed = {name for each in wanted for name in row.tensors_of(cut.result.tensors, *each)}
    changed = {name for name, tensor in cut.result.tensors.items() if tensor.compute}
    assert changed and changed <= allowed


def test_a_refit_that_does_not_gain_leaves_the_model_as_it_was(tiny, monkeypatch):
    model = load(tiny("llama"))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(LeastSquares, "solve", lambda self, ridge: torch.full_like(self.xy.T, 5.0))
    monkeypatch.setattr(LeastSquares, "left", lambda self, solution: 0.5)  # as if it were good on the held-out rows
    cut = fit_layers(plan_layers(open_checkpoint(tiny("llama")), text=[1, 3]), model, self_labelled(model, data()))
    assert [seam["refitted"] for seam in cut.seams] == [[], []]
    assert not any(tensor.compute for tensor in cut.result.tensors.values())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_healing_twice_from_the_same_files_gives_the_same_bytes(tiny, tmp_path):
    for name in ("one", "two"):
        model = load(tiny("qwen3"))
        cut = fit_layers(plan_layers(open_checkpoint(tiny("qwen3")), text=[2]), model, self_labelled(model, data()))
        write_cut(cut, tmp_path / name)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_runs_of_removed_layers_are_one_seam(tiny):
    seams = find_seams(plan_layers(open_checkpoint(tiny("qwen3_vl")), text=[1, 2], vision=[0, 4, 5]))
    assert [(s.stack, s.before, s.gone) for s in seams] == [("vision", 3, (4, 5)), ("text", 0, (1, 2))]


def test_layers_behind_a_seam_belong_to_it_up_to_the_next(tiny):
    seams = find_seams(plan_layers(open_checkpoint(tiny("qwen3_vl")), vision=[1, 4]))
    assert [(s.before, s.behind) for s in seams] == [(0, (2,)), (3, (5,))]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(HEALABLE)))
def test_families_with_norms_behind_their_projections_are_refused(family, tiny):
    with pytest.raises(PruneKitError, match=f"--heal: {family} has norms"):
        check_healable(plan_layers(open_checkpoint(tiny(family)), text=[1]))


def test_a_cut_with_no_layer_before_it_is_refused(tiny):
    with pytest.raises(PruneKitError, match="no layer is left before"):
        check_healable(plan_layers(open_checkpoint(tiny("llama")), text=[0, 1]))


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "is empty"),
        ([{"text": "a"}] * 4, "has 4 rows"),
        ([{"text": "a"}] * 5 + [{"messages": []}], "line 6: rows must all be"),
        ([{"text": "a"}] * 5 + [{"text": " "}], "line 6 has no text"),
        ([{"text": 3}] * 5, "line 1 has no text"),
        ([{"messages": []}] * 5, 'no list "messages"'),
        ([[1]] * 5, "line 1 is not a JSON object"),
    ],
)
def test_bad_rows_are_named(lines, message, tmp_path):
    file = tmp_path / "calib.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(PruneKitError, match=message):
        read_calibration(file)


def test_a_line_that_is_no_json_is_named(tmp_path):
    (tmp_path / "calib.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(PruneKitError, match="line 2 is not JSON"):
        read_calibration(tmp_path / "calib.jsonl")


def test_texts_become_batches_within_their_limits(tmp_path):
    checkpoint = open_checkpoint(EMBEDDED)
    file = write_texts(tmp_path / "texts.jsonl")
    calibration = calibrate(load_model(checkpoint), checkpoint, file, max_tokens=600, max_length=20, batch_tokens=64)
    batches = [*calibration.fit, *calibration.held_out]
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == calibration.tokens
    assert 600 <= calibration.tokens < 620
    assert all(batch["input_ids"].numel() <= 64 and batch["input_ids"].shape[1] <= 20 for batch in batches)


def test_padding_is_no_label(tmp_path):
    checkpoint = open_checkpoint(EMBEDDED)
    calibration = calibrate(load_model(checkpoint), checkpoint, write_texts(tmp_path / "texts.jsonl"))
    batch = calibration.fit[0]
    assert ((batch["labels"] == -100) == (batch["attention_mask"] == 0)).all()


def test_questions_without_an_answer_are_left_out_and_refused_where_there_is_nothing_else():
    def encode(row):
        return {"input_ids": [7, 8], "labels": [7, 8 if row["answered"] else -100]}

    rows = [Rows("", [{"answered": number < answered} for number in range(9)]) for answered in (6, 4)]
    assert len(draw_rows(rows[0], encode, None)) == 6
    with pytest.raises(PruneKitError, match="4 of its rows have text or an answer and fit into .* give rows with answ"):
        calibrate(None, open_checkpoint(EMBEDDED), rows[1], encoder=Encoder(encode, lambda items: {}, encode))


def test_the_script_heals_and_says_so(tmp_path, script_here):
    file = write_texts(tmp_path / "texts.jsonl")
    done = script_here(
        "manual_select.py", "--model", EMBEDDED, "--out", tmp_path / "out", "--text", 3, "--heal", "--calib", file
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "text seam behind layer 2:" in done.stdout
    entry = json.loads((tmp_path / "out" / "pruning_info.json").read_text())["history"][-1]
    assert entry["settings"]["heal"] == str(file)
    assert entry["settings"]["calibration_data"] == [data_record(file)]
    assert entry["seams"][0]["removed"] == [3]
    assert entry["metrics"]["held_out_loss"] != entry["metrics"]["held_out_loss_unhealed"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--text", 1, "--heal"], "--heal and --calib need each other"),
        (["--text", 1, "--calib", "x.jsonl"], "--heal and --calib need each other"),
        (["--text", 1, "--heal", "--calib", "nowhere.jsonl"], "nowhere.jsonl is not there"),
        (["--text", 0, "--heal", "--calib", "nowhere.jsonl"], "no layer is left before"),
    ],
)
def test_the_script_ends_with_one_line_on_bad_input(arguments, message, tmp_path, script_here):
    done = script_here("manual_select.py", "--model", EMBEDDED, "--out", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_vision_blocks_are_not_healed_on_rows_without_images(tiny):
    folder = tiny("qwen3_vl")
    with pytest.raises(PruneKitError, match="too few calibration rows reach the vision layers"):
        fit_layers(plan_layers(open_checkpoint(folder), vision=[5]), load(folder), data(), quiet=True)


def test_messages_for_an_encoder_are_refused(tiny):
    with pytest.raises(PruneKitError, match="camembert is an encoder, for which messages have no form"):
        encoder_of(open_checkpoint(tiny("camembert")), Rows("", [{"messages": []}]), 64)


@pytest.mark.slow
@pytest.mark.ci
def test_pictures_and_vision_blocks_are_healed(tmp_path, script):
    """The embedded model reads; without two text layers and a vision block it misreads, healed it misreads less."""
    done = script("examples/tiny_ocr/tiny_ocr.py", "data", "--out", tmp_path / "data", "--share", 0.1)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "data" / "train.jsonl").read_text().splitlines()
    for name, part in (("calib", rows[:400]), ("fresh", rows[400:800])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    done = script(
        "manual_select.py", "--model", EMBEDDED, "--out", tmp_path / "out", "--text", 5, 7, "--vision", 4,
        "--heal", "--calib", tmp_path / "calib.jsonl",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seams = json.loads((tmp_path / "out" / "pruning_info.json").read_text())["history"][-1]["seams"]
    assert {seam["stack"] for seam in seams if seam["refitted"]} == {"text", "vision"}
    checkpoint = open_checkpoint(tmp_path / "out")
    fresh = calibrate(load_model(checkpoint), checkpoint, tmp_path / "fresh.jsonl", max_tokens=6000)
    batches = [*fresh.fit, *fresh.held_out]
    healed = score_batches(load_model(checkpoint), batches)["loss"]
    model = load_model(open_checkpoint(EMBEDDED))
    base = score_batches(model, batches)["loss"]
    with removed(model, plan_layers(open_checkpoint(EMBEDDED), text=[5, 7], vision=[4])):
        unhealed = score_batches(model, batches)["loss"]
    assert unhealed - healed > 0.3 * (unhealed - base)
