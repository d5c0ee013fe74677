"""ms-swift's command lines, read without ms-swift: to import its argument classes takes seven seconds.

Their source is parsed instead, and transformers' own HfArgumentParser is made from it, so that a line means here what
it means there: types, choices, lists, `--flag=value`, dashes for underscores, the last of several counts.
"""

import argparse
import ast
import dataclasses
import enum
import functools
import importlib.util
import json
import math
import re
import typing
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn

from prunekit.errors import PruneKitError, need_packages

from .extend import MODELS

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
JSON = typing.Union[dict, str, None]  # noqa: UP007  # in this order it is read as a string; ms-swift sees to it
TYPES = {"str": str, "int": int, "float": float, "bool": bool, "dict": dict, "list": list}


# --- reading source -----------------------------------------------------------------------------------------------


@functools.cache
def package(name: str) -> Path:
    """The folder of an installed package, which isn't imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no package {name}", name=name)
    return Path(spec.origin).parent


@functools.cache
def _module(file: Path) -> tuple[dict[str, ast.ClassDef], dict[str, tuple[Path, str]]]:
    """The classes of a source file by name, and from which file its other names come."""
    classes: dict[str, ast.ClassDef] = {}
    imported: dict[str, tuple[Path, str]] = {}
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.ClassDef):
            classes[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if node.level:
                folder = file.parents[node.level - 1]
            elif parts[0] in ("swift", "transformers"):
                folder = package(parts[0]).parent
            else:
                continue
            path = folder.joinpath(*parts)
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            imported |= {alias.asname or alias.name: (path, alias.name) for alias in node.names}
    return classes, imported


@functools.cache
def _find(file: Path, name: str) -> tuple[Path, ast.ClassDef] | None:
    """The class that a name means in a source file, and the file that defines it."""
    classes, imported = _module(file)
    if name in classes:
        return file, classes[name]
    return _find(*imported[name]) if name in imported and imported[name][0].is_file() else None


def _defined(file: Path, name: str) -> tuple[Path, ast.ClassDef]:
    """As `_find`, of a class that is there."""
    if (found := _find(file, name)) is None:
        raise LookupError(f"{file}: no class {name}")
    return found


def _constants(node: ast.ClassDef) -> dict[str, Any]:
    """The constants that a class body assigns to names."""
    return {
        item.targets[0].id: item.value.value
        for item in node.body
        if isinstance(item, ast.Assign)
        and isinstance(item.targets[0], ast.Name)
        and isinstance(item.value, ast.Constant)
    }


def _type(node: ast.expr, file: Path) -> Any:
    """The type that an annotation names; what is neither built in, typing's nor an Enum is None."""
    match node:
        case ast.Constant(None):
            return NoneType
        case ast.BinOp(left, ast.BitOr(), right):
            return typing.Union[_type(left, file), _type(right, file)]  # noqa: UP007
        case ast.Subscript(ast.Name("Optional"), inner):
            return typing.Optional[_type(inner, file)]  # noqa: UP045
        case ast.Subscript(ast.Name("Union"), ast.Tuple(parts)):
            return typing.Union[tuple(_type(part, file) for part in parts)]  # noqa: UP007
        case ast.Subscript(ast.Name("Literal"), choices):
            return typing.Literal[ast.literal_eval(choices)]
        case ast.Subscript(ast.Name("List" | "list"), inner):
            return list[_type(inner, file)]  # type: ignore[misc]  # not known before it runs
        case ast.Subscript(ast.Name("Dict" | "dict")):
            return dict
        case ast.Name(name) if name in TYPES:
            return TYPES[name]
        case ast.Name(name) if found := _find(file, name):
            return enum.Enum(name, _constants(found[1]))
    return None


def _field(node: ast.expr | None) -> dict[str, Any] | None:
    """dataclasses.field's arguments for a default; None if the constructor doesn't take the field.

    A default that isn't written out is None; it can't be told from the source, and isn't needed to check a line.
    """

    def value(node: ast.expr | None) -> Any:
        try:
            return node and ast.literal_eval(node)
        except ValueError:
            return None

    if node is None:
        return {}
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "field"):
        return {"default": value(node)}
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if "init" in given and value(given["init"]) is False:
        return None
    metadata = given.get("metadata")
    said = metadata if isinstance(metadata, ast.Dict) else ast.Dict([], [])
    pairs = {value(key): value(item) for key, item in zip(said.keys, said.values)}
    made = {"metadata": {key: pairs[key] for key in ("aliases", "choices") if pairs.get(key)}}
    if "default_factory" in given:
        factory = given["default_factory"]
        default = value(factory.body) if isinstance(factory, ast.Lambda) else []
        return made | {"default_factory": lambda: default}
    return made | ({"default": value(given["default"])} if "default" in given else {})


