"""What a run, a ranking, an adapter, a phase and a cache were made from: the same is taken, another is refused."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.cuts import cut_width
from helpers.lab import values
from helpers.tiny_models import FAMILIES
from safetensors.torch import load_file, save_file

from prunekit.checkpoint import fingerprint, history, open_checkpoint, write_weights
from prunekit.checkpoint.provenance import data_record, difference, made_from
from prunekit.knockout.ranking import read_ranking
from prunekit.surgery.cut import write_cut
from prunekit.surgery.layers import cut_layers, plan_layers


def of(folder):
    return fingerprint(open_checkpoint(folder))


def with_one_more(folder, big):
    """The fingerprint of a folder's model with this tensor, too."""
    tensors = load_file(folder / "model.safetensors") | {"big": big}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return of(folder)


def bytes_read():
    """By this process so far, as Linux counts."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def change_one_weight(folder):
    """As a training that went on, but the least of it: one number of one tensor."""
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values())).view(-1)[-1] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_a_copied_folder_with_other_times_is_the_same_model(own, tmp_path):
    folder = own("qwen3_vl")
    os.utime(folder / "model.safetensors", (1, 1))
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "copy", copy_function=shutil.copyfile)
    assert of(copy) == of(folder)


def test_a_resharded_model_is_the_same(own, tmp_path):
    folder = own("qwen3_vl")
    sharded = shutil.copytree(folder, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    write_weights(sharded, open_checkpoint(folder).tensors, max_shard_bytes=50_000)
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert of(sharded) == of(folder)


def test_a_config_that_another_transformers_saved_is_the_same_model(own):
    folder = own("llama")
    before, config = of(folder), json.loads((folder / "config.json").read_text())
    config |= {"transformers_version": "4.0", "_name_or_path": "/home/me/base"}
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert of(folder) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_one_changed_weight_of_a_small_tensor_is_another_model(family, own):
    folder = own(family)
    before = of(folder)
    change_one_weight(folder)
    assert of(folder) != before


def test_another_number_in_the_config_is_another_model(own):
    folder = own("llama")
    before, config = of(folder), json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert of(folder) != before


def test_a_cut_is_another_model(tiny, tmp_path):
    checkpoint = open_checkpoint(tiny("qwen3_vl"))
    write_cut(cut_layers(plan_layers(checkpoint, vision=[2])), tmp_path / "a")
    write_cut(cut_layers(plan_layers(checkpoint, vision=[3])), tmp_path / "b")  # of the same shapes
    assert len({of(folder) for folder in (tiny("qwen3_vl"), tmp_path / "a", tmp_path / "b")}) == 3


@pytest.mark.parametrize("where", [0, 1 / 3, 2 / 3, 1])
def test_of_a_large_tensor_blocks_from_its_first_to_its_last_byte_count(where, own):
    folder = own("llama")
    big = torch.zeros(1_000_000, dtype=torch.bfloat16)
    before = with_one_more(folder, big)
    big[round(where * 999_999)] = 1
    assert with_one_more(folder, big) != before


def test_a_step_in_bfloat16_that_moves_one_weight_in_500_is_another_model(own):
    folder = own("llama")
    torch.manual_seed(0)
    big = torch.randn(1000, 1000).bfloat16()
    before = with_one_more(folder, big)
    moved = torch.rand(1000, 1000) < 1 / 500
    assert with_one_more(folder, torch.where(moved, big * 1.01, big).bfloat16()) != before


def test_a_fingerprint_reads_a_hundredth_of_a_large_model(own):
    folder = own("llama")
    large = {f"w{i}": torch.zeros(2**23, dtype=torch.bfloat16) for i in range(8)}
    save_file(load_file(folder / "model.safetensors") | large, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    before = bytes_read()
    fingerprint(checkpoint)
    assert bytes_read() - before < checkpoint.nbytes / 100


# --- data -------------------------------------------------------------------------------------------------------------


def test_a_data_set_is_known_by_its_rows_wherever_it_lies(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n{}")
    (tmp_path / "b.jsonl").write_text("{}\n{}")
    one, other = (data_record(tmp_path / name) for name in ("a.jsonl", "b.jsonl#1"))
    assert (one["rows"], one["sha256"]) == (2, other["sha256"])
    (tmp_path / "b.jsonl").write_text("{}\n[]")
    assert data_record(tmp_path / "b.jsonl")["sha256"] != one["sha256"]


def test_other_numbers_of_a_files_rows_are_other_data(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{}\n{}\n{}")
    one, two, moved, all_of_it = (
        {"dataset": [data_record(tmp_path / name)]} for name in ("a.jsonl#1", "a.jsonl#2", "b.jsonl#1", "a.jsonl")
    )
    assert [bool(difference(one, other)) for other in (one, two, moved, all_of_it)] == [False, True, False, True]


def test_a_data_set_of_a_hub_is_known_by_its_name():
    assert data_record("swift/self-cognition#500") == {"path": "swift/self-cognition#500"}


def test_of_ms_swifts_flags_the_last_ones_count(tiny, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    flags = ["--model", str(tiny("llama")), "--dataset", str(tmp_path / "a.jsonl"), "--max_steps", "3"]
    found = made_from([*flags, "--val-dataset", "x/y", "--dataset", f"{tmp_path}/b.jsonl", f"{tmp_path}/a.jsonl"])
    assert [record["path"][-7:] for record in found["dataset"]] == ["b.jsonl", "a.jsonl"]
    assert found["val_dataset"] == [{"path": "x/y"}]
    assert found["model"][0]["fingerprint"] == of(tiny("llama"))


def test_a_difference_names_the_settings_and_paths_that_changed():
    old = {"model": [{"path": "a", "fingerprint": "1"}], "dataset": [{"path": "x"}]}
    assert difference(old, {"model": [{"path": "moved", "fingerprint": "1"}], "dataset": [{"path": "x"}]}) == ""
    new = {"model": [{"path": "a", "fingerprint": "2"}], "teacher_model": [{"path": "t", "fingerprint": "3"}]}
    said = difference(old, new | {"dataset": old["dataset"]})
    assert said == "of another MODEL (a was something else) and of another TEACHER (t was something else)"


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mine(lab, tmp_path):
    """A lab whose MODEL is its own, to be changed."""
    lab.model = shutil.copytree(lab.env["MODEL"], tmp_path / "mine")
    lab.env["MODEL"] = "mine"
    return lab


def refused(result, *words):
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def test_an_interrupted_run_of_a_model_that_was_pruned_anew_is_not_resumed(mine):
    mine.run("full_run.sh", GPUS="", STUB_FAIL_AT=3)
    change_one_weight(mine.model)
    refused(mine.run("full_run.sh", GPUS=""), "of another MODEL (mine was something else)", "RESTART=1")
    assert len(mine.calls()) == 1 and (mine.work / "checkpoint-2").exists()
    assert mine.run("full_run.sh", GPUS="", RESTART=1).returncode == 0
    assert "--resume_from_checkpoint" not in mine.calls()[-1]["argv"]
    assert history(mine.out)[-1]["input_fingerprint"] == of(mine.model)


def test_an_interrupted_run_of_a_model_that_was_touched_and_moved_back_is_resumed(mine):
    mine.run("full_run.sh", GPUS="", STUB_FAIL_AT=3)
    os.utime(mine.model / "model.safetensors", (1, 1))
    assert mine.run("full_run.sh", GPUS="").returncode == 0
    assert values(mine.calls()[-1]["argv"], "--resume_from_checkpoint")


def test_a_model_pruned_anew_while_it_was_trained_is_not_published_over(mine):
    process = mine.until_hanging("full_run.sh", GPUS="", STUB_HANG_AT=4)
    change_one_weight(mine.model)
    os.kill(mine.calls(event="hang")[0]["child"], 9)
    os.kill(mine.calls(event="hang")[0]["pid"], 9)
    process.communicate(timeout=60)
    done = mine.run("full_run.sh", GPUS="")
    refused(done, "of another MODEL")
    assert not mine.out.exists()


def test_publishing_on_another_base_than_the_run_s_is_refused(mine, script, tmp_path):
    mine.run("full_run.sh", GPUS="", STUB_FAIL_AT=4)
    change_one_weight(mine.model)
    done = script(
        "prunekit.training.publish",
        "--run",
        mine.work,
        "--base",
        mine.model,
        "--out",
        tmp_path / "new",
        "--stage",
        "x",
    )
    refused(done, "has changed since", "RESTART=1")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("what", ["DATASET", "VAL_DATASET", "TEACHER"])
def test_an_interrupted_run_with_other_rows_or_another_teacher_is_not_resumed(what, mine, tmp_path):
    shutil.copytree(mine.model, tmp_path / "teacher")
    mine.env["TEACHER"] = "teacher"
    mine.run("distil.sh", GPUS="", STUB_FAIL_AT=3)
    if what == "TEACHER":
        change_one_weight(tmp_path / "teacher")
    else:
        file = tmp_path / mine.env[what]
        file.write_text(file.read_text() * 2)
    refused(mine.run("distil.sh", GPUS=""), f"of another {what}")


def test_a_finished_run_that_was_killed_in_its_clean_up_is_not_taken_for_one_of_another_model(mine):
    mine.run("full_run.sh", GPUS="", KEEP_RUN=1)
    (mine.work / "publishing").write_text("none\n")
    change_one_weight(mine.model)
    refused(mine.run("full_run.sh", GPUS=""), "exists")


def test_a_run_begun_by_a_version_that_kept_no_record_is_not_resumed(mine):
    mine.run("full_run.sh", GPUS="", STUB_FAIL_AT=3)
    (mine.work / "made_from.json").unlink()
    refused(mine.run("full_run.sh", GPUS=""), "of a model that it doesn't name", "RESTART=1")


def test_what_a_writer_killed_half_way_left_is_no_record(mine):
    mine.run("full_run.sh", GPUS="", STUB_FAIL_AT=3)
    (mine.work / "made_from.json.new").write_text('{"model": [{"pa')
    assert mine.run("full_run.sh", GPUS="").returncode == 0


def test_the_history_of_a_distillation_says_its_teacher_and_data(lab):
    assert lab.run("distil.sh", GPUS="").returncode == 0
    settings = history(lab.out)[-1]["settings"]
    assert settings["teacher_model"] == [{"path": lab.env["TEACHER"], "fingerprint": of(lab.env["TEACHER"])}]
    assert settings["dataset"] == [data_record(lab.folder / "train.jsonl") | {"path": "train.jsonl"}]
    assert settings["dataset"][0]["rows"] == 1
    assert settings["chosen"] == "the last"


# --- phases -----------------------------------------------------------------------------------------------------------


@pytest.mark.ci
def test_phases_of_another_model_are_refused_and_restart_makes_them_anew(mine, tmp_path):
    shutil.rmtree(mine.model)
    cut_width(mine.env["TEACHER"], mine.model, head_share=0.5)
    assert mine.run("progressive_run.sh", GPUS="").returncode == 0
    mine.out.rename(tmp_path / "old")
    change_one_weight(mine.model)
    refused(mine.run("progressive_run.sh", GPUS=""), "ckpt/out-phase1 was made of another MODEL", "RESTART=1")
    assert not mine.out.exists() and len(mine.calls()) == 3
    assert mine.run("progressive_run.sh", GPUS="", RESTART=1).returncode == 0
    assert len(mine.calls()) == 6
    made = history(mine.out)
    inputs = [mine.model, mine.out.with_name("out-phase1"), mine.out.with_name("out-phase2")]
    assert [entry["input_fingerprint"] for entry in made[-3:]] == list(map(of, inputs))


@pytest.fixture
def phase(mine):
    """A lab with a finished phase at OUTPUT."""
    assert mine.run("full_run.sh", GPUS="", REUSE=1).returncode == 0
    mine.inode = mine.out.stat().st_ino
    return mine


def test_a_finished_phase_of_the_same_model_is_kept_wherever_that_was_moved_from(phase):
    os.utime(phase.model / "model.safetensors", (1, 1))
    done = phase.run("full_run.sh", GPUS="", REUSE=1)
    assert (done.returncode, "is there already" in done.stdout) == (0, True), done.stderr
    assert len(phase.calls()) == 1 and not phase.work.exists()


@pytest.mark.parametrize("flags", [["--learning_rate", "1"], []], ids=["settings", "rows"])
def test_a_finished_phase_of_other_settings_or_rows_is_refused(flags, phase, tmp_path):
    if not flags:
        (tmp_path / "train.jsonl").write_text((tmp_path / "train.jsonl").read_text() * 2)
    said = "with other settings" if flags else "of another DATASET (train.jsonl was something else)"
    refused(phase.run("full_run.sh", *flags, GPUS="", REUSE=1), f"ckpt/out was made {said}", "RESTART=1")
    assert len(phase.calls()) == 1 and not phase.work.exists()


def test_a_remade_phase_that_was_interrupted_goes_on(phase):
    change_one_weight(phase.model)
    phase.run("full_run.sh", GPUS="", REUSE=1, RESTART=1, STUB_FAIL_AT=3)
    assert phase.out.stat().st_ino == phase.inode
    assert phase.run("full_run.sh", GPUS="", REUSE=1).returncode == 0
    assert values(phase.calls()[-1]["argv"], "--resume_from_checkpoint")
    assert history(phase.out)[-1]["input_fingerprint"] == of(phase.model)


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(mine):
    """A lab whose ADAPTER was trained on its MODEL."""
    assert mine.run("lora.sh", GPUS="", OUTPUT="lora").returncode == 0
    mine.env["ADAPTER"] = "lora"
    return mine


def test_an_adapter_says_on_which_model_and_rows_it_was_trained(adapter):
    [entry] = history(adapter.folder / "lora")
    assert (entry["stage"], entry["input_fingerprint"]) == ("lora", of(adapter.model))
    assert entry["settings"]["dataset"][0]["rows"] == 1
    assert entry["adapter_parameters"] == 1
    assert "A LoRA for qwen3_vl" in (adapter.folder / "lora" / "README.md").read_text()


def test_an_adapter_isn_t_merged_into_another_model_of_the_same_shapes(adapter):
    change_one_weight(adapter.model)
    refused(adapter.run("export_lora.sh", GPUS=""), "lora: was trained on mine as it was then", "lora.sh")
    assert len(adapter.calls()) == 1 and not adapter.out.parent.exists()


def test_an_adapter_is_merged_into_a_copy_of_its_model_which_says_so(adapter, tmp_path):
    shutil.copytree(adapter.model, tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.move(tmp_path / "lora", tmp_path / "moved")
    done = adapter.run("export_lora.sh", GPUS="", MODEL="copy", ADAPTER="moved")
    assert done.returncode == 0, done.stderr
    entry = history(adapter.out)[-1]
    assert entry["settings"]["adapters"][0]["path"] == "moved" and entry["settings"]["adapters"][0]["fingerprint"]
    assert (adapter.out / "command.sh").exists()


def test_an_adapter_of_elsewhere_is_merged_with_a_warning(mine, tmp_path):
    done = mine.run("export_lora.sh", GPUS="")
    assert done.returncode == 0, done.stderr
    assert "adapter: doesn't say on which model it was trained" in done.stderr


# --- rankings ---------------------------------------------------------------------------------------------------------


def ranking(folder, **more):
    entries = [{"name": "vision-02", "stack": "vision", "layer": 2, "relative": 1.0}]
    return {"model": "base", "fingerprint": of(folder), "removals": entries, "greedy": None} | more


def layers_script(script, model, tmp_path, found, *flags):
    (tmp_path / "ranking.json").write_text(json.dumps(found))
    return script("manual_select.py", "--model", model, "--out", tmp_path / "out", "--max-fraction", 1,
                  "--from-ranking", tmp_path / "ranking.json", *flags)  # fmt: skip


def test_a_ranking_of_the_whole_model_is_refused_for_the_cut_one(tiny, tmp_path, script):
    write_cut(cut_layers(plan_layers(open_checkpoint(tiny("qwen3_vl")), vision=[2])), tmp_path / "cut")
    done = layers_script(script, tmp_path / "cut", tmp_path, ranking(tiny("qwen3_vl")))
    refused(done, "the ranking is of base as it was then", "knockout_check.sh")
    assert not (tmp_path / "out").exists()


def test_a_ranking_is_taken_for_a_copy_of_its_model(own, tiny, tmp_path, script):
    done = layers_script(script, own("qwen3_vl"), tmp_path, ranking(tiny("qwen3_vl")))
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert history(tmp_path / "out")[-1]["removed"]["vision"] == [2]


def test_a_ranking_that_doesn_t_say_of_which_model_it_is_is_taken_with_a_warning(tiny, tmp_path, capsys):
    old = ranking(tiny("qwen3_vl"), fingerprint=None)
    (tmp_path / "ranking.json").write_text(json.dumps(old))
    assert read_ranking(tmp_path / "ranking.json", open_checkpoint(tiny("qwen3_vl"))) == old
    assert "doesn't say of which model" in capsys.readouterr().err


def test_a_ranking_of_another_model_doesn_t_share_out_sparsity(tiny, own, tmp_path, script):
    folder = own("llama")
    entries = [{"name": f"text-0{i}", "stack": "text", "layer": i, "relative": 0.5 + i / 10} for i in range(5)]
    found = ranking(tiny("llama"), removals=entries)
    (tmp_path / "ranking.json").write_text(json.dumps(found))
    line = ["sparsify.py", "--model", folder, "--sparsity", 0.5, "--layer-importance", "knockout", "--ranking",
            tmp_path / "ranking.json", "--dry-run"]  # fmt: skip
    assert script(*line).returncode == 0
    change_one_weight(folder)
    refused(script(*line), "the ranking is of base as it was then")
