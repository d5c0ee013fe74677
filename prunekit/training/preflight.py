"""Refuse bad input in a second, before a stage writes anything or touches a GPU.

    python -m prunekit.training.preflight --model checkpoints/base --out checkpoints/recovered --swift sft -- \\
        --dataset train.jsonl

Every launcher calls this first. What follows `--` is the whole line that ms-swift will get, the user's own flags last.
Prints one line that names the mistake and the mend, and exits 2; or answers, and exits 0:

    MODEL_TYPE=, TEACHER_TYPE=    architectures of the model and of the teacher: ms-swift's --model_type, unless the
                                  user names another
    TEMPLATE=                     the model's chat template; empty where ms-swift finds it by itself
    TARGET_MODULES=               a LoRA's, where the line says all-linear and that isn't all of this model's; else
                                  empty
    MAX_LENGTH=, COMPLETION_LENGTH=   what --max_length and --max_completion_length must be; empty: as they are
    ENGINE_LENGTH=                vLLM's max_model_len; empty without vLLM
    TEXTS=                        1 if the data are plain texts; empty: messages
    FREE_PORTS=                   as many as --free-ports asks for: 41001,41002

Libraries may print lines of their own in between.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from prunekit.arguments import Parser, is_file, natural, positive_float, positive_int, split_arguments
from prunekit.checkpoint import (
    Checkpoint,
    check_out,
    layer_numbers,
    open_checkpoint,
    read_header,
    read_json,
    statistics,
)
from prunekit.checkpoint.provenance import check_base
from prunekit.checkpoint.remote_code import check_no_remote_code
from prunekit.data.rows import ROWS_CHECKED, check_asks, check_row, has_answer, is_text, iterate, locate
from prunekit.data.templates import find_template
from prunekit.data.tokens import same_tokenizer, tokens_of
from prunekit.errors import PruneKitError, run_script
from prunekit.families import NAME_PREFIX, positions
from prunekit.msswift.line import check_line, check_whole_names, parse
from prunekit.msswift.names import check_names, check_rewards
from prunekit.msswift.settings import saves_shards, zero_optimization

from .lengths import PROMPT, Lengths, check_engine, choose_lengths
from .zeros_settings import SPLIT_UP, VARIABLES, settings_of

DATA_FILES = {".jsonl", ".json", ".csv", ".txt", ".parquet", ".arrow"}
ENVIRONMENT = (  # what ms-swift reads as whole numbers
    "NPROC_PER_NODE", "NNODES", "MAX_PIXELS", "MIN_PIXELS", "VIDEO_MAX_PIXELS", "VIDEO_MIN_PIXELS", "FPS_MAX_FRAMES",
    "FPS_MIN_FRAMES", "IMAGE_MAX_TOKEN_NUM", "IMAGE_MIN_TOKEN_NUM", "VIDEO_MAX_TOKEN_NUM", "VIDEO_MIN_TOKEN_NUM",
)  # fmt: skip
HUB_DATASET = re.compile(r"(?:(?:hf|ms)::)?[\w.-]+/[\w.-]+(?::[\w./-]+)?", re.IGNORECASE)


def check_dataset(
    name: str, columns: Iterable[str] = (), learned: bool = False, held_out: bool = False, asked: bool = False
) -> bool | None:
    """Check that a data set's rows are ms-swift's messages, whose images can be read, or all texts (the first 10,000).

    Of FILE#N all that N rows are drawn from; of one that is `held_out` the first N, which are taken.

    Says whether they are texts, {"text": ...}. None of what looks like a hub's `org/name` and is no file or folder
    here, and of tables and text files: these are left to ms-swift. Raises PruneKitError naming the line, for files that
    ms-swift can't read, and where answers are to be `learned`, if there are none: such a training would learn nothing.
    Where a model is `asked` all rows must have a question.
    """
    path = Path(re.sub(r"#\d+$", "", name))
    local = is_file(name) or is_file(path)
    if not local and HUB_DATASET.fullmatch(str(path)) and path.suffix not in DATA_FILES and not path.parent.exists():
        return None
    file, _ = locate(name)
    if file.suffix not in DATA_FILES:
        raise PruneKitError(f"dataset {file}: ms-swift reads {', '.join(sorted(DATA_FILES))}; convert it, or rename it")
    if file.suffix not in (".jsonl", ".json"):
        return None
    texts: bool | None = None
    parts = reread = ""  # where a content is a list of parts, and where one is text that is JSON
    for where, row in islice(iterate(name if held_out else file), ROWS_CHECKED):
        texts = is_text(row) if texts is None else texts
        check_row(where, row, texts, columns)
        if asked and not texts:
            check_asks(where, row["messages"])
        learned = learned and not texts and not has_answer(row["messages"])
        contents = [] if texts else [message["content"] for message in row["messages"]]
        parts = parts or (where if any(isinstance(content, list) for content in contents) else "")
        reread = reread or (where if any(map(_is_json, contents)) else "")
    if parts and reread:  # of a column of both, datasets reads texts as JSON: the answer "5" is a number then
        raise PruneKitError(
            f"{parts} has a content of parts, {reread} one of text like 5, true or {{}}, which ms-swift then takes for "
            'JSON: write <image> into the text in place of parts, and name files in "images"'
        )
    if learned:
        raise PruneKitError(
            f"dataset {file}: no row has an assistant's message, so nothing would be learned: add answers"
        )
    return texts


def _is_json(content: object) -> bool:
    try:
        json.loads(content)  # type: ignore[arg-type]
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def check_datasets(
    names: Iterable[str],
    columns: Iterable[str] = (),
    answers: bool = False,
    held_out: Iterable[str] = (),
    learned: bool = False,
    asked: bool = False,
) -> bool:
    """Whether data sets of a training are texts. PruneKitError as `check_dataset`, and if some are, others not.

    With `answers`, for a training that begins at questions, none may be. Of those `held_out`, FILE#N must have N rows:
    ms-swift repeats rows to train on, and fails on others, when all is loaded. Others are as for `check_dataset`.
    """
    kinds = {name: check_dataset(name, columns, learned, asked=asked) for name in names}
    kinds |= {name: check_dataset(name, columns, learned, held_out=True, asked=asked) for name in held_out}
    for name in held_out:
        count = None if kinds[name] is None else locate(name)[1]
        if count is not None and (rows := sum(1 for _ in iterate(name))) < count:
            raise PruneKitError(f"dataset {name}: has {rows} rows to evaluate on, not {count}: leave out #{count}")
    texts = [name for name, kind in kinds.items() if kind]
    if texts and answers:
        raise PruneKitError(
            f'dataset {texts[0]}: rows {{"text": ...}} ask nothing; full_run.sh, progressive_run.sh, sparse_run.sh and '
            "lora.sh train on them"
        )
    if texts and (others := [name for name, kind in kinds.items() if kind is False]):
        raise PruneKitError(
            f'dataset {texts[0]} has rows {{"text": ...}}, {others[0]} has messages: train and evaluate on one kind'
        )
    return bool(texts)


def check_environment() -> int:
    """How many processes ms-swift will start; PruneKitError for numbers in its environment that are none."""
    for name in ENVIRONMENT:
        value = os.environ.get(name) or "1"
        if not re.fullmatch(r"0*[1-9]\d{0,14}", value, re.ASCII):
            raise PruneKitError(f"{name}={value[:80]!r} is no whole number above 0: unset it, or give one")
    folder = os.environ.get("ROOT_IMAGE_DIR")
    if folder and not Path(folder).is_dir():
        raise PruneKitError(f"ROOT_IMAGE_DIR={folder}: no such folder; unset it, or name the one that images are in")
    return int(os.environ.get("NPROC_PER_NODE") or 1) * int(os.environ.get("NNODES") or 1)


def open_here(name: Path) -> Checkpoint:
    """open_checkpoint, but a hub's name is refused, its folder in the cache named: ms-swift asks another hub for it."""
    checkpoint = open_checkpoint(name)
    if not name.exists():
        raise PruneKitError(f"{name}: ms-swift would fetch it from a hub again; give its folder, {checkpoint.path}")
    return checkpoint


