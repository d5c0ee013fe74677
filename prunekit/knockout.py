"""Which layers are cheap? Remove one, train briefly, look at token_acc; for every layer in question.

    python -m prunekit.knockout --model checkpoints/base --out runs/knockout --text all --vision 0-5 -- SWIFT-ARGS

`knockout_check.sh` calls this with ms-swift's arguments after `--`. The baseline, the whole model after the same short
training, is a run like the others. Each finished run is one file under OUT/runs, written at once, so that a killed
sweep goes on where it was; ranking.json and ranking.png are drawn anew from these files after every run.
"""

import argparse
import ctypes
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from .checkpoint import Checkpoint, layer_numbers, open_checkpoint, statistics, write_json
from .errors import PruneKitError, run_script
from .layers import apply_removal, parse_numbers, plan_removal
from .publish import read_log

BASELINE = "baseline"


@dataclass(frozen=True)
class Knockout:
    """One run: the whole model, or the model without one layer of a stack."""

    stack: str | None = None  # "text" or "vision"
    layer: int | None = None

    @property
    def name(self) -> str:
        return BASELINE if self.stack is None else f"{self.stack}-{self.layer:02d}"


def plan_knockouts(checkpoint: Checkpoint, text: str, vision: str) -> list[Knockout]:
    """The baseline, then one run for each layer named: "all", "none" or numbers and ranges like "0-3,10".

    Raises PruneKitError for layers that can't be removed, before any run.
    """
    runs = [Knockout()]
    for stack, wanted in (("text", text), ("vision", vision)):
        if wanted.strip() in ("", "none"):
            continue
        if wanted.strip() == "all":
            numbers = layer_numbers(checkpoint, stack) if stack in checkpoint.family.stacks else []
        else:
            numbers = parse_numbers(wanted.split())
        for number in numbers:
            plan_removal(checkpoint, **{stack: [number]})
            runs.append(Knockout(stack, number))
    return runs


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, so that kill -9 of a sweep leaves nothing running."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)


