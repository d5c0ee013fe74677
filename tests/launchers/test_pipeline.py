"""The demo's stages, shortened, through the real ms-swift; and what a kill -9 in the middle changes (nothing)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT, TINY_VL
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

pytestmark = [pytest.mark.slow, pytest.mark.ci]
SKILLS = ("read", "line", "count", "place", "bars", "add", "add_text", "copy")
CHECKPOINTS = ("pruned", "recovered", "distilled", "mqa", "vocabulary", "mqa-recovered", "merged", "rl")
ENVIRONMENT = os.environ | {"WANDB_MODE": "offline", "GPUS": ""}


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("demo") / "run"
    finished = subprocess.run(
        ["bash", "demo.sh"],
        cwd=ROOT,
        # A training of two processes costs twice the imports: test_nodes.py has one
        env=ENVIRONMENT | {"QUICK": "1", "RUN": str(run), "CPU_PROCESSES": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return run


def load(folder: Path, **kwargs):
    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **kwargs)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_checkpoint_loads_strictly(demo, name):
    _, report = load(demo / name, output_loading_info=True)
    assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])


def test_the_summary_begins_with_the_base_and_has_a_row_for_every_checkpoint(demo):
    stages = json.loads((demo / "summary.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["base", *CHECKPOINTS]
    keys = {"stage", "parameters", "kv_bytes_per_token", "token_acc", "exact_match", "seconds"}
    assert all(keys <= stage.keys() for stage in stages)


def test_the_summary_says_every_skill_at_every_stage(demo):
    stages = json.loads((demo / "summary.json").read_text())["stages"]
    assert all(stage["groups"].keys() == set(SKILLS) for stage in stages)


def test_the_ranking_says_which_layer_carries_which_skill(demo):
    ranking = json.loads((demo / "knockout" / "ranking.json").read_text())
    assert all(removal["groups"].keys() == set(SKILLS) for removal in ranking["removals"])


def test_a_quarter_of_the_model_is_gone_and_three_quarters_of_its_kv_cache(demo):
    stages = json.loads((demo / "summary.json").read_text())["stages"]
    assert stages[-1]["parameters"] <= 0.75 * stages[0]["parameters"]
    assert stages[-1]["kv_bytes_per_token"] * 4 <= stages[0]["kv_bytes_per_token"]


def test_the_history_of_the_last_checkpoint_names_every_stage(demo):
    history = json.loads((demo / "rl" / "pruning_info.json").read_text())["history"]
    assert [entry["stage"] for entry in history] == [
        "manual_select", "full_run", "distil", "kv_cut", "vocab_cut", "full_run", "export_lora", "rl_run"
    ]  # fmt: skip


def test_knockouts_ranked_every_layer_and_trained_the_finalists(demo):
    ranking = json.loads((demo / "knockout" / "ranking.json").read_text())
    assert len(ranking["removals"]) == 12 + 8
    assert all(removal["relative"] for removal in ranking["removals"])
    assert [bool(removal["trained"]) for removal in ranking["removals"]] == [True] * 2 + [False] * 18


def test_the_scan_s_baseline_is_ms_swift_s_own_token_acc(demo, tmp_path):
    ranking = json.loads((demo / "knockout" / "ranking.json").read_text())
    command = (demo / "knockout" / "trained" / "runs" / "baseline.json").read_text()
    assert json.loads(command)["error"] is None
    swift = ranking["settings"]["swift"]
    arguments = ["--model", TINY_VL, "--model_type", "qwen3_vl", *swift, "--output_dir", tmp_path / "run"]
    arguments += ["--eval_strategy", "steps", "--save_strategy", "no", "--report_to", "none"]
    arguments += ["--max_steps", 1, "--eval_steps", 1, "--learning_rate", 0]
    swift = Path(sys.executable).parent / "swift"
    done = subprocess.run(
        [swift, "sft", *map(str, arguments)], cwd=ROOT, env=ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [evaluation] = [
        record
        for line in (tmp_path / "run" / "logging.jsonl").read_text().splitlines()
        if "eval_token_acc" in (record := json.loads(line))
    ]
    assert ranking["baseline"]["token_acc"] == pytest.approx(evaluation["eval_token_acc"], abs=1e-3)
    assert ranking["baseline"]["loss"] == pytest.approx(evaluation["eval_loss"], rel=0.01)


@pytest.mark.parametrize(
    "picture",
    [
        "stages.png",
        *(f"knockout/{name}.png" for name in ("ranking", "greedy", "curves")),
        "recovered/curves.png",
        "rl/curves.png",
    ],
)
def test_pictures_are_drawn(demo, picture):
    assert (demo / picture).stat().st_size > 10_000


def test_the_report_card_tells_the_whole_way_from_the_base(demo):
    report = json.loads((demo / "report" / "report.json").read_text())
    assert sorted(report["anatomy"][0]["stacks"]["text"]["gone"]) == ["4", "6"]
    assert len(report["way"][0]) == 8 and "report.html" in {path.name for path in (demo / "report").iterdir()}


def test_no_temporary_checkpoint_is_left(demo):
    assert not [*demo.glob("*.run"), *demo.glob("*.partial-*"), *demo.glob("knockout/*/work")]


def test_every_training_stage_left_an_offline_wandb_run_of_the_group(demo):
    names = [path.name for path in (demo / "wandb").glob("offline-run-*")]
    assert len(names) == 1 + 2 + 1 + 2 + 1 + 1 + 1  # knockouts, their ranking, recoveries, distillation, LoRA, RL


def test_the_merged_checkpoint_answers_as_base_and_adapter_do(demo):
    from peft import PeftModel

    row = json.loads((demo / "data" / "test.jsonl").read_text().splitlines()[0])
    processor = AutoProcessor.from_pretrained(demo / "merged")
    content = [{"type": "image"}, {"type": "text", "text": "Read the text."}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[Image.open(row["images"][0])], return_tensors="pt")
    adapted = PeftModel.from_pretrained(load(demo / "mqa-recovered"), demo / "lora").eval()
    with torch.no_grad():
        expected, merged = adapted(**inputs).logits, load(demo / "merged").eval()(**inputs).logits
        rounded = adapted.merge_and_unload().bfloat16().float()(**inputs).logits
    norm = expected.norm()
    assert (merged - rounded).norm() < 0.005 * norm
    assert (merged - expected).norm() < 0.05 * norm  # the rounding to bf16, of weights hardly trained here


def test_a_second_demo_repeats_nothing(demo):
    finished = subprocess.run(
        ["bash", "demo.sh"],
        cwd=ROOT,
        env=ENVIRONMENT | {"QUICK": "1", "RUN": str(demo)},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0
    assert finished.stdout.count("done already") == len(CHECKPOINTS) + 5  # data, knockout, lora, evaluation, card


def recover(demo: Path, output: Path) -> list[str]:
    return [
        "env", f"MODEL={demo / 'pruned'}", f"OUTPUT={output}", f"DATASET={demo / 'data' / 'train.jsonl'}",
        f"VAL_DATASET={demo / 'data' / 'val.jsonl'}", "bash", "full_run.sh",
        "--per_device_train_batch_size", "16", "--per_device_eval_batch_size", "150", "--max_steps", "8",
        "--gradient_accumulation_steps", "1", "--eval_steps", "4", "--save_steps", "4", "--logging_steps", "1",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def uninterrupted(demo, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("recover") / "whole"
    environment = ENVIRONMENT | {"KEEP_RUN": "1"}  # the trainer's own fp32 weights are looked at, too
    subprocess.run(recover(demo, output), cwd=ROOT, env=environment, check=True, capture_output=True)
    return output


def test_a_training_killed_in_the_middle_ends_as_if_nothing_had_happened(demo, uninterrupted, tmp_path):
    output = tmp_path / "killed"
    command = recover(demo, output)
    launcher = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 180
    while not list(tmp_path.glob("killed.run/checkpoint-4/trainer_state.json")):
        assert launcher.poll() is None and time.time() < deadline
        time.sleep(0.05)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    assert not output.exists()
    finished = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "resuming from" in finished.stdout, "from the beginning it would end so, too"
    expected, resumed = (
        load_file(uninterrupted / "model.safetensors"),
        load_file(output / "model.safetensors"),
    )
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_evaluate_counts_token_acc_as_ms_swift_does(demo, uninterrupted, tmp_path):
    log = [json.loads(line) for line in (uninterrupted / "logging.jsonl").read_text().splitlines()]
    swift = [record["eval_token_acc"] for record in log if "eval_token_acc" in record][-1]
    subprocess.run(
        [
            sys.executable, "-m", "prunekit.evaluate", "--model",
            uninterrupted.with_name("whole.run") / "checkpoint-8", "--dataset", demo / "data" / "val.jsonl",
            "--no-generate", "--json", tmp_path / "scores.json",
        ],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    ours = json.loads((tmp_path / "scores.json").read_text())[0]["datasets"]["val"]["token_acc"]
    assert ours == pytest.approx(swift, abs=1e-3)
