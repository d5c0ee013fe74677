"""Short trainings of a model without one of its layers: planned, run side by side or on a cluster, recorded.

A run trains the whole checkpoint with the layer cut in memory (callback.py), in a process of its own (processes.py),
with RAY_ADDRESS set on any node of a Ray cluster.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prunekit.checkpoint import finite, open_checkpoint, read_json, statistics, write_json
from prunekit.checkpoint.training_run import read_log
from prunekit.errors import PruneKitError

from . import cluster
from .processes import run_swift, share_out, side_by_side
from .removal import BASELINE, Removal, plan_without

GROUP = re.compile("eval_(.+)_token_acc")  # of a log: what GroupScores writes of each group
PLUGIN = """
from prunekit.knockout.callback import GroupScores, KnockoutLayers
from swift.callbacks import callbacks_map

callbacks_map |= {"knockout_layers": KnockoutLayers, "group_scores": GroupScores}
"""


Run = Removal | None  # the model without a layer, or the whole one


def run_name(run: Run) -> str:
    return BASELINE if run is None else str(run)


def merged_flag(arguments: list[str], flag: str, *values: str) -> list[str]:
    """The arguments with one `flag` at their end: these values, then all that the flag had, however often it stood.

    ms-swift takes only a flag's last occurrence.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, flag.replace("_", "-"), nargs="*", action="extend", default=[], dest="given")
    found, others = parser.parse_known_args(arguments)
    return [*others, flag, *dict.fromkeys([*values, *found.given])]


def _step(record: dict[str, Any]) -> int:
    return int(record["global_step/max_steps"].split("/")[0])


