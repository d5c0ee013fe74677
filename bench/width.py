"""What narrower layers cost and save: SmolLM2-135M with a third of its query heads and a quarter of its neurons cut.

    bash bench/setup.sh && .venv/bin/python bench/width.py --json docs/measured/width.json \\
        --tokens 4096 --test-tokens 8192

It has 9 query heads in 3 KV groups of 3, so that a layer keeps 6 or 3 heads: half isn't possible. Scores are compared
on held-out loss, untrained; then recoveries with the same few steps: plain, with rates per head, of active heads only,
in three phases, whose first trains what was cut, or the most important half of the heads. Prefill and decoding are
timed side by side with the uncut model, by turns. --parts amounts: layers that keep different numbers, or go whole,
against the same number in each, untrained and after the same steps. Calibration and training are on the training half
of Wikipedia articles, losses (nats per token) on the other half. Prints JSON; goes on where it was if --json exists.
Times are only worth something on a machine with nothing else to do: --parts speed runs them alone.
"""

import argparse
import json
import re
import statistics
import sys
import time
from pathlib import Path

import torch
from materials import ROOT, known_result, result_file, run, smollm2, write_texts

from prunekit.checkpoint import history, open_checkpoint, read_json, write_json
from prunekit.critical import critical_parameters
from prunekit.data.batches import calibrate
from prunekit.errors import PruneKitError, run_script
from prunekit.model.load import load_model
from prunekit.model.scores import score_batches
from prunekit.training.head_rates import HeadRates, Rates, freeze_others, known_scores

CUTS = {  # by name: what width_cut.py is told
    "removed": ("--heads", 6, "--neuron-share", 0.75),
    "masked": ("--heads", 6, "--mask"),
    "heads 6": ("--heads", 6),
    "heads 3": ("--heads", 3),
    "groups 2": ("--kv-groups", 2),
    "neurons 75%": ("--neuron-share", 0.75),
}
PARTS = ("recover", "speed", "scores")
AMOUNTS = {  # by name: how many layers go first, healed, and what width_cut.py is told of the rest
    "each layer 6 of 9 heads, 75% of the neurons": (0, CUTS["removed"]),
    "3 layers, 6 of 9 heads, 86% of the neurons": (3, ("--heads", 6, "--neurons", 1320)),
    "5 layers, 87% of the neurons": (5, ("--neurons", 1331)),
    "7 layers, 97% of the neurons": (7, ("--neurons", 1492)),
    "each layer 6 of 9 heads, 75% of the neurons, masked": (0, (*CUTS["removed"], "--mask", "--score", "taylor")),
    "as many masked across layers": (0, (*CUTS["removed"], "--mask", "--score", "taylor", "--across-layers")),
}
SCORES = ("magnitude", "activation", "entropy", "variance", "taylor")
KEEP_MASKS = {  # what training does to masked heads; "plain" brings them to life again
    "head rates": Rates(),
    "active heads": Rates(others=0.0, weak_share=0.0),
    "at rest": Rates(weak_share=0.0),
    "progressive": Rates(weak_share=0.0),
    "important heads first": Rates(weak_share=0.0),
}
IMPORTANT = Rates(weak=0.0, weak_share=0.5, others=0.0)  # --optimizer important_heads


