"""What a knockout sweep found, as files: ranking.json, ranking.csv, pictures, a W&B run; and what is chosen by it."""

import csv
import itertools
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prunekit.checkpoint import Checkpoint, finite, layer_numbers, read_json, statistics, write_json
from prunekit.checkpoint.provenance import check_ranking
from prunekit.errors import PruneKitError
from prunekit.report.knockout import draw_greedy, draw_knockout_curves, draw_ranking, with_experts
from prunekit.rules import FLAG, LAYER, REAL, Items, Keys, Rule, check
from prunekit.surgery.layers import MOST_LAYERS, MOST_SHARE

from .folder import PICTURES, RANKING, TABLE
from .removal import BASELINE, MEAN, NAME, STACKS, WORST, Removal, plan_without

HIGHER_IS_CHEAPER = ("token_acc",)  # of the predictors; of the others (loss, kl, block_influence) lower is
NESTED = ("standard_error", "generation", "trained")  # in a removal: None, or a dict
LEAST_FALL = 0.01  # of the baseline's token_acc, over a whole greedy path: below that its shape is noise
LEAST_BEND = 0.1  # of the fall, above the chord: below that a path is straight


_REMOVAL = Keys(
    {
        "stack": Rule("text or vision", lambda value: value in STACKS),
        "layer": LAYER,
        "relative": REAL,
    },
    needed=("stack", "layer"),
)
_NAME = Rule("a name like text-03", lambda value: bool(NAME.fullmatch(str(value))))
_POINT = Keys({"removed": Items(_NAME), "relative": REAL}, needed=("removed",))
_RANKING = Keys(
    {
        "removals": Items(_REMOVAL),
        "greedy": Keys({"path": Items(_POINT), "healed": FLAG}, needed=("path",)),
    },
    needed=("removals",),
)


