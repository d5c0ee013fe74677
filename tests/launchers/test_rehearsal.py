"""GPU paths of the launchers on a CPU that plays two GPUs (tests/rehearsal): vLLM, DeepSpeed and ms-swift are real.

The student has fewer layers, moved taps, half the heads and one KV head, and nothing mended it: it would answer with
the tokens that stand for images. What stays unrehearsed: docs/gpu.md.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.paths import EMBEDDED, ROOT
from helpers.tiny_ocr import save_tiny_ocr_with_wide_heads, tiny_ocr
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, Qwen3VLForConditionalGeneration

from prunekit.checkpoint import history

pytestmark = [pytest.mark.rehearsal, pytest.mark.slow]

NVIDIA_SMI = "#!/bin/sh\nprintf '0, 81920\\n1, 81920\\n'\n"
LAYERS = ["--text", "2", "6", "--vision", "4", "--drop-taps", "1"]
FLAGS = {  # what a CPU can't do, and few rows
    "use_cpu": "true", "ddp_backend": "gloo", "use_liger_kernel": "false", "dataloader_num_workers": 0,
    "logging_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 8, "max_length": 128,
}  # fmt: skip
VLLM = {
    "vllm_enforce_eager": "true",
    "sleep_level": 0,
    "max_completion_length": 16,
    "log_completions": "true",
    "learning_rate": 1e-3,  # so large that each step is felt
}


def words_of(flags: dict) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="session")
def machine(tmp_path_factory) -> dict[str, str]:
    """The environment of a machine with two GPUs, or what passes for one."""
    done = subprocess.run(["bash", "lib/rehearsal.sh"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    programs = tmp_path_factory.mktemp("bin")
    (programs / "nvidia-smi").write_text(NVIDIA_SMI)
    (programs / "nvidia-smi").chmod(0o755)
    venv = ROOT / ".venv-rehearsal"
    return os.environ | {
        "VIRTUAL_ENV": str(venv),
        "PATH": f"{programs}:{venv}/bin:/usr/bin:/bin",
        "PYTHONPATH": f"{ROOT}/tests/rehearsal:{ROOT}",
        "DS_ACCELERATOR": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "WANDB_MODE": "offline",
        "KEEP_RUN": "1",  # the trainer's own checkpoints are looked at, too
    }


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> dict[str, str]:
    """MODEL, TEACHER, DATASET and VAL_DATASET: a cut student, what it was cut from, and pictures of words."""
    root = tmp_path_factory.mktemp("lab")
    save_tiny_ocr_with_wide_heads(root / "teacher")
    weights, tokenizer = load_file(root / "teacher/model.safetensors"), AutoTokenizer.from_pretrained(EMBEDDED)
    foreign = [token for token in range(len(tokenizer)) if not tokenizer.decode([token]).isascii()]
    weights["model.language_model.embed_tokens.weight"][foreign] = 0  # halves of them couldn't be read back
    save_file(weights, root / "teacher/model.safetensors", {"format": "pt"})
    cuts = [
        ["manual_select.py", "--model", "teacher", "--out", "layers", *LAYERS],
        ["width_cut.py", "--model", "layers", "--out", "heads", "--head-share", "0.5"],
        ["kv_cut.py", "--model", "heads", "--out", "cut", "--kv-heads", "1"],
    ]
    for script, *arguments in cuts:
        subprocess.run([sys.executable, ROOT / script, *arguments], cwd=root, check=True, capture_output=True)
    words, rows = tiny_ocr._words("val", 0, frozenset())[:64], []
    for number, picture in enumerate(tiny_ocr.pictures("val", words, 0, 0)):
        Image.fromarray(picture).save(root / f"{number}.png")
        question = {"role": "user", "content": f"<image>{tiny_ocr.PROMPT}"}
        messages = [question, {"role": "assistant", "content": words[number]}]
        rows.append({"messages": messages, "images": [str(root / f"{number}.png")], "solution": words[number]})
    for name, part in {"train": rows[:48], "val": rows[48:56]}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = {"DATASET": str(root / "train.jsonl"), "VAL_DATASET": str(root / "val.jsonl")}
    return {"MODEL": str(root / "cut"), "TEACHER": str(root / "teacher")} | data


@pytest.fixture(scope="session")
def start(machine, lab):
    """start(launcher, output, flags, **settings): a launcher at work; its messages go to output.log."""

    def begin(launcher: str, output: Path, flags: dict, **settings: str) -> subprocess.Popen:
        environment = machine | lab | {"OUTPUT": str(output)} | settings
        with output.with_suffix(".log").open("a") as log:
            command = ["bash", ROOT / launcher, *words_of(FLAGS | flags)]
            return subprocess.Popen(command, cwd=output.parent, env=environment, stdout=log, stderr=log)

    return begin


def finish(process: subprocess.Popen, output: Path) -> Path:
    assert process.wait(timeout=900) == 0, output.with_suffix(".log").read_text()[-6000:]
    return output


def saved(output: Path, step: int) -> Path:
    return output.with_name(f"{output.name}.run") / f"checkpoint-{step}"


def logged(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "logging.jsonl").read_text().splitlines()]


def load(folder: Path):
    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)


GENERATING = {  # name: launcher, flags, settings
    "distil-server": ("distil.sh", {"max_steps": 2}, {"GPUS": "0,1"}),
    "distil-colocate": ("distil.sh", {"max_steps": 2}, {"GPUS": "0", "DEEPSPEED": "zero3"}),
    "rl-colocate": ("rl_run.sh", {"max_steps": 4, "num_generations": 4}, {"GPUS": "0"}),
}


@pytest.fixture(scope="session")
def trained(start, tmp_path_factory):
    """trained(name): OUTPUT of one of GENERATING, made on first use."""
    root = tmp_path_factory.mktemp("trained")

    def output(name: str) -> Path:
        launcher, flags, settings = GENERATING[name]
        if not (root / name).exists():
            finish(start(launcher, root / name, VLLM | flags, **settings), root / name)
        return root / name

    return output


@pytest.mark.parametrize("name", GENERATING)
def test_what_learns_from_its_own_answers_is_published_and_loads_strictly(name, trained):
    _, report = load(trained(name))
    assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])
    assert history(trained(name))[-1]["stage"] == GENERATING[name][0].removesuffix(".sh")


@pytest.mark.parametrize("name", GENERATING)
def test_the_student_moves(name, trained, lab):
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (lab["MODEL"], trained(name)))
    assert before.keys() <= after.keys()  # DeepSpeed writes the tied head, too
    assert any(not torch.equal(before[key].float(), after[key].float()) for key in before)


def log_probability(folder: Path | str, answers: list[str], images: list[str]) -> float:
    """Nats per token of these answers to the prompt, each with its picture, by the model at folder."""
    model, processor = load(folder)[0].eval(), AutoProcessor.from_pretrained(EMBEDDED)
    content = [{"type": "image"}, {"type": "text", "text": tiny_ocr.PROMPT}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    found = []
    for answer, image in zip(answers, images, strict=True):
        picture = Image.open(image)
        begin = processor(text=prompt, images=picture, return_tensors="pt")["input_ids"].shape[1]
        inputs = processor(text=prompt + answer, images=picture, return_tensors="pt")
        with torch.inference_mode():
            scores = model(**inputs).logits[0, begin - 1 : -1].log_softmax(-1)
        found += scores.gather(1, inputs["input_ids"][0, begin:, None]).flatten().tolist()
    return sum(found) / len(found)


@pytest.mark.parametrize("name", GENERATING)
def test_vllm_answers_with_the_weights_that_were_trained(name, trained, lab):
    """The last evaluation's answers are likely under the published model, and not under the student at the start."""
    lines = (trained(name).with_name(f"{name}.run") / "completions.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    rows = [json.loads(row) for row in Path(lab["VAL_DATASET"]).read_text().splitlines()]
    pictures = {row["solution"]: row["images"][0] for row in rows}
    images = [pictures[word] for word in last.get("solution", pictures)]  # RL answers each several times
    answers = [text.partition("\ufffd")[0] for text in last["completion"]]
    now, before = (log_probability(folder, answers, images) for folder in (trained(name), lab["MODEL"]))
    assert now > before + 0.2, answers  # with the old weights it would be less


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_a_sharded_training_killed_in_the_middle_ends_as_if_nothing_had_happened(zero, start, tmp_path):
    flags = {"max_steps": 4, "save_steps": 2, "eval_steps": 4, "learning_rate": 1e-3}
    settings = {"GPUS": "0,1", "DEEPSPEED": zero}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start("full_run.sh", whole, flags, **settings), whole)
    run, deadline = start("full_run.sh", killed, flags, **settings), time.monotonic() + 600
    while not (saved(killed, 2) / "trainer_state.json").exists():
        assert run.poll() is None and time.monotonic() < deadline, killed.with_suffix(".log").read_text()[-6000:]
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not killed.exists()
    finish(start("full_run.sh", killed, flags, **settings), killed)
    assert "resuming from" in killed.with_suffix(".log").read_text()
    _, report = load(killed)
    assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])
    expected, resumed = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    # A step that was logged between the checkpoint and the kill is there twice
    losses = [
        {line["global_step/max_steps"]: line["loss"] for line in logged(folder) if "loss" in line}
        for folder in (whole, killed)
    ]
    assert losses[0] == losses[1]