@functools.cache
def _dataclass(file: Path, name: str) -> type:
    """A dataclass with the fields of that class and of its bases, in their order."""
    file, node = _defined(file, name)
    bases = [_dataclass(file, base.id) for base in node.bases if isinstance(base, ast.Name) and _find(file, base.id)]
    fields = []
    for item in node.body:
        if not (node.decorator_list and isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
            continue
        kind, given = _type(item.annotation, file), _field(item.value)
        if kind == JSON:
            kind = JSON
        if kind is not None and given is not None:
            fields.append((item.target.id, kind, dataclasses.field(**given)))
    return dataclasses.make_dataclass(name, fields, bases=tuple(bases), kw_only=True)


def _arguments(kind: str) -> type:
    file, name = CLASSES[kind]
    return _dataclass(package("swift") / "arguments" / file, name)


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


def _show(text: str) -> str:
    """A word of the command line in a message of one line."""
    return text[:80] if text[:80].isprintable() else repr(text[:80])


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
            f"{_show(word)}: `swift {kind}` has no such flag: "
            + (f"did you mean {like[0]}?" if like else "leave it out")
        )
    return args


# --- what a flag's value may be -----------------------------------------------------------------------------------

POSITIVE = (
    "max_length", "max_completion_length", "max_new_tokens", "response_length", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_epochs", "logging_steps",
    "eval_steps", "save_steps", "dataset_num_proc", "packing_length", "packing_num_proc",
    "num_generations", "num_generations_eval", "num_iterations", "steps_per_generation", "generation_batch_size",
    "gkd_logits_topk", "lora_rank", "lora_alpha", "adam_epsilon", "epsilon", "max_pixels", "sequence_parallel_size",
    "vllm_max_model_len", "vllm_tensor_parallel_size", "vllm_data_parallel_size", "vllm_max_num_seqs", "max_model_len",
    "chord_sft_per_device_train_batch_size", "eval_accumulation_steps", "move_model_batches", "max_turns",
    "ddp_timeout",
)  # fmt: skip
NATURAL = (
    "learning_rate", "vit_lr", "aligner_lr", "weight_decay", "max_grad_norm", "warmup_steps", "temperature", "seed",
    "data_seed", "dataloader_num_workers", "dataloader_prefetch_factor", "epsilon_high", "chord_mu_warmup_steps",
    "chord_mu_decay_steps", "beta", "sleep_level", "eval_delay",
)  # fmt: skip
SHARES = (
    "lmbda", "lora_dropout", "freeze_parameters_ratio", "split_dataset_ratio", "vllm_gpu_memory_utilization", "top_p",
    "adam_beta1", "adam_beta2", "warmup_ratio", "label_smoothing_factor", "chord_mu_peak", "chord_mu_valley",
)  # fmt: skip
BELOW_ONE = ("lora_dropout", "adam_beta1", "adam_beta2", "warmup_ratio")
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
DEEPSPEED = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def check_numbers(args: argparse.Namespace) -> None:
    """PruneKitError for a number that no training can use: not finite, or out of its range."""
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if not math.isfinite(number):
                wrong = "give a finite number"
            elif name in POSITIVE and number <= 0:
                wrong = "give a number above 0"
            elif name in NATURAL and number < 0:
                wrong = "give 0 or more"
            elif name in SHARES and not 0 <= number <= 1 or name in BELOW_ONE and number == 1:
                wrong = "give a number from 0 to 1" + (", below 1" if name in BELOW_ONE else "")
            elif name == "beta" and getattr(args, "rlhf_type", "") == "gkd" and number > 1:
                wrong = "give a number from 0 (forward KL) to 1 (reverse KL)"
            elif name == "vllm_gpu_memory_utilization" and number == 0:
                wrong = "give a share of the GPU's memory, above 0"
            elif name == "max_steps" and (number == 0 or number < -1):
                wrong = "give a number of steps, or -1 to count by --num_train_epochs"
            else:
                continue
            raise PruneKitError(f"--{name} {number}: {wrong}")


def _assigned(tree: ast.AST, registry: str) -> tuple[set[str], int]:
    """Names that `registry = {...}` and `registry["name"] = ...` put into a registry, and the number of such lines."""
    names: set[Any] = set()
    lines = 0
    for node in ast.walk(tree):
        match node:
            case ast.Assign([ast.Name(name)], ast.Dict(keys)) if name == registry and all(
                isinstance(key, ast.Constant) for key in keys
            ):
                names |= {key.value for key in keys if isinstance(key, ast.Constant)}
            case ast.Assign([ast.Subscript(ast.Name(name), ast.Constant(key))]) if name == registry:
                names.add(key)
            case _:
                continue
        lines += 1
    return names, lines