def read_curves(log: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run's logging.jsonl says: token_acc and loss of the last evaluation, all evaluations, training losses.

    `error` is None, or says that a loss or token_acc of the last evaluation is no number; all that is none is None.
    """
    curve = [record for record in log if "eval_token_acc" in record]
    groups = {
        match[1]: {"token_acc": finite(value), "loss": finite(record[f"eval_{match[1]}_loss"])}
        for record in log
        for key, value in record.items()
        if (match := GROUP.fullmatch(key))
    }
    if not curve:
        raise RuntimeError("the run ended without an evaluation: is eval_steps at most max_steps?")
    last = {"loss": curve[-1]["eval_loss"], "token_acc": curve[-1]["eval_token_acc"]}
    wrong = [name for name, value in last.items() if not math.isfinite(value)]
    return ({"groups": groups} if groups else {}) | {
        "token_acc": finite(last["token_acc"]),
        "loss": finite(last["loss"]),
        "curve": [
            {"step": _step(r), "token_acc": finite(r["eval_token_acc"]), "loss": finite(r["eval_loss"])} for r in curve
        ],
        "training": [{"step": _step(r), "loss": finite(r["loss"])} for r in log if "loss" in r],
        "error": (
            f"{wrong[0]} is {str(last[wrong[0]]).replace('nan', 'NaN')} at step {_step(curve[-1])}: "
            "lower the learning rate, or train in bfloat16 or float32"
            if wrong
            else None
        ),
    }


@dataclass(frozen=True)
class Training:
    """What all runs of a sweep have in common. Paths are those of every node."""

    model: Path
    model_type: str  # ms-swift's
    out: Path
    arguments: tuple[str, ...]  # for `swift sft`
    group: str  # in W&B
    by: str | None = None  # a column of the validation rows: token_acc and loss by groups of them, too
    validation: tuple[str, ...] = ()  # their files, where `by` is given
    threads: int | None = None  # of a run on the CPU; None: what the environment says

    def result(self, run: Run, gpus: list[str]) -> dict[str, Any]:
        """Train and measure: the run's record. A run that fails has an "error" in it, and raises nothing."""
        (self.out / "work").mkdir(parents=True, exist_ok=True)
        # Where a node was given up that still lives, a run may go on there beside its second try.
        work = Path(tempfile.mkdtemp(prefix=f"{run_name(run)}-", dir=self.out / "work"))
        started = time.time()
        result = _empty_record(run)
        try:
            checkpoint = open_checkpoint(self.model)
            if run:
                checkpoint = plan_without(checkpoint, [run]).result
            result["parameters"] = statistics(checkpoint)["parameters"]
            self._train(run, work, gpus)
            result |= read_curves(read_log(work / "swift"))
        except (RuntimeError, OSError, PruneKitError) as error:
            result["error"] = str(error)
        result["seconds"] = round(time.time() - started, 1)
        shutil.rmtree(work, ignore_errors=True)
        return result

    def _train(self, run: Run, work: Path, gpus: list[str]) -> None:
        """Run ms-swift, which writes into `work`/swift. Raises RuntimeError with its last words if it fails."""
        log = self.out / "logs" / f"{run_name(run)}.log"
        log.parent.mkdir(exist_ok=True)
        arguments = ["--model", str(self.model), "--model_type", self.model_type, *self.arguments]
        arguments += ["--run_name", f"knockout/{run_name(run)}", "--output_dir", str(work / "swift")]
        arguments += ["--eval_strategy", "steps", "--save_strategy", "no"]
        environment = {"WANDB_RUN_GROUP": self.group}
        if self.threads:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        callbacks = []
        if run:
            callbacks.append("knockout_layers")
            environment["PRUNEKIT_REMOVE"] = str(run)
        if self.by:
            callbacks.append("group_scores")
            environment["PRUNEKIT_BY"] = json.dumps([self.by, *self.validation])
        if callbacks:
            plugin = work / "knockout_callbacks.py"
            plugin.write_text(PLUGIN)
            arguments = merged_flag(arguments, "--external_plugins", str(plugin))
            arguments = merged_flag(arguments, "--callbacks", *callbacks)
        run_swift(arguments, gpus, log, environment)


def _empty_record(run: Run) -> dict[str, Any]:
    which = run.json if run else {"name": BASELINE, "stack": None, "layer": None}
    found: dict[str, Any] = {"parameters": None, "token_acc": None, "loss": None, "curve": [], "training": []}
    return which | found | {"error": None, "seconds": 0.0}


def _read_record(file: Path, run: Run) -> dict[str, Any] | None:
    """A run's record, None if there is none. PruneKitError for a file that is damaged."""
    if not file.exists():
        return None
    record = read_json(file)
    like = _empty_record(run)
    numbers = ("parameters", "token_acc", "loss", "seconds")
    if not (
        isinstance(record, dict)
        and record.keys() >= like.keys()
        and all(record[key] == like[key] for key in ("name", "stack", "layer"))
        and all(record[key] is None or type(record[key]) in (int, float) for key in numbers)
        and isinstance(record["error"], str | None)
        and all(
            isinstance(record[key], list) and all(isinstance(point, dict) and "step" in point for point in record[key])
            for key in ("curve", "training")
        )
    ):
        raise PruneKitError(f"{file}: is no record of {run_name(run)}'s training; remove it and run again")
    return record


def _result_on_node(training: Training, run: Run) -> dict[str, Any]:
    return training.result(run, [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu])


class Sweep:
    """Runs knockouts, each in a process of its own, and writes OUT/runs/NAME.json when one ends.

    Without `gpus` on the CPU. With RAY_ADDRESS set, on that cluster with `gpus_per_task` each, and `gpus` and `jobs`
    say nothing.
    """

    def __init__(self, training: Training, gpus: list[str], jobs: int, gpus_per_task: int = 0):
        self.training, self.gpus, self.jobs, self.gpus_per_task = training, gpus, jobs, gpus_per_task

    def result_file(self, run: Run) -> Path:
        return self.training.out / "runs" / f"{run_name(run)}.json"

    def finished(self, runs: list[Run]) -> dict[str, dict[str, Any]]:
        """Records by name of those among these runs that earlier sweeps here did. Failed ones aren't: do them again.

        A run that trained to the end and came to NaN is finished: it would do so again.
        """
        records = {run_name(run): _read_record(self.result_file(run), run) for run in runs}
        return {name: found for name, found in records.items() if found and (not found["error"] or found["curve"])}

    def do_all(self, runs: list[Run]) -> Generator[dict[str, Any]]:
        """Do these runs; yields each one's record as it ends, on disk by then. Failed runs have an "error" in it.

        To close the iterator early, as KeyboardInterrupt does, ends the runs that are going on; they leave no record.
        """
        if runs:  # MODE=scan takes the folder for trainings, which it leaves alone
            (self.training.out / "runs").mkdir(parents=True, exist_ok=True)
        pairs = (
            self._on_cluster(runs)
            if os.environ.get("RAY_ADDRESS")
            else side_by_side(self.training.result, runs, share_out(self.gpus, self.jobs))
        )
        with contextlib.closing(pairs):
            for run, result in pairs:
                write_json(self.result_file(run), result)
                yield result

    def _on_cluster(self, runs: list[Run]) -> Generator[tuple[Run, dict[str, Any]]]:
        work = partial(_result_on_node, self.training)
        with contextlib.closing(cluster.run_tasks(work, runs, gpus=self.gpus_per_task)) as tasks:
            for run, result in tasks:
                if isinstance(result, Exception):
                    result = _empty_record(run) | {"error": f"{type(result).__name__}: {result}".splitlines()[0]}
                yield run, result
