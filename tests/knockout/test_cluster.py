"""Work on a Ray cluster: two nodes on this machine's loopback, which nobody without the token can use."""

import contextlib
import json
import os
import secrets
import signal
import sys
import time

import psutil
import pytest
from helpers.cluster_tasks import SlowTraining, process_number, root_of, sleep_or_return, surroundings
from helpers.paths import EMBEDDED, ROOT
from helpers.trainings import left_running

from prunekit.errors import PruneKitError
from prunekit.knockout.cluster import connected, run_tasks
from prunekit.knockout.removal import Removal
from prunekit.knockout.scanner import Job
from prunekit.knockout.search import Scan, find_path
from prunekit.knockout.trained import Sweep, run_name

# Read by Ray when it is first imported, be it to find no cluster
os.environ |= {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's switch for loopback addresses
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
}

# --- clusters that don't do ---


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:6379", "6379", "ray://127.0.0.1:1"])
def test_an_address_where_no_cluster_is_fails_within_seconds(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    started = time.monotonic()
    with pytest.raises(PruneKitError, match=f"RAY_ADDRESS={address}"):
        list(run_tasks(root_of, [1]))
    assert time.monotonic() - started < 15


def test_a_missing_ray_is_named_with_its_extra(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PruneKitError, match=r"-e '\.\[distributed\]'"):
        list(run_tasks(root_of, [1]))


# --- a cluster that does ---


@pytest.fixture(scope="module")
def cluster():
    """Two nodes, of one CPU each; the second has two GPUs, or says so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests"))  # for functions of helpers

        from ray.cluster_utils import Cluster

        cluster = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1, num_gpus=2)
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
        cluster.shutdown()


def test_results_and_errors_come_with_their_items(cluster):
    found = dict(run_tasks(root_of, [4, -1, 9]))
    assert (found[4], found[9]) == (2.0, 3.0)
    assert isinstance(found[-1], ValueError) and len(found) == 3


def test_a_task_has_the_drivers_folder_and_variables_and_no_gpu(cluster, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OF_THE_DRIVER", "yes")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert dict(run_tasks(surroundings, [0])) == {0: (str(tmp_path), "yes", "")}


@pytest.mark.parametrize("gpus, seen", [(1, {"0", "1"}), (2, {"0,1"})])
def test_a_task_sees_the_gpus_that_it_was_given(cluster, gpus, seen):
    found = {result[2] for _, result in run_tasks(surroundings, [0, 1], gpus=gpus, cpus=0)}
    assert found <= seen


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_process_does_many_tasks(cluster, gpus):
    numbers = [result for _, result in run_tasks(process_number, range(6), gpus=gpus)]
    assert len(set(numbers)) < 6


def test_a_driver_listens_on_loopback_only(cluster):
    with contextlib.closing(run_tasks(root_of, [1, 2])) as results:
        next(results)
        listening = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    assert {address.removeprefix("::ffff:") for address in listening} <= {"127.0.0.1"}


def test_tasks_that_run_are_killed_when_the_iterator_is_closed(cluster, tmp_path):
    results = run_tasks(sleep_or_return, [str(tmp_path), "", str(tmp_path), str(tmp_path)])
    assert next(results) == ("", None)
    while not (running := [int(file.name) for file in tmp_path.iterdir()]):
        time.sleep(0.1)
    results.close()
    end = time.monotonic() + 10
    while any(map(psutil.pid_exists, running)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, running))


def test_more_gpus_than_any_node_has_are_refused(cluster):
    with pytest.raises(PruneKitError, match="needs 4 GPUs, no node has more than 2"):
        list(run_tasks(root_of, [1], gpus=4))


# --- knockouts ---


@pytest.mark.ci
def test_a_killed_node_costs_no_result_and_doubles_none(cluster, tiny, tmp_path):
    doomed = cluster.add_node(num_cpus=1).all_processes["raylet"][0].process.pid
    (tmp_path / "doomed").write_text(str(doomed))
    sweep = Sweep(SlowTraining(tiny("qwen3_vl"), "qwen3_vl", tmp_path, (), "group"), [], 1)
    runs = [None, *(Removal("text", i) for i in range(5)), *(Removal("vision", i) for i in range(6))]
    names = []
    for record in sweep.do_all(runs):
        names.append(record["name"])
        if str(doomed) in (tmp_path / "begun").read_text():
            with contextlib.suppress(ProcessLookupError):
                os.kill(doomed, signal.SIGKILL)
    begun = (tmp_path / "begun").read_text().split()
    assert begun.count(str(doomed)) == 1 and len(begun) == len(runs) + 1
    assert sorted(names) == sorted(run_name(run) for run in runs)
    records = [json.loads(file.read_text()) for file in (tmp_path / "runs").iterdir()]
    assert len(records) == len(runs) and not any(record["error"] for record in records)


@pytest.mark.ci
@pytest.mark.slow
def test_trained_knockouts_spread_over_nodes_give_the_records_of_one_machine(cluster, reader, monkeypatch):
    runs = [None, Removal("text", 1)]
    sweep = Sweep(reader, [], 1)
    spread = {record["name"]: record for record in sweep.do_all(runs)}
    assert [record["error"] for record in spread.values()] == [None] * 2
    assert not left_running(str(reader.out / "work"))
    monkeypatch.delenv("RAY_ADDRESS")
    here = {record["name"]: record for record in sweep.do_all(runs[1:])}
    assert (reader.out / "logs" / "text-01.log").stat().st_size > 0
    for name, record in here.items():
        assert spread[name] | {"seconds": 0} == record | {"seconds": 0}


# --- scans ---


@pytest.mark.ci
@pytest.mark.slow
def test_a_scan_spread_over_nodes_finds_what_one_machine_does(cluster, texts, monkeypatch, tmp_path):
    job = Job(str(EMBEDDED), str(texts), batch_tokens=200)
    candidates = [Removal("text", 2), Removal("vision", 3)]
    found = {}
    for where in ("cluster", "here"):
        with connected() if where == "cluster" else contextlib.nullcontext():
            scan = Scan(job, tmp_path / where, quiet=True)
            path = find_path(scan, candidates, 2, None, None)
        found[where] = [scan.score([], name) for name in ("baseline", "text-02", "vision-03")], path
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert len((tmp_path / "cluster").read_text().splitlines()) >= 2 * scan.batches
    (scores, path), (expected, expected_path) = found["cluster"], found["here"]
    assert [entry["removed"] for entry in path] == [entry["removed"] for entry in expected_path]
    for one, other in zip([*scores, *path], [*expected, *expected_path], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["samples"] == other["samples"]


def test_what_processes_have_cached_stays_for_the_next_tasks_of_a_connection(cluster):
    with connected():
        first, second = ({number for _, number in run_tasks(process_number, range(4))} for _ in range(2))
    assert second <= first
