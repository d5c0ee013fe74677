"""What a run is made from, by content: its model, teacher, adapters and data.

    python -m prunekit.checkpoint.provenance --of checkpoints/recovered.run -- --model checkpoints/pruned \\
        --dataset train.jsonl

The launchers call this before ms-swift runs, with ms-swift's arguments behind `--`. It answers

    CHANGED=      what --of, a run's folder or a published one, was made from instead; empty: the same, or nothing is
                  there yet
    MADE_FROM=    what a run of these arguments keeps in its made_from.json
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from prunekit.arguments import Parser, split_arguments
from prunekit.errors import PruneKitError, run_script

from .card import HISTORY
from .folder import fingerprint, open_checkpoint, sampled_digest
from .format import Checkpoint, read_header, read_json
from .records import COMMAND, MADE_FROM, history

CACHE_SETTINGS = "cache.json"  # of a teacher's cache
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
SETTINGS = {  # the launchers' names for them, by ms-swift's
    "model": "MODEL",
    "teacher_model": "TEACHER",
    "teacher_model_server": "CACHE",
    "adapters": "ADAPTER",
    "dataset": "DATASET",
    "val_dataset": "VAL_DATASET",
    "chord_sft_dataset": "CHORD_DATASET",
}


class DataDigest:
    """The sha256 and the number of lines of a data set's file, taken while somebody reads it."""

    def __init__(self) -> None:
        self.sha256, self.lines, self.last = hashlib.sha256(), 0, b"\n"

    def reading(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """The blocks of a file as they are, to be iterated over to the end."""
        for block in blocks:
            self.sha256.update(block)
            self.lines, self.last = self.lines + block.count(b"\n"), block[-1:]
            yield block

    def record(self, name: str | Path) -> dict[str, Any]:
        """What `data_record` says of the file, once it was read."""
        rows = {"rows": self.lines + (self.last != b"\n")} if _data_file(name).suffix == ".jsonl" else {}
        return {"path": str(name), **rows, "sha256": self.sha256.hexdigest()}


def _data_file(name: str | Path) -> Path:
    return Path(name if Path(name).is_file() else re.sub(r"#\d+$", "", str(name)))


def data_record(name: str | Path) -> dict[str, Any]:
    """A data set's path, and of a file its sha256 and (JSONL) rows. Reads it whole: about a second a gigabyte.

    `name` may end in ms-swift's `#N` (use N rows). What is no file here, a hub's data set, has its name alone. Whoever
    parses the file as well takes the record from its `Rows`, which read it once.
    """
    path = _data_file(name)
    if not path.is_file():
        return {"path": str(name)}
    digest = DataDigest()
    with path.open("rb") as file:
        for _ in digest.reading(iter(partial(file.read, 2**20), b"")):
            pass
    return digest.record(name)


def model_record(path: str | Path) -> dict[str, str]:
    """A checkpoint's path and fingerprint."""
    return {"path": str(path), "fingerprint": fingerprint(open_checkpoint(path))}


def cache_record(folder: str | Path) -> dict[str, str]:
    """Where a teacher's answers come from and, if that is a cache, its teacher's fingerprint."""
    settings = Path(folder) / CACHE_SETTINGS
    return {"path": str(folder)} | ({"fingerprint": read_json(settings)["teacher"]} if settings.is_file() else {})


def adapter_record(folder: str | Path) -> dict[str, str]:
    """A LoRA's path and fingerprint. PruneKitError if a file of it is missing or torn."""
    config, weights = (Path(folder) / name for name in ADAPTER_FILES)
    return {"path": str(folder), "fingerprint": sampled_digest(read_json(config), read_header(weights))}


def made_from(arguments: list[str]) -> dict[str, Any]:
    """Records of all that ms-swift's arguments name in SETTINGS; of a flag that is given twice the last counts."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in SETTINGS:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="*", default=[], dest=name)
    given = {name: values for name, values in vars(parser.parse_known_args(arguments)[0]).items() if values}
    makers = {
        "model": model_record,
        "teacher_model": model_record,
        "teacher_model_server": cache_record,
        "adapters": adapter_record,
    }
    return {name: [makers.get(name, data_record)(value) for value in values] for name, values in given.items()}


def run_record(run: Path) -> dict[str, Any] | None:
    """What `made_from` said when a run began; None if its folder doesn't say."""
    found = read_json(run / MADE_FROM) if (run / MADE_FROM).exists() else None
    return found if isinstance(found, dict) and "model" in found else None


def recorded(folder: Path) -> dict[str, Any] | None:
    """What a run or a published folder was made from, as `made_from` says it; None if it doesn't say."""
    if found := run_record(folder):
        return found
    last = (history(folder) or [{}])[-1]
    if "input_fingerprint" not in last:
        return None
    settings = last.get("settings") or {}
    return {"model": [{"fingerprint": last["input_fingerprint"]}]} | {
        name: settings[name] for name in SETTINGS if name in settings
    }


def contents(records: Any) -> list[str]:
    """What tells records of `made_from` from others, wherever it lies: a fingerprint, a sha256, or else the name.

    Of FILE#N the rows are others with another N.
    """

    def of_data(record: dict[str, Any]) -> str:
        number = re.search(r"#\d+$", record["path"])
        return record["sha256"] + (number[0] if number else "") if "sha256" in record else record["path"]

    return [record.get("fingerprint") or of_data(record) for record in records or ()]


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What was another in `old`, as "of another MODEL (a/path) and …"; empty if nothing was, wherever it lay."""
    changed = [name for name in SETTINGS if contents(old.get(name)) != contents(new.get(name))]
    paths = {name: ", ".join(record["path"] for record in new.get(name, ())) for name in changed}
    return " and ".join(f"of another {SETTINGS[name]} ({path} was something else)" for name, path in paths.items())


def check_base(model: Checkpoint, adapter: str | Path) -> None:
    """PruneKitError if an adapter was trained on another model; a warning if it doesn't say on which."""
    found = recorded(Path(adapter))
    if found is None:
        print(
            f"warning: {adapter}: doesn't say on which model it was trained; only shapes are checked",
            file=sys.stderr,
        )
    elif contents(found["model"]) != [fingerprint(model)]:
        raise PruneKitError(
            f"{adapter}: was trained on {history(adapter)[-1].get('input')} as it was then, not on {model.path}: "
            "merge it into that, or train it anew with lora.sh"
        )


def check_ranking(model: Checkpoint, ranking: Any) -> None:
    """PruneKitError if a ranking is of another model; a warning if it doesn't say of which."""
    found = ranking.get("fingerprint") if isinstance(ranking, dict) else None
    if found is None:
        print(
            "warning: the ranking doesn't say of which model it is: an older Prune-Kit made it",
            file=sys.stderr,
        )
    elif found != fingerprint(model):
        raise PruneKitError(
            f"the ranking is of {ranking.get('model')} as it was then, not of {model.path}: make one of this model "
            "with knockout_check.sh"
        )


def main() -> None:
    own, swift = split_arguments()
    parser = Parser(description=__doc__)
    parser.add_argument("--of", type=Path, required=True, help="folder of a run, or what one has published")
    folder, new = parser.parse_args(own).of, made_from(swift)
    old = recorded(folder)
    known = not any((folder / name).exists() for name in (HISTORY, COMMAND))
    unknown = "" if known else "of a model that it doesn't name (an older Prune-Kit began it)"
    print(f"CHANGED={unknown if old is None else difference(old, new)}")
    print(f"MADE_FROM={json.dumps(new)}")


if __name__ == "__main__":
    run_script(main)
