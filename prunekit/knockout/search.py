"""Fast scan: score every removal of a layer in memory, or find a set of them one by one, without training.

    python -m prunekit.scan --model checkpoints/base --dataset data/val.jsonl --out runs/knockout/scan
    python -m prunekit.scan --model checkpoints/base --dataset data/val.jsonl --out runs/scan --race --greedy 8
    python -m prunekit.scan --model checkpoints/base --dataset data/val.jsonl --out runs/scan --processes 8

Writes OUT/scan.json: token_acc, loss, KL, block influence, parameters and time saved by each removal; with --greedy the
path of sets. Every measurement is a line of OUT/records.jsonl at once, so the same command continues an interrupted
scan. Several processes, a GPU each, split the samples, the rows to answer, and with --heal the removals; with RAY_ADDRESS
set the nodes of a Ray cluster do, but for --heal, which refuses it.
"""

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from tqdm import tqdm

from prunekit.arguments import device, natural, positive_int, share
from prunekit.checkpoint import layer_numbers, open_checkpoint, statistics, write_json
from prunekit.checkpoint.work_folder import claim_folder, fingerprint
from prunekit.data.answers import generate, score_answers
from prunekit.data.batches import calibrate, read_calibration
from prunekit.data.rows import Rows, check_answered
from prunekit.errors import PruneKitError, run_script
from prunekit.model.load import check_causal

from . import cluster
from .healed import HealedScanner
from .ranking import finalists
from .removal import BASELINE, Removal, knockout_parser, list_removals, plan_without
from .scanner import Job, encoder_for, finite, load_scanner, rows_of

KINDS = ("right", "loss", "kl", "tokens")  # of a sample's scores
METRICS = {"token_acc": "right", "loss": "loss", "kl": "kl"}  # and what of a sample they are means of
PREDICTOR = "token_acc"  # what of an untrained removal says most about the trained one: see docs/knockout.md
CRITERION = "loss"  # of paths and races: finer than token_acc, which changes by whole tokens
SURE = 2.0  # standard errors
FEW_SAMPLES = 8  # below, a standard error says nothing


def measure_batch(item: tuple[Job, tuple[Removal, ...], tuple[Removal, ...], int]) -> dict[str, Any]:
    """One line of records.jsonl, computed wherever this process runs."""
    job, gone, candidates, index = item
    found = load_scanner(job).measure(gone, candidates, index)
    return {"gone": [str(removal) for removal in gone], "batch": index, **found}


def count_batches(job: Job) -> int:
    return len(load_scanner(job).batches)


def _check_record(record: Any) -> None:
    """ValueError, TypeError, KeyError or AttributeError for what is no line of records.jsonl."""
    names = [*record["gone"], *record["scores"], *record["influence"], *record["seconds"]]
    numbers = [record["batch"], *record["seconds"].values(), record["seconds"]["all"]]
    for total, count in record["influence"].values():
        numbers += [total or 0.0, count]
    for scores in record["scores"].values():
        lists = [scores[kind] for kind in KINDS]
        if len({*map(len, lists)}) != 1:
            raise ValueError("lists differ in length")
        numbers += [value for values in lists for value in values if value is not None]
    if not all(type(name) is str for name in names) or not all(type(n) in (int, float) for n in numbers):
        raise TypeError("a name is no text, or a value no number")


