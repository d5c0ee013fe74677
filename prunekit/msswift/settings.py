"""Settings that are a name of ms-swift's, JSON or a file of it; what a DeepSpeed configuration says of ZeRO.

    python -m prunekit.msswift.settings zero3_offload

Prints the stage of a DeepSpeed configuration: the launchers ask so.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prunekit.arguments import Parser, is_file
from prunekit.errors import PruneKitError, run_script

from .names import show
from .source import package

FSDP = ("fsdp2",)
DEEPSPEED = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
AUTO_STAGE = 2  # accelerate's, for "auto"


def read_object(flag: str, text: str) -> dict[str, Any]:
    """A JSON object, or the content of a file that holds one."""
    try:
        if is_file(text):
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
        raise PruneKitError(f"{flag} {show(text)}: neither a JSON object nor a file that holds one")
    return given


def check_settings(flag: str, value: str | None, names: Iterable[str]) -> None:
    """PruneKitError if a setting is neither a name of ms-swift's nor JSON nor a file of JSON."""
    if value and value not in names:
        if not value.lstrip().startswith("{") and not is_file(value):
            raise PruneKitError(f"{flag} {show(value)}: no such file, and none of {', '.join(names)}")
        read_object(flag, value)


def _configuration(flag: str, value: str, names: Iterable[str]) -> dict[str, Any]:
    """What a setting says: a name of ms-swift's, JSON or a file of it. PruneKitError as `check_settings`."""
    check_settings(flag, value, names)
    return read_object(flag, str(package("swift") / "config" / f"{value}.json") if value in names else value)


def saves_shards(fsdp: str) -> bool:
    """Whether checkpoints of such a training have each process' share of the weights instead of all."""
    config = _configuration("--fsdp", fsdp, FSDP).get("fsdp_config")
    return "FULL_STATE_DICT" not in str(config.get("state_dict_type") if isinstance(config, dict) else None)


def zero_optimization(deepspeed: str, flag: str = "--deepspeed") -> dict[str, Any]:
    """What a DeepSpeed configuration (a name of ms-swift's, JSON or a file of it) says of ZeRO; its `stage` is 0 to 3.

    PruneKitError if it can't be read, says nothing of ZeRO (accelerate takes no such one), or of another stage.
    """
    if not isinstance(zero := _configuration(flag, deepspeed, DEEPSPEED).get("zero_optimization"), dict):
        raise PruneKitError(f'{flag} {show(deepspeed)}: has no "zero_optimization", an object with a "stage"')
    stage = zero.get("stage", 0)
    if stage == "auto":
        stage = AUTO_STAGE
    if type(stage) is not int or stage not in range(4):
        raise PruneKitError(f'{flag} {show(deepspeed)}: "stage": {json.dumps(stage)[:40]} is none of 0, 1, 2 and 3')
    return zero | {"stage": stage}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("deepspeed", help="a name of ms-swift's, JSON or a file of it")
    print(zero_optimization(parser.parse_args().deepspeed)["stage"])


if __name__ == "__main__":
    run_script(main)
