"""What a smaller vocabulary costs: SmolLM2-135M with half and a quarter of its 49,152 tokens, beside dropping layers.

    bash bench/setup.sh && .venv/bin/python bench/vocabulary.py --json docs/measured/vocabulary.json

Tokens are chosen on docstrings of Python packages, by vocab_cut.py. Bits a byte of UTF-8 are measured, which compare
vocabularies as losses a token don't: on other modules of the same packages, which share no docstring with those, on
Python's own library, and on text of another kind (Wikipedia); with the standard error of the difference to the uncut
model, by rows. Layers are dropped for the same parameters, those that bench/heal.py found cheapest. Recovery is the
same few steps on the same rows for all, the uncut model too. Part `embedded` cuts the model of eight skills. Prints
JSON; goes on where it was if --json exists.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from materials import (
    EMBEDDED,
    ROOT,
    embedded_data,
    known_result,
    package_docstrings,
    result_file,
    run,
    smollm2,
    texts_of,
    write_texts,
)

from prunekit.checkpoint import history, open_checkpoint, read_json, write_json
from prunekit.errors import run_script
from prunekit.model.load import load_model

LAYERS = read_json(ROOT / "docs/measured/heal.json")["order"]
CUTS = {  # by name: the script, and what it is told; 4 layers have as many parameters as half of the vocabulary
    "half of the vocabulary": ("vocab_cut.py", "--keep-share", 0.5),
    "4 layers dropped": ("manual_select.py", "--text", *LAYERS[:4]),
    "a quarter of the vocabulary": ("vocab_cut.py", "--keep-share", 0.25),
    "6 layers dropped": ("manual_select.py", "--text", *LAYERS[:6]),
}
PARTS = ("smollm2", "embedded")

# Runs a command and says what it took: from a small process, whose memory isn't taken for its child's
WATCH = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=sys.stderr)
used, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
print(json.dumps({"seconds": round(seconds, 1), "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
                  "peak_mb": round(used.ru_maxrss * 1024 / 1e6)}))
sys.exit(code)
"""


