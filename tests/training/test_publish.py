"""From a training run's folder to a clean checkpoint."""

import json
import shutil

import pytest
import torch
from helpers.tiny_models import build, load, logits
from safetensors.torch import load_file, save_file

from prunekit.checkpoint import HISTORY, append_history, history, open_checkpoint
from prunekit.checkpoint.training_run import final_metrics, find_checkpoint, has_ended, read_log, whole_checkpoints
from prunekit.errors import PruneKitError
from prunekit.training import publish as publishing
from prunekit.training.publish import publish


@pytest.fixture
def base(own):
    folder = own("qwen3_vl")
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text("base")
    append_history(folder, {"stage": "manual_select"})
    return folder


@pytest.fixture
def run(tmp_path):
    """An ms-swift run folder: three checkpoints with a trainer's traces, the last one torn."""
    for step in (10, 20, 30):
        folder = tmp_path / f"run/checkpoint-{step}"
        model = build("qwen3_vl")
        model.config.use_cache = False
        with torch.no_grad():
            model.model.language_model.norm.weight.fill_(step)
        model.save_pretrained(folder)
        for name in ("optimizer.pt", "rng_state.pth", "training_args.bin", "latest", "args.json"):
            (folder / name).write_text("{}")
        (folder / "global_step1").mkdir()
        (folder / "tokenizer.json").write_text("trained")
        (folder / "trainer_state.json").write_text("{}" if step < 30 else '{"epo')
    lines = [
        {"loss": 2.0},
        {"loss": 1.0, "eval_loss": 0.5},
        {"eval_token_acc": 0.9, "best_model_checkpoint": "a/checkpoint-10"},
    ]
    (tmp_path / "run/logging.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"lo')
    (tmp_path / "run/command.sh").write_text("swift sft")
    return tmp_path / "run"


def norm(folder):
    return load_file(folder / "model.safetensors")["model.language_model.norm.weight"][0].item()


def test_the_last_whole_checkpoint_is_found(run):
    assert find_checkpoint(run)[0].name == "checkpoint-20"


def test_the_best_checkpoint_is_found_where_the_log_names_it(run):
    assert find_checkpoint(run, "best") == (run / "checkpoint-10", "the best")


@pytest.mark.parametrize("last_line", [None, {"best_model_checkpoint": None}, {"loss": 1}])
def test_no_checkpoint_is_the_best_where_none_is_named_or_the_named_one_is_gone(run, last_line):
    if last_line is None:
        shutil.rmtree(run / "checkpoint-10")
    else:
        (run / "logging.jsonl").write_text(json.dumps(last_line))
    with pytest.raises(PruneKitError, match="names no best checkpoint.*CHECKPOINT=last"):
        find_checkpoint(run, "best")
    assert find_checkpoint(run, "last") == (run / "checkpoint-20", "the last")


@pytest.mark.parametrize("state", ["[]", "null", "3", '"x"', "[" * 100_000, ""])
def test_a_checkpoint_whose_state_is_no_object_is_not_whole(state, run):
    (run / "checkpoint-20" / "trainer_state.json").write_text(state)
    assert set(whole_checkpoints(run)) == {10}


def test_of_a_best_checkpoint_the_numbers_of_its_own_time_are_published(run, base, tmp_path, script):
    lines = [{"global_step/max_steps": f"{n}/20", "eval_loss": 1 / n, "loss": n} for n in (10, 20)]
    lines.append({"best_model_checkpoint": "a/checkpoint-10", "global_step": 20})
    (run / "logging.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = script("prunekit.training.publish", "--run", run, "--base", base, "--out", tmp_path / "out", "--stage", "x",
                  "--checkpoint", "best")  # fmt: skip
    assert done.returncode == 0, done.stderr
    entry = history(tmp_path / "out")[-1]
    assert entry["metrics"] == {"eval_loss": 0.1, "loss": 10}
    assert (entry["settings"]["checkpoint"], entry["settings"]["chosen"]) == ("checkpoint-10", "the best")


def test_the_history_says_rate_steps_batch_processes_callbacks_and_dtype(run, base, tmp_path, script):
    said = {
        "tuner_type": "full", "learning_rate": 8e-5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
        "torch_dtype": "float32", "bf16": True, "callbacks": ["keep_zeros"], "max_length": 4096,
    }  # fmt: skip
    more = {"global_world_size": 3, "lora_rank": 8, "fp16": False, "reward_funcs": [], "rlhf_type": None}
    (run / "checkpoint-20/args.json").write_text(json.dumps(said | more | {"hub_token": "secret"}))
    (run / "checkpoint-20/trainer_state.json").write_text('{"global_step": 20, "epoch": 1.5}')
    script("prunekit.training.publish", "--run", run, "--base", base, "--out", tmp_path / "out", "--stage", "x")
    assert history(tmp_path / "out")[-1]["settings"] == said | {
        "checkpoint": "checkpoint-20", "chosen": "the last", "steps": 20, "epochs": 1.5, "world_size": 3,
        "global_batch": 24,
    }  # fmt: skip


@pytest.mark.parametrize("text", ["[]", "null", '{"learning_', '{"gradient_accumulation_steps": "4"}'])
def test_arguments_of_another_shape_are_left_out_of_the_history(text, run, base, tmp_path, script):
    (run / "checkpoint-20/args.json").write_text(text)
    done = script("prunekit.training.publish", "--run", run, "--base", base, "--out", tmp_path / "out", "--stage", "x")
    assert done.returncode == 0, done.stderr
    assert "global_batch" not in history(tmp_path / "out")[-1]["settings"]


def test_a_run_without_a_finished_checkpoint_is_refused(tmp_path):
    with pytest.raises(PruneKitError, match="no finished checkpoint-N here"):
        find_checkpoint(tmp_path)


def test_metrics_are_the_last_finite_value_of_each_number(run):
    (run / "logging.jsonl").open("a").write('\n{"grad_norm": NaN}\n')
    assert final_metrics(read_log(run)) == {"loss": 1.0, "eval_loss": 0.5, "eval_token_acc": 0.9}


def test_lines_of_a_resumed_run_count_and_what_is_no_number_does_not(run):
    """A killed run's last line is torn, and the resumed one goes on behind it."""
    (run / "logging.jsonl").open("a").write('\n[1]\n{"loss": 0.25, "done": true, "grad_norm": Infinity}\n')
    assert final_metrics(read_log(run)) == {"loss": 0.25, "eval_loss": 0.5, "eval_token_acc": 0.9}


def command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["publish", *map(str, arguments)])
    publishing.main()