def _plugin(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except OSError:
        raise PruneKitError(f"plugin {path} is not there: name a .py file (--external_plugins)") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise PruneKitError(f"plugin {path} is not Python: {error}") from None


def registered(path: Path, registry: str) -> tuple[set[str], set[str]]:
    """The names that a Python file puts into a registry of ms-swift, to list and to allow; it is read and not run.

    `registry = {...}` and `registry["name"] = ...` are exact. A file that does anything else with it (a loop,
    `registry.update(...)`) is likely to register its functions, and may register under any string in it.
    """
    tree = _plugin(path)
    names, understood = _assigned(tree, registry)
    if sum(isinstance(node, ast.Name) and node.id == registry for node in ast.walk(tree)) == understood:
        return names, names
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    strings: set[Any] = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return names | functions, names | functions | classes | strings


def check_registered(
    what: str,
    names: Iterable[str | None],
    registry: str,
    source: str,
    plugins: Iterable[Path] = (),
    more: Iterable[str] = (),
) -> None:
    """Check that ms-swift (in `source`), one of the plugins, or `more` knows every name; none of them is imported."""
    if not (names := [name for name in names if name is not None]):
        return
    found = [registered(path, registry) for path in (package("swift") / source, *plugins)]
    for name in names:
        if name not in more and not any(name in allowed for _, allowed in found):
            known = sorted({*more}.union(*(listed for listed, _ in found)))
            raise PruneKitError(f"unknown {what} {_show(name)}: {_choices(name, known)}, or register it in a plugin")


def check_rewards(names: Iterable[str], plugins: Iterable[Path]) -> None:
    """Check that ms-swift or one of the plugins registers every reward; neither is imported."""
    plugins = list(plugins)
    for plugin in plugins:
        registered(plugin, "orms")  # can be read
    check_registered("reward", names, "orms", "rewards/orm.py", plugins)


def _set_in(source: str, function: str) -> set[str]:
    """The strings in a set that a function of ms-swift's writes out."""
    tree = ast.parse((package("swift") / source).read_bytes())
    [node] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    sets = [part for part in ast.walk(node) if isinstance(part, ast.Set)]
    constants = [item.value for part in sets for item in part.elts if isinstance(item, ast.Constant)]
    return {constant for constant in constants if isinstance(constant, str)}


def _choices(value: str, known: list[str]) -> str:
    if len(known) > 60:
        return f"choose one of ms-swift's, like {', '.join(get_close_matches(value, known, 8, 0.3) or known[:8])}"
    like = get_close_matches(value, known, 1)
    return f"choose from {', '.join(known)}" + (f" (did you mean {like[0]}?)" if like else "")


def _check_choice(what: str, value: str | None, known: Iterable[str]) -> None:
    if value is not None and value not in (known := list(known)):
        raise PruneKitError(f"{what} {_show(value)} is unknown: {_choices(value, known)}")


def _named(source: str, plugins: Iterable[Path], register: str) -> list[str]:
    """Names in ms-swift's classes of constants (LLMModelType, ...), and any string of a plugin that registers more."""
    names = [name for node in _module(package("swift") / source)[0].values() for name in _constants(node).values()]
    for plugin in plugins:
        tree = _plugin(plugin)
        if any(isinstance(node, ast.Name) and node.id == register for node in ast.walk(tree)):
            names += [
                node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
    return names


def _model_types(plugins: Iterable[Path]) -> list[str]:
    return [*MODELS, *_named("model/constant.py", plugins, "register_model")]


def check_names(model_type: str | None, template: str | None, plugins: Iterable[Path] = ()) -> None:
    """PruneKitError for a --model_type or --template that neither ms-swift nor Prune-Kit nor a plugin has."""
    _check_choice("--model_type", model_type, _model_types(plugins))
    _check_choice("--template", template, _named("template/constant.py", plugins, "register_template"))


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # a name that is too long
        return False


def _is_folder(text: str) -> bool:
    try:
        return Path(text).is_dir()
    except OSError:
        return False


def _json(flag: str, text: str) -> dict[str, Any]:
    """A JSON object, or the content of a file that holds one."""
    try:
        if _is_file(text):
            given = json.loads(Path(text).read_bytes())
        else:
            try:
                given = json.loads(text)
            except ValueError:
                from json_repair import repair_json  # as ms-swift does

                given = json.loads(repair_json(text))
    except (OSError, ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise PruneKitError(f"{flag} {_show(text)}: neither a JSON object nor a file that holds one")
    return given


def _check_settings(flag: str, value: str | None, names: Iterable[str]) -> None:
    """PruneKitError if a setting is neither a name of ms-swift's nor JSON nor a file of JSON."""
    if value and value not in names:
        if not value.lstrip().startswith("{") and not _is_file(value):
            raise PruneKitError(f"{flag} {_show(value)}: no such file, and none of {', '.join(names)}")
        _json(flag, value)


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
    if args.rlhf_type == "gkd" and args.gkd_logits_topk and args.use_liger_kernel:
        raise PruneKitError("--gkd_logits_topk and --use_liger_kernel exclude each other: leave one out")
    if args.rlhf_type == "gkd" and args.seq_kd:
        raise PruneKitError("--seq_kd is not in ms-swift any more: leave it out")
    if args.rlhf_type != "grpo":
        return
    if args.num_generations == 1 and not (args.teacher_model or args.teacher_model_server):
        raise PruneKitError("--num_generations 1: answers are compared with each other; give 2 or more")
    _check_choice("--truncation_strategy", args.truncation_strategy, ("left", "delete"))
    rewards = len(args.reward_funcs) + len(args.reward_model or ())
    if args.reward_weights and len(args.reward_weights) != rewards:
        raise PruneKitError(
            f"--reward_weights gives {len(args.reward_weights)} for {rewards} rewards: give one for each of "
            f"--reward_funcs"
        )
    steps = args.steps_per_generation or args.gradient_accumulation_steps or 1
    batch = args.generation_batch_size or args.per_device_train_batch_size * processes * steps
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
    _check_choice("--teacher_model_type", get("teacher_model_type"), _model_types(plugins))
    tuners = [*_set_in("arguments/base_args/base_args.py", "get_supported_tuners")]
    check_registered("tuner_type", [args.tuner_type], "tuners_map", "tuner_plugin/mapping.py", plugins, tuners)
    if args.attn_impl and "/" not in args.attn_impl:  # with a slash: a kernel of the hub
        _check_choice("--attn_impl", args.attn_impl, ATTENTION)
    _check_settings("--rope_scaling", args.rope_scaling, ("linear", "dynamic", "yarn"))
    texts = [text for text in (args.system, *args.new_special_tokens) if text and text.endswith(".txt")]
    for file in (*texts, *args.custom_dataset_info):
        if not _is_file(file):
            raise PruneKitError(f"{_show(file)}: no such file (--system, --new_special_tokens, --custom_dataset_info)")
    for folder in args.adapters:
        if not _is_folder(folder):
            raise PruneKitError(f"--adapters {_show(folder)}: no such folder")
    for name in REGEXES:
        try:
            re.compile(pattern := get(name) or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise PruneKitError(f"--{name} {pattern[:80]!r}: no regular expression ({error})") from None
    for name, hint in typing.get_type_hints(_arguments(kind)).items():
        if hint == JSON and name not in LENIENT and isinstance(text := get(name), str):
            _json(f"--{name}", text)
    if kind not in ("sft", "rlhf"):
        return
    _check_settings("--deepspeed", args.deepspeed, DEEPSPEED)
    _check_settings("--teacher_deepspeed", get("teacher_deepspeed"), DEEPSPEED)
    _check_settings("--fsdp", args.fsdp, ["fsdp2"])
    _check_choice("--ddp_backend", args.ddp_backend, ("nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl"))
    if not re.fullmatch(r"\s*\d+(\.\d+)?\s*[KMGT]B\s*", args.max_shard_size, re.IGNORECASE):  # read at the first saving
        raise PruneKitError(f"--max_shard_size {_show(args.max_shard_size)}: give a size like 5GB")
    if args.resume_from_checkpoint and not _is_folder(args.resume_from_checkpoint):
        raise PruneKitError(f"--resume_from_checkpoint {_show(args.resume_from_checkpoint)}: no such folder")
    _check_choice("--eval_strategy", args.eval_strategy, ("no", "steps", "epoch"))
    schedulers = _constants(_defined(package("transformers") / "trainer_utils.py", "SchedulerType")[1]).values()
    _check_choice("--lr_scheduler_type", args.lr_scheduler_type, schedulers)
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
            _check_choice("--loss_type", name, GRPO_LOSSES)
    integrations = (package("transformers") / "integrations/integration_utils.py").read_bytes()
    trackers, _ = _assigned(ast.parse(integrations), "INTEGRATION_TO_CALLBACK")
    for name in args.report_to:
        _check_choice("--report_to", name, [*sorted(trackers), "all", "none"])
    _check_together(kind, args, processes)
    check_packages(args)
