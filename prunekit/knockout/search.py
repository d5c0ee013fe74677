"""Searches among removals: all of them, a race for the best, a greedy path; here, by processes, or on a Ray cluster."""

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import distributed
from tqdm import tqdm

from prunekit.checkpoint import layer_numbers, open_checkpoint, statistics
from prunekit.data.batches import Calibration, calibrate
from prunekit.data.groups import ratio
from prunekit.data.rows import Rows
from prunekit.errors import PruneKitError
from prunekit.surgery.experts import plan_experts
from prunekit.surgery.experts_fit import order_experts

from . import cluster
from .generation import answer_without, score_generation
from .healed import HealedScanner
from .records import METRICS, Records, Table, paired
from .removal import BASELINE, MEAN, WORST, Candidate, FewerExperts, Removal, plan_without
from .scanner import Job, encoder_for, load_scanner, rounded

AT_ONCE = 4  # candidates that a path measures, before it looks whether others may still be better: calls have a cost
CRITERION = "loss"  # of paths and races: finer than token_acc, which changes by whole tokens
SURE = 2.0  # standard errors
FEW_SAMPLES = 8  # below, a standard error says nothing


def measure_batch(item: tuple[Job, tuple[Removal, ...], tuple[Candidate, ...], int]) -> dict[str, Any]:
    """One line of records.jsonl, computed wherever this process runs."""
    job, gone, candidates, index = item
    found = load_scanner(job).measure(gone, candidates, index)
    return {"gone": [str(removal) for removal in gone], "batch": index, **found}


def groups_of_batches(job: Job) -> Sequence[list[str]]:
    """Of each batch the groups of its samples, "" without a column to group by."""
    return load_scanner(job).groups


def calibration_of(job: Job, calib: Rows, tokens: int) -> Calibration:
    """Rows beside a job's own, for its model."""
    scanner = load_scanner(job)
    encoder = encoder_for(job).for_rows(calib)  # to find its template anew takes seconds, and is said again
    return calibrate(
        scanner.model, scanner.checkpoint, calib, tokens, job.max_length, model_type=job.model_type,
        template=job.template, encoder=encoder,
    )  # fmt: skip


