"""What can be cut next: trials worth making, and candidates read from what scans and evaluations measured."""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunekit.checkpoint import Checkpoint, Outline, fingerprint, heads, history, open_checkpoint, read_json, statistics
from prunekit.checkpoint.provenance import check_ranking
from prunekit.errors import PruneKitError
from prunekit.knockout.removal import STACKS, Removal, plan_without
from prunekit.report.results import read_results
from prunekit.rules import NAMES, OBJECT, REAL, Items, Keys, check
from prunekit.surgery.experts import check_experts, plan_experts
from prunekit.surgery.kv import plan_kv
from prunekit.surgery.layers import check_healable
from prunekit.surgery.vocabulary import plan_vocabulary
from prunekit.surgery.width import ROUND, plan_width

from .choice import SIZES, Candidate, amount, gain, useful_share
from .timing import Timing

LEAST_EXPERTS, LEAST_NEURONS, LEAST_TOKENS = 0.5, 0.5, 0.25  # of them stay in one round
MOST_TRIALS = 2  # of a kind in one round
PARTS = (0.5, 1.0)  # of what a round may take
FINER = 0.25  # of these, where all that was tried costs more than the gate bears
SCRIPTS = {
    "layers": "manual_select.py", "experts": "expert_cut.py", "heads": "width_cut.py", "neurons": "width_cut.py",
    "kv": "kv_cut.py", "vocabulary": "vocab_cut.py",
}  # fmt: skip
CUTTERS = ("expert_cut", "width_cut", "kv_cut", "vocab_cut")  # whose folders are trials
_POINT = Keys({"removed": NAMES, "loss": REAL}, ("removed",))
_PATH = Keys({"greedy": Keys({"path": Items(_POINT)}, ("path",)), "settings": OBJECT})


def sizes(model: Outline | str | Path, timing: Timing | None = None) -> dict[str, float]:
    """A model's sizes by SIZES' keys; with `timing` also the `speed` that it estimates."""
    outline = model if isinstance(model, Outline) else open_checkpoint(model)
    numbers = statistics(outline)
    found = {unit: numbers[key] for unit, key in SIZES.items()}
    return found if timing is None else found | {"speed": timing.of(outline)}


def _saved(checkpoint: Checkpoint, after: Outline | str | Path, timing: Timing | None = None) -> dict[str, float]:
    left = sizes(after, timing)
    return {unit: before - left[unit] for unit, before in sizes(checkpoint, timing).items()}


# --- trials -----------------------------------------------------------------------------------------------------------


def _experts(checkpoint: Checkpoint, amounts: Sequence[float]) -> Iterable[tuple[str, Outline]]:
    """Numbers of experts in each mixture without the others of which these amounts of parameters go."""
    try:
        possible = check_experts(checkpoint)
    except PruneKitError:  # no mixture, or one that needs them all
        return
    all_go, one_goes = (
        _saved(checkpoint, plan_experts(checkpoint, number).outline)["params"] for number in (possible[0], possible[-1])
    )  # with each of them layers that draft go, too
    of_one = (all_go - one_goes) / (len(possible) - 1) if len(possible) > 1 else one_goes
    least = max(possible[0], math.ceil(LEAST_EXPERTS * possible.stop))
    for wanted in amounts:
        number = max(least, possible.stop - math.floor(wanted / of_one + 1e-9))
        if number in possible:
            yield str(number), plan_experts(checkpoint, number).outline


def _heads(checkpoint: Checkpoint) -> Iterable[tuple[str, Outline]]:
    """Each number of query heads that every layer could keep, falling; none where heads could only be masked."""
    for number in range(heads(checkpoint).query - 1, 0, -1):
        try:
            plan = plan_width(checkpoint, number)
        except PruneKitError:
            continue
        if not plan.heads_masked:
            yield str(number), plan.outline


def _neurons(checkpoint: Checkpoint, amounts: Sequence[float], most: float) -> Iterable[tuple[str, Outline]]:
    """Shares of the neurons that take these amounts of parameters, as nearly as steps allow, and at most `most`."""
    before = statistics(checkpoint)["neurons"]
    try:
        half = _saved(checkpoint, plan_width(checkpoint, neuron_share=0.5).outline)["params"]
    except PruneKitError:  # too few are left
        return
    for wanted in amounts:
        share = max(LEAST_NEURONS, 1 - 0.5 * wanted / max(half, 1))
        for rounded in (share, share + ROUND / before):
            with contextlib.suppress(PruneKitError):  # less than the smallest step
                outline = plan_width(checkpoint, neuron_share=rounded).outline
                if _saved(checkpoint, outline)["params"] <= most:
                    yield _share_of_neurons(statistics(outline)["neurons"], before), outline
                    break


def _share_of_neurons(after: int, before: int) -> str:
    return f"{after / before:.4g}"