def test_a_run_goes_on_from_its_last_whole_checkpoint(run, monkeypatch, capsys, tmp_path):
    command(monkeypatch, "--run", run, "--find-resume")
    command(monkeypatch, "--run", tmp_path / "nothing", "--find-resume")
    assert capsys.readouterr().out.splitlines() == [str(run / "checkpoint-20"), ""]


@pytest.mark.parametrize(
    ("state", "named", "ended"),
    [
        ({"global_step": 20, "max_steps": 20}, "a/checkpoint-20", True),
        ({"global_step": 20, "max_steps": 30}, "a/checkpoint-20", False),  # it failed, which writes that line, too
        ({"global_step": 20, "max_steps": 20}, "a/checkpoint-10", False),
        ({"global_step": 20, "max_steps": 20}, None, False),  # killed before it could tell which is the best
        ({}, "a/checkpoint-20", False),
    ],
)
def test_a_training_has_ended_that_took_all_steps_and_told_its_last_checkpoint(state, named, ended, run):
    (run / "checkpoint-20/trainer_state.json").write_text(json.dumps(state))
    (run / "logging.jsonl").write_text(json.dumps({"last_model_checkpoint": named}) + "\n")
    assert has_ended(run, run / "checkpoint-20") == ended


def test_one_checkpoint_of_a_run_can_be_published_in_another_dtype(run, base, tmp_path, monkeypatch):
    wish = ["--run", run / "checkpoint-10", "--base", base, "--out", tmp_path / "out", "--stage", "sft"]
    command(monkeypatch, *wish, "--dtype", "bfloat16")
    assert norm(tmp_path / "out") == 10
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path / "out").tensors.values()} == {"BF16"}
    with pytest.raises(PruneKitError, match="exists; choose another OUT or pass --overwrite"):
        command(monkeypatch, *wish)
    command(monkeypatch, *wish, "--overwrite")
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path / "out").tensors.values()} == {"F32"}


def test_each_weight_has_the_dtype_that_it_has_in_the_base_and_a_new_one_the_commonest(run, tmp_path):
    model = build("qwen3_vl").to(torch.bfloat16)
    model.model.language_model.norm.float()
    model.save_pretrained(tmp_path / "base")
    file = run / "checkpoint-20/model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()  # tied: may be there
    save_file(tensors, file, {"format": "pt"})
    publish(run / "checkpoint-20", tmp_path / "out", tmp_path / "base", "sft")
    dtypes = {name: tensor.dtype for name, tensor in open_checkpoint(tmp_path / "out").tensors.items()}
    assert dtypes.pop("model.language_model.norm.weight") == "F32" and set(dtypes.values()) == {"BF16"}


def test_a_dtype_is_said_in_every_part_of_the_config(run, base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["dtype"] = config["vision_config"]["torch_dtype"] = "float32"
    config.pop("dtype", None)
    (base / "config.json").write_text(json.dumps(config))
    publish(run / "checkpoint-20", tmp_path / "out", base, "sft", dtype="float16")
    found = json.loads((tmp_path / "out/config.json").read_text())
    said = found["dtype"], found["text_config"]["dtype"], found["vision_config"]["torch_dtype"]
    assert said == ("float16",) * 3


@pytest.fixture
def adapter(run):
    """A run whose last whole checkpoint is a LoRA's."""
    folder = run / "checkpoint-20"
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"a": torch.ones(3)}, folder / "adapter_model.safetensors")
    return run


