"""What attention heads cost: 0, 25, 33 and 50% of them removed, perplexity before and after recovery, and speed.

    .venv/bin/python bench/heads.py --json runs/heads.json                           # two small models, made here
    .venv/bin/python bench/heads.py --model checkpoints/base --train data/train.jsonl --test data/test.jsonl \\
        --json runs/heads.json

For any models; rows are {"text": ...}. Without --model a GPT-2 and a Llama of 12 heads are trained on docstrings of
packages first. Each cut is width_cut.py's, calibrated on the training texts, then trained for the same steps as
all others, the uncut model too: all weights, or where heads are only masked with those at rest. Counts that a family
can't have become the nearest that it can; where its config can't say another count at all, heads are masked, which
saves no time, and the table says so. The last row removes half of the neurons, too. Prints a table and draws a picture
beside --json; goes on where it was if that exists. Times are only worth something on a machine with nothing else to do.
"""

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path

from materials import package_docstrings, result_file, small
from width import Bench, time_models

from prunekit.checkpoint import Checkpoint, heads, history, open_checkpoint, statistics
from prunekit.data.batches import calibrate
from prunekit.errors import PruneKitError, run_script
from prunekit.model.load import load_model
from prunekit.surgery.cut import write_cut
from prunekit.surgery.width import plan_width
from prunekit.surgery.width_fit import fit_width

SHARES = (0.25, 0.33, 0.5)
HEADERS = ("removed", "heads", "parameters", "before", "recovered", "prefill", "decoding")


def nearest(checkpoint: Checkpoint, share: float) -> int:
    """How many heads a layer keeps if about this share goes: the nearest number that the family can have."""
    count = heads(checkpoint).query
    for number in sorted(range(1, count), key=lambda number: abs(count - number - share * count)):
        try:
            plan_width(checkpoint, heads_kept=number)
        except PruneKitError:
            continue
        return number
    raise PruneKitError(f"{checkpoint.path}: none of its {count} heads can go")


class Heads(Bench):
    """One model's rows of the table."""

    def __init__(self, args: argparse.Namespace, base: Path, train: Path, test: Path):
        work = args.runs / "heads" / base.name / f"{args.score}-{args.tokens}-{args.length}"
        super().__init__(args, base, train, test, work, texts=str(train), held_out=str(test))
        self.name = base.name

    def cuts(self) -> dict[str, dict]:
        """By name what `plan_width` is told; cuts that come to the same are one."""
        count = heads(self.base).query
        kept = {f"{1 - number / count:.0%} of heads": number for number in (nearest(self.base, s) for s in SHARES)}
        last, number = list(kept.items())[-1]
        both = {f"{last}, 50% of neurons": {"heads_kept": number, "neuron_share": 0.5}}
        return {name: {"heads_kept": number} for name, number in kept.items()} | both

    def cut_as(self, name: str, wanted: dict) -> Path:
        """The folder of a cut, as width_cut.py makes it."""
        out = self.work / name.replace(" ", "-").replace("%", "").replace(",", "")
        if not out.exists():
            model = load_model(self.base)
            data = calibrate(model, self.base, self.texts, self.args.tokens, self.args.length)
            plan = plan_width(self.base, **wanted)
            write_cut(fit_width(plan, model, data, self.args.score, partial(load_model, self.base)), out)
        return out

    def measure(self) -> None:
        args, folders = self.args, {"uncut": self.base.path}
        folders |= {name: self.cut_as(name, wanted) for name, wanted in self.cuts().items()}
        for name, folder in folders.items():
            if not self.known(self.name, name):
                entry = (history(folder) or [{}])[-1]
                masked = entry.get("settings", {}).get("masked", [])
                trained = self.train(folder, "at rest" if "heads" in masked else "plain")
                checkpoint = open_checkpoint(folder)
                row = {
                    "heads": heads(self.base).query - entry.get("removed", {}).get("heads", 0),
                    "of": heads(self.base).query,
                    "masked": masked,
                    "parameters": statistics(checkpoint)["parameters"],
                    "before": math.exp(trained["before"]),
                    "recovered": math.exp(trained["after"]),
                }
                self.keep(row | {key: trained[key] for key in ("steps", "tokens")}, self.name, name)
        if not self.known(self.name, "uncut", "prefill"):
            models = {name: load_model(open_checkpoint(folder)) for name, folder in folders.items()}
            for name, speed in time_models(models, args.turns, args.decode, args.prompt).items():
                self.keep(self.result[self.name][name] | speed, self.name, name)


