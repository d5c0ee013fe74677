"""What a folder tells of itself: history, model card, the records of its stage; and what later stages take over."""

import contextlib
import re
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prunekit import errors
from prunekit.rules import LAYER, NUMBERS, OBJECT, REAL, TEXT, Items, Keys, Values, check, whole

from .atomic import write_json
from .card import HISTORY, ROWS, model_card
from .folder import fingerprint, open_checkpoint
from .format import read_json

# What a stage says of itself beside the weights that it writes, each name once; later stages have their own.
LOG, COMMAND, MADE_FROM, ZEROS = "logging.jsonl", "command.sh", "made_from.json", "sparsity.json"
CURVES, SPARSITY, QUALITY, HEADS = "curves.png", "sparsity.png", "quality.png", "heads.png"
RECORDS = (LOG, COMMAND, MADE_FROM, ZEROS, CURVES, SPARSITY, QUALITY, HEADS)

MODULE = re.compile(r"\d+_\w+")
MAX_SIDE_FILE = 256 * 2**20
CHAT_TEMPLATES = "additional_chat_templates/*.jinja"  # where transformers keeps those that have names
NOT_CARRIED = re.compile(
    r".*\.(?:safetensors|bin|pt|pth|pkl|ckpt|h5|msgpack|onnx|onnx_data|gguf|npz|distcp|ot|tflite|mlmodel|pdparams)$"
    r"|.*\.index\.json$|\..*|README\.md$"
    r"|config\.json$|params\.json$|trainer_state\.json$|args\.json$|latest$|zero_to_(?:fp32|torch)\.py$"
    rf"|(?:{'|'.join(map(re.escape, (HISTORY, *RECORDS)))})$"
)


def side_files(folder: Path) -> dict[str, Path]:
    """Files that travel with the weights: tokenizer, processor, chat templates, generation config, other small ones.

    By their names in the folder. With them go the folders of what sentence-transformers puts behind a model, whole.
    Not: weights in whatever form, pickles, other subfolders, hidden files, a trainer's state, params.json
    (Mistral's, with the sizes that were), and what each stage writes anew.
    """
    found = [
        file
        for file in [*folder.iterdir(), *folder.glob(CHAT_TEMPLATES)]
        if file.is_file() and not NOT_CARRIED.match(file.name) and file.stat().st_size <= MAX_SIDE_FILE
    ]
    found += [file for module in _modules(folder) for file in module.iterdir() if file.is_file()]
    return {str(file.relative_to(folder)): file for file in sorted(found)}


def _modules(folder: Path) -> list[Path]:
    """Folders of what sentence-transformers puts behind a model, such as 1_Pooling: no size of them changes."""
    file = folder / "modules.json"
    listed = read_json(file) if file.is_file() else None
    names = [each.get("path") for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    wanted = [folder / name for name in names if isinstance(name, str) and MODULE.fullmatch(name)]
    return [module for module in wanted if module.is_dir()]


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files, by what they shall be called in the folder."""
    for name, file in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)


_SIZES: dict[str, Any] = dict.fromkeys(ROWS.values(), whole(0, 2**63)) | dict.fromkeys(
    ("num_hidden_layers", "vision_depth"), LAYER
)
_SIZES["parameters_by_component"] = Values(whole(0, 2**63))

ENTRY = Keys(  # what readers of a history count on, where it is there
    dict.fromkeys(("stage", "input", "time"), TEXT)
    | dict.fromkeys(("settings", "metrics", "versions"), OBJECT)
    | {"removed": Keys({"text": NUMBERS, "vision": NUMBERS})}
    | {"sparsity": Keys({"sparsity": REAL, "tensors": Values(REAL)}, ("sparsity", "tensors"))}
    | {f"{key}{when}": rule for key, rule in _SIZES.items() for when in ("", "_before")}
)


def history(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a folder's pruning_info.json, oldest first; none if there is no such file."""
    file = Path(path) / HISTORY
    if not file.exists():
        return []
    content = read_json(file)
    check(content, Keys({"history": Items(ENTRY)}, ("history",)), file)
    return content["history"]


def append_history(folder: str | Path, entry: dict[str, Any]) -> None:
    """Add an entry to a folder's pruning_info.json, atomically."""
    write_json(Path(folder) / HISTORY, {"history": [*history(folder), entry]})


def history_entry(
    stage: str,
    input_path: str | Path,
    before: dict[str, Any],
    after: dict[str, Any],
    removed: Any = None,
    metrics: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What one stage did. `before` and `after` come from `statistics`; both are in it, `before` as `…_before`.

    `input_fingerprint` says which model it was made from, wherever that lies now; the model it made has none in its
    folder, which could not be trusted once someone changed the weights: it is taken from them when it is needed.
    """
    import importlib.metadata  # a third of what a script takes to start that writes no entry

    versions = {}
    for package in ("prunekit", "torch", "transformers", "ms-swift"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "stage": stage,
        "input": str(input_path),
        "input_fingerprint": fingerprint(open_checkpoint(input_path)),
        "removed": removed,
        **{f"{key}_before": value for key, value in before.items()},
        **after,
        "metrics": metrics,
        "settings": settings,
        "versions": versions,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_records(
    folder: Path,
    config: dict[str, Any],
    numbers: dict[str, Any],
    entries: list[dict[str, Any]],
    use: str | None = None,
    adapter: dict[str, Any] | None = None,
) -> None:
    """What a stage tells of itself in the folder that it writes: history, model card, and the script's command line.

    A command.sh that is there already (a training's own) stays. `use` and `adapter` are `model_card`'s.
    """
    write_json(folder / HISTORY, {"history": entries})
    card = model_card(config, numbers, entries, use, adapter)
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
    if errors.command and not (folder / COMMAND).exists():
        (folder / COMMAND).write_text(errors.command, encoding="utf-8", errors="surrogateescape")
