"""How fast is surgery? Against cp of as many bytes, transformers' load + save, and mergekit's passthrough.

    bash bench/setup.sh && .venv/bin/python bench/surgery.py --json docs/measured/surgery.json
    .venv/bin/python bench/surgery.py checkpoints/base --runs 9

Contenders take turns in shuffled order, each in a process of its own, with the sources in the page cache, the last
output removed and the disk idle. The surgery puts its files on the disk before it ends (fsync), plain cp leaves that
to the kernel: "cp + sync" waits for it too.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from materials import ROOT, result_file
from materials import run as run_command

from prunekit.checkpoint import layer_numbers, open_checkpoint, write_json
from prunekit.errors import run_script

DROPPED = [4, 9, 14, 19, 24]
MERGEKIT = ROOT / ".venv-rehearsal/bin/mergekit-yaml"
LOAD_SAVE = f"""
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
layers, config = model.model.layers, model.config
kept = [i for i in range(len(layers)) if i not in {DROPPED}]
model.model.layers = type(layers)(layers[i] for i in kept)
config.num_hidden_layers = len(kept)
if getattr(config, "layer_types", None):
    config.layer_types = [config.layer_types[i] for i in kept]
model.save_pretrained(sys.argv[2], max_shard_size="1GB")
"""


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def warm(*folders: Path) -> None:
    for file in (file for folder in folders for file in folder.iterdir()):
        with file.open("rb") as stream:
            while stream.read(2**20):
                pass


def timed(command: list, folder: Path) -> tuple[float, float, str]:
    """Seconds, peak MB, and the error's last line if it failed, of a command that writes `folder`."""
    start = time.perf_counter()
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    error = output.decode().strip().splitlines()[-1].strip() if status else ""
    # mergekit 0.1.5 writes all of a Qwen3's weights, then fails to save its config: its time counts all the same.
    if not any(folder.glob("*.safetensors")) or (status and command[0] != MERGEKIT):
        sys.exit(f"error: {command} failed:\n{output.decode()}")
    return seconds, usage.ru_maxrss * 1024 / 1e6, error


