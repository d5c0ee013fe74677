"""ms-swift's command lines, checked without importing ms-swift: against the installed one, and by what is refused."""

import contextlib
import importlib.util
import subprocess
import sys

import pytest
from helpers.paths import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.errors import PruneKitError
from prunekit.msswift import line as swift_line
from prunekit.msswift.line import CLASSES, check_line, parse, parser
from prunekit.msswift.names import check_names
from prunekit.msswift.source import set_in

PLUGINS = ROOT / "plugins"
GRPO = ["--rlhf_type", "grpo", "--per_device_train_batch_size", "8"]


def check(kind: str, *line: object, processes: int = 1):
    args = parse(kind, list(map(str, line)))
    check_line(kind, args, processes)
    return args


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


# --- as the installed ms-swift --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def swift_parsers():
    import swift
    from swift.utils.utils import _patch_get_type_hints
    from transformers import HfArgumentParser

    with _patch_get_type_hints():
        return {kind: HfArgumentParser([getattr(swift, name)], add_help=False) for kind, (_, name) in CLASSES.items()}


# what the source alone doesn't tell
LOOSER = {"parallelism_config", "log_level", "log_level_replica", "generation_config"}


@pytest.mark.parametrize("kind", CLASSES)
def test_the_parser_is_the_one_that_swift_makes(kind, swift_parsers):
    def described(made):
        return {
            tuple(action.option_strings): (
                type(action).__name__,
                getattr(action.type, "__qualname__", None),
                action.nargs,
                action.const,
                tuple(action.choices or ()),
                action.required,
                None if action.dest == "optim" else action.default,
            )
            for action in made._actions
            if action.dest not in LOOSER
        }

    assert described(parser(kind)) == described(swift_parsers[kind])
    assert parser(kind)._option_string_actions.keys() == swift_parsers[kind]._option_string_actions.keys()


def test_names_of_models_templates_and_tuners_are_those_that_swift_registers():
    from swift.arguments.base_args.base_args import get_supported_tuners
    from swift.model import MODEL_MAPPING
    from swift.template import TEMPLATE_MAPPING
    from swift.tuner_plugin import tuners_map

    plugins = [PLUGINS / "gpt2_model.py"]
    for name in MODEL_MAPPING:
        check_names(name, None, plugins)
    for name in TEMPLATE_MAPPING:
        check_names(None, name, plugins)
    tuners = set_in("arguments/base_args/base_args.py", "get_supported_tuners")
    assert tuners | tuners_map.keys() == get_supported_tuners()


@pytest.mark.parametrize(
    ("flag", "module", "registry"),
    [
        ("--optimizer", "swift.optimizers", "optimizers_map"),
        ("--callbacks", "swift.callbacks", "callbacks_map"),
        ("--eval_metric", "swift.metrics", "eval_metrics_map"),
        ("--loss_type", "swift.loss", "loss_map"),
        ("--report_to", "transformers.integrations.integration_utils", "INTEGRATION_TO_CALLBACK"),
    ],
)
def test_what_swift_registers_is_taken_and_listed(flag, module, registry):
    names = [name for name in getattr(importlib.import_module(module), registry) if not name.startswith("ow")]
    for name in names:
        check("sft", flag, name)
    with pytest.raises(PruneKitError) as error:
        check("sft", flag, "nonesuch")
    for name in names:
        assert name in str(error.value)


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


def test_names_of_plugins_are_known():
    check("sft", "--callbacks", "keep_zeros", "--external_plugins", PLUGINS / "sparsity.py")
    check("sft", "--optimizer", "active_heads", "--external_plugins", PLUGINS / "head_rates.py")
    check("sft", "--model_type", "gpt2", "--external_plugins", PLUGINS / "gpt2_model.py")


@pytest.mark.parametrize(
    ("registry", "flag"),
    [
        ("callbacks_map", "--callbacks"),
        ("optimizers_map", "--optimizer"),
        ("loss_map", "--loss_type"),
        ("eval_metrics_map", "--eval_metric"),
        ("tuners_map", "--tuner_type"),
    ],
)
def test_a_plugin_registers_for_its_own_flag_alone(tmp_path, registry, flag):
    plugin = tmp_path / "mine.py"
    plugin.write_text(f"raise SystemExit('it ran')\n{registry}['mine'] = Mine\n")
    check("sft", flag, "mine", "--external_plugins", plugin)
    plugin.write_text("orms['mine'] = Mine\n")
    with pytest.raises(PruneKitError, match="unknown .* mine"):
        check("sft", flag, "mine", "--external_plugins", plugin)


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
        ("--max_length 0", r"--max_length 0: give a number above 0"),
        ("--max_length abc", r"--max_length: 'abc' is no whole number"),
        ("--max_length 1.5", r"--max_length: '1.5' is no whole number"),
        ("--learning_rate abc", r"--learning_rate: 'abc' is no number"),
        ("--learning_rate nan", r"--learning_rate nan: give a finite number"),
        ("--learning_rate inf", r"--learning_rate inf: give a finite number"),
        ("--learning_rate 1e400", r"--learning_rate inf: give a finite number"),
        ("--learning_rate -1", r"--learning_rate -1.0: give 0 or more"),
        ("--lora_dropout 1", r"--lora_dropout 1.0: give a number from 0 to 1, below 1"),
        ("--max_steps 0", r"--max_steps 0: give a number of steps, or -1"),
        ("--max_steps -2", r"--max_steps -2: give a number of steps, or -1"),
        ("--per_device_train_batch_size 0", r"give a number above 0"),
        ("--gradient_accumulation_steps -4", r"give a number above 0"),
        ("--save_steps 0", r"give a number above 0"),
        ("--seed -1", r"give 0 or more"),
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
        ("--rlhf_type gkd --lmbda 1.5", r"--lmbda 1.5: give a number from 0 to 1"),
        ("--rlhf_type gkd --beta 2", r"--beta 2.0: give a number from 0 .*to 1"),
        ("--rlhf_type gkd --gkd_logits_topk 0", r"--gkd_logits_topk 0: give a number above 0"),
        ("--rlhf_type gkd --gkd_logits_topk 8 --use_liger_kernel true", r"exclude each other"),
        ("--rlhf_type gkd --teacher_deepspeed zero9", r"--teacher_deepspeed zero9: no such file"),
        ("--rlhf_type gkd --vllm_gpu_memory_utilization 0", r"give a share of the GPU's memory, above 0"),
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