class Bench:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        free = ("json", "runs", "parts", "fresh")
        settings = {name: value for name, value in vars(args).items() if name not in free}
        settings |= {"model": "SmolLM2-135M-Instruct, bf16", "threads": torch.get_num_threads()}
        self.result = known_result(args.json, settings)
        self.work = args.runs / "vocabulary"
        if args.fresh:
            shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True, exist_ok=True)

    def keep(self, value, *path: str) -> None:
        part = self.result
        for key in path[:-1]:
            part = part.setdefault(key, {})
        part[path[-1]] = value
        print(*path, json.dumps(value)[:300], file=sys.stderr, flush=True)
        if self.args.json:
            write_json(self.args.json, self.result)

    def cut(self, name: str, model: Path, calib: Path, script: str, *words) -> Path:
        """The folder of a cut, made by the script as a user makes it; its seconds and memory are kept."""
        out = self.work / name.replace(" ", "-")
        if not out.exists():
            command = [sys.executable, ROOT / script, "--model", model, "--out", out, *words]
            if script == "vocab_cut.py":
                command += ["--calib", calib]
            done = subprocess.run(
                [sys.executable, "-c", WATCH, *map(str, command)], cwd=ROOT, check=True, stdout=subprocess.PIPE
            )
            self.keep(json.loads(done.stdout), "cuts", name)
        return out

    # --- SmolLM2 -------------------------------------------------------------------------------------------------

    def smollm2(self) -> None:
        args = self.args
        base = smollm2(args.runs / "smollm2-bf16", "bfloat16")
        paths = package_docstrings(args.runs) | write_texts(args.runs)
        train = paths["packages-train"]
        kinds = {"kin": "packages-test", "library": "docstrings", "wikipedia": "wikipedia-test"}
        tests = {kind: texts_of(paths[stem], args.rows) for kind, stem in kinds.items()}
        tests |= {kind: texts[::2] for kind, texts in tests.items() if kind != "kin"}  # which is what matters most
        folders = {"uncut": base} | {name: self.cut(name, base, train, *words) for name, words in CUTS.items()}
        for when in ("untrained", "recovered"):
            for name, folder in folders.items():
                if name in self.result.get(when, {}):
                    continue
                model = load_model(open_checkpoint(folder), dtype="float32" if when == "recovered" else "bfloat16")
                tokenizer = _tokenizer(folder)
                seconds = self.recover(model, tokenizer, texts_of(train, args.steps)) if when == "recovered" else 0
                scored = {kind: self.bits(model, tokenizer, texts) for kind, texts in tests.items()}
                whole = self.result.get("rows", {}).get(when, {})
                numbers = {kind: _summary(found, whole.get(kind)) for kind, found in scored.items()}
                if name == "uncut":
                    self.keep(scored, "rows", when)
                parameters = sum(parameter.numel() for parameter in model.parameters())
                self.keep({"parameters": parameters, "seconds": seconds} | numbers, when, name)

    def bits(self, model, tokenizer, texts: list[str]) -> list[tuple[float, int, int]]:
        """Of each text (bits, bytes, tokens), all predicted behind the token that ends texts."""
        found = []
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for text in texts:
                ids = torch.tensor([[0, *tokenizer.encode(text, add_special_tokens=False).ids]])
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
                nats = float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
                found.append((round(nats / math.log(2), 2), len(text.encode()), ids.shape[1] - 1))
        return found

    def recover(self, model, tokenizer, texts: list[str]) -> int:
        """All weights in fp32 under bf16 autocast, AdamW, warm-up and linear decay, a row a step. Seconds."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.args.rate, betas=(0.9, 0.95), weight_decay=0.1)
        steps, start = len(texts), time.perf_counter()
        for step, text in enumerate(texts):
            for group in optimizer.param_groups:
                group["lr"] = self.args.rate * min((step + 1) / max(1, steps // 10), 1.0) * (1 - 0.9 * step / steps)
            ids = torch.tensor([[0, *tokenizer.encode(text, add_special_tokens=False).ids][: self.args.length]])
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return round(time.perf_counter() - start)

    # --- the embedded model --------------------------------------------------------------------------------------

    def embedded(self) -> None:
        data = embedded_data(self.args.runs / "tiny_vl")
        folders = {"uncut": EMBEDDED}
        for share in (0.75, 0.5, 0.25):
            name = f"embedded {share}"
            words = ("vocab_cut.py", "--keep-share", share)
            folders[name] = self.cut(name, EMBEDDED, data / "train.jsonl", *words)
        for name, folder in folders.items():
            if name in self.result.get("embedded", {}):
                continue
            out = self.work / "scores.json"
            command = [sys.executable, "-m", "prunekit.evaluate", "--model", folder, "--dataset", data / "test.jsonl"]
            run(*command, "--limit", self.args.questions, "--json", out)
            (found,) = read_json(out)
            entry = history(folder)[-1] if name != "uncut" else {}
            score = found["datasets"]["test"]
            numbers = {"parameters": found["parameters"], "exact_match": score["exact_match"]}
            numbers |= {"token_acc": score["token_acc"], "metrics": entry.get("metrics")}
            self.keep(numbers, "embedded", name)


def _tokenizer(folder: Path):
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def _summary(found: list, whole: list | None) -> dict[str, float]:
    """Bits and tokens a byte; the difference to the uncut model's bits, with its standard error over rows."""
    size = sum(each[1] for each in found)
    bits = sum(each[0] for each in found) / size
    summary = {"bits_per_byte": round(bits, 5), "tokens_per_byte": round(sum(each[2] for each in found) / size, 5)}
    if whole:
        base = sum(each[0] for each in whole) / size
        differences = [(own[0] - other[0]) / own[1] for own, other in zip(found, whole, strict=True)]
        error = statistics.stdev(differences) / len(differences) ** 0.5
        summary |= {"above_uncut": round(bits / base - 1, 5), "standard_error": round(error / base, 5)}
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"), help="folder of the materials")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument(
        "--rows", type=int, default=60, help="of 2400 characters each, half as many of other kinds (default: 60)"
    )
    parser.add_argument("--steps", type=int, default=30, help="of recovery, a row each (default: 30)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row at most (default: 512)")
    parser.add_argument("--rate", type=float, default=5e-5, help="learning rate (default: 5e-5)")
    parser.add_argument("--questions", type=int, default=400, help="for the embedded model (default: 400)")
    parser.add_argument("--fresh", action="store_true", help="make the cuts anew, and time them")
    parser.add_argument("--json", type=result_file, help="also write the result here")
    args = parser.parse_args()
    args.runs = args.runs.absolute()
    bench = Bench(args)
    for part in args.parts:
        getattr(bench, part)()
    print(json.dumps(bench.result, indent=2))


if __name__ == "__main__":
    run_script(main)
