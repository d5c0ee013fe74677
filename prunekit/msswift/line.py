"""ms-swift's command lines, read without ms-swift: to import its argument classes takes seven seconds.

Their source is parsed instead, and transformers' own HfArgumentParser is made from it, so that a line means here what
it means there: types, choices, lists, `--flag=value`, dashes for underscores, the last of several counts. `parse` says
what a line means, `check_line` refuses what ms-swift would refuse or trip over later.
"""

import argparse
import ast
import functools
import importlib.util
import re
import typing
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from prunekit.arguments import is_file, is_folder
from prunekit.errors import PruneKitError, need_packages

from .names import assigned, check_choice, check_names, check_registered, model_types, registered, show
from .ranges import check_numbers
from .settings import FSDP, check_settings, read_object, zero_optimization
from .source import JSON, as_dataclass, constants_in, package, set_in

RENAMED = {
    "--sft_type": "--tuner_type",
    "--train_type": "--tuner_type",
    "--evaluation_strategy": "--eval_strategy",
}  # in earlier releases
CLASSES = {
    "sft": ("sft_args.py", "SftArguments"),
    "rlhf": ("rlhf_args.py", "RLHFArguments"),
    "export": ("export_args.py", "ExportArguments"),
    "rollout": ("deploy_args.py", "RolloutArguments"),
}
REGEXES = ("freeze_parameters_regex", "trainable_parameters_regex", "target_regex")
ATTENTION = (
    "sdpa", "eager", "flex_attention", "flash_attn", "flash_attention_2", "flash_attention_3", "flash_attention_4",
)  # fmt: skip
FLASH_ATTENTION = ("kernels", "flash_attn", "flash_attn_interface")  # packages that have it
REGISTRIES = {  # flags whose values are registered by name, here or in a plugin
    "optimizer": ("optimizers_map", "optimizers/mapping.py"),
    "callbacks": ("callbacks_map", "callbacks/mapping.py"),
    "eval_metric": ("eval_metrics_map", "metrics/mapping.py"),
    "agent_template": ("agent_template_map", "agent_template/mapping.py"),
    "multi_turn_scheduler": ("multi_turns", "rollout/multi_turn.py"),
}
GRPO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "real", "fipo")
LENIENT = ("deepspeed", "device_map", "fsdp_config", "max_memory")  # may be something else than JSON


def _arguments(kind: str) -> type:
    file, name = CLASSES[kind]
    return as_dataclass(package("swift") / "arguments" / file, name)


@functools.cache
def parser(kind: str) -> argparse.ArgumentParser:
    """The parser of `swift sft`, `rlhf`, `export` or `rollout`, as the installed ms-swift would make it."""
    # by its file: `import transformers` alone takes a second, and this module of it needs nothing of the rest
    spec = importlib.util.spec_from_file_location("hf_argparser", package("transformers") / "hf_argparser.py")
    assert spec and spec.loader  # a .py file has one
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.HfArgumentParser(_arguments(kind), add_help=False)
    made.error = _refuse
    return made


def _refuse(message: str) -> NoReturn:
    """argparse's message, as a PruneKitError that begins with the flag."""
    message = re.sub(r"^argument (--\w+)\S*:", r"\1:", message)
    for pattern, said in (
        (r"expected one argument", "needs a value"),
        (r"expected at least one argument", "needs a value, or several"),
        (r"invalid int value: (.*)", r"\1 is no whole number"),
        (r"invalid float value: (.*)", r"\1 is no number"),
        (r"Truthy value expected: got (.*) but expected .*", r"\1 is neither true nor false"),
    ):
        message = re.sub(pattern, said, message)
    message = re.sub(r", --\w+-[\w-]+", "", message)  # of each ambiguous flag, its spelling with dashes
    raise PruneKitError(" ".join(message.split()))


def parse(kind: str, line: list[str]) -> argparse.Namespace:
    """The values that a line's flags have for `swift KIND`; PruneKitError for a line that it wouldn't take."""
    swift = parser(kind)
    args, rest = swift.parse_known_args(line)
    for word in rest:
        if not word.startswith("-"):
            raise PruneKitError(
                f"{word[:80]!r} belongs to no flag of `swift {kind}`: is a flag's name or a quote missing?"
            )
        flag = word.partition("=")[0].replace("-", "_").replace("__", "--", 1)
        known = [name for name in swift._option_string_actions if "-" not in name[2:]]
        like = get_close_matches(RENAMED.get(flag, flag), known, 1, 0.7)
        raise PruneKitError(
            f"{show(word)}: `swift {kind}` has no such flag: "
            + (f"did you mean {like[0]}?" if like else "leave it out")
        )
    return args