def check_adapter(folder: Path, base: Checkpoint) -> None:
    """Check that a LoRA adapter is whole, and that its matrices fit those weights of the base that it names."""
    if not (folder / "adapter_config.json").is_file():
        raise PruneKitError(f"{folder} holds no adapter (adapter_config.json): give the folder that lora.sh wrote")
    config = read_json(folder / "adapter_config.json")
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise PruneKitError(f"{folder / 'adapter_config.json'}: names no peft_type; train the adapter again")
    tensors = read_header(folder / "adapter_model.safetensors")
    if not tensors:
        raise PruneKitError(f"{folder / 'adapter_model.safetensors'}: holds no tensors; train the adapter again")

    def plain(name: str) -> str:
        return re.sub(NAME_PREFIX, "", name)

    weights = {plain(name): tensor.shape for name, tensor in base.tensors.items()}
    layers = {stem: len(layer_numbers(base, stem)) for stem in base.family.stacks}
    for name, tensor in tensors.items():
        if not (found := re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])(?:\.\w+)?\.weight", name)):
            continue
        module, side = found.groups()
        for stack, count in layers.items():
            if (number := re.match(base.family.stacks[stack].prefix + r"(\d+)\.", module)) and int(number[1]) >= count:
                raise PruneKitError(
                    f"{folder}: trained for {stack} layer {number[1]}, of which {base.path} has {count}: give the "
                    f"MODEL that lora.sh had"
                )
        shape = weights.get(plain(module) + ".weight")
        if shape is None or len(shape) != 2:
            continue
        outputs, inputs = shape[::-1] if base.family.text.inputs_first else shape
        width, wanted = (tensor.shape[-1], inputs) if side == "A" else (tensor.shape[0], outputs)
        if width != wanted:
            raise PruneKitError(
                f"{folder}: trained for {module} of {width} {'inputs' if side == 'A' else 'outputs'}, "
                f"{base.path} has {wanted}: give the MODEL that lora.sh had"
            )