def _train_in_this_process(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Body of a forked process: ms-swift is imported already, so a run starts at once."""
    _die_with_parent()
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        import torch
        from swift import sft_main

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
        sft_main(arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _free_port() -> int:
    """A local TCP port that nothing uses now: runs side by side each need their own for torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _last_line(log: Path) -> str:
    """The line of a log that says most about a failure: the last that isn't empty or a progress bar."""
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines() if log.exists() else []
    return next(
        (line.strip() for line in reversed(lines) if line.strip() and "wandb" not in line), "no message"
    )


class Sweep:
    """Runs knockouts, each in a process of its own, and keeps OUT's files true after each."""

    def __init__(self, checkpoint: Checkpoint, out: Path, arguments: list[str], group: str, gpus: list[str], jobs: int,
                 model_type: str):  # fmt: skip
        self.checkpoint, self.out, self.arguments, self.group = checkpoint, out, arguments, group
        self.model_type = model_type
        self.jobs = jobs
        self.slots: SimpleQueue[list[str]] = SimpleQueue()
        for job in range(jobs):
            self.slots.put(gpus[job::jobs])
        if not gpus:
            os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
            self.forks = multiprocessing.get_context("forkserver")
            self.forks.set_forkserver_preload(["prunekit.knockout_preload"])

    def result_file(self, run: Knockout) -> Path:
        return self.out / "runs" / f"{run.name}.json"

    def do(self, run: Knockout) -> dict[str, Any]:
        """Remove, train, measure; returns the result, which is on disk by then. Never raises for a failed run."""
        work = self.out / "work" / run.name
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        started = time.time()
        result: dict[str, Any] = asdict(run) | {"name": run.name}
        gpus = self.slots.get()
        try:
            model = self.checkpoint.path
            if run.stack is not None:
                model = work / "model"
                apply_removal(plan_removal(self.checkpoint, **{run.stack: [run.layer]}), model)
            result["parameters"] = statistics(model)["parameters"]
            self._train(run, model, work, gpus)
            records = [record for record in read_log(work / "swift") if "eval_token_acc" in record]
            if not records:
                raise RuntimeError("the run ended without an evaluation: is eval_steps at most max_steps?")
            result |= {
                "token_acc": records[-1]["eval_token_acc"],
                "loss": records[-1]["eval_loss"],
                "curve": [
                    {
                        "step": int(record["global_step/max_steps"].split("/")[0]),
                        "token_acc": record["eval_token_acc"],
                    }
                    for record in records
                ],
                "training": [record["loss"] for record in read_log(work / "swift") if "loss" in record],
                "error": None,
            }
        except (RuntimeError, OSError, PruneKitError) as error:
            result |= {"token_acc": None, "loss": None, "error": str(error)}
        finally:
            self.slots.put(gpus)
        result["seconds"] = round(time.time() - started, 1)
        shutil.rmtree(work, ignore_errors=True)
        write_json(self.result_file(run), result)
        return result

    def _train(self, run: Knockout, model: Path, work: Path, gpus: list[str]) -> None:
        log = self.out / "logs" / f"{run.name}.log"
        log.parent.mkdir(exist_ok=True)
        arguments = ["--model", str(model), "--model_type", self.model_type, *self.arguments]
        arguments += [
            "--run_name",
            f"knockout/{run.name}",
            "--eval_strategy",
            "steps",
            "--save_strategy",
            "no",
            "--output_dir",
            str(work / "swift"),
        ]
        environment = os.environ | {"WANDB_RUN_GROUP": self.group}
        environment.pop("NPROC_PER_NODE", None)
        if gpus:
            environment |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
            if len(gpus) > 1:
                environment |= {"NPROC_PER_NODE": str(len(gpus)), "MASTER_PORT": str(_free_port())}
            with log.open("w") as target:
                code = subprocess.run(
                    ["swift", "sft", *arguments], env=environment, stdout=target, stderr=target,
                    preexec_fn=_die_with_parent,
                ).returncode  # fmt: skip
        else:
            process = self.forks.Process(
                target=_train_in_this_process, args=(arguments, environment, str(log))
            )
            process.start()
            process.join()
            code = process.exitcode
        if code:
            raise RuntimeError(f"{_last_line(log)} (exit code {code}; see {log})")


def rank(results: list[dict[str, Any]], settings: dict[str, Any], model: str) -> dict[str, Any]:
    """The content of ranking.json: removals by what is left of the baseline's token_acc, cheapest first."""
    baseline = next((result for result in results if result["stack"] is None and not result["error"]), None)
    removals = []
    for result in results:
        if result["stack"] is not None:
            relative = (
                baseline and result["token_acc"] is not None and result["token_acc"] / baseline["token_acc"]
            )
            removals.append(result | {"relative": relative or None})
    removals.sort(key=lambda result: (result["relative"] is None, -(result["relative"] or 0)))
    return {
        "metric": "token_acc",
        "model": model,
        "baseline": baseline,
        "removals": removals,
        "settings": settings,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def fingerprint(checkpoint: Checkpoint) -> str:
    """Tells one checkpoint from another by config, tensors and the time its files were written, reading no weights."""
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    parts = [
        json.dumps(checkpoint.config, sort_keys=True),
        *(f"{name}{t.shape}" for name, t in checkpoint.tensors.items()),
    ]
    parts += [f"{file.name}{file.stat().st_size}{file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def main() -> None:
    own, swift = sys.argv[1:], []
    if "--" in own:
        own, swift = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--model-type", help="ms-swift's, default: the model's own model_type")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the sweep; an unfinished one is continued"
    )
    parser.add_argument("--text", default="all", help="text layers: all, none, or like 0-3,10 (default: all)")
    parser.add_argument("--vision", default="all", help="vision blocks, likewise")
    parser.add_argument("--group", default="knockout", help="W&B group")
    parser.add_argument("--gpus", default="", help="like 0,1,2,3; empty: CPU")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs side by side; GPUs are shared out (default: 1)"
    )
    args = parser.parse_args(own)

    checkpoint = open_checkpoint(args.model)
    runs = plan_knockouts(checkpoint, args.text, args.vision)
    gpus = [gpu for gpu in args.gpus.split(",") if gpu]
    if args.jobs < 1 or (gpus and args.jobs > len(gpus)):
        raise PruneKitError(
            f"--jobs {args.jobs}: choose 1 to {len(gpus) or os.cpu_count()}, one GPU a run at the least"
        )

    settings_file = args.out / "settings.json"
    own_files = {"lock", ".settings.json.new"}  # all that a sweep killed at its very start leaves
    is_sweep = not args.out.exists() or settings_file.exists()
    if not is_sweep and (not args.out.is_dir() or {path.name for path in args.out.iterdir()} - own_files):
        raise PruneKitError(f"{args.out}: is in use, and no sweep of knockouts; choose another OUT")
    args.out.mkdir(parents=True, exist_ok=True)
    lock = (args.out / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise PruneKitError(f"{args.out}: another sweep is running there; choose another OUT") from None
    settings = {"fingerprint": fingerprint(checkpoint), "swift": swift}
    if settings_file.exists() and json.loads(settings_file.read_text()) != settings:
        raise PruneKitError(
            f"{args.out}: holds a sweep of another model or other settings; choose another OUT or remove it"
        )
    write_json(settings_file, settings)
    (args.out / "runs").mkdir(exist_ok=True)
    shutil.rmtree(args.out / "work", ignore_errors=True)

    model_type = args.model_type or checkpoint.config["model_type"]
    sweep = Sweep(checkpoint, args.out, swift, args.group, gpus, args.jobs, model_type)
    failed = sweep_all(sweep, runs, settings)
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed:", *failed, sep="\n  ", file=sys.stderr)
        sys.exit(1)


def sweep_all(sweep: Sweep, runs: list[Knockout], settings: dict[str, Any]) -> list[str]:
    """Do every run that isn't done; returns a line for each that failed."""
    from tqdm import tqdm

    from .report import draw_ranking

    results: dict[str, dict[str, Any]] = {}
    for run in runs:
        if sweep.result_file(run).exists():
            result = json.loads(sweep.result_file(run).read_text())
            if not result["error"]:  # a failed run is tried again
                results[run.name] = result
    todo = [run for run in runs if run.name not in results]
    if results:
        print(f"{len(results)} of {len(runs)} runs are done already")

    def write_ranking() -> dict[str, Any]:
        ranking = rank(list(results.values()), settings, str(sweep.checkpoint.path))
        write_json(sweep.out / "ranking.json", ranking)
        if ranking["baseline"] and ranking["removals"]:
            draw_ranking(ranking, sweep.out / "ranking.png")
        return ranking

    with (
        ThreadPoolExecutor(sweep.jobs) as pool,
        tqdm(total=len(runs), initial=len(results), desc="knockouts", unit="run") as bar,
    ):
        pending: set[Future] = {pool.submit(sweep.do, run) for run in todo}
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    result = future.result()
                    results[result["name"]] = result
                    shown = result["error"] or f"token_acc {result['token_acc']:.4f}"
                    bar.write(f"{result['name']:>10}  {shown}  ({result['seconds']:.0f} s)", file=sys.stdout)
                    bar.update()
                    write_ranking()
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.kill()
            pool.shutdown(cancel_futures=True, wait=False)
            raise
    ranking = write_ranking()
    shutil.rmtree(sweep.out / "work", ignore_errors=True)
    print(f"wrote {sweep.out / 'ranking.json'} and ranking.png")
    for entry in ranking["removals"]:
        if entry["relative"] is not None:
            print(f"{entry['name']:>10}  {entry['relative']:7.1%} of the baseline's token_acc")
    return [f"{result['name']}: {result['error']}" for result in results.values() if result["error"]]


if __name__ == "__main__":
    run_script(main)
