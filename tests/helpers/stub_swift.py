#!/usr/bin/env python3
"""Plays ms-swift for the launchers' tests: records how it was called, and does on disk what the real one does.

Like the real command it is a wrapper that starts the trainer as a child and waits. Settings from the environment:
  STUB_CALLS        file to which a JSON line per call is added: argv, env, pid of the trainer, pid of its child
  STUB_STEPS        steps to train (4); a checkpoint every 2
  STUB_FAIL_AT      step after which training fails, with exit code 3
  STUB_HANG_AT      step after which it hangs, beside a child process of its own; export: before its config is written
  STUB_STUBBORN     it ignores SIGTERM
  STUB_SERVER       rollout: ok, dead (ends at once) or silent (never answers)
  STUB_CACHE        what it writes as cache.json where it fills a teacher's cache
  STUB_MEET         the nodes of a training (NNODES) wait for one another before it begins, as torchrun's do
"""

import http.server
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path


def flag(name, default=None):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def record(**more):
    call = {"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid(), **more}
    with Path(os.environ["STUB_CALLS"]).open("a") as calls:
        calls.write(json.dumps(call) + "\n")


def hang():
    child = subprocess.Popen(["sleep", "600"])
    record(event="hang", child=child.pid)
    time.sleep(600)


def meet():
    calls = Path(os.environ["STUB_CALLS"])
    ranks = {str(rank) for rank in range(int(os.environ["NNODES"]))}
    while ranks:
        started = [json.loads(line) for line in calls.read_text().splitlines()]
        ranks -= {call["env"].get("NODE_RANK") for call in started if flag("--output_dir") in call["argv"]}
        time.sleep(0.05)


def save_model(folder):
    folder.mkdir(parents=True)
    if flag("--tuner_type") == "lora":
        header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        data = len(header).to_bytes(8, "little") + header + bytes(4)
        (folder / "adapter_model.safetensors").write_bytes(data)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        return
    for file in Path(flag("--model")).glob("*.[js]*"):
        shutil.copy(file, folder)


def train():
    run, steps = Path(flag("--output_dir")), int(os.environ.get("STUB_STEPS", 4))
    begin = int(flag("--resume_from_checkpoint", "checkpoint-0").rpartition("-")[2])
    run.mkdir(parents=True, exist_ok=True)
    if "STUB_MEET" in os.environ:
        meet()
    if os.environ.get("NODE_RANK", "0") != "0":  # which takes part, and writes nothing
        return
    for step in range(begin + 1, steps + 1):
        with (run / "logging.jsonl").open("a") as log:
            line = {
                "loss": 1 / step,
                "token_acc": 0.5,
                "learning_rate": 1e-4,
                "global_step/max_steps": f"{step}/{steps}",
            }
            log.write(json.dumps(line) + "\n")
        if step % 2 == 0 or step == steps:
            folder = run / f"checkpoint-{step}"
            save_model(folder)
            (folder / "optimizer.pt").write_bytes(b"junk")
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": steps}))
        if str(step) == os.environ.get("STUB_FAIL_AT"):
            print("RuntimeError: CUDA out of memory", file=sys.stderr)
            sys.exit(3)
        if str(step) == os.environ.get("STUB_HANG_AT"):
            hang()
    if cache := os.environ.get("PRUNEKIT_FILL_CACHE"):
        Path(cache).mkdir(exist_ok=True)
        (Path(cache) / "cache.json").write_text(os.environ["STUB_CACHE"])
    with (run / "logging.jsonl").open("a") as log:
        log.write(
            json.dumps(
                dict.fromkeys(("last_model_checkpoint", "best_model_checkpoint"), str(run / f"checkpoint-{steps}"))
            )
        )


class Health(http.server.BaseHTTPRequestHandler):
    def setup(self):  # closed connections leave nothing behind: the next server may have the port at once
        super().setup()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def do_GET(self):
        self.send_response(200 if self.path == "/health/" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


def serve():
    kind = os.environ.get("STUB_SERVER", "ok")
    if kind == "dead":
        sys.exit("ValueError: no room for the KV cache")
    if kind == "silent":
        hang()
    http.server.HTTPServer(("127.0.0.1", int(flag("--port"))), Health).serve_forever()


def export():
    folder = Path(flag("--output_dir"))
    save_model(folder)
    if os.environ.get("STUB_HANG_AT") == "export":
        hang()
    if "--quant_method" in sys.argv:
        config = json.loads((folder / "config.json").read_text())
        method = {"bnb": "bitsandbytes"}.get(flag("--quant_method"), flag("--quant_method"))
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))


if "STUB_INNER" not in os.environ:
    result = subprocess.run([sys.executable, "-SE", *sys.argv], env={**os.environ, "STUB_INNER": "1"})
    sys.exit(result.returncode)
if "STUB_STUBBORN" in os.environ:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
record(event="start")
match sys.argv[1]:
    case "sft" | "rlhf":
        train()
    case "export":
        export()
    case "rollout":
        serve()
