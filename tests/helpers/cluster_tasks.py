"""What the tests have a cluster do; a module that a worker process imports in no time."""

import json
import math
import os
import time
from pathlib import Path

from prunekit.knockout.trained import Training


def root_of(number):
    return math.sqrt(number)


def surroundings(_):
    return str(Path.cwd()), os.environ.get("OF_THE_DRIVER"), os.environ["CUDA_VISIBLE_DEVICES"]


def process_number(_):
    return os.getpid()


def linger(folder):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)


def sleep_or_return(folder):
    if folder:
        linger(folder)


class SlowTraining(Training):
    """Trainings that take a second, or a minute on the node named in `doomed`, and only write ms-swift's log."""

    def _train(self, run, work, gpus):
        node = os.environ["RAY_RAYLET_PID"]
        with (self.out / "begun").open("a") as begun:
            begun.write(f"{node}\n")
        time.sleep(60 if node == (self.out / "doomed").read_text() else 1)
        (work / "swift").mkdir()
        record = {"global_step/max_steps": "2/2", "eval_token_acc": 0.5, "eval_loss": 1.0}
        (work / "swift" / "logging.jsonl").write_text(json.dumps(record))
