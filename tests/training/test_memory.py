"""What a training takes, counted: against tensors made for real, arithmetic, and ms-swift's lines."""

import json
import re
from collections import Counter

import pytest
import torch
from helpers.paths import EMBEDDED
from helpers.tiny_models import VISION, _build
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from prunekit.checkpoint import open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.memory import defaults
from prunekit.msswift.line import parse
from prunekit.training.ledger import Ledger
from prunekit.training.memory import Training, Zero, add_up, alternatives
from prunekit.training.steps import Account, Rows, Step, frozen_by, go_through, inputs_for

FLOATS = {"weights": "float32", "compute": "float32", "autocast": False}
GPUS = 4


def line(stage="sft", gpus=GPUS, *flags):
    kind = "sft" if stage in ("sft", "lora") else "rlhf"
    return parse(kind, [*defaults(stage, gpus, list(flags)), *flags])


def training(stage="sft", gpus=GPUS, *flags, **more):
    return Training.of(line(stage, gpus, *flags), open_checkpoint(EMBEDDED), gpus, **more)


def config_folder(family, folder):
    cls, config = _build(family)
    config.architectures = [cls.__name__]
    config.save_pretrained(folder)
    return cls, config


def allocated(step) -> int:
    """The most bytes that torch's allocator has given at once while this runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        most = max(most, live := live + event.nbytes())
    return most


def test_a_storage_is_counted_once_until_its_last_view_is_gone():
    fake = FakeTensorMode()
    with fake, Ledger(fake) as ledger:
        first = torch.zeros(256)
        view = first[:10].view(2, 5)
        assert ledger.live.total() == 1024
        del first
        assert ledger.live.total() == 1024
        del view
    assert (ledger.live.total(), ledger.peak.total()) == (0, 1024)


def test_what_was_there_before_is_not_counted():
    fake = FakeTensorMode()
    with fake:
        weight = torch.zeros(8, 4)
        with Ledger(fake) as ledger:
            ledger.leave_out([weight])
            weight.t()
    assert ledger.peak.total() == 0


def test_whole_numbers_are_computed_for_real():
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, Ledger(fake):
        assert torch.arange(5)[torch.arange(5) > 2].tolist() == [3, 4]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "llama", "gpt2", "qwen3_vl"])
def test_a_step_is_counted_as_torch_allocates_it(family, checkpointing, tmp_path):
    cls, config = config_folder(family, tmp_path)
    rows = Rows(2, 48, 16 if family in VISION else 0, 12)
    model = cls._from_config(config, attn_implementation="sdpa").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = inputs_for(config, rows, FakeTensorMode())
    if "pixel_values" in inputs:
        inputs["pixel_values"] = torch.zeros(inputs["pixel_values"].shape)
    inputs["labels"] = inputs["labels"][:, -13:]
    measured = allocated(lambda: model(**inputs, logits_to_keep=13, use_cache=False).loss.backward())
    step = Step("sft", rows, **FLOATS, checkpointing=checkpointing, reentrant=False)
    assert go_through(tmp_path, step).peak.total() == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("kind", ["sft", "gkd", "grpo"])
def test_every_stage_of_a_model_of_images_is_gone_through(kind, tmp_path):
    config_folder("qwen3_vl", tmp_path)
    step = Step(kind, Rows(2, 48, 16, 12), **FLOATS, teacher=tmp_path if kind == "gkd" else None)
    assert {"activations", "gradients"} <= {*go_through(tmp_path, step).peak}


def test_checkpointing_rows_and_frozen_weights_save_activations(tmp_path):
    config_folder("qwen3", tmp_path)

    def peak(rows=4, checkpointing=False, **more):
        step = Step("sft", Rows(rows, 64, 0, 8), **FLOATS, checkpointing=checkpointing, **more)
        return go_through(tmp_path, step).peak["activations"]

    assert max(peak(rows=1), peak(checkpointing=True), peak(frozen=("layers.[0-3]", "embed"))) < peak()


def test_gradients_that_are_kept_are_there_when_the_step_begins(tmp_path):
    config_folder("qwen3", tmp_path)
    found = {
        when: go_through(tmp_path, Step("sft", Rows(1, 16, 0, 8), **FLOATS, gradients=when))
        for when in ("kept", "made", "sent")
    }
    assert found["kept"].peak["gradients"] == found["kept"].trained_bytes
    assert found["kept"].peak.total() > found["made"].peak.total() > found["sent"].peak.total()


def test_an_adapter_alone_is_trained(tmp_path):
    config_folder("qwen3", tmp_path)
    lora = (("r", 4), ("target_modules", ("q_proj", "down_proj")))
    found = go_through(tmp_path, Step("sft", Rows(1, 16, 0, 8), **FLOATS, lora=lora))
    per_layer = 4 * (32 + 8 * 16) + 4 * (48 + 32)  # rank times inputs and outputs
    assert found.trained == 5 * per_layer


def test_of_a_mixture_all_linear_is_its_attention_as_ms_swift_reads_it(tmp_path):
    config_folder("mixtral", tmp_path)
    lora = (("r", 4), ("lora_dropout", 0.05), ("target_modules", "all-linear"))
    found = go_through(tmp_path, Step("sft", Rows(1, 16, 0, 8), **FLOATS, lora=lora))
    per_layer = 4 * (2 * (32 + 4 * 16) + 2 * (32 + 2 * 16))
    assert found.trained == 5 * per_layer


def test_an_adapter_that_peft_refuses_is_a_mistake_in_one_line(tmp_path):
    config_folder("qwen3_moe", tmp_path)  # of its dense layers' names it takes the experts, too
    lora = (("r", 4), ("lora_dropout", 0.05), ("target_modules", "all-linear"))
    with pytest.raises(PruneKitError, match="peft refuses this LoRA of a qwen3_moe: .*lora_dropout"):
        go_through(tmp_path, Step("sft", Rows(1, 16, 0, 8), **FLOATS, lora=lora))


def account(weights=2000, trained=1000, peak=None):
    return Account(weights, trained, trained, 2 * trained, 0, Counter(peak or {"activations": 10**6}))


@pytest.mark.parametrize(
    ("name", "weights", "optimizer"),
    [("zero1", 2000, 3000), ("zero2", 2000, 3000), ("zero3", 500 + 2000, 3000), ("zero2_offload", 2000, 0)],
)
def test_zero_shares_out_what_its_stage_says(name, weights, optimizer):
    found = add_up(training("sft", GPUS, "--deepspeed", name), account())
    assert (found.parts["weights"], found.parts.get("optimizer", 0)) == (weights, optimizer)


def test_ddp_keeps_gradients_twice():
    one, four = (add_up(training("sft", n, "--deepspeed", ""), account(peak={"gradients": 2000})) for n in (1, 4))
    assert four.parts["gradients"] - one.parts["gradients"] == 2000


def test_the_optimizers_turn_counts_where_it_takes_the_most():
    found = add_up(training("sft", 1), account(peak={"activations": 1}, trained=10**10))
    assert found.when == "at the optimizer's turn"
    assert found.parts["gradients"] == 10**10 * (2 + 6)  # 16-bit ones, and both flat copies


def test_a_rollout_engine_has_its_share_of_the_card_while_it_generates():
    found = add_up(training("grpo", 2, gpu_memory=10**12), account())
    assert (found.when, found.parts["rollout engine"]) == ("while it generates", 4 * 10**11)
    awake = add_up(training("grpo", 2, "--sleep_level", "0", gpu_memory=10**12), account())
    assert (awake.when, awake.parts["rollout engine"]) == ("in a step", 4 * 10**11)


def test_a_cached_teacher_needs_no_rollout_engine():
    now = line("gkd", 1, "--teacher_model", str(EMBEDDED))
    cached = vars(now) | alternatives(now, open_checkpoint(EMBEDDED).config, 1)["CACHE=runs/cache"]
    assert line("gkd", 1, "--teacher_model_server", "runs/cache").lmbda == cached["lmbda"] == 0
    engines = [
        Training.of(type(now)(**values), open_checkpoint(EMBEDDED), 1, 10**12).engine for values in (vars(now), cached)
    ]
    assert engines == [3 * 10**11, 0]


def test_rows_are_as_long_as_the_line_and_the_model_allow(monkeypatch):
    assert training().step.rows.tokens == open_checkpoint(EMBEDDED).config["text_config"]["max_position_embeddings"]
    assert training("sft", 4, "--max_length", "100").step.rows == Rows(4, 100, 50, 49)
    monkeypatch.setenv("MAX_PIXELS", str(4 * 16**2 * 7))
    image = training("sft", 4, "--max_length", "100").step.rows.image
    assert 0 < image < 50
    generated = training("grpo", 4, "--max_length", "100", "--max_completion_length", "20").step.rows
    assert (generated.tokens, generated.answer) == (120, 20)
    assert training("grpo", 4, tokens=300).step.rows == Rows(8, 300, 0, 299)  # an answer may have 512


def test_a_file_of_deepspeeds_is_read(tmp_path):
    file = tmp_path / "mine.json"
    settings = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5}
    file.write_text(json.dumps({"zero_optimization": settings}))
    assert Zero.of(str(file), 8) == Zero(2, host_optimizer=True, bucket=5, gathered=10**9)
    assert Zero.of("zero3", 8).bucket == 64
    said = '{"zero_optimization": {"stage": 3, "offload_param": {"device": "%s"}}}'
    assert [Zero.of(said % device, 8).host_weights for device in ("cpu", "none", "auto")] == [True, False, False]


def test_what_is_off_already_is_no_alternative():
    config = open_checkpoint(EMBEDDED).config
    found = alternatives(line("sft", 4, "--per_device_train_batch_size", "1", "--freeze_vit", "true"), config, 4)
    assert not {"--per_device_train_batch_size 1", "--freeze_vit true", "--gradient_checkpointing true"} & {*found}
    assert "DEEPSPEED=zero3" in found


@pytest.mark.parametrize(
    ("flags", "frozen"),
    [
        ((False, False, False), set()),
        ((True, False, False), {"text"}),
        ((False, True, False), {"vision"}),
        ((False, False, True), {"merger", "tap"}),
    ],
)
def test_each_of_ms_swifts_flags_freezes_its_part(flags, frozen):
    names = {
        "text": "model.language_model.layers.0.mlp.up_proj.weight",
        "vision": "model.visual.blocks.0.attn.qkv.weight",
        "merger": "model.visual.merger.norm.weight",
        "tap": "model.visual.deepstack_merger_list.0.norm.weight",
    }
    patterns = frozen_by(open_checkpoint(EMBEDDED).family.vision_prefix, *flags)
    assert {part for part, name in names.items() if any(re.search(each, name) for each in patterns)} == frozen
