"""What a training has left in the folder that it ran in: its log, its checkpoint-N folders, and what they say of it."""

import json
import math
import re
from pathlib import Path
from typing import Any

from prunekit.errors import PruneKitError
from prunekit.rules import REAL

from .format import read_json
from .records import LOG

TRAINING = (  # of ms-swift's args.json, what says most about a training
    "tuner_type", "rlhf_type", "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "optim",
    "optimizer",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "torch_dtype", "bf16", "fp16",
    "callbacks",
    "lora_rank", "lora_alpha", "reward_funcs", "beta", "lmbda", "seed",
)  # fmt: skip

OF_LORA = ("lora_rank", "lora_alpha")


def read_log(run: Path) -> list[dict[str, Any]]:
    """The parsable lines of a run's logging.jsonl; a killed run may have torn the last one."""
    lines = []
    if (run / LOG).exists():
        for line in (run / LOG).read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                lines.append(record)
    return lines


def log_until(log: list[dict[str, Any]], checkpoint: Path) -> list[dict[str, Any]]:
    """The lines of a log that tell of a checkpoint-N: all if it is the last, else those of steps up to N."""
    steps = [str(record.get("global_step/max_steps")).partition("/")[0] for record in log]
    reached = [int(step) if re.fullmatch("[0-9]{1,18}", step) else None for step in steps]
    number = checkpoint.name.removeprefix("checkpoint-")
    if not number.isdigit() or int(number) >= max(filter(None, reached), default=0):
        return log
    return [record for record, step in zip(log, reached) if step is not None and step <= int(number)]


def final_metrics(log: list[dict[str, Any]]) -> dict[str, float]:
    """The last finite value of each number in a log."""
    merged = {key: value for record in log for key, value in record.items()}
    return {k: v for k, v in merged.items() if REAL.holds(v)}


def _read_object(file: Path) -> dict[str, Any] | None:
    """A JSON object of a run's folder; None if it isn't there, torn or something else."""
    try:
        found = read_json(file)
    except PruneKitError:
        return None
    return found if isinstance(found, dict) else None


def whole_checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoint-N folders of a run by N that have a whole trainer_state.json: the Trainer writes it last."""
    found = {folder.name.removeprefix("checkpoint-"): folder for folder in run.glob("checkpoint-*")}
    return {
        int(number): folder
        for number, folder in found.items()
        if re.fullmatch("[0-9]{1,18}", number) and _read_object(folder / "trainer_state.json") is not None
    }


def find_checkpoint(run: Path, which: str = "last") -> tuple[Path, str]:
    """The last or best whole checkpoint-N of an ms-swift run folder, and why it; one with weights of its own is itself.

    `best` is what the last line of logging.jsonl names. Raises PruneKitError if it isn't there, whole.
    """
    if (run / "config.json").exists():
        return run, "the only one"
    whole = whole_checkpoints(run)
    if not whole:
        raise PruneKitError(f"{run}: no finished checkpoint-N here; look at the end of its log, then train again")
    if which != "best":
        return whole[max(whole)], "the last"
    named = Path(str((read_log(run) or [{}])[-1].get("best_model_checkpoint"))).name
    best = next((folder for folder in whole.values() if folder.name == named), None)
    if not best:
        raise PruneKitError(
            f"{run}: its {LOG} names no best checkpoint that is there; publish the last by CHECKPOINT=last"
        )
    return best, "the best"


def has_ended(run: Path, last: Path) -> bool:
    """Whether a training has taken all its steps and told so: resumed from its last checkpoint, it takes another."""
    state = _read_object(last / "trainer_state.json") or {}
    taken, wanted = state.get("global_step"), state.get("max_steps")
    named = (read_log(run) or [{}])[-1].get("last_model_checkpoint")
    return type(taken) is type(wanted) is int and taken >= wanted and Path(str(named)).name == last.name


def training_settings(folder: Path) -> dict[str, Any]:
    """What ms-swift's own files in a checkpoint-N say of its training: steps, rate, batch, dtype, ..., few of many."""
    state, found = _read_object(folder / "trainer_state.json"), _read_object(folder / "args.json") or {}
    if state is None:
        return {}
    unused = () if found.get("tuner_type") == "lora" else OF_LORA
    settings = {"steps": state.get("global_step"), "epochs": state.get("epoch")}
    settings |= {name: found.get(name) for name in TRAINING if name not in unused}
    settings["world_size"] = found.get("global_world_size")
    factors: list[Any] = [
        settings[k] for k in ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
    ]
    if all(type(factor) is int for factor in factors):
        settings["global_batch"] = math.prod(factors)
    return {name: value for name, value in settings.items() if value not in (None, False, [], "")}