def check_whole_names(kind: str, line: Iterable[str]) -> None:
    """PruneKitError for a flag that is shortened: ms-swift takes it, and a launcher doesn't see that it is there."""
    known = parser(kind)._option_string_actions
    for word in line:
        flag = word.partition("=")[0]
        whole = [action.dest for name, action in known.items() if name.startswith(flag)]
        if word.startswith("--") and flag not in known and whole:
            raise PruneKitError(f"{show(flag)}: write the flag's whole name, --{whole[0]}")


def check_packages(args: argparse.Namespace) -> None:
    """PruneKitError if a line asks for a package that isn't installed."""
    get = vars(args).get
    for wanted, name in (
        (get("deepspeed"), "deepspeed"),
        (get("use_vllm"), "vllm"),
        (get("use_liger_kernel"), "liger_kernel"),
    ):
        if wanted:
            need_packages(name, extra="gpu")
    if str(args.attn_impl).startswith("flash_att") and not any(map(importlib.util.find_spec, FLASH_ATTENTION)):
        raise PruneKitError(f"--attn_impl {args.attn_impl}: no flash attention is installed: pip install kernels")


def _check_together(kind: str, args: argparse.Namespace, processes: int) -> None:
    """PruneKitError for flags that ms-swift takes one by one, but not together."""
    get = vars(args).get
    if get("fp16") and get("bf16"):
        raise PruneKitError("--fp16 true and --bf16 true exclude each other: give one")
    if get("fsdp") and get("deepspeed"):
        raise PruneKitError("--fsdp and --deepspeed (DEEPSPEED=) exclude each other: leave one out")
    if args.warmup_ratio and args.warmup_steps:
        raise PruneKitError("--warmup_ratio and --warmup_steps exclude each other: give one (the other as 0)")
    if (args.packing or args.padding_free) and not str(args.attn_impl).startswith("flash_att"):
        flag = "packing" if args.packing else "padding_free"
        raise PruneKitError(
            f"--{flag} needs flash attention by name: --attn_impl flash_attention_2 (or 3, 4, flash_attn)"
        )
    if kind != "rlhf":
        return
    if args.use_vllm and not args.vllm_mode or args.vllm_mode and not args.use_vllm:
        raise PruneKitError("--use_vllm true and --vllm_mode server or colocate belong together: give both or neither")
    for name in ("min_p", "structured_outputs_regex"):
        if get(name) and not args.use_vllm:
            raise PruneKitError(f"--{name}: answers go by it where vLLM generates, and not here: leave it out")
    if args.teacher_model and args.teacher_model_server:
        raise PruneKitError("--teacher_model and --teacher_model_server exclude each other: leave one out")
    if args.rlhf_type == "gkd" and "://" in (args.teacher_model_server or "") and args.temperature != 1:
        raise PruneKitError(
            f"--temperature {args.temperature:g}: a teacher's server answers at temperature 1: leave it out"
        )
    if args.rlhf_type == "gkd" and args.gkd_logits_topk and args.use_liger_kernel:
        raise PruneKitError("--gkd_logits_topk and --use_liger_kernel exclude each other: leave one out")
    if args.rlhf_type == "gkd" and args.seq_kd:
        raise PruneKitError("--seq_kd is not in ms-swift any more: leave it out")
    if args.rlhf_type != "grpo":
        return
    if args.num_generations == 1 and not (args.teacher_model or args.teacher_model_server):
        raise PruneKitError("--num_generations 1: answers are compared with each other; give 2 or more")
    check_choice("--truncation_strategy", args.truncation_strategy, ("left", "delete"))
    rewards = len(args.reward_funcs) + len(args.reward_model or ())
    if args.reward_weights and len(args.reward_weights) != rewards:
        raise PruneKitError(
            f"--reward_weights gives {len(args.reward_weights)} for {rewards} rewards: give one for each of "
            f"--reward_funcs"
        )
    each, batch = args.per_device_train_batch_size * processes, args.generation_batch_size
    if batch and batch != each * (args.steps_per_generation or batch // each):
        raise PruneKitError(
            f"--generation_batch_size {batch}: give {each} (--per_device_train_batch_size x processes) times "
            "--steps_per_generation, which may be left out"
        )
    batch = batch or each * (args.steps_per_generation or args.gradient_accumulation_steps or 1)
    if batch % args.num_generations:
        raise PruneKitError(
            f"--num_generations {args.num_generations}: a generation batch of {batch} "
            "(--per_device_train_batch_size x processes x --steps_per_generation) isn't a multiple of it"
        )
    generations, rows = (
        args.num_generations_eval or args.num_generations,
        args.per_device_eval_batch_size * processes,
    )
    if (args.val_dataset or args.split_dataset_ratio) and args.eval_strategy != "no" and rows % generations:
        raise PruneKitError(
            f"--per_device_eval_batch_size {args.per_device_eval_batch_size}: {rows} rows on {processes} processes "
            f"aren't a multiple of --num_generations {generations}"
        )


def check_line(kind: str, args: argparse.Namespace, processes: int = 1) -> None:
    """PruneKitError for what `swift KIND` would refuse, or trip over, only after it has begun."""
    get = vars(args).get
    plugins = [Path(plugin) for plugin in args.external_plugins]
    for plugin in plugins:
        registered(plugin, "")  # can be read
    check_numbers(args)
    check_names(args.model_type, args.template, plugins)
    check_choice("--teacher_model_type", get("teacher_model_type"), model_types(plugins))
    tuners = [*set_in("arguments/base_args/base_args.py", "get_supported_tuners")]
    check_registered("tuner_type", [args.tuner_type], "tuners_map", "tuner_plugin/mapping.py", plugins, tuners)
    if args.attn_impl and "/" not in args.attn_impl:  # with a slash: a kernel of the hub
        check_choice("--attn_impl", args.attn_impl, ATTENTION)
    check_settings("--rope_scaling", args.rope_scaling, ("linear", "dynamic", "yarn"))
    texts = [text for text in (args.system, *args.new_special_tokens) if text and text.endswith(".txt")]
    for file in (*texts, *args.custom_dataset_info):
        if not is_file(file):
            raise PruneKitError(f"{show(file)}: no such file (--system, --new_special_tokens, --custom_dataset_info)")
    for folder in args.adapters:
        if not is_folder(folder):
            raise PruneKitError(f"--adapters {show(folder)}: no such folder")
    for name in REGEXES:
        try:
            re.compile(pattern := get(name) or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise PruneKitError(f"--{name} {pattern[:80]!r}: no regular expression ({error})") from None
    for name, hint in typing.get_type_hints(_arguments(kind)).items():
        if hint == JSON and name not in LENIENT and isinstance(text := get(name), str):
            read_object(f"--{name}", text)
    if kind not in ("sft", "rlhf"):
        return
    for name in ("deepspeed", "teacher_deepspeed"):
        if value := get(name):
            zero_optimization(value, f"--{name}")
    check_settings("--fsdp", args.fsdp, FSDP)
    check_choice("--ddp_backend", args.ddp_backend, ("nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl"))
    if not re.fullmatch(r"\s*\d+(\.\d+)?\s*[KMGT]B\s*", args.max_shard_size, re.IGNORECASE):  # read at the first saving
        raise PruneKitError(f"--max_shard_size {show(args.max_shard_size)}: give a size like 5GB")
    if args.resume_from_checkpoint and not is_folder(args.resume_from_checkpoint):
        raise PruneKitError(f"--resume_from_checkpoint {show(args.resume_from_checkpoint)}: no such folder")
    check_choice("--eval_strategy", args.eval_strategy, ("no", "steps", "epoch"))
    schedulers = constants_in(package("transformers") / "trainer_utils.py", "SchedulerType")
    check_choice("--lr_scheduler_type", args.lr_scheduler_type, schedulers)
    for name, (registry, source) in REGISTRIES.items():
        names = value if isinstance(value := get(name), list) else [value]
        check_registered(name.removesuffix("s"), names, registry, source, plugins)
    scales = args.loss_scale.split("+") if args.loss_scale else ()
    strategies = ("default", "last_round", "all")
    check_registered("loss_scale", scales, "loss_scale_map", "loss_scale/mapping.py", plugins, strategies)
    if kind == "sft":
        check_registered("loss_type", [args.loss_type], "loss_map", "loss/mapping.py", plugins)
    elif args.rlhf_type == "grpo":
        for name in args.loss_type or ():
            check_choice("--loss_type", name, GRPO_LOSSES)
    integrations = (package("transformers") / "integrations/integration_utils.py").read_bytes()
    trackers, _ = assigned(ast.parse(integrations), "INTEGRATION_TO_CALLBACK")
    for name in args.report_to:
        check_choice("--report_to", name, [*sorted(trackers), "all", "none"])
    _check_together(kind, args, processes)
    check_packages(args)