def experts_that_go(item: tuple[Job, int, Rows, int]) -> dict[int, list[int]]:
    """By layer the experts that go until so many are left, in that order, by calibration rows and tokens."""
    job, experts, calib, tokens = item
    scanner = load_scanner(job)
    plan = plan_experts(scanner.checkpoint, experts)
    return order_experts(plan, scanner.model, calibration_of(job, calib, tokens))


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
        self.groups: Sequence[list[str]]
        [(_, self.groups)] = (
            self._everywhere(groups_of_batches, [job]) if self.cluster else [(job, groups_of_batches(job))]
        )
        self.batches = len(self.groups)
        self.parameters = statistics(self.checkpoint)["parameters"]

    def _everywhere(self, function: Callable, items: list) -> Iterator[tuple[Any, Any]]:
        for item, result in cluster.run_tasks(function, items, gpus=self.gpus_per_task):
            if isinstance(result, Exception):
                raise result
            yield item, result

    def _gather(self, mine: Any) -> list[Any]:
        """What each process found, the first one's first."""
        gathered: list[Any] = [mine] * self.world
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

    def fewer_experts(self, numbers: Sequence[int], calib: Rows, tokens: int) -> list[FewerExperts]:
        """Each of these numbers, falling, with the experts that go: chosen on calibration rows, not on those scored.

        One process chooses for all. Where all is measured by now, nothing is chosen.
        """
        known = [self.records.scores.get(((), index), {}) for index in range(self.batches)]
        if not numbers or all(str(FewerExperts(number)) in scores for number in numbers for scores in known):
            return [FewerExperts(number) for number in numbers]
        item = (self.job, numbers[-1], calib, tokens)
        if self.cluster:
            [(_, order)] = self._everywhere(experts_that_go, [item])
        else:
            order = self._gather(experts_that_go(item) if self.rank == 0 else None)[0]
        return [
            FewerExperts(number, tuple((layer, tuple(gone[: len(gone) - rest])) for layer, gone in order.items()))
            for number in numbers
            for rest in [number - numbers[-1]]
        ]

    def parameters_without(self, gone: Sequence[Removal]) -> int | None:
        """Parameters that are left; None where these layers can't be removed together."""
        if not gone:
            return self.parameters
        try:
            return statistics(plan_without(self.checkpoint, gone).result)["parameters"]
        except PruneKitError:
            return None

    def measure(
        self, gone: Sequence[Removal], candidates: Sequence[Candidate], batches: Sequence[int], what: str
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
        """Find the `keep` best candidates (by the loss they add, times their weight) without scoring all on all
        samples.

        Successive accepts and rejects (Bubeck, Wang and Viswanathan 2013): after every few batches, a candidate whose
        paired difference to the one on the other side of the cut is over `SURE` standard errors is decided, and gets no
        more samples. Ends when all are decided, the samples are used up, or `share` of the full scan's layer runs is.
        Returns the names of the best, and of those that were left undecided.
        """
        undecided, best = list(candidates), []
        chosen: list[str] = []
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
            few = len(table[BASELINE]["tokens"]) < FEW_SAMPLES
            if few and batches.stop < self.batches:
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
            for place, candidate in enumerate(order if undecided and not few else []):
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
        """Metrics of one removal (or the baseline) per token, with standard errors of what sets it off the baseline.

        A removal that was scored on some of the samples gets the baseline's figure on all of them and its own
        difference: so all are comparable. With a column to group by, `groups` has the same of each group's samples.
        """
        whole, own = self._tables(gone, [BASELINE]), self._tables(gone, [BASELINE, name])
        figures = {group: self._figures(name, whole[group], own[group]) for group in whole}
        return figures.pop(None) | ({"groups": figures} if figures else {})

    def _tables(self, gone: Sequence[Removal], names: Sequence[str]) -> dict[str | None, Table]:
        """What was measured of these names, by None, and each group's part of it, by the group's name."""
        table = self.records.table(gone, names)
        tables: dict[str | None, Table] = {None: table}
        if self.job.by:
            groups = np.array([group for batch in self.records.batches(gone, names) for group in self.groups[batch]])
            for group in sorted({group for batch in self.groups for group in batch}):
                tables[group] = {
                    name: {kind: values[groups == group] for kind, values in kinds.items()}
                    for name, kinds in table.items()
                }
        return tables

    def _figures(self, name: str, whole: Table, table: Table) -> dict[str, Any]:
        """Those of `score`; `whole` has the baseline's samples, `table` those that `name` was scored on, too."""
        result: dict[str, Any] = {}
        errors: dict[str, float | None] = {}
        for metric, kind in METRICS.items():
            base, _ = ratio(whole[BASELINE][kind], whole[BASELINE]["tokens"])
            difference, error = paired(table, name, BASELINE, metric)
            result[metric] = rounded(base + difference)
            errors[metric] = rounded(error)
        result["samples"] = len(table[name]["tokens"])
        result["tokens"] = int(table[name]["tokens"].sum())
        return result if name == BASELINE else result | {"standard_error": errors}

    def layer_figures(self, gone: Sequence[Removal], name: str) -> dict[str, Any]:
        """Block influence (1 - mean cosine of a layer's input and output, ShortGPT, 2403.03853), share of a pass's
        time.
        """
        key = tuple(str(k) for k in gone)
        found = [pair for (removed, _), pair in self.records.layers.items() if removed == key]
        influence = [part[name] for part, _ in found if name in part]
        tokens = sum(count for _, count in influence)
        seconds = sum(part.get(name, 0.0) for _, part in found)
        return {
            "block_influence": rounded(sum(total or math.nan for total, _ in influence) / tokens) if tokens else None,
            "latency_saved": rounded(seconds / sum(part["all"] for _, part in found)),
        }


def _worst_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value


class HealedScan(Scan):
    """A scan in which the model is healed after every cut, and each candidate's seam. Each process heals all of it.

    `calib`: the rows to heal on.
    """

    def __init__(self, job: Job, records: Path | None, calib: Rows, calib_tokens: int, quiet: bool | None = None):
        super().__init__(job, records, quiet=quiet)
        self.scanner = HealedScanner(load_scanner(job), calibration_of(job, calib, calib_tokens))

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


def _spent(found: dict[str, Any], uncut: dict[str, Any], gate: str) -> float:
    """What a path adds to the loss, by the gate `worst` to that of the group that it adds most to; NaN if one is."""
    pairs = [(found, uncut)]
    if gate == WORST:
        pairs = [(scores, uncut["groups"][group]) for group, scores in found["groups"].items()]
    losses = [(after[CRITERION], before[CRITERION]) for after, before in pairs]
    return math.nan if None in itertools.chain(*losses) else max(after - before for after, before in losses)


def _worth_measuring(
    possible: Sequence[Removal],
    costs: dict[Removal, float],
    fresh: dict[Removal, float],
    weight: dict[str, float],
    at_once: int,
) -> list[Removal]:
    """Those that may cost less than the best of the `fresh` ones: all of unknown cost, or else the cheapest few."""
    unknown = [k for k in possible if k not in costs and k not in fresh]
    if unknown:
        return unknown
    best = min((cost * weight[str(k)] for k, cost in fresh.items()), default=math.inf)
    stale = {k: costs[k] * weight[str(k)] for k in possible if k not in fresh}
    due = sorted((k for k, cost in stale.items() if cost < best), key=stale.__getitem__)
    return due[:at_once]


def find_path(
    scan: Scan,
    candidates: Sequence[Removal],
    count: int | None,
    target: float | None,
    race_share: float | None,
    generation: int = 0,
    generation_tokens: int = 64,
    gate: str = MEAN,
) -> list[dict[str, Any]]:
    """Remove what costs least loss per parameter saved, scan again, and so on: the greedy path.

    By the gate `worst` a set costs what it adds to the loss of that group of rows which loses most by it. Ends after
    `count` removals, at `target` of the parameters, or where nothing more can go. With `race_share` each choice is a
    race for the best one; without, it is lazy greedy's (Minoux 1978): what a layer costs is taken to grow with what is
    gone, so that only those are measured again that cost less, when they last were, than the best one does now.
    Entries: `removed` (names), `parameters`, metrics of the model so cut.
    """
    gone: list[Removal] = []
    path: list[dict[str, Any]] = []
    costs: dict[Removal, float] = {}  # what each added to the loss when it was last measured
    while True:
        scan.measure(gone, [], range(scan.batches), f"without {len(gone)} layers")
        left = scan.parameters_without(gone)
        assert left is not None  # each of these was possible
        score = scan.score(gone, BASELINE)
        entry = {"removed": [str(k) for k in gone], "parameters": left, **score}
        [answered] = scan.generate([gone], generation, generation_tokens) if generation else [None]
        path.append(entry | {"generation": answered})
        done = len(gone) == count or (target is not None and left <= target * scan.parameters)
        without = {k: scan.parameters_without([*gone, k]) for k in candidates if k not in gone}
        after = {k: parameters for k, parameters in without.items() if parameters is not None}
        possible = list(after)
        if done or not possible:
            return path
        weight = {str(k): 1 / (left - after[k]) for k in possible}
        what = f"choose layer {len(gone) + 1}"
        if race_share:
            [best], _ = scan.race(gone, possible, 1, weight, race_share, what)
        else:
            base, fresh = _spent(score, path[0], gate), dict[Removal, float]()
            while due := _worth_measuring(possible, costs, fresh, weight, max(AT_ONCE, scan.world)):
                scan.measure(gone, due, range(scan.batches), what)
                fresh |= {k: _worst_if_nan(_spent(scan.score(gone, str(k)), path[0], gate) - base) for k in due}
            costs |= fresh
            finite = [k for k, cost in fresh.items() if cost < math.inf]
            if not finite:
                return path
            best = str(min(finite, key=lambda k: fresh[k] * weight[str(k)]))
        gone = [*gone, Removal.parse(best)]