class Records:
    """What was measured, by removed layers and batch; a line of a file each, so that nothing is measured twice.

    Raises PruneKitError for a file that is damaged, save for a last line that a kill tore: that is dropped.
    """

    def __init__(self, file: Path | None):
        self.file, self.scores, self.layers = file, {}, {}
        if file and file.exists():
            raw = file.read_bytes()
            whole = raw[: raw.rfind(b"\n") + 1]
            for number, line in enumerate(whole.splitlines(), 1):
                try:
                    record = json.loads(line)
                    _check_record(record)
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                    raise PruneKitError(
                        f"{file} line {number}: is no record of a scan; remove the file and run again"
                    ) from None
                self._take(record)
            if whole != raw:  # a kill tore the last line: it is measured again
                file.write_bytes(whole)

    def _take(self, record: dict[str, Any]) -> None:
        key = (tuple(record["gone"]), record["batch"])
        self.scores.setdefault(key, {}).update(record["scores"])
        self.layers.setdefault(key, (record["influence"], record["seconds"]))

    def add(self, record: dict[str, Any]) -> None:
        if self.file:
            with self.file.open("a") as lines:
                lines.write(json.dumps(record, allow_nan=False) + "\n")
        self._take(record)

    def table(self, gone: Sequence[Removal], names: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
        """By name: `right`, `loss`, `kl` and `tokens`, each (samples,), over the batches in which all names were scored."""
        key = tuple(str(removal) for removal in gone)
        batches = [
            scores
            for (removed, _), scores in sorted(self.scores.items())
            if removed == key and all(name in scores for name in names)
        ]
        return {
            name: {
                kind: np.array([value for scores in batches for value in scores[name][kind]], dtype=float)
                for kind in KINDS
            }
            for name in names
        }


def paired(table: dict[str, dict[str, np.ndarray]], one: str, other: str, metric: str) -> tuple[float, float]:
    """(difference of a metric per token, one less other; its standard error), over the same samples."""
    kind = METRICS[metric]
    difference, tokens = table[one][kind] - table[other][kind], table[one]["tokens"]
    mean = float(difference.sum() / tokens.sum())
    rest = difference - mean * tokens
    count = len(rest)
    error = math.sqrt(float((rest**2).sum()) * count / max(count - 1, 1)) / float(tokens.sum())
    return mean, error if count > 1 else math.inf


class Scan:
    """A job's removals, measured here, by the processes of torchrun or by a Ray cluster.

    `gpus_per_task`: 1 if the cluster's tasks get a GPU each, 0 if they get none.
    """

    def __init__(self, job: Job, records: Path | None, gpus_per_task: int = 0, quiet: bool | None = None):
        self.job, self.checkpoint = job, open_checkpoint(job.model)
        self.world = distributed.get_world_size() if distributed.is_initialized() else 1
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.records = Records(records)
        if self.world > 1:  # one reads, so that all do the same
            shared = [self.records]
            distributed.broadcast_object_list(shared)
            self.records = shared[0]
            self.records.file = records if self.rank == 0 else None
        self.gpus_per_task, self.quiet = gpus_per_task, quiet or self.rank > 0 or None
        self.cluster = bool(os.environ.get("RAY_ADDRESS"))
        [(_, self.batches)] = self._everywhere(count_batches, [job]) if self.cluster else [(job, count_batches(job))]
        self.parameters = statistics(self.checkpoint)["parameters"]

    def _everywhere(self, function: Callable, items: list) -> Iterator[tuple[Any, Any]]:
        for item, result in cluster.run_tasks(function, items, gpus=self.gpus_per_task):
            if isinstance(result, Exception):
                raise result
            yield item, result

    def _gather(self, mine: list) -> list[list]:
        """What each process found, the first one's first."""
        gathered: list[list] = [mine] * self.world
        if self.world > 1:
            distributed.all_gather_object(gathered, mine)
        return gathered

    def generate(self, removals: Sequence[Sequence[Removal]], rows: int, tokens: int) -> list[dict[str, Any]]:
        """Exact match and CER of real greedy answers to so many rows without each of these sets of layers.

        Answers end after `tokens` tokens. A cluster's tasks take a set each, torchrun's processes rows of each.
        """
        items = [(self.job, tuple(gone), rows, tokens, self.rank, self.world) for gone in removals]
        if self.cluster:
            found = dict(self._everywhere(answer_without, items))
            parts = [[found[item]] for item in items]
        else:
            parts = [self._gather(answer_without(item)) for item in items]
        return [score_generation(self.job, rows, tokens, part) for part in parts]

    def parameters_without(self, gone: Sequence[Removal]) -> int | None:
        """Parameters that are left; None where these layers can't be removed together."""
        if not gone:
            return self.parameters
        try:
            return statistics(plan_without(self.checkpoint, gone).result)["parameters"]
        except PruneKitError:
            return None

    def measure(
        self, gone: Sequence[Removal], candidates: Sequence[Removal], batches: Sequence[int], what: str
    ) -> None:
        """Have records of these candidates in these batches, measuring what is missing."""
        key, items = tuple(str(k) for k in gone), []
        for index in batches:
            known = self.records.scores.get((key, index), {})
            missing = tuple(k for k in candidates if str(k) not in known)
            if missing or BASELINE not in known:
                items.append((self.job, tuple(gone), missing, index))
        total = sum(1 + len(item[2]) for item in items)
        with tqdm(total=total, desc=what, unit="pass", disable=self.quiet, leave=False) as bar:
            if self.cluster:
                for _, record in self._everywhere(measure_batch, items):
                    self.records.add(record)
                    bar.update(len(record["scores"]))
                return
            for start in range(0, len(items), self.world):
                mine = items[start : start + self.world][self.rank : self.rank + 1]
                found = []
                for job, gone_, missing, index in mine:
                    scores = load_scanner(job).measure(gone_, missing, index, lambda: bar.update(self.world))
                    found.append({"gone": list(key), "batch": index, **scores})
                    bar.update(self.world)
                for part in self._gather(found):
                    for record in part:
                        self.records.add(record)

    def race(
        self,
        gone: Sequence[Removal],
        candidates: Sequence[Removal],
        keep: int,
        weight: dict[str, float],
        share: float,
        what: str = "race",
    ) -> tuple[list[str], set[str]]:
        """Find the `keep` best candidates (by the loss they add, times their weight) without scoring all of them on all samples.

        Successive accepts and rejects (Bubeck, Wang and Viswanathan 2013): after every few batches, a candidate whose
        paired difference to the one on the other side of the cut is over `SURE` standard errors is decided, and gets no
        more samples. Ends when all are decided, the samples are used up, or `share` of the full scan's layer runs is.
        Returns the names of the best, and of those that were left undecided.
        """
        undecided, chosen, best = list(candidates), [], []
        cost = {str(k): 1 + self._behind(k) for k in candidates}
        every = self._behind(Removal("vision", -1))
        full, spent = self.batches * (every + sum(cost.values())), 0
        step = max(1, self.batches // 16)
        step = -(-step // self.world) * self.world
        for start in range(0, self.batches, step):
            batches = range(min(start + step, self.batches))
            self.measure(gone, undecided, batches[start:], what)
            spent += len(batches[start:]) * (every + sum(cost[str(k)] for k in undecided))
            table = self.records.table(gone, [BASELINE, *(str(k) for k in undecided)])
            if len(table[BASELINE]["tokens"]) < FEW_SAMPLES:
                continue
            scaled = {
                str(k): {
                    kind: values if kind == "tokens" else (values - table[BASELINE][kind]) * weight[str(k)]
                    for kind, values in table[str(k)].items()
                }
                for k in undecided
            }
            order = sorted(undecided, key=lambda k: _worst_if_nan(scaled[str(k)][CRITERION].sum()))
            left = keep - len(chosen)
            best = [*chosen, *(str(k) for k in order[:left])]
            if left >= len(order):
                undecided = []
            for place, candidate in enumerate(order if undecided else []):
                rival = order[left] if place < left else order[left - 1]
                pair = (candidate, rival) if place < left else (rival, candidate)
                mean, error = paired(scaled, str(pair[0]), str(pair[1]), CRITERION)
                if mean + SURE * error < 0 or math.isnan(mean):
                    undecided.remove(candidate)
                    if place < left:
                        chosen.append(str(candidate))
            if spent >= share * full or not undecided or len(chosen) == keep:
                break
        return best, {str(k) for k in undecided} if len(chosen) < keep else set()

    def _behind(self, removal: Removal) -> int:
        """How many layers have to be run to score a removal."""
        text, vision = (
            len(layer_numbers(self.checkpoint, stack)) if stack in self.checkpoint.family.stacks else 0
            for stack in ("text", "vision")
        )
        return text - 1 - removal.layer if removal.stack == "text" else text + vision - 1 - removal.layer

    def score(self, gone: Sequence[Removal], name: str) -> dict[str, Any]:
        """Metrics of one removal (or the baseline) per token, with the standard errors of what sets it off the baseline.

        A removal that was scored on some of the samples gets the baseline's figure on all of them and its own
        difference: so all are comparable.
        """
        everything = self.records.table(gone, [BASELINE])[BASELINE]
        tokens = everything["tokens"].sum()
        result: dict[str, Any] = {}
        errors = {}
        table = self.records.table(gone, [BASELINE, name])
        for metric, kind in METRICS.items():
            base = float(everything[kind].sum() / tokens)
            difference, errors[metric] = paired(table, name, BASELINE, metric)
            result[metric] = finite(base + difference)
            errors[metric] = finite(errors[metric])
        result["samples"] = len(table[name]["tokens"])
        result["tokens"] = int(table[name]["tokens"].sum())
        return result if name == BASELINE else result | {"standard_error": errors}

    def layer_figures(self, gone: Sequence[Removal], name: str) -> dict[str, Any]:
        """Block influence (1 - mean cosine of a layer's input and output, ShortGPT, 2403.03853) and share of a pass's time."""
        key = tuple(str(k) for k in gone)
        found = [pair for (removed, _), pair in self.records.layers.items() if removed == key]
        influence = [part[name] for part, _ in found if name in part]
        tokens = sum(count for _, count in influence)
        seconds = sum(part.get(name, 0.0) for _, part in found)
        return {
            "block_influence": finite(sum(total or math.nan for total, _ in influence) / tokens) if tokens else None,
            "latency_saved": finite(seconds / sum(part["all"] for _, part in found)),
        }


def _worst_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value


class HealedScan(Scan):
    """A scan in which the model is healed after every cut, and each candidate's seam. Each process heals the whole model.

    `calib`: the rows to heal on.
    """

    def __init__(self, job: Job, records: Path | None, calib: Rows, calib_tokens: int, quiet: bool | None = None):
        super().__init__(job, records, quiet=quiet)
        scanner = load_scanner(job)
        data = calibrate(
            scanner.model, scanner.checkpoint, calib, calib_tokens, job.max_length,
            model_type=job.model_type, template=job.template,
        )  # fmt: skip
        self.scanner = HealedScanner(scanner, data)

    def generate(self, removals, rows, tokens):
        found = []
        for gone in removals:
            self.scanner.heal(gone)
            found += super().generate([gone], rows, tokens)
        return found

    def measure(self, gone, candidates, batches, what):
        """All batches in one go: a candidate's refit serves them all. Processes share the candidates out."""
        key = tuple(str(k) for k in gone)
        known = [self.records.scores.get((key, index), {}) for index in range(self.batches)]
        missing = [k for k in candidates if any(str(k) not in scores for scores in known)]
        if not missing and all(BASELINE in scores for scores in known):
            return
        mine = missing[self.rank :: self.world]
        with tqdm(total=len(mine), desc=what, unit="layer", disable=self.quiet, leave=False) as bar:
            parts = self._gather(self.scanner.measure(gone, mine, bar.update))
        for index, found in enumerate(zip(*parts)):
            scores = {name: values for part in reversed(found) for name, values in part["scores"].items()}
            self.records.add({"gone": list(key), "batch": index, **found[0], "scores": scores})


def answer_without(item: tuple[Job, tuple[Removal, ...], int, int, int, int]) -> tuple[list[str], int]:
    """Greedy answers to some of the data set's first rows without some layers, and how many were cut.

    Item: job, layers, rows, tokens of an answer at most, and which of how many equal shares of the rows.
    """
    from swift import TransformersEngine

    job, gone, rows, tokens, share_, shares = item
    scanner, mine = load_scanner(job), rows_of(job)[:rows][share_::shares]
    if not mine:
        return [], 0
    with scanner.without(gone):
        engine = TransformersEngine(scanner.model, template=encoder_for(job).template)
        return generate(engine, mine, max_new_tokens=tokens)


def score_generation(job: Job, rows: int, tokens: int, parts: Sequence[tuple[list[str], int]]) -> dict[str, Any]:
    """Exact match and character error rate of what `answer_without` gave for all shares of the rows, in their order."""
    samples = rows_of(job)[:rows]
    answers = [""] * len(samples)
    for share_, (part, _) in enumerate(parts):
        answers[share_ :: len(parts)] = part
    scores = {key: finite(value) for key, value in score_answers(answers, samples, {}).items()}
    cut = sum(part for _, part in parts)
    return scores | {"samples": len(samples), "n_cut": cut, "max_new_tokens": tokens}


def find_path(
    scan: Scan,
    candidates: Sequence[Removal],
    count: int | None,
    target: float | None,
    race_share: float | None,
    generation: int = 0,
    generation_tokens: int = 64,
) -> list[dict[str, Any]]:
    """Remove what costs least loss per parameter saved, scan again, and so on: the greedy path.

    Ends after `count` removals, at `target` of the parameters, or where nothing more can go. With `race_share` each
    choice is a race for the best one. Entries: `removed` (names), `parameters`, metrics of the model so cut.
    """
    gone: list[Removal] = []
    path = []
    while True:
        scan.measure(gone, [], range(scan.batches), f"without {len(gone)} layers")
        left = scan.parameters_without(gone)
        entry = {"removed": [str(k) for k in gone], "parameters": left, **scan.score(gone, BASELINE)}
        [answered] = scan.generate([gone], generation, generation_tokens) if generation else [None]
        path.append(entry | {"generation": answered})
        done = len(gone) == count or (target is not None and left <= target * scan.parameters)
        after = {k: scan.parameters_without([*gone, k]) for k in candidates if k not in gone}
        possible = [k for k, parameters in after.items() if parameters is not None]
        if done or not possible:
            return path
        weight = {str(k): 1 / (left - after[k]) for k in possible}
        what = f"choose layer {len(gone) + 1}"
        if race_share:
            [best], _ = scan.race(gone, possible, 1, weight, race_share, what)
        else:
            scan.measure(gone, possible, range(scan.batches), what)
            base = scan.score(gone, BASELINE)[CRITERION]
            costs = {str(k): scan.score(gone, str(k))[CRITERION] for k in possible}
            costs = {name: (cost - base) * weight[name] for name, cost in costs.items() if cost is not None}
            if not costs:
                return path
            best = min(costs, key=costs.get)
        gone = [*gone, Removal.parse(best)]


def main() -> None:
    parser = knockout_parser(__doc__, "scan")
    parser.add_argument("--dataset", required=True, help='JSONL to score on: ms-swift messages or {"text": ...}')
    parser.add_argument(
        "--tokens", type=natural, default=65_536, help="of the data set to score on, 0: all (default: 65536)"
    )
    parser.add_argument(
        "--max-length",
        type=positive_int,
        default=4096,
        help="of a row; longer ones are left out (default: 4096)",
    )
    parser.add_argument("--batch-tokens", type=positive_int, default=4096, help="padding included (default: 4096)")
    parser.add_argument("--no-suffix", action="store_true", help="don't count what ends every answer (<|im_end|>)")
    parser.add_argument("--race", action="store_true", help="samples only where it is undecided which are the best")
    parser.add_argument("--race-share", type=share, default=0.3, help="of the full scan's work at most (default: 0.3)")
    parser.add_argument("--best", type=positive_int, default=10, help="how many the race is for (default: 10)")
    parser.add_argument("--greedy", type=positive_int, metavar="K", help="find a set of K layers, one by one")
    parser.add_argument("--target-params", type=share, metavar="SHARE", help="or until so many parameters are left")
    parser.add_argument(
        "--heal", action="store_true", help="score with the seams healed (with --greedy; needs --calib)"
    )
    parser.add_argument("--calib", metavar="JSONL", help="to heal on: other rows than those of --dataset")
    parser.add_argument("--calib-tokens", type=positive_int, default=16_384, metavar="N", help="(default: 16384)")
    parser.add_argument(
        "--generate", type=natural, default=0, metavar="N", help="also answer N rows without each of the best"
    )
    parser.add_argument(
        "--generate-tokens",
        type=positive_int,
        default=64,
        metavar="N",
        help="of such an answer (default: 64)",
    )
    parser.add_argument("--device", type=device, help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="to compute in")
    parser.add_argument("--template", help="ms-swift's, default: the one most like the checkpoint's own")
    parser.add_argument("--processes", type=positive_int, default=1, help="on this machine, a GPU each (default: 1)")
    parser.add_argument(
        "--gpus-per-task",
        type=natural,
        default=0,
        help="on a Ray cluster: 0 for its CPUs, else each task takes one (default: 0)",
    )
    args = parser.parse_args()
    if args.heal != bool(args.calib) or (args.heal and not (args.greedy or args.target_params)):
        parser.error("--heal needs --calib, and --greedy or --target-params")
    if os.environ.get("RAY_ADDRESS"):
        if args.heal:
            parser.error("--heal works on one machine: unset RAY_ADDRESS")
        if args.processes > 1 or "RANK" in os.environ:
            parser.error("--processes and torchrun are for one machine: unset RAY_ADDRESS")
    if torch.cuda.is_available() and args.processes > torch.cuda.device_count() and args.device != "cpu":
        parser.error(f"--processes {args.processes}: needs a GPU each, there are {torch.cuda.device_count()}")
    run_scan(args)


def run_scan(args: argparse.Namespace) -> None:
    """Refuse what can be refused, then scan, in this process or as several."""
    checkpoint = open_checkpoint(args.model)
    check_causal(checkpoint)
    candidates = list_removals(checkpoint, args.text, args.vision)
    if not candidates:
        raise PruneKitError(f"--text {args.text} --vision {args.vision}: names no layer to score")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = args.device
    if world > 1 and torch.cuda.is_available() and device in (None, "cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    job = Job(
        args.model, args.dataset, args.tokens or None, args.max_length, args.batch_tokens, args.race, not args.no_suffix,
        device, args.dtype, args.model_type, args.template,
    )  # fmt: skip
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    calib = read_calibration(args.calib) if args.calib else None
    if calib and any(k.stack == "vision" for k in candidates) and not any(row.get("images") for row in calib):
        raise PruneKitError(f"--calib {args.calib}: no row has an image, to heal vision blocks on; or --vision none")
    rows = rows_of(job)
    if args.generate:
        if "text" in rows[0]:
            raise PruneKitError(
                f"--generate: {args.dataset} has texts, no questions with answers; give messages, or leave it out"
            )
        for number, row in enumerate(rows[: args.generate], 1):
            check_answered(f"dataset {args.dataset} row {number}", row)
    encoder_for(job)  # the tokenizer is there, model type and template are known
    # How it is computed, and where things lie: the model goes by its fingerprint
    ignored = ("model", "out", "gpus_per_task", "device", "processes")
    settings = {key: value for key, value in vars(args).items() if key not in ignored}
    settings |= {
        "fingerprint": fingerprint(checkpoint),
        "data": [each.record for each in (rows, calib) if each],
    }
    with contextlib.ExitStack() as held:
        if rank == 0:
            held.enter_context(claim_folder(args.out, settings, "scan"))
        if args.processes > 1 and world == 1:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
            os.execv(sys.executable, [*command, str(args.processes), "-m", "prunekit.scan", *sys.argv[1:]])
        if world > 1:
            # A process that dies ends the others at once; one that is slow may take its time
            distributed.init_process_group("gloo", timeout=timedelta(days=1))
        if os.environ.get("RAY_ADDRESS"):
            held.enter_context(cluster.connected())
        result = search(args, job, candidates, calib)
        if rank == 0:
            write_json(args.out / "scan.json", result | {"settings": settings})
            print_scan(result)
    if world > 1:
        distributed.destroy_process_group()


def search(args: argparse.Namespace, job: Job, candidates: list[Removal], calib: Rows | None) -> dict[str, Any]:
    """Do what the command line asks for: the content of scan.json."""
    scan = Scan(job, args.out / "records.jsonl", min(1, args.gpus_per_task))
    best, undecided = None, set()
    if args.race:
        best, undecided = scan.race([], candidates, args.best, {str(k): 1.0 for k in candidates}, args.race_share)
    else:
        scan.measure([], candidates, range(scan.batches), "scan")
    result = describe(scan, candidates, best, undecided)
    answers = args.generate, args.generate_tokens
    if args.generate:
        chosen = result["best"][: args.best]
        generated = scan.generate([[k] for k in candidates if str(k) in chosen], *answers)
        entries = [entry for entry in result["removals"] if entry["name"] in chosen]
        for entry, found in zip(entries, generated, strict=True):
            entry["generation"] = found
    if args.greedy or args.target_params:
        searched = scan
        if calib:
            searched = HealedScan(job, args.out / "records-healed.jsonl", calib, args.calib_tokens)
        race_share = args.race_share if args.race and not calib else None
        path = find_path(searched, candidates, args.greedy, args.target_params, race_share, *answers)
        result["greedy"] = {
            "healed": args.heal,
            "criterion": f"{CRITERION} per parameter saved",
            "path": path,
        }
    return result


def describe(scan: Scan, candidates: Sequence[Removal], best: list[str] | None, undecided: set[str]) -> dict[str, Any]:
    """The content of scan.json."""
    removals = []
    for removal in candidates:
        scores = scan.score([], str(removal))
        parameters = scan.parameters_without([removal])
        removals.append(
            {
                **removal.json,
                "parameters": parameters,
                "parameters_saved": scan.parameters - parameters,
                **scan.layer_figures([], str(removal)),
                **scores,
                "decided": str(removal) not in undecided,
                "generation": None,
                "error": None if scores["loss"] is not None else "loss is NaN",
            }
        )
    result = {
        "predictor": PREDICTOR if best is None else CRITERION,
        "counts_suffix": scan.job.counts_suffix,
        "baseline": {**scan.score([], BASELINE), "parameters": scan.parameters},
        "removals": removals,
        "greedy": None,
    }
    return result | {"best": best or finalists(result, None)}


def print_scan(result: dict[str, Any]) -> None:
    base = result["baseline"]
    counted = "" if result["counts_suffix"] else ", suffix tokens left out"
    print(
        f"baseline: token_acc {base['token_acc']:.4f}, loss {base['loss']:.4f} ({base['samples']} samples, {base['tokens']} tokens{counted})"
    )
    by_name = {entry["name"]: entry for entry in result["removals"]}
    for name in result["best"]:
        entry = by_name[name]
        answered = entry["generation"]
        print(
            f"{name:>10}  token_acc {entry['token_acc']:.4f}  loss {entry['loss']:.4f} ± {entry['standard_error']['loss'] or 0:.4f}"
            f"  KL {entry['kl']:.4f}  {entry['parameters_saved'] / base['parameters']:.1%} of the parameters"
            + (f"  exact match {answered['exact_match']:.3f}" if answered else "")
            + ("" if entry["decided"] else "  (undecided)")
        )
    for entry in (result["greedy"] or {}).get("path", [])[1:]:
        print(
            f"without {' '.join(entry['removed'])}: token_acc {entry['token_acc']:.4f}  loss {entry['loss']:.4f}"
            f"  {entry['parameters'] / base['parameters']:.1%} of the parameters left"
        )
    entries = [*result["removals"], *(result["greedy"] or {}).get("path", [])]
    answered = [entry["generation"] for entry in entries if entry["generation"]]
    if cut := sum(found["n_cut"] for found in answered):
        print(
            f"warning: {cut} of {sum(found['samples'] for found in answered)} answers were cut at "
            f"{answered[0]['max_new_tokens']} tokens: if right ones are as long, raise --generate-tokens (GENERATE_TOKENS)",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_script(main)