def _tokens(checkpoint: Checkpoint, amounts: Sequence[float]) -> Iterable[tuple[str, Outline]]:
    """Numbers of tokens whose rows of embedding and head have these amounts of parameters."""
    rows = statistics(checkpoint)["vocab_size"] or 0
    try:
        one_less = plan_vocabulary(checkpoint, rows - 1, multiple=1)
    except PruneKitError:  # no tokenizer, or none that could do without a token
        return
    a_row, least = _saved(checkpoint, one_less.outline)["params"], max(round(LEAST_TOKENS * rows), len(one_less.stays))
    for wanted in amounts:
        with contextlib.suppress(PruneKitError):  # less than the smallest step
            outline = plan_vocabulary(checkpoint, max(least, round(rows - wanted / a_row))).outline
            yield str(statistics(outline)["vocab_size"]), outline


def _kv(checkpoint: Checkpoint) -> Iterable[tuple[str, Outline]]:
    """The next number of KV heads."""
    for number in range(heads(checkpoint).kv - 1, 0, -1):
        try:
            yield str(number), plan_kv(checkpoint, number, "calibrated").outline
        except PruneKitError:
            continue
        return


def list_trials(
    checkpoint: Checkpoint,
    kinds: Sequence[str],
    wanted: Mapping[str, float],
    most: float,
    timing: Timing | None = None,
    known: Sequence[Candidate] = (),
    finer: bool = False,
) -> list[tuple[str, str, list[str]]]:
    """(name, script, flags) of the cuts that are worth a trial in a round which may take `most` parameters.

    Of experts, heads, neurons, KV heads and tokens: what saves something that is wanted and takes no more than that.
    Layers need no trial: a scan scores them in memory. What is `known` isn't tried again, and smaller amounts are where
    it is from a round that failed, of which this one may take half. `finer`: a quarter of all amounts, and no heads.
    """
    now = sizes(checkpoint, timing)
    useful = useful_share(most, wanted, now) * now["params"]
    amounts = [part * useful * (0.5 if known else 1) * (FINER if finer else 1) for part in PARTS]
    options = {
        "experts": ("--experts", _experts(checkpoint, amounts) if "experts" in kinds else ()),
        "heads": ("--heads", _heads(checkpoint) if "heads" in kinds and not finer else ()),
        "neurons": ("--neuron-share", _neurons(checkpoint, amounts, most) if "neurons" in kinds else ()),
        "kv": ("--kv-heads", _kv(checkpoint) if "kv" in kinds and not finer else ()),
        "vocabulary": ("--size", _tokens(checkpoint, amounts) if "vocabulary" in kinds else ()),
    }
    measured = {each.flags for each in known}
    trials: list[tuple[str, str, list[str]]] = []
    for kind, (flag, found) in options.items():
        fitting = 0
        for value, outline in found:
            saved = _saved(checkpoint, outline, timing)
            if saved["params"] > most or fitting == MOST_TRIALS:
                break
            trial = (f"{flag[2:]}-{value}", SCRIPTS[kind], [flag, value])
            if gain(saved, wanted) > 0 and trial not in trials:
                fitting += 1
                trials.append(trial)
    return [trial for trial in trials if tuple(trial[2]) not in measured]


def check_reachable(
    checkpoint: Checkpoint, kinds: Sequence[str], targets: Mapping[str, float], timing: Timing | None = None
) -> None:
    """PruneKitError for a target (by UNITS' keys) that these kinds can't reach, were all gone of them that can go."""
    before = sizes(checkpoint, timing)
    left = dict(before)
    for kind in kinds:
        saved = _most_saved(checkpoint, kind, timing)
        left = {unit: max(0.0, left[unit] - saved[unit]) for unit in left}
    for unit, target in targets.items():
        if target < left[unit]:
            raise PruneKitError(
                f"TARGET_{unit.upper()}: is {amount(unit, target)} of {amount(unit, before[unit]).split()[0]}, and "
                f"cuts of {', '.join(kinds)} leave {amount(unit, left[unit]).split()[0]} at the least"
                f"{' by the estimate' * (unit == 'speed')}: allow more kinds (CUTS), or ask for less"
            )


def _most_saved(checkpoint: Checkpoint, kind: str, timing: Timing | None) -> dict[str, float]:
    """All that a kind can save, or more: one text layer left and no vision block, one head for each KV head, ..."""
    if kind == "layers":
        numbers, before = statistics(checkpoint), sizes(checkpoint)
        parts, text = numbers["parameters_by_component"], 1 - 1 / numbers["num_hidden_layers"]
        gone = text * parts["text"] + parts["vision"]
        saved = {"params": gone, "bytes": before["bytes"] * gone / before["params"], "kv": text * before["kv"]}
        return saved if timing is None else saved | {"speed": text * timing.of_layers}
    found: list[tuple[str, Outline]] = []
    with contextlib.suppress(PruneKitError):  # none of this kind can go
        if kind == "experts":
            found = [("", plan_experts(checkpoint, check_experts(checkpoint).start).outline)]
        elif kind == "heads":
            found = list(_heads(checkpoint))
        elif kind == "neurons":
            found = [("", plan_width(checkpoint, neuron_share=0.01).outline)]
        elif kind == "vocabulary":
            one_less = plan_vocabulary(checkpoint, (statistics(checkpoint)["vocab_size"] or 0) - 1, multiple=1)
            found = [("", plan_vocabulary(checkpoint, len(one_less.stays), multiple=1).outline)]
        else:
            found = [("", plan_kv(checkpoint, 1, "calibrated").outline)]
    return _saved(checkpoint, found[-1][1] if found else checkpoint, timing)


