"""ms-swift's command lines, checked without importing ms-swift: what is taken, and what is refused."""

import contextlib
import importlib.util
import subprocess
import sys

import pytest
from helpers.paths import ROOT
from helpers.swift_lines import check
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.errors import PruneKitError
from prunekit.msswift import line as swift_line
from prunekit.msswift.line import CLASSES, check_line, check_whole_names, parse, parser

GRPO = ["--rlhf_type", "grpo", "--per_device_train_batch_size", "8"]


@pytest.fixture
def installed(monkeypatch):
    """installed(name, ...): these packages are found, whether they are there or not; the others are not."""

    def found(*names):
        have = importlib.util.find_spec

        def find_spec(name, *rest):
            if name in ("deepspeed", "vllm", "liger_kernel", *swift_line.FLASH_ATTENTION):
                return have("json") if name in names else None
            return have(name, *rest)

        monkeypatch.setattr("importlib.util.find_spec", find_spec)

    return found


def test_no_library_is_imported_to_check_a_line():
    code = (
        "from prunekit.msswift.line import check_line, parse\n"
        "for kind in ('sft', 'rlhf', 'export', 'rollout'): check_line(kind, parse(kind, ['--max_length', '9']))\n"
        "import sys; assert not {'swift', 'transformers', 'torch', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --- what is taken --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_swifts_defaults_are_taken(kind):
    check(kind)


@pytest.mark.parametrize(
    ("line", "length"),
    [
        ("--max_length 5", 5),
        ("--max-length 5", 5),
        ("--max_length=5", 5),
        ("--max_length 7 --max-length=5", 5),
        ("--max_len 5", 5),  # argparse's abbreviations
        ("", None),
    ],
)
def test_a_flag_is_read_as_swift_reads_it(line, length):
    assert check("sft", *line.split()).max_length == length


def test_lists_and_switches_are_read_as_swift_reads_them():
    args = check("sft", "--dataset", "a", "b", "--no_gradient_checkpointing", "--columns", '{"a": "b"}')
    assert (args.dataset, args.gradient_checkpointing, args.columns) == (["a", "b"], False, '{"a": "b"}')


@pytest.mark.parametrize(
    "line",
    [
        "--max_steps -1",
        "--learning_rate 1e-5",
        "--eval_steps 0.1",
        "--attn_impl kernels-community/flash-attn",
        "--report_to none",
        "--report_to wandb tensorboard",
        "--columns {'a':'b'}",  # ms-swift repairs quotes
        "--columns {a:b}",
        "--rope_scaling yarn",
        "--deepspeed=",
        "--loss_scale last_round+hermes+ignore_empty_think",
    ],
)
def test_what_swift_takes_passes(line):
    check("sft", *line.split())


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--max_lenght 5", r"--max_lenght: .* did you mean --max_length\?"),
        ("--max-lenght=5", r"--max-lenght=5: .* did you mean --max_length\?"),
        ("--train_type full", r"did you mean --tuner_type\?"),
        ("--overwrite_output_dir", r"--overwrite_output_dir: `swift sft` has no such flag"),
        ("--rlhf_type gkd", r"--rlhf_type: `swift sft` has no such flag"),
        ("--max", r"ambiguous option: --max could match --max_steps, --max_grad_norm"),
        ("--run_name my run", r"'run' belongs to no flag"),
        ("--max_length", r"--max_length: needs a value"),
        ("--dataset --max_length 5", r"--dataset: needs a value, or several"),
        ("--max_length abc", r"--max_length: 'abc' is no whole number"),
        ("--max_length 1.5", r"--max_length: '1.5' is no whole number"),
        ("--learning_rate abc", r"--learning_rate: 'abc' is no number"),
        ("--bf16 maybe", r"--bf16: maybe is neither true nor false"),
        ("--fp16 true --bf16 true", r"exclude each other"),
        ("--warmup_ratio 0.1 --warmup_steps 5", r"exclude each other"),
        ("--lr_scheduler_type cosin", r"--lr_scheduler_type cosin is unknown: .*did you mean cosine\?"),
        ("--optimizer muo", r"unknown optimizer muo: .*did you mean muon\?"),
        ("--optim adamw", r"--optim: invalid choice: 'adamw'"),
        ("--callbacks lisa early", r"unknown callback early: .*did you mean early_stop\?"),
        ("--tuner_type loro", r"unknown tuner_type loro: .*did you mean lora\?"),
        ("--loss_type mse", r"unknown loss_type mse: choose from"),
        ("--eval_metric accuracy", r"unknown eval_metric accuracy: .*choose from acc"),
        ("--report_to wandbb", r"--report_to wandbb is unknown: .*did you mean wandb\?"),
        ("--attn_impl flash", r"--attn_impl flash is unknown: .*did you mean flash_attn\?"),
        ("--torch_dtype bf16", r"--torch_dtype: invalid choice: 'bf16' .*bfloat16"),
        (
            "--model_type qwen3vl",
            r"--model_type qwen3vl is unknown: choose one of ms-swift's, like .*qwen3_vl",
        ),
        ("--template qwen3vl", r"--template qwen3vl is unknown: choose one of ms-swift's, like .*qwen3_vl"),
        ("--packing true", r"--packing needs flash attention"),
        ("--padding_free true --attn_impl sdpa", r"--padding_free needs flash attention"),
        ("--trainable_parameters_regex (", r"--trainable_parameters_regex '\(': no regular expression"),
        ("--columns x", r"--columns x: neither a JSON object nor a file"),
        ("--columns [1]", r"--columns \[1\]: neither a JSON object nor a file"),
        ("--lr_scheduler_kwargs x", r"--lr_scheduler_kwargs x: neither a JSON object nor a file"),
        ("--deepspeed zero4", r"--deepspeed zero4: no such file, and none of zero0, .*zero3_offload"),
        ("--loss_scale default+react+foo", r"unknown loss_scale foo: choose from .*agentflan"),
        ("--agent_template qwen", r"unknown agent_template qwen: .*qwen_en"),
        ("--ddp_backend ncc", r"--ddp_backend ncc is unknown: .*did you mean nccl\?"),
        ("--rope_scaling yarm", r"--rope_scaling yarm: no such file, and none of linear, dynamic, yarn"),
        ("--system gone.txt", r"gone.txt: no such file"),
        ("--new_special_tokens <a> gone.txt", r"gone.txt: no such file"),
        ("--custom_dataset_info gone.json", r"gone.json: no such file"),
        ("--adapters gone", r"--adapters gone: no such folder"),
        ("--max_shard_size 5G", r"--max_shard_size 5G: give a size like 5GB"),
        ("--fsdp fsdp2 --deepspeed zero2", r"--fsdp and --deepspeed \(DEEPSPEED=\) exclude each other"),
        ("--fsdp fsdp3", r"--fsdp fsdp3: no such file, and none of fsdp2"),
        ("--eval_strategy step", r"--eval_strategy step is unknown: .*did you mean steps\?"),
        ("--resume_from_checkpoint gone", r"--resume_from_checkpoint gone: no such folder"),
        ("--external_plugins gone.py", r"plugin gone.py is not there"),
    ],
)
def test_a_bad_line_is_refused_in_one_line(line, message):
    with pytest.raises(PruneKitError, match=message) as error:
        check("sft", *line.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "flag"), [("--per-device-train-b 2", "per_device_train_batch_size"), ("--lmb=0", "lmbda")]
)
def test_a_shortened_flag_is_refused_by_its_whole_name(line, flag):
    with pytest.raises(PruneKitError, match=rf"^--[a-z-]+: write the flag's whole name, --{flag}$"):
        check_whole_names("rlhf", line.split())
    check_whole_names("rlhf", ["--lmbda=0", "--per-device-train-batch-size", "2", "--system", "--be brief"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--rlhf_type gpo", r"--rlhf_type: invalid choice: 'gpo'"),
        ("--use_vllm true", r"belong together"),
        ("--vllm_mode colocate", r"belong together"),
        ("--rlhf_type grpo --multi_turn_scheduler gym", r"unknown multi_turn_scheduler gym: .*gym_scheduler"),
        (
            "--rlhf_type gkd --teacher_model_type qwen3vl",
            r"--teacher_model_type qwen3vl is unknown: .*qwen3_vl",
        ),
        ("--rlhf_type grpo --min_p 0.1", r"--min_p: answers go by it where vLLM generates"),
        ("--rlhf_type gkd --gkd_logits_topk 8 --use_liger_kernel true", r"exclude each other"),
        ("--rlhf_type gkd --teacher_model a --teacher_model_server b", r"exclude each other"),
        ("--rlhf_type gkd --teacher_model_server http://a:1 --temperature 0.5", r"--temperature 0.5: .* answers at"),
        ("--rlhf_type gkd --teacher_deepspeed zero9", r"--teacher_deepspeed zero9: no such file"),
    ],
)
def test_a_bad_line_of_rlhf_is_refused_in_one_line(line, message):
    with pytest.raises(PruneKitError, match=message):
        check("rlhf", *line.split())