def read_ranking(file: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """A ranking.json of this model. PruneKitError if it isn't, or isn't what `build_ranking` makes."""
    ranking = read_json(file)
    check(ranking, _RANKING, f"the ranking isn't one that knockout_check.sh wrote ({RANKING})")
    said = [*ranking["removals"], *(ranking.get("greedy") or {"path": ()})["path"]]
    if said and not any("relative" in entry for entry in said):  # nor would importances of it be more than none
        raise PruneKitError(
            f"{file}: doesn't say what a removal keeps of the baseline, as a scan's own file doesn't: give "
            f"the {RANKING} of knockout_check.sh (MODE=scan: without trainings)"
        )
    check_ranking(checkpoint, ranking)
    return ranking


def choose_from_ranking(
    checkpoint: Checkpoint,
    ranking: dict[str, Any],
    keep_above: float = 0.95,
    max_layers: int = MOST_LAYERS,
    max_fraction: float = MOST_SHARE,
    independent: bool = False,
) -> list[tuple[Removal, float]]:
    """What to remove by a ranking, each with the share of the baseline that is kept.

    With a greedy path in the ranking, the path is followed as long as what is left keeps `keep_above`; the share is
    then that without the layer and all before it. Without one, or if `independent`, the removals that keep
    `keep_above` alone are taken, cheapest first. Takes at most `max_layers`, and nothing that would bring the removed
    share of all parameters over `max_fraction` or leave a stack with fewer layers than it must have: there a path
    ends, while independent removals go on with the next. Raises PruneKitError for layers that the model has not, or
    if nothing qualifies.
    """
    path = None if independent else ranking.get("greedy")
    alone = ((Removal(e["stack"], e["layer"]), e.get("relative")) for e in ranking["removals"])
    chosen: list[tuple[Removal, float]] = []
    for removal, relative in _path_steps(path["path"]) if path else alone:
        fits = len(chosen) < max_layers and _fits(checkpoint, [*(r for r, _ in chosen), removal], max_fraction)
        if fits and relative is not None and relative >= keep_above:
            chosen.append((removal, relative))
        elif path:
            break
    if not chosen:
        raise PruneKitError(
            f"the ranking has nothing that keeps {keep_above:.0%} of the baseline within {max_fraction:.0%} of the "
            "parameters; lower --keep-above or raise --max-fraction"
        )
    return chosen


def _path_steps(path: list[dict[str, Any]]) -> Iterator[tuple[Removal, float | None]]:
    """The layers of a greedy path one by one, each with what is left once it is gone."""
    for before, point in itertools.pairwise(path):
        for name in point["removed"]:
            if name not in before["removed"]:
                yield Removal.parse(name), point.get("relative")


def _fits(checkpoint: Checkpoint, gone: list[Removal], max_fraction: float) -> bool:
    """Can these be removed together, and are they at most `max_fraction` of the parameters?"""
    for stack in STACKS:
        count = len(layer_numbers(checkpoint, stack)) if stack in checkpoint.family.stacks else 0
        last = max((removal for removal in gone if removal.stack == stack), default=Removal(stack, -1))
        if last.layer >= count:
            raise PruneKitError(f"the ranking has a {last}, the model has not: is it the ranking of this model?")
    try:
        plan = plan_without(checkpoint, gone)
    except PruneKitError:
        return False
    return 1 - statistics(plan.result)["parameters"] / statistics(checkpoint)["parameters"] <= max_fraction


def knockout_importance(checkpoint: Checkpoint, ranking: dict[str, Any]) -> dict[tuple[str, int], float]:
    """Importance of each layer by a ranking: the share of the baseline's token_acc that its removal costs.

    A layer without which the model couldn't be measured is as important as can be (1). PruneKitError if the model has
    no such stack.
    """
    shares = {(entry["stack"], entry["layer"]): entry.get("relative") for entry in ranking["removals"]}
    found = {layer: 1.0 if share is None else min(1.0, max(0.0, 1 - share)) for layer, share in shares.items()}
    for stack in {stack for stack, _ in found}:
        if stack not in checkpoint.family.stacks:
            raise PruneKitError(f"--ranking: has a stack {stack!r}, {checkpoint.family.model_type} has none")
    return found


def build_ranking(
    scan: dict[str, Any] | None,
    trained: Sequence[dict[str, Any]],
    model: str,
    settings: dict[str, Any],
    fingerprint: str | None = None,
    by: str | None = None,
    gate: str = MEAN,
) -> dict[str, Any]:
    """The content of ranking.json, from a fast scan's result (None: there was none) and the trained knockouts'.

    Every removal gets `relative`, its share of the baseline's token_acc: after training if it was trained, like the
    baseline, else as scanned. It is None for what failed or has no number. Trained removals come first, best first;
    then the others, cheapest by the scan's predictor first; at the end those without `relative`. `fingerprint` is the
    model's: the ranking holds for no other. `by` is the column whose values group the rows: every removal then has the
    same of each of its `groups`, and the name of the `worst_group`, which by the gate `worst` says what `relative` is.
    What the scan says of fewer experts is in a list of its own, `experts`, as it scanned them: they are neither layers
    to choose from nor trained.
    """
    scan, trained = finite(scan), finite(trained)
    runs = {record["name"]: record for record in trained}
    trained_baseline = runs.pop(BASELINE, None)
    trained_whole = trained_baseline if trained_baseline and not trained_baseline["error"] else None
    baseline = {**(scan["baseline"] if scan else {}), "trained": trained_baseline}
    found = {entry["name"]: entry for entry in scan["removals"]} if scan else {}
    for name, record in runs.items():
        keys = ("name", "stack", "layer", "parameters")
        found.setdefault(name, {key: record.get(key) for key in keys} | {"error": None})

    def ranked(name: str, entry: dict[str, Any]) -> dict[str, Any]:
        run = runs.get(name)
        scanned, after = kept_shares(entry, baseline), kept_shares(run, trained_whole)
        best = scanned if after[None] is None else after
        error = entry["error"] or (run and run["error"])
        if run and not error and run["token_acc"] is None:
            error = "its training ended without a number"
        known = after[None] is not None or _cost(scan, entry) is not None
        return (
            entry
            | {
                "error": error,
                "finalist": run is not None,
                "trained": run,
                "relative_scanned": _gated(scanned, gate),
                "relative_trained": _gated(after, gate),
                "relative": _gated(best, gate) if known and not error else None,
            }
            | (_of_groups(entry, best, relative_scanned=scanned, relative_trained=after) if by else {})
        )

    removals = [ranked(name, entry) for name, entry in found.items()]
    removals.sort(key=lambda entry: _order(scan, entry))
    experts = [ranked(entry["name"], entry) for entry in (scan or {}).get("experts", ())]
    return (
        {
            "metric": "token_acc",
            "predictor": scan and scan["predictor"],
            "counts_suffix": scan["counts_suffix"] if scan else True,  # ms-swift's own token_acc counts it
            "model": model,
            "fingerprint": fingerprint,
            "settings": settings,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "baseline": baseline,
            "removals": removals,
            "greedy": scan and scan.get("greedy") and _with_shares(scan["greedy"], scan["baseline"], gate),
        }
        | ({"experts": experts} if experts else {})
        | ({"by": by, "gate": gate} if by else {})
    )


def finalists(scan: dict[str, Any], count: int | None) -> list[str]:
    """Names of the `count` cheapest removals by the scan's predictor (None: all), cheapest first; no failed one."""
    scan = finite(scan)
    costs = {
        entry["name"]: cost
        for entry in scan["removals"]
        if not entry["error"] and (cost := _cost(scan, entry)) is not None
    }
    return sorted(costs, key=lambda name: costs[name])[:count]


def find_bend(points: Sequence[tuple[float, float]]) -> int | None:
    """Index of the point from which quality falls faster: the one highest above the chord (Kneedle, Satopaa 2011).

    Points are (parameters, token_acc), in the order of removal. None if there are fewer than four, if they hardly
    fall, or if none lies clearly above the straight line from the first to the last.
    """
    if len(points) < 4:
        return None
    (size, best), (smallest, worst) = points[0], points[-1]
    if size <= smallest or best - worst <= LEAST_FALL * best:
        return None
    heights = [(y - worst) / (best - worst) - (x - smallest) / (size - smallest) for x, y in points]
    bend = max(range(len(points)), key=lambda index: heights[index])
    return bend if heights[bend] >= LEAST_BEND else None


def _with_shares(greedy: dict[str, Any], baseline: dict[str, Any], gate: str) -> dict[str, Any]:
    """A greedy path with each point's shares of the baseline, and where it bends."""
    path = [
        point
        | {
            "relative": _gated(kept := kept_shares(point, baseline), gate),
            "parameters_share": _share(point["parameters"], baseline["parameters"]),
        }
        | (_of_groups(point, kept) if "groups" in point else {})
        for point in greedy["path"]
    ]
    measured = [index for index, point in enumerate(path) if point["relative"] is not None]
    bend = find_bend([(path[index]["parameters"], path[index]["relative"]) for index in measured])
    return greedy | {"path": path, "bend": None if bend is None else measured[bend]}


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


Kept = dict[str | None, float | None]  # shares of the baseline's token_acc: of all rows by None, of groups by name


def kept_shares(found: dict[str, Any] | None, baseline: dict[str, Any] | None) -> Kept:
    """What a score, a removal's or a path's, keeps of the baseline's."""
    found, baseline = found or {}, baseline or {}
    whole = baseline.get("groups", {})
    return {None: _share(found.get("token_acc"), baseline.get("token_acc"))} | {
        group: _share(scores["token_acc"], whole[group]["token_acc"] if group in whole else None)
        for group, scores in found.get("groups", {}).items()
    }


def worst_group(kept: Kept) -> str | None:
    """The group that keeps least; None without groups that the baseline gets anything of right."""
    known = {group: share for group, share in kept.items() if group is not None and share is not None}
    return min(known, key=known.__getitem__, default=None)


def _gated(kept: Kept, gate: str) -> float | None:
    return kept[worst_group(kept) if gate == WORST else None]


def _of_groups(entry: dict[str, Any], kept: Kept, **more: Kept) -> dict[str, Any]:
    """A removal's groups with their shares, and which of them is the worst."""
    shares = more | {"relative": kept}
    groups = {
        group: entry.get("groups", {}).get(group, {}) | {name: each.get(group) for name, each in shares.items()}
        for group in sorted(group for group in kept if group is not None)
    }
    return {"groups": groups, "worst_group": worst_group(kept)}


def _cost(scan: dict[str, Any] | None, entry: dict[str, Any]) -> float | None:
    """What the scan's predictor says of a removal, so that less is cheaper."""
    if not scan:
        return None
    value = entry.get(scan["predictor"])
    if scan.get("gate") == WORST:
        value = _gated(kept_shares(entry, scan["baseline"]), WORST)
    return -value if value is not None and scan["predictor"] in HIGHER_IS_CHEAPER else value


def _order(scan: dict[str, Any] | None, entry: dict[str, Any]) -> tuple[int, float | None]:
    if entry["relative"] is None:
        return 2, 0.0
    if entry["relative_trained"] is not None:
        return 0, -entry["relative_trained"]
    return 1, _cost(scan, entry)


def write_ranking(out: Path, ranking: dict[str, Any]) -> list[Path]:
    """Write OUT/ranking.json and ranking.csv and draw what there is to draw; each file is whole, or as before.

    Returns the pictures.
    """
    write_json(out / RANKING, ranking)
    rows = removal_rows(ranking)
    draft = out / f".{TABLE}.new"
    with draft.open("w", newline="", encoding="utf-8") as file:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    draft.replace(out / TABLE)

    pictures = []
    records = [ranking["baseline"]["trained"], *(entry["trained"] for entry in ranking["removals"])]
    drawn = (
        (draw_ranking, any(e["relative"] is not None for e in with_experts(ranking))),
        (draw_greedy, ranking["greedy"] and len(ranking["greedy"]["path"]) > 1),
        (draw_knockout_curves, any(record and record["curve"] for record in records)),
    )
    for name, (draw, wanted) in zip(PICTURES, drawn, strict=True):
        if wanted:
            draw(ranking, out / name)
            pictures.append(out / name)
    return pictures


def removal_rows(ranking: dict[str, Any]) -> list[dict[str, Any]]:
    """Each removal as one flat row, in the ranking's order, numbers of experts behind layers; curves are left out."""
    doubled = ("trained_name", "trained_stack", "trained_layer", "trained_error")
    rows = [{"name": entry["name"], "relative": entry["relative"]} | _flat(entry) for entry in with_experts(ranking)]
    return [{key: value for key, value in row.items() if key not in doubled} for row in rows]


def _flat(entry: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, dict):
            row |= _flat(value, f"{prefix}{key}_")
        elif not isinstance(value, list) and (value is not None or key not in NESTED):
            row[prefix + key] = value
    return row


def log_to_wandb(ranking: dict[str, Any], pictures: Sequence[Path], group: str) -> None:
    """One W&B run named knockout/ranking, with the removals, the greedy path and the pictures.

    Project, mode and folder come from W&B's own environment variables. Whatever goes wrong there is one line on
    stderr, and no error: the files have it all.
    """
    try:
        import wandb

        settings = wandb.Settings(console="off", silent=True)
        with wandb.init(name="knockout/ranking", group=group, job_type="ranking", config=ranking["settings"],
                        settings=settings) as run:  # fmt: skip
            log: dict[str, Any] = {path.stem: wandb.Image(str(path)) for path in pictures}
            log["removals"] = _wandb_table(removal_rows(ranking))
            if ranking["greedy"]:
                path = [point | {"removed": " ".join(point["removed"])} for point in ranking["greedy"]["path"]]
                log["greedy_path"] = _wandb_table([_flat(point) for point in path])
            run.log(log)
    except Exception as error:  # W&B raises many kinds; none is worth a sweep
        line = " ".join(str(error).split()) or type(error).__name__
        print(f"warning: W&B has no ranking ({line}); see the files", file=sys.stderr)


def _wandb_table(rows: list[dict[str, Any]]):
    import wandb

    columns: list[Any] = list(dict.fromkeys(key for row in rows for key in row))
    return wandb.Table(columns=columns, data=[[row.get(column) for column in columns] for row in rows])