def test_an_adapter_is_published_as_its_two_files_with_the_runs_records(adapter, base, tmp_path, monkeypatch):
    wish = ["--run", adapter, "--base", base, "--out", tmp_path / "out", "--stage", "lora"]
    command(monkeypatch, *wish)
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "logging.jsonl", "command.sh"} <= found
    assert not found & {"optimizer.pt", "model.safetensors", "trainer_state.json"}
    assert torch.equal(load_file(tmp_path / "out/adapter_model.safetensors")["a"], torch.ones(3))
    with pytest.raises(PruneKitError, match="exists"):
        command(monkeypatch, *wish)


def test_a_torn_adapter_is_not_published(adapter, base, tmp_path, monkeypatch):
    file = adapter / "checkpoint-20/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(PruneKitError):
        command(monkeypatch, "--run", adapter, "--base", base, "--out", tmp_path / "out", "--stage", "lora")
    assert not (tmp_path / "out").exists()


def test_a_run_becomes_a_clean_checkpoint(run, base, tmp_path, script):
    done = script(
        "prunekit.training.publish", "--run", run, "--base", base, "--out", tmp_path / "out", "--stage", "sft"
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja",
        "logging.jsonl", "command.sh", HISTORY, "README.md",
    }  # fmt: skip
    assert (norm(out), (out / "tokenizer.json").read_text()) == (20, "trained")
    first, entry = history(out)
    assert (first["stage"], entry["stage"], entry["input"]) == ("manual_select", "sft", str(base))
    assert entry["metrics"]["eval_token_acc"] == 0.9
    assert torch.equal(logits(load(out)), logits(load(run / "checkpoint-20")))


def test_a_trainers_config_changes_are_not_published(run, base, tmp_path):
    publish(run / "checkpoint-20", tmp_path / "out", base, "sft")
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((base / "config.json").read_text())


def test_weights_get_the_dtypes_of_the_base(run, tmp_path):
    build("qwen3_vl").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    publish(run / "checkpoint-20", tmp_path / "out", tmp_path / "base", "sft")
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path / "out").tensors.values()} == {"BF16"}
    trained, published = (load_file(f / "model.safetensors") for f in (run / "checkpoint-20", tmp_path / "out"))
    assert all(torch.equal(trained[name].bfloat16(), published[name]) for name in trained)
    assert load(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_wanted_dtype_goes_to_weights_and_config(key, run, base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    del config["dtype"]
    (base / "config.json").write_text(json.dumps(config | {key: "float32"}))
    publish(run / "checkpoint-20", tmp_path / "out", base, "sft", dtype="float16")
    assert json.loads((tmp_path / "out/config.json").read_text())[key] == "float16"
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path / "out").tensors.values()} == {"F16"}


def test_weights_that_overflow_a_dtype_are_not_published(run, base, tmp_path):
    file = run / "checkpoint-20/model.safetensors"
    tensors = load_file(file)
    tensors["model.language_model.norm.weight"][0] = 1e6
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(PruneKitError, match=r"norm\.weight: has values too large for float16; choose another dtype"):
        publish(run / "checkpoint-20", tmp_path / "out", base, "sft", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("has_head", ["source", "base"])
def test_a_tied_head_may_be_there_or_not(has_head, run, base, tmp_path):
    folder = base if has_head == "base" else run / "checkpoint-20"
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    entry = publish(run / "checkpoint-20", tmp_path / "out", base, "sft")
    assert entry["parameters"] == entry["parameters_before"] == load(tmp_path / "out").num_parameters()


def test_an_untied_head_must_be_there(own, tmp_path):
    base = own("qwen3")
    tensors = load_file(base / "model.safetensors")
    source = shutil.copytree(base, tmp_path / "source")
    del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(PruneKitError, match=r"source: has no lm_head\.weight"):
        publish(source, tmp_path / "out", base, "sft")


def test_a_base_saved_without_its_head_prefix_fits(own, tiny, tmp_path):
    base = own("gpt2")
    tensors = load_file(base / "model.safetensors")
    tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()} | {
        "h.0.attn.bias": torch.ones(1, 1, 64, 64)
    }
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    publish(tiny("gpt2"), tmp_path / "out", base, "sft")
    assert torch.equal(logits(load(tmp_path / "out")), logits(build("gpt2")))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.pop("model.language_model.layers.4.mlp.up_proj.weight"),
            r"checkpoint-20: has no .*layers\.4\.mlp",
        ),
        (lambda t: t.update(extra=torch.zeros(1)), "own-qwen3_vl: has no extra"),
        (
            lambda t: t.update({"model.language_model.norm.weight": torch.zeros(31)}),
            r"norm\.weight is \[31\], in .* \[32\]",
        ),
    ],
)  # fmt: skip
def test_a_source_that_is_not_the_base_trained_is_refused(change, message, run, base, tmp_path):
    file = run / "checkpoint-20/model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(PruneKitError, match=message):
        publish(run / "checkpoint-20", tmp_path / "out", base, "sft")
    assert not (tmp_path / "out").exists()


def test_a_used_out_is_refused(run, base):
    with pytest.raises(PruneKitError, match="is or holds the input"):
        publish(run / "checkpoint-20", run, base, "sft")
    with pytest.raises(PruneKitError, match="exists; choose another OUT or pass --overwrite"):
        publish(run / "checkpoint-20", run / "checkpoint-10", base, "sft")
