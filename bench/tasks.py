"""Cuts judged by tasks, not only by nats: SmolLM2-135M cut in several ways, by multiple choice and by loss.

    bash bench/setup.sh
    pip install --no-deps evals==3.0.1.post1 --target runs/evals     # for its 1000 rows of MMLU; 730 MB
    .venv/bin/python bench/tasks.py --evals runs/evals --json docs/measured/tasks.json

Tasks: `mmlu` (four answers, written out); `wikipedia` and `docstrings`: which of four pieces of a held-out text follows
a beginning; `needle`: which of four numbers in a page of held-out text was said to be whose. An answer's score is its
log-likelihood a byte (lm-eval's acc_norm). What was cut is compared with the base question by question. Calibrated on
Wikipedia, or on a mixture of Wikipedia, docstrings of packages and questions with answers (MMLU rows that aren't
asked), each row once or half of them twice (kv_cut.py's default). Prints JSON; goes on where it was if --json exists.
"""

import argparse
import json
import random
import re
import statistics
import sys
from pathlib import Path

import torch
from care import decompose
from materials import ROOT, known_result, package_docstrings, result_file, run, smollm2, texts_of, write_texts

from prunekit.checkpoint import open_checkpoint, read_json, write_json
from prunekit.data.batches import calibrate
from prunekit.errors import run_script
from prunekit.model.load import load_model
from prunekit.model.scores import score_batches

LAYERS = read_json(ROOT / "docs/measured/heal.json")["order"]
KV = ("kv_cut.py", "--kv-heads", 1)
ONCE = ("--repeat", 0)
DROP = ("manual_select.py", "--text", *LAYERS[:5])
CASES: dict[str, tuple] = {  # by name: the script and its words; {wikipedia} and {mixture} are calibration files
    "KV 3 to 1, averaged": KV,
    "KV 3 to 1, calibrated on Wikipedia": (*KV, *ONCE, "--calib", "{wikipedia}"),
    "KV 3 to 1, calibrated on a mixture": (*KV, *ONCE, "--calib", "{mixture}"),
    "KV 3 to 1, refined on a mixture": (*KV, *ONCE, "--calib", "{mixture}", "--refine", "{refine}"),
    "KV 3 to 1, refined on a mixture, half of it said twice": (*KV, "--calib", "{mixture}", "--refine", "{refine}"),
    "K and V of rank 64 (CARE), on Wikipedia": ("care", "{wikipedia}", False),
    "K and V of rank 64 (CARE), on a mixture": ("care", "{mixture}", False),
    "K and V of adjusted ranks (CARE), on a mixture": ("care", "{mixture}", True),
    "5 layers dropped": DROP,
    "5 layers dropped, healed on Wikipedia": (*DROP, "--heal", "--calib", "{wikipedia}"),
    "5 layers dropped, healed on a mixture": (*DROP, "--heal", "--calib", "{mixture}"),
    "half of the vocabulary": ("vocab_cut.py", "--keep-share", 0.5, "--calib", "{mixture}"),
}
Question = tuple[str, list[str], int]  # what is asked, the answers, which of them is right


def mmlu(evals: Path) -> list[Question]:
    rows = evals / "evals/registry/data/sandbagging/samples-all-large.jsonl"
    if not rows.exists():
        sys.exit(f"error: {rows} is missing; pip install --no-deps evals==3.0.1.post1 --target {evals}")
    found = []
    for row in map(json.loads, rows.open()):
        asked, *answers = re.fullmatch(
            r"(.*?)\nA\. (.*?)\nB\. (.*?)\nC\. (.*?)\nD\. (.*?)\nAnswer:", row["question"], re.S
        ).groups()
        found.append(
            (f"Question: {asked.strip()}\nAnswer:", [f" {each}" for each in answers], "ABCD".index(row["answer"]))
        )
    return found


def continuations(texts: list[str], beginning: int = 500, length: int = 150) -> list[Question]:
    """Which piece follows? The others are from elsewhere in the same text; all begin at a word."""
    found = []
    for number, text in enumerate(texts):
        rng = random.Random(number)
        words = [match.start() for match in re.finditer(r"(?<=\S) (?=\S)", text)]
        starts = [start for start in words if start >= beginning]
        right = starts[0]
        others = [start for start in starts if right + length <= start <= len(text) - length]
        if len(others) < 3:
            continue
        answers = [right, *rng.sample(others, 3)]
        rng.shuffle(answers)
        found.append((text[:right], [text[each : each + length] for each in answers], answers.index(right)))
    return found


PEOPLE = ("Anna", "Boris", "Clara", "David", "Elena", "Frank", "Greta", "Henry")