# --- candidates -------------------------------------------------------------------------------------------------------


def from_path(checkpoint: Checkpoint, file: Path, timing: Timing | None = None) -> list[Candidate]:
    """A candidate for every set of a greedy path, from a scan.json or a ranking.json of this model."""
    found = read_json(file)
    check(found, _PATH, file)
    if not found.get("greedy"):
        raise PruneKitError(f"{file}: has no greedy path; make one: GREEDY=8 HEAL=1 bash knockout_check.sh")
    settings: dict[str, Any] = found.get("settings") or {}
    of = found.get("fingerprint") or settings.get("fingerprint")
    check_ranking(checkpoint, {"model": found.get("model", "another model"), "fingerprint": of})
    candidates, (base, *path) = [], found["greedy"]["path"]
    for point in path:
        if (cost := _difference(point.get("loss"), base.get("loss"))) is None:
            continue
        try:
            gone = sorted(map(Removal.parse, point["removed"]))
        except ValueError as error:
            raise PruneKitError(f"{file}: {error}; make it anew") from None
        flags: list[str] = []
        for stack in STACKS:
            if numbers := [str(removal.layer) for removal in gone if removal.stack == stack]:
                flags += [f"--{stack}", *numbers]
        saved = _saved(checkpoint, plan_without(checkpoint, gone).result, timing)
        candidates.append(Candidate("layers", " ".join(map(str, gone)), cost, saved, tuple(flags)))
    return candidates


def _difference(now: float | None, base: float | None) -> float | None:
    return now - base if now is not None and base is not None and math.isfinite(now - base) else None


def from_trials(checkpoint: Checkpoint, file: Path, timing: Timing | None = None) -> list[Candidate]:
    """A candidate for every model but the first of an evaluation, which is of `checkpoint` and of cuts made from it.

    What was cut says each folder's history. PruneKitError for a folder that was made by something else.
    """
    base, *others = read_results(file)
    own = fingerprint(checkpoint)
    before, tokens = _scores(base).get("loss"), _scores(base).get("tokens")
    candidates = []
    for result in others:
        folder = Path(result["model"])
        entry: dict[str, Any] = (history(folder) or [{}])[-1]
        if entry.get("input_fingerprint") != own or entry.get("stage") not in CUTTERS:
            raise PruneKitError(f"{file}: {folder} is no cut of {checkpoint.path} by {', '.join(CUTTERS)}")
        if (cost := _difference(loss_by(_scores(result), tokens), before)) is None:
            continue
        kind, flags = _cut(entry)
        candidates.append(Candidate(kind, f"{kind} {flags[-1]}", cost, _saved(checkpoint, folder, timing), flags))
    return candidates


def _scores(result: dict[str, Any]) -> dict[str, Any]:
    return next(iter(result["datasets"].values()), {})


def loss_by(scores: Mapping[str, float], tokens: float | None) -> float | None:
    """A loss in nats a token, of so many tokens: a model that cuts the same text into more has less on each."""
    loss, own = scores.get("loss"), scores.get("tokens")
    return loss * own / tokens if loss is not None and own and tokens else loss


def _cut(entry: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """(kind, flags that make it again) of a history's entry."""
    if entry["stage"] == "expert_cut":
        return "experts", ("--experts", str(entry["num_experts"]))
    if entry["stage"] == "kv_cut":
        return "kv", ("--kv-heads", str(entry["num_key_value_heads"]))
    if entry["stage"] == "vocab_cut":
        return "vocabulary", ("--size", str(entry["vocab_size"]))
    removed = entry.get("removed") or {}
    if "heads" in removed:
        if len(removed) > 1:
            raise PruneKitError(
                f"a trial cut {' and '.join(removed)} at once: cut one kind a trial, to tell costs apart"
            )
        return "heads", ("--heads", str(entry["num_attention_heads"]))
    return "neurons", ("--neuron-share", _share_of_neurons(entry["neurons"], entry["neurons_before"]))


def cut_lines(chosen: Sequence[Candidate], heal: Checkpoint | None = None) -> list[list[str]]:
    """The scripts that make these cuts one after the other, each with its flags: heads and neurons go in one.

    `heal`: the model that they are of, if layers are to be healed: with --heal, then, where there is something to heal.
    """
    lines: dict[str, list[str]] = {}
    for each in chosen:
        more = ["--heal"] if each.kind == "layers" and heal and _heals(heal, each) else []
        lines.setdefault(SCRIPTS[each.kind], []).extend([*each.flags, *more])
    return [[script, *flags] for script, flags in lines.items()]


def _heals(checkpoint: Checkpoint, layers: Candidate) -> bool:
    """False for a family that can't be healed, and for first layers: none before them could be refitted."""
    try:
        check_healable(plan_without(checkpoint, map(Removal.parse, layers.name.split())))
    except PruneKitError:
        return False
    return True
