"""Refuse bad input in a second, before a stage writes anything or touches a GPU.

    python -m prunekit.preflight --model checkpoints/base --dataset train.jsonl --out checkpoints/recovered

Every launcher calls this first, with the user's own flags last: those that this knows count as they do for ms-swift
(`--dataset`, `--val_dataset`, `--reward_funcs`, ...: the last one wins), the others are left to ms-swift. With
`--swift KIND`, what follows `--` is the whole line that ms-swift will get. Prints one line that names the mistake and
the mend, and exits 2; or answers and exits 0:

    MODEL_TYPE=, TEACHER_TYPE=    architectures of the model and of the teacher: ms-swift's --model_type, unless the user names another
    TEMPLATE=                     the model's chat template; empty where ms-swift finds it by itself
    POSITIONS=                    how many learned positions the model has; empty if they are rotary

Libraries may print lines of their own in between.
"""

import argparse
import ast
import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from .chat_templates import find_template
from .checkpoint import check_out, open_checkpoint
from .errors import PruneKitError, run_script

ROWS_CHECKED = 10_000
DATA_FILES = {".jsonl", ".json", ".csv", ".txt", ".parquet"}
HUB_DATASET = re.compile(r"(?:(?:hf|ms)::)?[\w.-]+/[\w.-]+(?::[\w./-]+)?", re.IGNORECASE)


def _is_missing(image: object) -> bool:
    """Is this the path of an image that is not there? URLs and base64 (long, without a dot) are no paths."""
    path = image.get("path") if isinstance(image, dict) else image
    if not isinstance(path, str) or "://" in path or path.startswith("data:"):
        return False
    if len(path) > 255 and "." not in path:
        return False
    return not Path(os.environ.get("ROOT_IMAGE_DIR", ""), path).is_file()


def _bad_row(row: object, columns: Iterable[str]) -> str | None:
    if not isinstance(row, dict):
        return "is not a JSON object"
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return 'has no list "messages"'
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return 'has a message without "role" and "content"'
    for column in columns:
        if column not in row:
            return f'has no column "{column}"'
    images = row.get("images")
    for image in images if isinstance(images, list) else [images]:
        if _is_missing(image):
            name = str(image["path"] if isinstance(image, dict) else image)
            return f"names an image that is not there: {name[:200]!r}"
    return None


def check_dataset(name: str, columns: Iterable[str] = ()) -> None:
    """Check that a JSONL file holds ms-swift messages rows and that their images exist (its first 10,000 rows).

    `name` may end in ms-swift's `#N` (use N rows). What looks like a hub's `org/name` and is no file or folder here
    is left to ms-swift, as are files of other kinds. Raises PruneKitError naming the line.
    """
    path = Path(name if Path(name).is_file() else re.sub(r"#\d+$", "", name))
    if not path.is_file():
        if HUB_DATASET.fullmatch(str(path)) and path.suffix not in DATA_FILES and not path.parent.exists():
            return
        raise PruneKitError(f"dataset {path} is not there: give a JSONL file of ms-swift messages")
    if path.suffix != ".jsonl":
        return
    number = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(islice(lines, ROWS_CHECKED), 1):
                problem = "is empty" if not line.strip() else _bad_row(json.loads(line), columns)
                if problem:
                    raise PruneKitError(
                        f'dataset {path} line {number} {problem}: rows look like {{"messages": [{{"role": "user", '
                        '"content": "…"}, {"role": "assistant", "content": "…"}], "images": ["…"]}'
                    )
    except UnicodeDecodeError:
        raise PruneKitError(f"dataset {path} is not UTF-8 text near line {number + 1}: convert it") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # not only JSONDecodeError: numbers of 5000 digits, 5000 brackets
        raise PruneKitError(
            f"dataset {path} line {number} is not JSON ({error}): one JSON object per line"
        ) from None
    except OSError as error:
        raise PruneKitError(f"dataset {path} line {number} cannot be read: {error.strerror}") from None
    if number == 0:
        raise PruneKitError(f"dataset {path} is empty: it needs at least one row")


