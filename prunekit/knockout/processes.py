"""Trainings of ms-swift in processes of their own, side by side, each ended with all that it started.

On a CPU such a process is a fork of a server that has ms-swift imported already, on GPUs it watches over `swift sft`.
"""

import contextlib
import ctypes
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed, wait
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil

from prunekit.errors import PruneKitError

# What starts a process or lists them asks all others for their end, which each tells once: of two that ask at the same
# time one is told 255, as of a dead server.
_ASKING = threading.Lock()
OF_TORCHRUN = ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")  # of other trainings
EXCEPTION = re.compile(r"(?:\[rank\d+\]: )?((?:\w+\.)*(?!ChildFailed)\w*(?:Error|Exception|Interrupt)(?:: .+)?)")


def _end_descendants(*_: Any) -> None:
    """Kill all that descends from this process, and leave."""
    while descendants := psutil.Process().children(recursive=True):
        for process in descendants:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(descendants, timeout=1)
    os._exit(1)


def _end_with_parent() -> None:
    """Wait for the death of the process that asked for this one, then end this one: the fork server outlives that."""
    if parent := multiprocessing.parent_process():
        parent.join()
    _end_descendants()


def _enter(environment: dict[str, str], log: str) -> None:
    """Begin a run's process: its environment, its output into its log, and its end.

    SIGTERM ends it with all its descendants, and so does the sweep's death, be it by kill -9. Ctrl-C is the sweep's.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_descendants)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if sys.platform == "linux":
        pr_set_child_subreaper = 36  # orphans among the descendants become children of this process
        ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _train_in_this_process(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Body of a forked process: ms-swift is imported already, so a run starts at once."""
    _enter(environment, log)
    try:
        import torch
        from swift import sft_main

        if threads := environment.get("OMP_NUM_THREADS"):  # which torch, imported already, won't read again
            torch.set_num_threads(int(threads))
        sft_main(arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        _end_descendants()


def _train_by_command(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Body of a process that watches over `swift sft`: the trainers behind that wrapper outlive it otherwise."""
    _enter(environment, log)
    if subprocess.run(["swift", "sft", *arguments]).returncode:
        _end_descendants()


def _forks(preload: bool) -> Any:
    """Makes processes by forking a server that holds nothing, or with `preload` what a training imports.

    Of one kind for the whole life of this process.
    """
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["prunekit.knockout.preload"] if preload else [])
    return forks


def run_process(process: Any) -> int:
    """Start a process, wait for its end and return its exit code, beside other threads that do the same."""
    with _ASKING:
        process.start()
    wait_for([process.sentinel])
    with _ASKING:
        process.join()
        return process.exitcode


def _last_line(log: Path) -> str:
    """The line of a log that says most about a failure: the last of an exception, else the last that has a word.

    Behind the exception torchrun prints a report of its own, which doesn't name it.
    """
    text = log.read_text(errors="replace").replace("\r", "\n") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line) and "wandb" not in line]
    errors = [found[1] for line in lines if (found := EXCEPTION.fullmatch(line))]
    return (errors or lines or ["no message"])[-1]


def run_swift(arguments: list[str], gpus: list[str], log: Path, environment: dict[str, str]) -> None:
    """`swift sft` with these arguments on these GPUs (none: the CPU), and this on top of the environment.

    Its output is in `log`. Raises RuntimeError with its last words if it fails.
    """
    environment = {name: value for name, value in os.environ.items() if name not in OF_TORCHRUN} | environment
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        environment["NPROC_PER_NODE"] = str(len(gpus))  # torchrun takes a free port
    process = _forks(preload=not gpus).Process(
        target=_train_by_command if gpus else _train_in_this_process,
        args=(arguments, environment, str(log)),
    )
    if code := run_process(process):
        raise RuntimeError(f"{_last_line(log)} (exit code {code}; see {log})")


def share_out(gpus: list[str], jobs: int) -> list[list[str]]:
    """The GPUs of each of `jobs` runs side by side. PruneKitError if some would have more than others."""
    if len(gpus) % jobs:
        raise PruneKitError(f"--jobs {jobs}: {len(gpus)} GPUs can't be shared out evenly among so many runs")
    return [gpus[job::jobs] for job in range(jobs)]


def side_by_side(
    function: Callable[[Any, list[str]], Any], items: Sequence[Any], slots: list[list[str]]
) -> Generator[tuple[Any, Any]]:
    """Call `function(item, gpus)` for each item, as many at once as there are slots of GPUs; yields (item, result).

    To close the iterator early, as KeyboardInterrupt does, ends the processes that are going on.
    """
    free: SimpleQueue[list[str]] = SimpleQueue()
    for slot in slots:
        free.put(slot)
    stopped = threading.Event()

    def do(item: Any) -> Any:
        gpus = free.get()
        try:
            if stopped.is_set():
                raise CancelledError
            return function(item, gpus)
        finally:
            free.put(gpus)

    pool = ThreadPoolExecutor(len(slots))
    futures = {pool.submit(do, item): item for item in items}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        stopped.set()
        deadline = time.monotonic() + 10
        while wait([future for future in futures if not future.cancel()], timeout=0.1).not_done:
            with _ASKING:
                for process in multiprocessing.active_children():
                    process.terminate() if time.monotonic() < deadline else process.kill()
        pool.shutdown()