def needles(texts: list[str], length: int = 2000) -> list[Question]:
    """Four people's numbers among a page of text; whose is asked for, in RULER's manner (2404.06654, multi-key)."""
    found = []
    for number, text in enumerate(texts):
        rng = random.Random(number)
        people, numbers = rng.sample(PEOPLE, 4), rng.sample(range(10_000, 100_000), 4)
        pieces = [text[start : start + length // 5] for start in range(0, length, length // 5)]
        said = [f"\nThe magic number of {who} is {what}.\n" for who, what in zip(people, numbers, strict=True)]
        page = "".join(piece + line for piece, line in zip(pieces, [*said, ""], strict=True))
        right = rng.randrange(4)
        found.append((f"{page}\nThe magic number of {people[right]} is", [f" {each}" for each in numbers], right))
    return found


class Judge:
    """Asks a model questions of four answers."""

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer

        self.model = load_model(open_checkpoint(folder))
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.inference_mode()
    def is_right(self, question: Question) -> bool:
        asked, answers, right = question
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        begun = self.model(torch.tensor([self.ids(asked)]), past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(len(answers))
        rows = [self.ids(answer) for answer in answers]
        padded = torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
        logits = begun.logits.expand(len(rows), 1, -1)
        if padded.shape[1] > 1:  # what stands behind a row's end isn't seen from before it
            logits = torch.cat([logits, self.model(padded[:, :-1], past_key_values=cache).logits], 1)
        likelihoods = logits.float().log_softmax(-1).gather(-1, padded[:, :, None])[:, :, 0]
        scores = [
            float(own[: len(row)].sum()) / len(answer.encode())
            for own, row, answer in zip(likelihoods, rows, answers, strict=True)
        ]
        return max(range(len(answers)), key=scores.__getitem__) == right

    def answers(self, questions: list[Question], what: str) -> list[bool]:
        from tqdm import tqdm

        return [self.is_right(question) for question in tqdm(questions, desc=what, unit="question")]


def against(own: list[bool], base: list[bool]) -> dict[str, float]:
    """The share of right answers, and of what the base has above chance (1/4), each with its standard error."""
    accuracy, whole = statistics.mean(own), statistics.mean(base)
    differences = [int(mine) - int(its) for mine, its in zip(own, base, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    found = {"accuracy": round(accuracy, 4), "difference_error": round(error, 4)}
    if (above := whole - 0.25) > 0:
        found |= {"kept_above_chance": round((accuracy - 0.25) / above, 3), "kept_error": round(error / above, 3)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"), help="folder of the materials")
    parser.add_argument("--evals", type=Path, default=Path("runs/evals"), help="where the package evals lies")
    parser.add_argument("--questions", type=int, default=300, help="of each task at most (default: 300)")
    parser.add_argument("--tokens", type=int, default=32_768, help="of calibration (default: 32768)")
    parser.add_argument("--test-tokens", type=int, default=8_192, help="whose loss is measured (default: 8192)")
    parser.add_argument("--refine", type=int, default=200, help="steps of kv_cut.py --refine (default: 200)")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="CASE", help="default: all")
    parser.add_argument("--json", type=result_file, help="also write the result here, and go on from it")
    args = parser.parse_args()
    args.runs = args.runs.absolute()
    settings = {name: value for name, value in vars(args).items() if name not in ("runs", "evals", "json", "cases")}
    result = {"cases": {}, "answers": {}} | known_result(args.json, settings)

    base = smollm2(args.runs / "smollm2-bf16", "bfloat16")
    texts = write_texts(args.runs) | package_docstrings(args.runs)
    exam = mmlu(args.evals)
    random.Random(0).shuffle(exam)
    asked, others = exam[: args.questions], exam[args.questions :]
    known = [question + answers[right] for question, answers, right in others]
    # Four questions a row: short rows of nothing but questions would be a text of a third kind
    exams = ["\n\n".join(known[start : start + 4]) for start in range(0, len(known) - 3, 4)]
    mixture = args.runs / "tasks-mixture.jsonl"
    rng = random.Random(0)
    kinds = [texts_of(texts["wikipedia-train"]), texts_of(texts["packages-train"]), exams]
    rows = [row for kind in kinds for row in rng.sample(kind, min(150, len(kind)))]
    rng.shuffle(rows)
    mixture.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    calibs = {"{wikipedia}": texts["wikipedia-train"], "{mixture}": mixture, "{refine}": args.refine}
    held_out = {name: texts_of(texts[name]) for name in ("wikipedia-test", "docstrings")}
    tasks = {
        "mmlu": asked,
        "wikipedia": continuations(held_out["wikipedia-test"])[: args.questions],
        "docstrings": continuations(held_out["docstrings"])[: args.questions],
        "needle": needles(held_out["wikipedia-test"])[: args.questions // 2],
    }

    def folder_of(name: str) -> Path:
        out = args.runs / f"tasks/{args.questions}-{args.tokens}-{args.refine}" / re.sub(r"\W+", "-", name)
        script, *words = (calibs.get(word, word) for word in CASES[name])
        if out.exists():
            return out
        if script == "care":
            calib, adjusted = words
            ranks = decompose(base, out, calib, args.tokens, 64, adjusted)
            print(name, ranks, file=sys.stderr)
            return out
        if "--calib" in words and script != "vocab_cut.py":
            words += ["--calib-tokens", args.tokens, "--max-length", 512]
        run(sys.executable, script, "--model", base, "--out", out, *words)
        return out

    for name in ["base", *args.cases]:
        if name in result["cases"]:
            continue
        folder = base if name == "base" else folder_of(name)
        judge = Judge(folder)
        answers = {task: judge.answers(questions, f"{name}: {task}") for task, questions in tasks.items()}
        whole = result["answers"] or answers  # the base comes first
        if name == "base":
            result["answers"] = {task: [int(each) for each in own] for task, own in answers.items()}
        checkpoint = open_checkpoint(folder)
        losses = {}
        for kind in ("wikipedia-test", "docstrings"):
            data = calibrate(judge.model, checkpoint, texts[kind], args.test_tokens, 512)
            losses[kind] = round(score_batches(judge.model, [*data.fit, *data.held_out])["loss"], 4)
        scores = {task: against(own, whole[task]) for task, own in answers.items()}
        result["cases"][name] = {"tasks": scores, "loss": losses}
        print(name, json.dumps(result["cases"][name]), file=sys.stderr, flush=True)
        if args.json:
            write_json(args.json, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    run_script(main)