class Bench:
    def __init__(self, args: argparse.Namespace, base: Path, train: Path, test: Path, work: Path, **settings: str):
        """base: the uncut checkpoint; train, test: rows of text to calibrate and train on, and to measure on."""
        self.args = args
        free = ("json", "runs", "parts", "model", "train", "test")
        own = {name: value for name, value in vars(args).items() if name not in free}
        self.result = known_result(args.json, own | settings | {"threads": torch.get_num_threads()})
        self.base, self.texts, self.test, self.work = open_checkpoint(base), train, test, work
        self._test = None
        self._before: dict[Path, float] = {}

    def known(self, *path: str) -> bool:
        part = self.result
        for key in path:
            if key not in part:
                return False
            part = part[key]
        return True

    def keep(self, value, *path: str) -> None:
        part = self.result
        for key in path[:-1]:
            part = part.setdefault(key, {})
        part[path[-1]] = value
        print(*path, json.dumps(value), file=sys.stderr, flush=True)
        if self.args.json:
            write_json(self.args.json, self.result)

    def loss(self, model) -> float:
        if self._test is None:
            self._test = calibrate(model, self.base, self.test, self.args.test_tokens, self.args.length)
        with torch.autocast("cpu", torch.bfloat16):
            return round(score_batches(model, [*self._test.fit, *self._test.held_out])["loss"], 4)

    def cut(self, name: str, score: str = "activation", calibrated: bool = True) -> Path:
        """The folder of a cut, made by the script as a user makes it."""
        how = f"{score}-{self.args.tokens}" if calibrated else "uncalibrated"
        out = self.work / f"{name}-{how}".replace(" ", "-").replace("%", "")
        if not out.exists():
            command = [sys.executable, "width_cut.py", "--model", self.base.path, "--out", out, *CUTS[name]]
            if calibrated:
                command += ["--score", score, *self.calib()]
            print(f"{out.name}: {run(*command):.0f} s", file=sys.stderr)
        return out

    # --- what is left, untrained ---------------------------------------------------------------------------------

    def scores(self) -> None:
        if not self.known("base"):
            self.keep(self.loss(load_model(self.base)), "base")
        wanted = [("removed", score, True) for score in SCORES] + [("removed", "magnitude", False)]
        wanted += [(name, "activation", True) for name in CUTS if name not in ("removed", "masked")]
        for name, score, calibrated in wanted:
            how = score if calibrated else f"{score}, no refit"
            if not self.known("untrained", name, how):
                folder = self.cut(name, score, calibrated)
                entry = history(folder)[-1]
                self.keep(
                    {"loss": self.loss(load_model(open_checkpoint(folder))), "parameters": entry["parameters"]},
                    "untrained", name, how,
                )  # fmt: skip

    def amounts(self) -> None:
        """Every layer narrower by the same, or some by more: as many parameters are left of all, or as many masked."""
        order = read_json(ROOT / "docs/measured/heal.json")["order"]
        for name, (dropped, words) in AMOUNTS.items():
            if self.known("amounts", name):
                continue
            work = self.work / "amounts" / name.replace(" ", "-").replace("%", "").replace(",", "")
            base, out = work / "layers" if dropped else self.base.path, work / "cut"
            if dropped and not base.exists():
                words_of = ("--model", self.base.path, "--out", base, "--text", *order[:dropped], "--heal")
                run(sys.executable, "manual_select.py", *words_of, *self.calib())
            if not out.exists():
                run(sys.executable, "width_cut.py", "--model", base, "--out", out, *words, *self.calib())
            if "--mask" in words:  # masked neurons would come to life again
                found = {"before": self.loss(load_model(open_checkpoint(out)))}
            else:
                found = self.train(out, "plain")
            self.keep({"parameters": history(out)[-1]["parameters"]} | found, "amounts", name)

    def calib(self) -> tuple:
        return "--calib", self.texts, "--calib-tokens", self.args.tokens, "--max-length", 512

    # --- recovery ------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """The same steps, tokens and rows for every way."""
        ways = {
            "masked": ("plain", "head rates", "active heads", "progressive", "important heads first"),
            "removed": ("plain", "progressive", "important heads first"),
        }
        for name, some in ways.items():
            folder = self.cut(name, self.args.score, not self.args.uncalibrated)
            for way in some:
                if not self.known("recovered", name, way):
                    self.keep(self.train(folder, way), "recovered", name, way)

    def rows(self, checkpoint, model) -> list[dict]:
        """Batches of one row of `length` tokens, the same for every way."""
        tokens = self.args.steps * self.args.length
        data = calibrate(model, checkpoint, self.texts, 2 * tokens, self.args.length, batch_tokens=1)
        batches = [b for b in [*data.fit, *data.held_out] if b["input_ids"].shape[1] == self.args.length]
        if len(batches) < self.args.steps:
            raise PruneKitError(
                f"{self.texts}: {len(batches)} of the rows drawn have {self.args.length} tokens, and each of --steps "
                f"{self.args.steps} takes one: give longer texts, or lower --length or --steps"
            )
        return batches[-self.args.steps :]

    def train(self, folder: Path, way: str) -> dict:
        """fp32 weights under bf16 autocast, AdamW, warm-up and linear decay. Progressive: three phases in one run."""
        torch.manual_seed(0)
        args, checkpoint = self.args, open_checkpoint(folder)
        masked = (history(folder) or [{}])[-1].get("settings", {}).get("masked", [])  # the uncut one has no history
        model = load_model(checkpoint, dtype="float32")
        if folder not in self._before:
            self._before[folder] = self.loss(model)
        batches = self.rows(checkpoint, model)
        keep = KEEP_MASKS.get(way) if "heads" in masked else None
        phases = [(args.steps, args.rate, None, 1, keep)]
        if way in ("progressive", "important heads first"):
            first, last = args.steps * 3 // 10, args.steps // 5
            what = (critical_parameters(checkpoint), 1, keep) if way == "progressive" else (None, 1, IMPORTANT)
            phases = [
                (first, 2.5 * args.rate, *what),
                (args.steps - first - last, args.rate, None, 1, keep),
                (last, args.rate / 8, None, 4, keep),
            ]
        done, start = 0, time.perf_counter()
        for steps, rate, pattern, accumulate, settings in phases:
            for parameter_name, parameter in model.named_parameters():
                parameter.requires_grad_(pattern is None or bool(re.search(pattern, parameter_name)))
            rates = None
            if settings:
                rates = HeadRates(model, checkpoint, settings, known_scores(checkpoint))
                if not settings.others:
                    freeze_others(model, rates)
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
            if rates:
                rates.attach(optimizer)
            updates = max(1, steps // accumulate)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda n, u=updates: min((n + 1) / max(1, u // 10), 1.0) * (1 - n / u * 0.9)
            )
            for step in range(steps):
                batch = {key: value for key, value in batches[done].items() if key != "labels"}
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(**batch, labels=batches[done]["labels"], use_cache=False).loss / accumulate
                loss.backward()
                done += 1
                if (step + 1) % accumulate == 0 or step + 1 == steps:
                    torch.nn.utils.clip_grad_norm_(trained, 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
        seconds = time.perf_counter() - start
        return {"before": self._before[folder], "after": self.loss(model), "steps": done, "tokens": done * args.length,
                "trainable": sum(p.numel() for p in trained), "seconds": round(seconds)}  # fmt: skip

    # --- speed ---------------------------------------------------------------------------------------------------

    def speed(self) -> None:
        """Median seconds of prefill and decoding, and their ratio to the uncut model's: all models take turns."""
        if self.known("speed"):
            return
        folders = {name: self.cut(name, "magnitude", calibrated=False) for name in CUTS}  # shapes are what counts
        models = {"uncut": load_model(self.base)}
        models |= {name: load_model(open_checkpoint(folder)) for name, folder in folders.items()}
        speed = time_models(models, self.args.turns, self.args.decode)
        for name, folder in folders.items():
            speed[name]["kv_bytes_per_token"] = history(folder)[-1]["kv_bytes_per_token"]
        self.keep(speed, "speed")


def time_models(models: dict, turns: int, decode: int, prompt_tokens: int = 512) -> dict[str, dict]:
    """Of each model by phase (prefill, decode) the median in ms, and how many times as fast as the one named `uncut`.

    All take turns; a ratio is of one turn, so that what else the machine does hits both.
    """
    tokens = min(10_000, *(model.get_input_embeddings().num_embeddings for model in models.values()))
    prompt = torch.randint(0, tokens, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    times = {name: {"prefill": [], "decode": []} for name in models}
    with torch.inference_mode():
        for turn in range(turns + 1):
            for name, model in models.items():
                start = time.perf_counter()
                output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
                middle = time.perf_counter()
                token = output.logits[:, -1:].argmax(-1)
                for _ in range(decode):
                    output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
                    token = output.logits[:, -1:].argmax(-1)
                if turn:  # the first warms up
                    times[name]["prefill"].append(middle - start)
                    times[name]["decode"].append(time.perf_counter() - middle)
    speed: dict[str, dict] = {name: {} for name in models}
    for name, phases in times.items():
        for phase, seconds in phases.items():
            ratios = [base / own for base, own in zip(times["uncut"][phase], seconds)]
            speed[name][phase] = {
                "ms": round(1000 * statistics.median(seconds), 1),
                "times_as_fast": round(statistics.median(ratios), 3),
                "from_to": [round(min(ratios), 3), round(max(ratios), 3)],
            }
    return speed


def draw(result: dict, path: Path) -> None:
    """Held-out loss untrained, by score, and after each recovery."""
    from prunekit.report.style import LINES, MUTED, PALE, new_figure, save_figure

    figure, axes = new_figure(2, 9.6, 3.6)
    left = {how: each["loss"] for how, each in result["untrained"]["removed"].items()}
    axes[0][0].barh(list(left), list(left.values()), color=LINES[0], height=0.6)
    axes[0][0].set_title("6 of 9 heads, 75% of neurons, untrained")
    bars = [
        (f"{name}: {way}", each["before"], each["after"])
        for name, ways in result["recovered"].items()
        for way, each in ways.items()
    ]
    names = [bar[0] for bar in bars]
    axes[0][1].barh(names, [bar[1] for bar in bars], color=PALE, height=0.6)
    axes[0][1].barh(names, [bar[2] for bar in bars], color=LINES[2], height=0.6)
    axes[0][1].set_title("before (grey) and after the same steps")
    for axis in axes[0]:
        axis.axvline(result["base"], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axis.invert_yaxis()
        axis.set_xlim(left=result["base"] * 0.95)
        axis.set_xlabel("held-out loss; dashed: uncut")
        axis.grid(axis="y", visible=False)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"), help="folder of the materials")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=(*PARTS, "amounts"))
    parser.add_argument("--tokens", type=int, default=2048, help="of calibration (default: 2048)")
    parser.add_argument("--test-tokens", type=int, default=4096)
    parser.add_argument("--score", default="activation", choices=SCORES, help="of the cuts that are recovered")
    parser.add_argument(
        "--uncalibrated", action="store_true", help="recover what was cut by the weights alone: quicker"
    )
    parser.add_argument("--steps", type=int, default=30, help="of recovery, a row each (default: 30)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (default: 256)")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate (default: 1e-4)")
    parser.add_argument("--turns", type=int, default=9, help="of timing (default: 9)")
    parser.add_argument("--decode", type=int, default=32, help="tokens to decode (default: 32)")
    parser.add_argument("--json", type=result_file, help="also write the result here, and a picture beside it")
    args = parser.parse_args()
    args.runs = args.runs.absolute()
    base, texts = smollm2(args.runs / "smollm2-bf16", "bfloat16"), write_texts(args.runs)
    train, test = texts["wikipedia-train"], texts["wikipedia-test"]
    bench = Bench(args, base, train, test, args.runs / "width", model="SmolLM2-135M-Instruct")
    for part in args.parts:
        getattr(bench, part)()
    if args.json and bench.known("untrained") and bench.known("recovered"):
        draw(bench.result, args.json.with_suffix(".png"))
    print(json.dumps(bench.result, indent=2))


if __name__ == "__main__":
    run_script(main)