def contenders(model: Path, work: Path) -> dict[str, list]:
    """Command by name; each writes work/out. work/cut and work/kv are what our two scripts write."""
    layers = len(layer_numbers(open_checkpoint(model), "text"))
    ends = [-1, *DROPPED, layers]
    slices = [
        {"sources": [{"model": str(model), "layer_range": [a + 1, b]}]} for a, b in zip(ends, ends[1:]) if a + 1 < b
    ]
    recipe = work / "mergekit.json"  # JSON is YAML
    recipe.write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
    out = work / "out"
    surgery = [sys.executable, ROOT / "manual_select.py", "--model", model, "--text", *DROPPED, "--out"]
    merge = [sys.executable, ROOT / "kv_cut.py", "--model", model, "--kv-heads", 1, "--out"]
    options = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet", "--out-shard-size", "1B"]
    commands = {
        "manual_select": [*surgery, out],
        "transformers": [sys.executable, "-c", LOAD_SAVE, model, out],
        "mergekit": [MERGEKIT, recipe, out, *options],
        "kv_cut": [*merge, out],
    }
    for name, command in {"cut": surgery, "kv": merge}.items():
        timed([*command, work / name], work / name)
        commands[f"cp {name}"] = ["cp", "-r", work / name, out]
        commands[f"cp {name} + sync"] = ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/* "$1"', work / name, out]
    return commands


def measure(model: Path, work: Path, runs: int, slow_runs: int) -> dict:
    commands, out = contenders(model, work), work / "out"
    results: dict[str, dict] = {name: {"seconds": [], "peak_rss_mb": 0.0} for name in commands}
    for run in range(runs):
        names = [n for n in commands if run < slow_runs or n not in ("transformers", "mergekit")]
        for name in random.Random(run).sample(names, len(names)):
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            warm(model, work / "cut", work / "kv")
            seconds, peak, error = timed(commands[name], out)
            weights = [weight_bytes(folder) for folder in (out, work / ("kv" if "kv" in name else "cut"))]
            if abs(weights[0] / weights[1] - 1) > 0.001:
                sys.exit(f"error: {name} wrote {weights[0]} bytes of weights instead of {weights[1]}")
            print(f"{model.name} run {run + 1}: {name} {seconds:.2f} s, {peak:.0f} MB", file=sys.stderr)
            result = results[name]
            result["seconds"].append(round(seconds, 3))
            result["peak_rss_mb"] = round(max(result["peak_rss_mb"], peak), 1)
            result["weights_mb"] = round(weights[0] / 1e6, 1)
            if error:
                result["error"] = error
    for result in results.values():
        seconds = result["seconds"]
        result |= {"min": min(seconds), "median": round(statistics.median(seconds), 3), "max": max(seconds)}
    checkpoint = open_checkpoint(model)
    largest = max(tensor.nbytes for tensor in checkpoint.tensors.values()) / 1e6
    return {
        "weights_mb": round(checkpoint.nbytes / 1e6, 1),
        "files": len({tensor.file for tensor in checkpoint.tensors.values()}),
        "largest_tensor_mb": round(largest, 1),
        "contenders": results,
        "limits": [
            *(
                limit(results, *names)
                for names in (
                    ("manual_select", "cp cut", 1.0),
                    ("manual_select", "cp cut + sync", 1.0),
                    ("manual_select", "transformers", 0.1),
                    ("manual_select", "mergekit", 1.0),
                    ("kv_cut", "cp kv", 1.5),
                    ("kv_cut", "cp kv + sync", 1.5),
                )
            ),
            memory_limit(results, "manual_select", 150),
            memory_limit(results, "kv_cut", 300 + largest),
        ],
    }


def limit(results: dict, ours: str, peer: str, most: float) -> dict:
    ratios = {key: round(results[ours][key] / results[peer][key], 3) for key in ("median", "min")}
    met = {f"met_by_{key}": ratio <= most for key, ratio in ratios.items()}
    return {"limit": f"{ours} takes at most {most} x {peer}", **ratios, **met}


def memory_limit(results: dict, ours: str, most: float) -> dict:
    peak = results[ours]["peak_rss_mb"]
    return {"limit": f"{ours} needs less than {most:.0f} MB", "peak_rss_mb": peak, "met": peak < most}


def machine(folder: Path) -> dict:
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    disk = subprocess.run(["df", "--output=fstype", folder], capture_output=True, text=True, check=True)
    return {
        "cpu": cpus[0].split(": ")[1] if cpus else platform.machine(),
        "cores": os.cpu_count(),
        "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "file_system": disk.stdout.split()[-1],
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "transformers": version("transformers"),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = ROOT / "runs/bench"
    parser.add_argument(
        "models", type=Path, nargs="*", help="checkpoints (default: smollm2 and synthetic of materials.py)"
    )
    parser.add_argument("--runs", type=int, default=5, help="of each contender (default: 5)")
    parser.add_argument("--slow-runs", type=int, default=2, help="of transformers and mergekit (default: 2)")
    parser.add_argument("--json", type=result_file, metavar="FILE", help="write the JSON there too")
    arguments = parser.parse_args()
    if not MERGEKIT.exists():
        sys.exit("error: mergekit is missing; bash bench/setup.sh installs it")
    models = arguments.models
    if not models:
        models = [runs / "smollm2", runs / "synthetic"]
        run_command(sys.executable, "bench/materials.py", runs)

    # Bytecode is cached for our scripts as it is for the peers, which were compiled when they were installed.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    report = {"machine": machine(ROOT), "models": {}}
    for model in models:
        model = model.resolve()
        with tempfile.TemporaryDirectory(prefix=f"{model.name}-surgery-", dir=model.parent) as work:  # on its disk
            report["models"][model.name] = measure(model, Path(work), arguments.runs, arguments.slow_runs)
        if arguments.json:
            write_json(arguments.json, report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    run_script(main)