def check_targets(targets: Iterable[str], base: Checkpoint) -> None:
    """Check that one of an adapter's target modules at least is a module of the base."""
    modules = {part for name in base.tensors for part in _endings(name.rpartition(".")[0])}
    if not any(target in modules or target.startswith("all-") for target in targets):
        raise PruneKitError(
            f"--target_modules {' '.join(targets)[:80]}: {base.path} has no such module: give all-linear, or names "
            f"like {' '.join(base.family.text.projections)}, one by one"
        )


def _endings(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def check_teacher(student: Checkpoint, teacher: Checkpoint) -> None:
    """Check that a teacher says the same by a token's number as the student, and sees images as it does.

    It gets the student's own inputs. Heads of different sizes are no fault, which rounding up the vocabulary makes:
    ms-swift's loss and ours fill the shorter one up.
    """
    if not same_tokenizer(student.path, teacher.path):
        mine, theirs = tokens_of(student.path), tokens_of(teacher.path)
        if mine and theirs and (other := [n for n in sorted(mine.keys() & theirs.keys()) if mine[n] != theirs[n]]):
            raise PruneKitError(
                f"{teacher.path}: another vocabulary than {student.path}'s: token {other[0]} is {theirs[other[0]]!r}, "
                f"not {mine[other[0]]!r}; a teacher needs the student's tokenizer"
            )
        sizes = [(each.config.get("text_config") or each.config).get("vocab_size") for each in (student, teacher)]
        if not (mine and theirs) and sizes[0] != sizes[1]:
            raise PruneKitError(
                f"{teacher.path}: a vocabulary of {sizes[1]} tokens, {student.path} has {sizes[0]}; a teacher needs "
                f"the student's tokenizer"
            )
    sees, shows = student.config.get("vision_config"), teacher.config.get("vision_config")
    if isinstance(sees, dict):
        if not isinstance(shows, dict):
            raise PruneKitError(f"{teacher.path}: sees no images, {student.path} does: give a teacher of its kind")
        for key in ("patch_size", "spatial_merge_size", "temporal_patch_size"):
            if sees.get(key) != shows.get(key):
                raise PruneKitError(
                    f"{teacher.path}: cuts images by {key} {shows.get(key)}, {student.path} by {sees.get(key)}: give "
                    f"a teacher of its kind"
                )


def check_saved(swift: argparse.Namespace) -> None:
    """Check that the checkpoints of a training by this line have all weights: they are what is published."""
    if swift.save_strategy == "no":
        raise PruneKitError("--save_strategy no: what is trained is published from a checkpoint; leave it out")
    if swift.deepspeed and swift.tuner_type == "full":
        zero, gathers = zero_optimization(swift.deepspeed), "gather_16bit_weights_on_model_save"
        if zero["stage"] == 3 and True not in (zero.get(gathers), zero.get(f"stage3_{gathers}")):
            raise PruneKitError(
                f"--deepspeed {swift.deepspeed[:80]}: its checkpoints would have no weights to publish: say "
                f'"stage3_{gathers}": true in "zero_optimization"'
            )
    if swift.fsdp and saves_shards(swift.fsdp):
        raise PruneKitError(
            f"--fsdp {swift.fsdp[:80]}: its checkpoints would have no weights to publish, but shards: give a file with "
            '"state_dict_type": "FULL_STATE_DICT" in "fsdp_config", or DEEPSPEED=zero3'
        )


def check_best(swift: argparse.Namespace) -> None:
    """Check that a training by this line can name a best checkpoint: one that was evaluated as it was saved."""
    evaluated = swift.val_dataset or swift.cached_val_dataset or swift.split_dataset_ratio
    if not evaluated or swift.eval_strategy == "no":
        raise PruneKitError("CHECKPOINT=best: nothing is evaluated; give a VAL_DATASET, or set CHECKPOINT=last")
    saves, evals = swift.save_strategy, swift.eval_strategy or swift.save_strategy
    if saves == "best":
        return
    every = swift.eval_steps or swift.save_steps
    if evals != saves or (saves == "steps" and every % swift.save_steps):
        raise PruneKitError(
            f"CHECKPOINT=best: it is evaluated every {every:g} steps and saved every {swift.save_steps:g} ({evals}, "
            f"{saves}); "
            "give the same --eval_steps and --save_steps, or set CHECKPOINT=last"
        )


def _can_bind(port: int, reuse: bool) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        try:
            probe.bind(("", port))
        except PermissionError:
            raise PruneKitError(f"port {port} is not for users: choose one above 1023") from None
        except OverflowError:
            raise PruneKitError(f"port {port} is none: choose one from 1 to 65535") from None
        except OSError:
            return False
        return True


def check_port(port: int, patience: float = 70) -> None:
    """Check that ms-swift gets a local TCP port, which it takes on all interfaces and without SO_REUSEADDR.

    Where it can't, it takes the next one without a word, and nobody finds its server. So the connections of a server
    that has just ended are waited for (a minute, `patience` seconds at most).
    """
    end = time.monotonic() + patience
    while not _can_bind(port, reuse=False):
        if not _can_bind(port, reuse=True) or time.monotonic() > end:
            raise PruneKitError(f"port {port} is in use: choose another (ROLLOUT_PORT, MASTER_PORT)")
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """TCP ports that are free now, all different, and below those that the system gives to others meanwhile."""
    ports = random.sample(range(20000, 32000), 1000)
    return list(islice((port for port in ports if _can_bind(port, reuse=False)), count))


def check_disk(out: Path, size: int, factor: float = 1) -> None:
    """Check that `out` can be made, and that its file system has `factor` times `size` bytes (the model's) free."""
    folder = next(parent for parent in out.resolve().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise PruneKitError(f"{out} cannot be made: {folder} is no folder that you may write to")
    free = shutil.disk_usage(folder).free
    if free < size * factor:
        raise PruneKitError(
            f"{folder} has {free / 1e9:.1f} GB free, {out.name} may need {size * factor / 1e9:.1f} GB ({factor:g} "
            f"times the model's {size / 1e9:.2f} GB: checkpoints with optimizer states, and the result): make room"
        )


def decide_lengths(swift: argparse.Namespace, checkpoint: Checkpoint, gpu: int = 0, texts: bool = False) -> Lengths:
    """The lengths for a merged line of ms-swift's (see lengths.py); says what it takes back, and checks the engine.

    gpu: bytes of memory; 0 if they aren't known. Blocks of `texts` are all as long as they may be: within positions.
    """
    get = vars(swift).get
    if texts:
        wanted = swift.max_length or PROMPT
        length = min(wanted, positions(checkpoint.config, wanted))
        if length < wanted:
            print(f"--max_length {length}: the model has no more positions", file=sys.stderr)
        return Lengths(max_length=length if length != swift.max_length else None)
    generates = get("rlhf_type") == "grpo" or (get("rlhf_type") == "gkd" and swift.lmbda > 0)
    completion = get("response_length") or get("max_new_tokens") or get("max_completion_length")
    vllm = bool(generates and swift.use_vllm)
    engine = swift.vllm_max_model_len if vllm else None
    found = choose_lengths(checkpoint.config, swift.max_length, completion if generates else None, vllm, engine)
    if swift.max_length and found.max_length:
        print(
            f"--max_length {found.max_length}: the model has no more positions"
            f"{' with room for an answer' if generates else ''}; longer rows are left out",
            file=sys.stderr,
        )
    if found.completion:
        print(f"--max_completion_length {found.completion}: the model has no more positions", file=sys.stderr)
    if gpu and vllm and swift.vllm_mode == "colocate" and found.engine and not checkpoint.config.get("sliding_window"):
        sizes, gpus = statistics(checkpoint), swift.vllm_tensor_parallel_size
        share = swift.vllm_gpu_memory_utilization
        weights = 2 * sizes["parameters"]
        if warning := check_engine(weights, sizes["kv_bytes_per_token"], found.engine, gpu, share, gpus):
            print(f"warning: {warning}", file=sys.stderr)
    return found


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--reuse-out", action="store_true", help="OUT may exist: the stage continues in it")
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--adapter", type=Path, help="folder with adapter_config.json")
    parser.add_argument(
        "--needed-columns", nargs="*", default=[], help="columns that rows of the line's --dataset must have"
    )
    parser.add_argument("--model-type", help="ms-swift's; default: the architecture")
    parser.add_argument("--template", help="ms-swift's; default: the one that is most like the checkpoint's own")
    parser.add_argument("--checkpoint", choices=("last", "best"), help="which one of the training will be published")
    parser.add_argument("--port", type=positive_int, action="append", default=[])
    parser.add_argument("--free-ports", type=natural, default=0, help="answer with so many ports that are free")
    parser.add_argument(
        "--disk-factor", type=positive_float, default=1.1, help="free space needed, in sizes of the model"
    )
    parser.add_argument("--gpu-memory", type=natural, default=0, help="MB of the smallest GPU in use (0: not known)")
    parser.add_argument("--swift", choices=("sft", "rlhf", "export"), default="sft", help="whose line follows --")
    flags, line = split_arguments()
    args = parser.parse_args(flags)
    swift = parse(args.swift, line)
    check_whole_names(args.swift, line)
    get = vars(swift).get
    check_line(args.swift, swift, check_environment())
    if args.swift != "export" and not args.reuse_out:
        check_saved(swift)
        if swift.fp16 and swift.use_cpu:
            raise PruneKitError("DTYPE=float16: nothing trains in it on a CPU; choose bfloat16 or float32")
        if args.checkpoint == "best":
            check_best(swift)
    plugins = [Path(plugin) for plugin in swift.external_plugins]
    model_type, template = swift.model_type or args.model_type, swift.template or args.template
    check_names(model_type, template, plugins)
    if get("teacher_model"):
        args.teacher = Path(swift.teacher_model)
    if args.adapter and swift.adapters:
        args.adapter = Path(swift.adapters[0])

    checkpoint = open_here(args.model)
    teacher = open_here(args.teacher) if args.teacher else checkpoint
    for each in (checkpoint, teacher):
        check_no_remote_code(each.path)
    if not checkpoint.family.causal:  # an unknown family is refused: publishing needs to know it
        lora = " --lora-rank 16" if swift.tuner_type == "lora" else ""
        raise PruneKitError(f"{args.model}: an encoder, which ms-swift doesn't train; python ner_run.py{lora} does")
    if teacher is not checkpoint:
        check_teacher(checkpoint, teacher)
    targets: list[str] = []
    if get("target_modules") and swift.tuner_type == "lora" and not swift.target_regex:
        check_targets(swift.target_modules, checkpoint)
        if swift.target_modules == ["all-linear"] and checkpoint.family.lora_targets != ["all-linear"]:
            targets = checkpoint.family.lora_targets
    if args.adapter:
        check_adapter(args.adapter, checkpoint)
    texts = False
    if not swift.columns:  # ms-swift renames columns: rows are left to it
        rlhf = args.swift == "rlhf"
        asked = rlhf and not (swift.rlhf_type == "gkd" and swift.lmbda == 0)
        learned = args.swift != "export" and not asked
        learned = learned and "all" not in (swift.loss_scale or "").split("+")  # which learns questions, too
        texts = check_datasets(swift.dataset, args.needed_columns, rlhf, swift.val_dataset, learned, asked)
        for dataset in get("chord_sft_dataset") or ():
            check_dataset(dataset, learned=True)
    check_rewards(get("reward_funcs") or (), plugins)
    if get("optimizer") in ("head_rates", "active_heads", "important_heads"):
        from .head_rates import Rates  # torch: seconds

        settings = Rates.parse(os.environ.get("HEAD_RATES", ""))
        settings.check_training(swift.optimizer, bool(swift.deepspeed or swift.fsdp), swift.tuner_type)
        if swift.optimizer == "head_rates":
            settings.check_dtype(str(swift.torch_dtype))
    sparse = {"keep_zeros", *VARIABLES} & {*(get("callbacks") or ())}
    for callback in sparse & VARIABLES.keys():
        settings_of(callback)
    if sparse and (swift.fsdp or swift.deepspeed and zero_optimization(swift.deepspeed)["stage"] == 3):
        raise PruneKitError(SPLIT_UP)
    if "dynamic_sparsity" in sparse and swift.deepspeed:
        raise PruneKitError("--callbacks dynamic_sparsity: works with plain DDP only; set DEEPSPEED= (empty)")
    for port in args.port:
        check_port(port)
    if not args.reuse_out:
        check_out(args.out, *filter(None, [args.model, args.teacher, args.adapter]), overwrite=args.overwrite)
    check_disk(args.out, checkpoint.nbytes, args.disk_factor)
    lengths = Lengths()
    if args.swift != "export":
        lengths = decide_lengths(swift, checkpoint, args.gpu_memory * 2**20, texts)
    if args.adapter:
        check_base(checkpoint, args.adapter)  # last: it may warn, and a refusal is one line
    with contextlib.redirect_stdout(sys.stderr):
        template = template or find_template(checkpoint, model_type, args.adapter, chat=not texts)
    answers = {
        "MODEL_TYPE": model_type or checkpoint.config["model_type"],
        "TEACHER_TYPE": teacher.config["model_type"],
        "TEMPLATE": template,
        "TARGET_MODULES": " ".join(targets),
        "MAX_LENGTH": lengths.max_length,
        "COMPLETION_LENGTH": lengths.completion,
        "ENGINE_LENGTH": lengths.engine,
        "TEXTS": int(texts) or None,
        "FREE_PORTS": ",".join(map(str, free_ports(args.free_ports))),
    }
    for name, value in answers.items():
        print(f"{name}={'' if value is None else value}")


if __name__ == "__main__":
    run_script(main)
