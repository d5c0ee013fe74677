"""What zeros cost: loss of SmolLM2-135M, half of its weights zero, and 70% of its MLP and o_proj after retraining.

    bash bench/setup.sh && .venv/bin/python bench/sparsity.py --json docs/measured/sparsity.json \\
        --steps 100 --learning-rate 3e-4

Untrained: magnitude, Wanda and gradient, by one threshold, per tensor, per output, with budgets by layers' importance,
and 2:4; some of them refitted. Retrained with the same tokens each: all at once, gradually in one run, in
cycles by Wanda, with zeros that move (RigL), and taught by the dense model. Calibrated and trained on one half of the
Wikipedia articles, measured on the other half, and on text of another kind (docstrings). Prints JSON; what the file has
already isn't measured again. Takes two hours on two CPU cores.
"""

import argparse
import json
import math
import re
import shutil
import sys
import time
from functools import cache
from pathlib import Path

import torch
import transformers
from materials import known_result, result_file, smollm2, write_texts

from prunekit.checkpoint import open_checkpoint, read_json, write_json
from prunekit.data.batches import calibrate, draw_rows, read_calibration
from prunekit.data.encode import encoder_of
from prunekit.errors import run_script
from prunekit.model.load import load_model
from prunekit.model.scores import score_batches
from prunekit.report import style
from prunekit.surgery import zeros_scores as weight_scores
from prunekit.surgery.cut import write_cut
from prunekit.surgery.zeros import ZerosCut, cut_zeros, magnitude, plan_zeros, with_importance
from prunekit.surgery.zeros_fit import refit
from prunekit.surgery.zeros_wish import Wish
from prunekit.training.zeros import DynamicSparsity, GradualPruning, KeepZeros
from prunekit.training.zeros_settings import Dynamic, Gradual

UNTRAINED = {  # name: (score, scope, importance, power), all at 50%
    "magnitude, global": ("magnitude", "global", None, 1),
    "magnitude, layer": ("magnitude", "layer", None, 1),
    "magnitude, layer by activation": ("magnitude", "layer", "activation", 0.5),
    "magnitude, layer by gradient": ("magnitude", "layer", "gradient", 1),
    "magnitude, layer by magnitude": ("magnitude", "layer", "magnitude", 0.5),
    "magnitude, layer by output-gradient": ("magnitude", "layer", "output-gradient", 1),
    "wanda, global": ("wanda", "global", None, 1),
    "wanda, layer": ("wanda", "layer", None, 1),
    "wanda, row": ("wanda", "row", None, 1),
    "wanda, row by activation": ("wanda", "row", "activation", 0.5),
    "wanda, row by gradient": ("wanda", "row", "gradient", 1),
    "wanda, row by magnitude": ("wanda", "row", "magnitude", 0.5),
    "wanda, row by output-gradient": ("wanda", "row", "output-gradient", 1),
    "gradient, layer": ("gradient", "layer", None, 1),
    "magnitude, 2:4": ("magnitude", "2:4", None, 1),
    "wanda, 2:4": ("wanda", "2:4", None, 1),
    "magnitude, layer, refitted": ("magnitude", "layer", None, 1),
    "wanda, row, refitted": ("wanda", "row", None, 1),
    "wanda, row by activation, refitted": ("wanda", "row", "activation", 0.5),
    "wanda, 2:4, refitted": ("wanda", "2:4", None, 1),
}
RETRAINED = (
    "one shot",
    "gradual",
    "dynamic",
    "one shot by wanda",
    "cycles by wanda",
    "one shot by wanda, refitted",
    "cycles by wanda, refitted",
    "one shot by wanda, refitted, distilled",
    "dense",
)
MODULES = "mlp|o_proj"
CONSTANT = "constant_with_warmup"