def _rewards_in(path: Path) -> tuple[set[str], set[str]]:
    """The rewards that a Python file registers in `orms`, to list and to allow; it is read and not run.

    `orms = {...}` and `orms["name"] = ...` are exact. A file that does anything else with `orms` (a loop,
    `orms.update(...)`) is likely to register its functions, and may register under any string in it.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except OSError:
        raise PruneKitError(
            f"plugin {path} is not there: name a .py file that registers your rewards"
        ) from None
    except (SyntaxError, ValueError) as error:
        raise PruneKitError(f"plugin {path} is not Python: {error}") from None
    names, understood = set(), 0
    for node in ast.walk(tree):
        match node:
            case ast.Assign([ast.Name("orms")], ast.Dict(keys)) if all(
                isinstance(key, ast.Constant) for key in keys
            ):
                names |= {key.value for key in keys}
            case ast.Assign([ast.Subscript(ast.Name("orms"), ast.Constant(key))]):
                names.add(key)
            case _:
                continue
        understood += 1
    if sum(isinstance(node, ast.Name) and node.id == "orms" for node in ast.walk(tree)) == understood:
        return names, names
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return names | functions, names | functions | classes | strings


def check_no_remote_code(folder: Path) -> None:
    """Refuse a checkpoint that brings Python code (`auto_map`): ms-swift 4.6 would run it, trusting every folder.

    TRUST_REMOTE_CODE=1 in the environment allows it.
    """
    if os.environ.get("TRUST_REMOTE_CODE") == "1":
        return
    for file in sorted(folder.glob("*config.json")):
        keys: set[str] = set()

        def collect(pairs, keys=keys):
            keys.update(key for key, _ in pairs)

        try:  # parsed, since a key may be written with escapes
            json.loads(file.read_bytes(), object_pairs_hook=collect)
        except (OSError, ValueError, RecursionError) as error:
            raise PruneKitError(f"{file}: cannot be read ({error}); download it again") from None
        if "auto_map" in keys:
            raise PruneKitError(
                f"{file} names Python code to run (auto_map): read it, then set TRUST_REMOTE_CODE=1"
            )


def check_rewards(names: Iterable[str], plugins: Iterable[Path]) -> None:
    """Check that ms-swift or one of the plugins registers every reward; neither is imported."""
    swift = Path(importlib.util.find_spec("swift").origin).parent
    found = [_rewards_in(path) for path in (swift / "rewards" / "orm.py", *plugins)]
    for name in names:
        if not any(name in allowed for _, allowed in found):
            listed = ", ".join(sorted(set().union(*(names for names, _ in found))))
            raise PruneKitError(f"unknown reward {name}: choose from {listed}, or register it in a plugin")


def check_port(port: str | int) -> None:
    """Check that nothing listens on a local TCP port."""
    if not (str(port).isascii() and str(port).isdigit() and 0 < int(port) < 65536):
        raise PruneKitError(f"port {port} is none: give a number from 1 to 65535")
    with socket.socket() as probe:
        # Old connections in TIME_WAIT don't count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(port)))
        except PermissionError:
            raise PruneKitError(f"port {port} is not for users: choose one above 1023") from None
        except OSError:
            raise PruneKitError(
                f"port {port} is in use: choose another (ROLLOUT_PORT, MASTER_PORT)"
            ) from None


def check_disk(out: Path, need: float) -> None:
    """Check that `out` can be made, and that its file system has `need` bytes free."""
    folder = next(parent for parent in out.resolve().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise PruneKitError(f"{out} cannot be made: {folder} is no folder that you may write to")
    free = shutil.disk_usage(folder).free
    if free < need:
        raise PruneKitError(
            f"{folder} has {free / 1e9:.1f} GB free, {out.name} may need {need / 1e9:.1f} GB: make room"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--reuse-out", action="store_true", help="OUT may exist: the stage continues in it")
    parser.add_argument("--teacher", "--teacher-model", type=Path)
    parser.add_argument("--adapter", type=Path, help="folder with adapter_config.json")
    parser.add_argument("--dataset", nargs="+", default=[])
    parser.add_argument("--val-dataset", nargs="+", default=[])
    parser.add_argument("--chord-sft-dataset", nargs="+", default=[])
    parser.add_argument("--columns", help="ms-swift renames columns: rows are left to it")
    parser.add_argument(
        "--needed-columns", nargs="+", default=[], help="columns that rows of --dataset must have"
    )
    parser.add_argument("--reward-funcs", nargs="+", default=[])
    parser.add_argument("--external-plugins", nargs="+", type=Path, default=[])
    parser.add_argument("--optimizer", help="ms-swift's, or one of plugins/head_rates.py")
    parser.add_argument("--model-type", help="ms-swift's; default: the architecture")
    parser.add_argument(
        "--template", help="ms-swift's; default: the one that is most like the checkpoint's own"
    )
    parser.add_argument("--port", action="append", default=[])
    parser.add_argument(
        "--disk-factor", type=float, default=1.1, help="free space needed, in sizes of the model"
    )
    parser.add_argument("--swift", choices=("sft", "rlhf", "export"), help="which line follows --")
    flags, line = sys.argv[1:], []
    if "--" in flags:
        flags, line = flags[: flags.index("--")], flags[flags.index("--") + 1 :]
    flags = [re.sub(r"^--[\w-]+", lambda name: name[0].replace("_", "-"), flag) for flag in flags + line]
    args, _ = parser.parse_known_args(flags)

    checkpoint = open_checkpoint(args.model)
    teacher = open_checkpoint(args.teacher) if args.teacher else checkpoint
    for each in (checkpoint, teacher):
        check_no_remote_code(each.path)
    _ = checkpoint.family  # raises PruneKitError: publishing needs to know it
    if args.adapter and not (args.adapter / "adapter_config.json").is_file():
        raise PruneKitError(
            f"{args.adapter} holds no adapter (adapter_config.json): give the folder that lora.sh wrote"
        )
    if not args.columns:
        for dataset in [*args.dataset, *args.val_dataset]:
            check_dataset(dataset, args.needed_columns)
        for dataset in args.chord_sft_dataset:
            check_dataset(dataset)
    check_rewards(args.reward_funcs, args.external_plugins)
    if args.optimizer in ("head_rates", "active_heads"):
        from .head_rates import Rates  # torch: seconds

        Rates.parse(os.environ.get("HEAD_RATES", ""))
    for port in args.port:
        check_port(port)
    if not args.reuse_out:
        check_out(args.out, *filter(None, [args.model, args.teacher, args.adapter]), overwrite=args.overwrite)
    check_disk(args.out, checkpoint.nbytes * args.disk_factor)
    with contextlib.redirect_stdout(sys.stderr):
        template = args.template or find_template(checkpoint, args.model_type, args.adapter)
    answers = {
        "MODEL_TYPE": checkpoint.config["model_type"],
        "TEACHER_TYPE": teacher.config["model_type"],
        "TEMPLATE": template or "",
        "POSITIONS": checkpoint.config.get("n_positions", ""),
    }
    for name, value in answers.items():
        print(f"{name}={value}")


if __name__ == "__main__":
    run_script(main)
