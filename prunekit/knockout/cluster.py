"""Work spread over a Ray cluster: used where RAY_ADDRESS is set, and nowhere else.

    pip install -e '.[distributed]'
    ray start --head --node-ip-address HEAD --port 6379 --include-dashboard false      # on the first node
    ray start --address HEAD:6379 --node-ip-address THIS                               # on each other one
    RAY_ADDRESS=HEAD:6379 bash knockout_check.sh                                       # on any of them

As for torchrun, every node has this checkout and its environment at the same path, and sees model, data and outputs at
the same paths, on a file system that they share. Whoever reaches a Ray cluster's ports can run code on it: keep it on
addresses that only its nodes reach, or ask for a token (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN the same on all nodes).
Nothing is opened here; a driver listens where its node does.
"""

import contextlib
import os
import pickle
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from prunekit.errors import PruneKitError

# What a node must know by itself; all other variables of the driver go with a task, secrets included: they travel
# among a task's arguments, since Ray writes its own `runtime_env` into logs.
OF_A_NODE = (
    "RAY_",
    "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
    "HOSTNAME",
    "TMPDIR",
    "SLURM_",
    "XDG_RUNTIME_DIR",
)


def _call(folder: str, environment: dict[str, str], task: bytes) -> Any:
    """Body of a task: `task` is unpickled, and with it modules imported, when the environment is right."""
    os.chdir(folder)
    os.environ.update(environment)
    function, item = pickle.loads(task)  # noqa: S301  # what the driver pickled
    return function(item)


@contextlib.contextmanager
def connected() -> Iterator[Any]:
    """Be a driver on the cluster at RAY_ADDRESS, within the block: one connection, whose processes and what they have
    cached serve every `run_tasks` inside. Yields the ray module. Raises PruneKitError where there is no such cluster.
    """
    try:
        import ray
    except ImportError:
        raise PruneKitError(
            "RAY_ADDRESS is set, but ray is not installed: pip install -e '.[distributed]', or unset it"
        ) from None
    if ray.is_initialized():
        yield ray
        return
    _connect(ray, os.environ["RAY_ADDRESS"])
    try:
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    """Join the cluster at `address`: "host:port", or "auto" for the one that this machine belongs to."""
    mend = "start it with 'ray start', or unset RAY_ADDRESS to work on this machine alone"
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or "/" in host:
            raise PruneKitError(f"RAY_ADDRESS={address}: must be HOST:PORT, as 'ray start --head' prints it, or auto")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, OverflowError) as error:  # Ray itself would try for minutes
            raise PruneKitError(f"RAY_ADDRESS={address}: can't be reached ({error}); {mend}") from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray raises what it likes here
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise PruneKitError(f"RAY_ADDRESS={address}: no Ray cluster joined ({words[0]}); {mend}") from None


def run_tasks(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    *,
    gpus: int = 0,
    cpus: int = 1,
    retries: int = 3,
) -> Generator[tuple[Any, Any]]:
    """Call `function(item)` for each item on the Ray cluster at RAY_ADDRESS; yields (item, result) as they finish.

    A task has `gpus` GPUs (its CUDA_VISIBLE_DEVICES, "" for none) and `cpus` CPUs of one node, the driver's working
    folder and its environment, less what describes a node. `function` is a function of a module, or a partial of one:
    a process does many tasks, so that what the module caches stays. A task whose process or node dies is done again
    elsewhere, `retries` times at most, and may then have been done twice in part. What a task raises isn't tried again
    and comes in place of its result, an Exception. Close the iterator to end early (`contextlib.closing`): what runs is
    killed, what waits is dropped. Raises PruneKitError where there is no such cluster, or no node with so many GPUs.
    """
    with connected() as ray:
        for kind, wanted in (("GPU", gpus), ("CPU", cpus)):
            most = max((node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"]), default=0)
            if wanted > most:
                raise PruneKitError(
                    f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: a task needs {wanted} {kind}s, no node has more than "
                    f"{most:g}; ask for fewer a task, or add a larger node"
                )
        environment = {k: v for k, v in os.environ.items() if not k.startswith(OF_A_NODE)}
        if not gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        # By default a process with GPUs does one task only.
        remote = ray.remote(max_calls=0, num_cpus=cpus, num_gpus=gpus, max_retries=retries)(_call)
        common = ray.put(str(Path.cwd())), ray.put(environment)
        left = {remote.remote(*common, pickle.dumps((function, item))): item for item in items}
        try:
            while left:
                [done], _ = ray.wait(list(left), num_returns=1)
                try:
                    result = ray.get(done)
                except Exception as error:  # the task's own, or that it was lost too often
                    result = getattr(error, "cause", None) or error
                yield left.pop(done), result
        finally:
            with contextlib.suppress(Exception):
                for task in left:
                    ray.cancel(task, force=True)