@pytest.mark.parametrize(
    ("line", "processes", "message"),
    [
        ("--loss_type gspo", 1, r"--loss_type gspo is unknown: .*choose from grpo"),
        (
            "--truncation_strategy right",
            1,
            r"--truncation_strategy right is unknown: .*choose from left, delete",
        ),
        ("--reward_funcs format --reward_weights 1 2", 1, r"--reward_weights gives 2 for 1 rewards"),
        ("--num_generations 1", 1, r"--num_generations 1: .*give 2 or more"),
        ("--generation_batch_size 12", 1, r"--generation_batch_size 12: give 8 \(.*\) times"),
        ("--generation_batch_size 64 --steps_per_generation 4", 1, r"--generation_batch_size 64: give 8 \(.*\) times"),
        ("--num_generations 3", 1, r"--num_generations 3: a generation batch of 8"),
        (
            "--num_generations 16 --steps_per_generation 2 --val_dataset v",
            1,
            r"1 rows on 1 processes aren't a multiple",
        ),
        ("--val_dataset v", 3, r"--per_device_eval_batch_size 1: 3 rows on 3 processes aren't a multiple"),
    ],
)
def test_batches_and_rewards_that_grpo_refuses_are_refused(line, processes, message):
    with pytest.raises(PruneKitError, match=message):
        check("rlhf", *GRPO, *line.split(), processes=processes)