class Bench:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.checkpoint = open_checkpoint(smollm2(args.runs / "smollm2-bf16", "bfloat16"))
        self.texts = write_texts(args.runs)
        self.work = args.runs / "sparsity"

    @cache  # noqa: B019
    def model(self):
        return load_model(self.checkpoint)

    @cache  # noqa: B019
    def data(self):
        tokens = self.args.calib_tokens
        return calibrate(self.model(), self.checkpoint, self.texts["wikipedia-train"], max_tokens=tokens)

    @cache  # noqa: B019
    def tests(self) -> dict[str, list]:
        tokens, found = self.args.test_tokens, {}
        for name in ("wikipedia-test", "docstrings"):
            data = calibrate(self.model(), self.checkpoint, self.texts[name], max_tokens=tokens)
            found[name] = [*data.fit, *data.held_out]
        return found

    @cache  # noqa: B019
    def scores(self, score: str, modules: str | None):
        if score == "magnitude":
            return magnitude
        weights = plan_zeros(self.checkpoint, Wish(sparsity=0.5, modules=modules)).weights
        return weight_scores.SCORES_OF[score](self.checkpoint, self.model(), self.data(), weights)

    @cache  # noqa: B019
    def importance(self, kind: str):
        weights = plan_zeros(self.checkpoint, Wish(sparsity=0.5)).weights
        return weight_scores.IMPORTANCE[kind](self.checkpoint, self.model(), self.data(), weights)

    def losses(self, model) -> dict[str, float]:
        return {name: score_batches(model, batches)["loss"] for name, batches in self.tests().items()}

    def sparsify(self, name: str, wish: Wish, importance: str | None = None, refitted: bool = False) -> Path:
        plan = plan_zeros(self.checkpoint, wish)
        if importance:
            plan = with_importance(plan, self.importance(importance))
        return self.write(name, cut_zeros(plan, self.scores(wish.score, wish.modules)), refitted)

    def write(self, name: str, cut: ZerosCut, refitted: bool) -> Path:
        if refitted:
            cut = refit(cut, load_model(cut.source), self.data())
        write_cut(cut, self.work / name, overwrite=True)
        return self.work / name

    def sparsify_again(self, model, name: str, wish: Wish, refitted: bool) -> Path:
        """More zeros in a model that was trained, chosen by what it does now."""
        folder = self.work / "cycle"
        model.to(torch.bfloat16).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(self.checkpoint.path / file, folder)
        checkpoint = open_checkpoint(folder)
        plan, score = plan_zeros(checkpoint, wish), weight_scores.SCORES_OF[wish.score]
        cut = cut_zeros(plan, score(checkpoint, load_model(checkpoint), self.data(), plan.weights))
        return self.write(name, cut, refitted)

    def untrained(self, name: str) -> dict:
        score, scope, importance, power = UNTRAINED[name]
        if ":" in scope:
            wish = Wish(pattern=(2, 4), score=score)
        else:
            wish = Wish(sparsity=0.5, scope=scope, score=score, power=power)
        start = time.perf_counter()
        folder = self.sparsify("untrained", wish, importance, name.endswith("refitted"))
        seconds = time.perf_counter() - start
        found = read_json(folder / "pruning_info.json")["history"][-1]["sparsity"]
        shares = found["tensors"].values()
        return {
            **self.losses(load_model(open_checkpoint(folder))),
            "sparsity": found["sparsity"],
            "tensors": [min(shares), max(shares)],
            "seconds": seconds,
        }

    def train(self, folder: Path, callback, steps: int, first: int = 0, teacher=None):
        """(model, seconds) after so many steps, on rows of the training half from that of step `first` on."""
        args = self.args
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        rows = read_calibration(self.texts["wikipedia-train"])
        encoder = encoder_of(self.checkpoint, rows, 512)
        rows = draw_rows(rows, encoder.encode, (args.steps * args.rows + args.eval_rows) * 511)
        start = args.eval_rows + first * args.rows
        settings = transformers.TrainingArguments(
            self.work / "training",
            max_steps=steps,
            per_device_train_batch_size=args.rows,
            learning_rate=args.learning_rate,
            lr_scheduler_type=args.schedule,
            warmup_steps=max(1, steps // 20),
            use_cpu=True,
            bf16=True,
            save_strategy="no",
            logging_steps=10,
            report_to=[],
        )
        trainer = (Distillation if teacher else transformers.Trainer)(
            model, settings, train_dataset=rows[start : start + steps * args.rows], eval_dataset=rows[: args.eval_rows],
            data_collator=encoder.collate, callbacks=[callback] if callback else [],
        )  # fmt: skip
        trainer.teacher = teacher
        if callback:
            callback.trainer = trainer
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        shutil.rmtree(self.work / "training", ignore_errors=True)
        return model, seconds

    def retrained(self, name: str) -> dict:
        args, zeros = self.args, {"sparsity": self.args.sparsity, "modules": MODULES}
        wanda = {"score": "wanda", "scope": "row"} if "wanda" in name else {}
        refitted, found = "refitted" in name, {"events": []}
        callback = None if name == "dense" else KeepZeros()
        if name.startswith("cycles"):
            levels, model, seconds = Gradual(**zeros, events=args.events).levels(), self.model(), 0.0
            for cycle, level in enumerate(levels):
                folder = self.sparsify_again(model, "cycles", Wish(**zeros | {"sparsity": level}, **wanda), refitted)
                after = self.losses(load_model(open_checkpoint(folder)))
                first, end = (each * args.steps // len(levels) for each in (cycle, cycle + 1))
                model, more = self.train(folder, KeepZeros(), end - first, first)
                seconds += more
                retrained = self.losses(model.to(torch.bfloat16).eval())
                found["events"].append({"sparsity": level, "after": after, "retrained": retrained})
        else:
            folder = self.checkpoint.path
            if name.startswith("one shot"):
                folder = self.sparsify("one-shot", Wish(**zeros, **wanda), refitted=refitted)
            elif name == "gradual":
                callback = GradualPruning(Gradual(**zeros, events=args.events, schedule="exponential"))
            elif name == "dynamic":
                callback = DynamicSparsity(Dynamic(**zeros, interval=max(1, args.steps // 12)))
            found["before"] = self.losses(load_model(open_checkpoint(folder)))
            model, seconds = self.train(
                folder, callback, args.steps, teacher=self.model() if "distilled" in name else None
            )
            found["events"] = getattr(callback, "history", {}).get("events", [])
        chosen = [p for name, p in model.named_parameters() if p.ndim == 2 and re.search(f"layers.*({MODULES})", name)]
        if callback:
            count = sum(int((weight == 0).sum()) for weight in chosen)
            found["sparsity"] = count / sum(weight.numel() for weight in chosen)
        return found | {
            **self.losses(model.to(torch.bfloat16).eval()),
            "tokens": args.steps * args.rows * 512,
            "seconds": seconds,
        }


class Distillation(transformers.Trainer):
    """The loss is the Kullback-Leibler divergence of the student from the teacher, per token."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
        with torch.no_grad():
            wanted = self.teacher(**inputs).logits.float().log_softmax(-1)
        outputs = model(**inputs)
        found = outputs.logits.float().log_softmax(-1)
        each = torch.nn.functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
        loss = each[inputs["attention_mask"].bool()].mean()
        return (loss, outputs) if return_outputs else loss


def draw(result: dict, path: Path) -> None:
    """Excess loss: left untrained, right after retraining (and before it, where all was pruned at once)."""
    figure, axes = style.new_figure(2, 14, 4.2)
    names = [name for name in UNTRAINED if name in result["untrained"]]
    for shift, colour, test in ((-0.2, style.LINES[0], "wikipedia-test"), (0.2, style.PALE, "docstrings")):
        costs = [result["untrained"][name][test] - result["base"][test] for name in names]
        places = [place + shift for place in range(len(names))]
        axes[0][0].barh(places, costs, height=0.38, color=colour, label=test)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    axes[0][0].set_title("loss above dense, half of all weights zero, untrained")
    axes[0][0].legend(frameon=False, fontsize=8)
    names, right = [name for name in RETRAINED if name in result["retrained"]], axes[0][1]
    for place, name in enumerate(names):
        found = result["retrained"][name]
        after = found["wikipedia-test"] - result["base"]["wikipedia-test"]
        if name.startswith("one shot"):
            before = found["before"]["wikipedia-test"] - result["base"]["wikipedia-test"]
            right.plot([before, after], [place, place], color=style.PALE, zorder=1)
            right.scatter(before, place, color=style.KEY, label="pruned" if name == "one shot" else None)
        right.scatter(after, place, color=style.FREE, label="trained" if place == 0 else None)
        right.annotate(f"{math.expm1(after):+.0%} ppl", (after, place), (6, 5), fontsize=8,
                       textcoords="offset points")  # fmt: skip
    share = result["settings"]["retraining"]["sparsity"]
    right.set_title(f"loss above dense, {share:.0%} of MLP and o_proj zero, retrained")
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.legend(frameon=False, fontsize=8, loc="lower right")
    style.save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"), help="folder of the materials")
    parser.add_argument("--calib-tokens", type=int, default=8192)
    parser.add_argument("--test-tokens", type=int, default=6144, help="of each kind of text")
    parser.add_argument("--sparsity", type=float, default=0.7, help="of MLP and o_proj, retrained")
    parser.add_argument("--steps", type=int, default=40, help="of retraining")
    parser.add_argument("--rows", type=int, default=2, help="of 512 tokens, in a step")
    parser.add_argument("--eval-rows", type=int, default=4, help="for the history of gradual pruning")
    parser.add_argument("--events", type=int, default=4, help="of gradual pruning")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--schedule", default=CONSTANT, help="of the rate; constant: later events need one, too")
    parser.add_argument("--only", nargs="+", choices=[*UNTRAINED, *RETRAINED], help="measure these alone")
    parser.add_argument("--json", type=result_file, help="also write the result here, and go on from it")
    args = parser.parse_args()

    bench = Bench(args)
    retraining = {"modules": MODULES} | {
        name: getattr(args, name) for name in ("sparsity", "steps", "rows", "eval_rows", "events", "learning_rate")
    }
    if args.schedule != CONSTANT:
        retraining["schedule"] = args.schedule
    settings = {"calibration_tokens": args.calib_tokens, "test_tokens": args.test_tokens} | {"retraining": retraining}
    result = {"model": "SmolLM2-135M-Instruct, bf16"} | known_result(args.json, settings)
    for part, names, measure in (
        ("untrained", UNTRAINED, bench.untrained),
        ("retrained", RETRAINED, bench.retrained),
    ):
        found = result.setdefault(part, {})
        result.setdefault("base", None)
        for name in names:
            if name in found or (args.only and name not in args.only):
                continue
            result["base"] = result["base"] or bench.losses(bench.model())
            found[name] = measure(name)
            costs = {test: found[name][test] - loss for test, loss in result["base"].items()}
            found[name]["perplexity"] = {test: math.expm1(cost) for test, cost in costs.items()}
            print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
            if args.json:
                write_json(args.json, result)
    if args.json and result["untrained"] and result["retrained"]:
        draw(result, args.json.with_suffix(".png"))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    run_script(main)
