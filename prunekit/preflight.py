"""Refuse bad input in a second, before a stage writes anything or touches a GPU.

    python -m prunekit.preflight --model checkpoints/base --dataset train.jsonl --out checkpoints/recovered

Every launcher calls this first. It prints the name of the model's architecture (ms-swift's `--model_type` unless
the user names another) and exits 0, or prints one line that names the mistake and the mend and exits 2.
"""

import argparse
import ast
import importlib.util
import json
import os
import shutil
import socket
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from .checkpoint import check_out, open_checkpoint
from .errors import PruneKitError, run_script

ROWS_CHECKED = 10_000


def _bad_row(row, columns: Iterable[str]) -> str | None:
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
    images = row.get("images", [])
    for image in images if isinstance(images, list) else [images]:
        path = image.get("path") if isinstance(image, dict) else image
        if (
            isinstance(path, str)
            and "://" not in path
            and not path.startswith("data:")
            and not Path(path).is_file()
        ):
            return f"names an image that is not there: {path}"
    return None


def check_dataset(name: str, columns: Iterable[str] = ()) -> None:
    """Check that a JSONL file holds ms-swift messages rows and that their images exist (its first 10,000 rows).

    `name` may end in ms-swift's `#N` (use N rows). What is no local file and has no local file's ending is taken
    for a hub's data set and left to ms-swift, as are CSV and JSON files. Raises PruneKitError naming the line.
    """
    path = Path(name.rpartition("#")[0] if name.rpartition("#")[2].isdigit() else name)
    if not path.is_file():
        if path.suffix in {
            "",
            *(s for s in [path.suffix] if not s.startswith((".json", ".csv", ".txt", ".parquet"))),
        } and (len(path.parts) == 2 and not path.is_absolute() and not path.parent.exists()):
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
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PruneKitError(
            f"dataset {path} line {number} is not JSON ({error}): one JSON object per line"
        ) from None
    except OSError as error:
        raise PruneKitError(f"dataset {path} cannot be read: {error.strerror}") from None
    if number == 0:
        raise PruneKitError(f"dataset {path} is empty: it needs at least one row")


def _assigned_keys(path: Path, name: str) -> set[str]:
    """The keys of `name = {...}` and of every `name["key"] = ...` in a Python file, read and not run.

    None stands for keys that only running the file would tell (a loop, `name.update(...)`).
    """
    keys: set[str | None] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        for target in targets:
            if isinstance(target, ast.Name) and target.id == name and isinstance(node.value, ast.Dict):
                keys |= {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
            elif (
                isinstance(target, ast.Subscript)
                and isinstance(target.value, ast.Name)
                and target.value.id == name
            ):
                keys |= {target.slice.value} if isinstance(target.slice, ast.Constant) else {None}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == f"{name}.update":
            keys.add(None)
    return keys


def check_no_remote_code(folder: Path) -> None:
    """Refuse a checkpoint that brings Python code (`auto_map`): ms-swift 4.6 would run it, trusting every folder.

    TRUST_REMOTE_CODE=1 in the environment allows it.
    """
    if os.environ.get("TRUST_REMOTE_CODE") == "1":
        return
    for file in sorted(folder.glob("*.json")):
        if file.stat().st_size < 2**20 and '"auto_map"' in file.read_text(encoding="utf-8", errors="replace"):
            raise PruneKitError(
                f"{file} names Python code to run (auto_map): read it, then set TRUST_REMOTE_CODE=1"
            )


def check_rewards(names: Iterable[str], plugins: Iterable[Path]) -> None:
    """Check that ms-swift or one of the plugins registers every reward; neither is imported.

    A plugin that registers under computed names (a loop) is trusted for functions and classes it defines.
    """
    package = Path(importlib.util.find_spec("swift").origin).parent
    known = _assigned_keys(package / "rewards" / "orm.py", "orms")
    for plugin in plugins:
        if not plugin.is_file():
            raise PruneKitError(f"plugin {plugin} is not there: name a .py file that registers your rewards")
        keys = _assigned_keys(plugin, "orms")
        known |= keys - {None}
        if None in keys:
            tree = ast.parse(plugin.read_text(encoding="utf-8"))
            known |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for name in names:
        if name not in known:
            raise PruneKitError(
                f"unknown reward {name}: choose from {', '.join(sorted(known))}, or register it in a plugin"
            )


def check_port(port: int) -> None:
    """Check that nothing listens on a local TCP port."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise PruneKitError(
                f"port {port} is in use: choose another (ROLLOUT_PORT, MASTER_PORT)"
            ) from None


def check_disk(out: Path, need: int) -> None:
    """Check that the file system of `out` has `need` bytes free."""
    folder = next(parent for parent in out.resolve().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < need:
        raise PruneKitError(
            f"{folder} has {free / 1e9:.1f} GB free, {out.name} may need {need / 1e9:.1f} GB: make room"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--reuse-out", action="store_true", help="OUT may exist: the stage continues in it")
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--adapter", type=Path, help="folder with adapter_config.json")
    parser.add_argument("--dataset", action="append", default=[], help="may be repeated")
    parser.add_argument("--columns", nargs="+", default=[], help="columns that every row must have")
    parser.add_argument("--rewards", nargs="+", default=[])
    parser.add_argument("--plugins", nargs="+", type=Path, default=[])
    parser.add_argument("--port", type=int, action="append", default=[])
    parser.add_argument(
        "--disk-factor", type=float, default=1.1, help="free space needed, in sizes of the model"
    )
    args = parser.parse_args()

    checkpoint = open_checkpoint(args.model)
    check_no_remote_code(checkpoint.path)
    if args.teacher:
        check_no_remote_code(open_checkpoint(args.teacher).path)
    if args.adapter and not (args.adapter / "adapter_config.json").is_file():
        raise PruneKitError(
            f"{args.adapter} holds no adapter (adapter_config.json): give the folder that lora.sh wrote"
        )
    for dataset in args.dataset:
        check_dataset(dataset, args.columns)
    check_rewards(args.rewards, args.plugins)
    for port in args.port:
        check_port(port)
    if not args.reuse_out:
        check_out(args.out, *filter(None, [args.model, args.teacher, args.adapter]), overwrite=args.overwrite)
    check_disk(args.out, int(checkpoint.nbytes * args.disk_factor))
    print(checkpoint.config["model_type"])


if __name__ == "__main__":
    run_script(main)