def test_batches_that_grpo_takes_pass():
    check("rlhf", *GRPO, "--val_dataset", "v", processes=8)
    check("rlhf", *GRPO, "--val_dataset", "v", "--per_device_eval_batch_size", "8", processes=3)
    check("rlhf", *GRPO, "--num_generations", "16", processes=2)
    check("rlhf", *GRPO, "--generation_batch_size", "32", "--steps_per_generation", "2", processes=2)


@pytest.mark.parametrize(
    ("line", "package"),
    [
        ("--deepspeed zero2", "deepspeed"),
        ("--use_vllm true --vllm_mode colocate", "vllm"),
        ("--use_liger_kernel true", "liger_kernel"),
    ],
)
def test_a_package_that_is_asked_for_must_be_there(installed, line, package):
    installed()
    with pytest.raises(PruneKitError, match=rf"{package} is not installed: pip install .*gpu"):
        check("rlhf", "--rlhf_type", "gkd", *line.split())
    installed(package)
    check("rlhf", "--rlhf_type", "gkd", *line.split())


@pytest.mark.parametrize("package", swift_line.FLASH_ATTENTION)
def test_flash_attention_comes_from_one_of_its_packages(installed, package):
    line = ["--packing", "true", "--attn_impl", "flash_attention_3"]
    installed()
    with pytest.raises(PruneKitError, match="--attn_impl flash_attention_3: no flash attention is installed"):
        check("sft", *line)
    installed(package)
    check("sft", *line)


def test_a_file_of_deepspeed_settings_is_read(tmp_path, installed):
    installed("deepspeed")
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 2}}')
    check("sft", "--deepspeed", file)
    file.write_text("zero_optimization: 2")
    with pytest.raises(PruneKitError, match="ds.json: neither a JSON object nor a file that holds one"):
        check("sft", "--deepspeed", file)
    with pytest.raises(PruneKitError, match="no such file"):
        check("sft", "--deepspeed", tmp_path)


# --- anything at all ------------------------------------------------------------------------------------------

WORDS = st.text(max_size=20) | st.sampled_from(
    [
        "0",
        "-1",
        "nan",
        "1e400",
        "true",
        "{",
        "[1]",
        "zero2",
        "grpo",
        "1" * 5000,
        "--",
        "-",
        "a\nb",
        "\ud800",
        "x" * 5000,
        "(",
    ]
)


@st.composite
def lines(draw):
    kind = draw(st.sampled_from(sorted(CLASSES)))
    flags = st.sampled_from(sorted(parser(kind)._option_string_actions)) | WORDS.map("--{}".format)
    parts = draw(st.lists(st.tuples(flags, st.lists(WORDS, max_size=2), st.booleans()), max_size=4))
    line = []
    for flag, values, joined in parts:
        line += [f"{flag}={values[0]}", *values[1:]] if joined and values else [flag, *values]
    return kind, line


@given(lines())
@settings(max_examples=200, deadline=None)
def test_any_line_is_taken_or_refused_in_one_line(case):
    kind, line = case
    try:
        check_line(kind, parse(kind, line))
    except PruneKitError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017


@pytest.mark.parametrize("flag", ["--adapters", "--resume_from_checkpoint"])
def test_a_folder_of_a_name_too_long_isn_t_there(flag):
    with pytest.raises(PruneKitError, match="no such folder"):
        check_line("sft", parse("sft", [flag, "x" * 5000]))


@given(st.sampled_from(sorted(CLASSES)), st.data())
@settings(max_examples=200, deadline=None)
def test_any_value_of_a_known_flag_is_taken_or_refused(kind, data):
    flag = data.draw(st.sampled_from(sorted(parser(kind)._option_string_actions)))
    value = data.draw(WORDS.filter(lambda word: not word.startswith("-")))
    with contextlib.suppress(PruneKitError):
        check_line(kind, parse(kind, [flag, value]))
