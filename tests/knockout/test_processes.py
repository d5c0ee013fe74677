"""Trainings in processes of their own: what is said of one that failed, and how GPUs are shared out among them."""

import multiprocessing
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from prunekit.errors import PruneKitError
from prunekit.knockout.processes import _last_line, run_process, share_out, side_by_side


def test_the_last_line_of_a_log_that_is_no_wandb_message_tells_the_failure(tmp_path):
    (tmp_path / "log").write_text("step 1\nValueError: no such flag\nwandb: find logs at x\n\n")
    assert _last_line(tmp_path / "log") == "ValueError: no such flag"


TORCHRUN = """\
[rank1]: Traceback (most recent call last):
[rank1]:   File "train.py", line 3, in <module>
[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB
E1124 10:00:00.000000 1 torch/distributed/elastic/multiprocessing/api.py:988] failed (exitcode: 1) local_rank: 1
Traceback (most recent call last):
  File "torchrun", line 8, in <module>
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\x20
============================================================
sft.py FAILED
------------------------------------------------------------
Root Cause (first observed failure):
  exitcode  : 1 (pid: 7)
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================
"""


@pytest.mark.parametrize(
    "text, said",
    [
        (TORCHRUN, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
        ("step 1\nKilled\n=======\n", "Killed"),
        ("KeyError: 'RANK'\n[INFO:swift] 90%\r100%\n", "KeyError: 'RANK'"),
        ("", "no message"),
    ],
)
def test_the_exception_behind_a_failure_is_found_in_its_log(tmp_path, text, said):
    (tmp_path / "log").write_text(text)
    assert _last_line(tmp_path / "log") == said


def test_processes_that_end_while_others_begin_all_tell_their_exit_code():
    forks = multiprocessing.get_context("forkserver")
    with ThreadPoolExecutor(6) as pool:
        codes = list(pool.map(lambda code: run_process(forks.Process(target=sys.exit, args=(code,))), [0, 7] * 60))
    assert codes == [0, 7] * 60


def test_gpus_are_shared_out_among_jobs():
    assert share_out(["0", "1", "2", "3"], 2) == [["0", "2"], ["1", "3"]]


def test_gpus_are_shared_out_evenly_or_not_at_all():
    with pytest.raises(PruneKitError, match="evenly"):
        share_out(["0", "1", "2"], 2)


def test_as_many_runs_go_on_at_once_as_there_are_shares_of_gpus():
    free = [["0"], ["1"]]

    def take(_, gpus):
        free.remove(gpus)
        time.sleep(0.05)
        free.append(gpus)
        return gpus

    done = list(side_by_side(take, range(6), list(free)))
    assert sorted(item for item, _ in done) == list(range(6)) and {gpus[0] for _, gpus in done} == {"0", "1"}