def table(result: dict[str, dict]) -> str:
    """Perplexity and speed of every cut of every model, as Markdown."""
    lines = []
    for model, rows in result.items():
        lines += [f"{model}:", "", f"| {' | '.join(HEADERS)} |", "|" + "---|" * len(HEADERS)]
        for name, row in rows.items():
            kept = f"{row['heads']} of {row['of']}" + (", the others masked" if "heads" in row["masked"] else "")
            speed = [f"{row[phase]['times_as_fast']:.2f}×" for phase in ("prefill", "decode")]
            perplexities = [f"{row[when]:.2f}" for when in ("before", "recovered")]
            parameters = f"{row['parameters']:,}"
            lines.append(f"| {' | '.join([name, kept, parameters, *perplexities, *speed])} |")
        lines.append("")
    return "\n".join(lines)


def draw(result: dict[str, dict], path: Path) -> None:
    """Perplexity before and after recovery, and speed, by the share of heads that went."""
    from prunekit.report.style import LINES, new_figure, save_figure

    figure, axes = new_figure(2, 9.6, 3.4)
    quality, speed = axes[0]
    for colour, (model, rows) in zip(LINES, result.items()):
        heads_only = [row for name, row in rows.items() if "neurons" not in name]
        shares = [1 - row["heads"] / row["of"] for row in heads_only]
        called = model + " (masked)" * any("heads" in row["masked"] for row in heads_only)
        lines = [(quality, when, [row[when] for row in heads_only]) for when in ("before", "recovered")]
        lines += [(speed, what, [row[what]["times_as_fast"] for row in heads_only]) for what in ("prefill", "decode")]
        for axis, what, heights in lines:
            style = "-" if what in ("recovered", "decode") else ":"
            axis.plot(shares, heights, style, color=colour, marker="o", markersize=4, label=f"{called}, {what}")
    quality.set_yscale("log")
    for which in (quality.yaxis.set_major_formatter, quality.yaxis.set_minor_formatter):
        which("{x:g}")
    quality.set_title("perplexity")
    speed.set_title("times as fast as uncut")
    for axis in axes[0]:
        axis.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axis.set_xlabel("heads removed")
        axis.legend(frameon=False, fontsize=7)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", help="decoders (default: two small ones, made here)")
    parser.add_argument("--train", type=Path, help="rows of text (default: docstrings)")
    parser.add_argument("--test", type=Path, help="others, to measure on")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"), help="folder of models and materials")
    parser.add_argument("--small-steps", type=int, default=800, help="of the small models' training (default: 800)")
    parser.add_argument("--score", default="activation", help="of heads and neurons, as width_cut.py's")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration (default: 8192)")
    parser.add_argument("--test-tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=60, help="of recovery, a row each (default: 60)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (default: 256)")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate (default: 1e-4)")
    parser.add_argument("--turns", type=int, default=9, help="of timing (default: 9)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill (default: 512)")
    parser.add_argument("--decode", type=int, default=32, help="tokens to decode (default: 32)")
    parser.add_argument("--json", type=result_file, help="also write the result here, and a picture beside it")
    args = parser.parse_args()
    if bool(args.train) != bool(args.test) or bool(args.model) != bool(args.train):
        parser.error("--model, --train and --test belong together")
    if twice := [model for model in args.model or () if [each.name for each in args.model].count(model.name) > 1]:
        parser.error(f"--model {twice[0]}: another is called the same, and the table goes by names: rename a folder")
    train, test, models = args.train, args.test, args.model
    if not models:
        train, test = package_docstrings(args.runs).values()
        folders = {each: args.runs / f"small-{each}-{args.small_steps}" for each in ("gpt2", "llama")}
        models = [small(folder, each, train, args.small_steps) for each, folder in folders.items()]
    result = {}
    for model in models:
        bench = Heads(args, model, train, test)
        bench.measure()
        result[bench.name] = bench.result[bench.name]
    if args.json:
        draw(result, args.json.with_suffix(".png"))
    print(table(result), file=sys.stdout)
    print(json.dumps(result, indent=2), file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
