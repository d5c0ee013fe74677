"""Unstructured sparsity: which weights of a checkpoint become zero, and the checkpoint with these zeros.

Magnitudes are read tensor by tensor, so no model is ever in memory; other scores come from
prunekit/surgery/zeros_scores.py.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import Any

from tqdm import tqdm

from prunekit.checkpoint import Checkpoint
from prunekit.errors import PruneKitError

from .cut import Account, OfPlan
from .zeros_weights import Weight, choose_weights, count_zeros, sparsity_record
from .zeros_wish import Wish, check_shared_out, check_wish

LEAST_WEIGHT = 1e-9  # of a layer in sharing out: what the others can't take goes even to the most important
NO_GAIN = (
    "zeros in dense weight files save neither space nor time: every one is stored and multiplied. They pay where files "
    "are compressed, or with a runtime that skips them"
)


@dataclass(frozen=True)
class ZerosPlan:
    """Which weights are meant, and how their zeros are shared out; which of them become zero, scores decide."""

    source: Checkpoint
    wish: Wish
    weights: dict[str, Weight]
    importance: dict[tuple[str, int], float] | None = None

    @property
    def sizes(self) -> dict[str, int]:
        return {name: math.prod(self.source.tensors[name].shape) for name in self.weights}


@dataclass(frozen=True)
class ZerosCut(OfPlan):
    """A checkpoint whose chosen weights are computed, with their zeros, when they are written."""

    plan: ZerosPlan
    result: Checkpoint
    zeroed: Callable[[str], Any]  # of a chosen tensor's name: its values with their zeros, otherwise as they were
    zeros: dict[str, int]  # by tensor
    zeros_before: int
    settings: dict[str, Any] = field(default_factory=dict)  # of the data, like metrics
    metrics: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return sparsity_record(self.source, self.zeros)

    def account(self) -> Account:
        plan, wish = self.plan, self.plan.wish
        unused = ["importance", "ranking", "refit"]
        unused += ([] if plan.importance else ["power", "maximum"]) + ([] if wish.sparsity else ["scope"])
        settings = {key: value for key, value in vars(wish).items() if value is not None and key not in unused}
        if wish.pattern:
            settings["pattern"] = f"{wish.pattern[1] - wish.pattern[0]}:{wish.pattern[1]}"
        settings |= self.settings
        if wish.importance:
            settings |= {"layer_importance": wish.importance, "ranking": wish.ranking}
        if wish.refit:
            settings["refit"] = True
        removed = {"weights": sum(self.zeros.values()) - self.zeros_before}
        return Account("sparsify", removed, self.metrics or None, settings, {"sparsity": self.record()})


def plan_zeros(checkpoint: Checkpoint, wish: Wish) -> ZerosPlan:
    """Plan to zero weights as wished. Raises PruneKitError for numbers out of range, wishes that contradict each other,
    and weights that don't divide into the pattern's groups. Reads no weights and writes no file."""
    check_wish(wish)
    weights = choose_weights(checkpoint, wish.modules)
    if wish.pattern:
        for name, weight in weights.items():
            inputs = checkpoint.tensors[name].shape[weight.inputs]
            if inputs % wish.pattern[1]:
                raise PruneKitError(
                    f"{name}: its {inputs} inputs don't divide into groups of {wish.pattern[1]}; "
                    "leave it out with --modules"
                )
    if wish.importance:
        check_shared_out(wish)
    return ZerosPlan(checkpoint, wish, weights)


def allocate(
    sizes: Sequence[int],
    importances: Sequence[float],
    total: int,
    power: float = 1.0,
    maximum: float = 1.0,
    least: Sequence[int] | None = None,
) -> list[int]:
    """How many weights of each group become zero: `total` in all, exactly, whatever the importances.

    Each group's ratio is proportional to 1 - (importance / largest importance) ** power, but at most `maximum` and at
    least `least` weights (what is zero already). What is over because groups are full goes to the others. Raises
    PruneKitError if `total` is less than all that is zero already, more than the groups can take, or if an importance
    is negative or no number.
    """
    least = least or [0] * len(sizes)
    if not all(0 <= importance < math.inf for importance in importances):
        raise PruneKitError("layer importances must be finite numbers, none below 0")
    most = [max(low, math.floor(Fraction(str(maximum)) * size)) for low, size in zip(least, sizes, strict=True)]
    if not sum(least) <= total <= sum(most):
        share, reach = total / sum(sizes), sum(least) if total < sum(least) else sum(most)
        what = "are zero already" if total < sum(least) else "at most can be, with --max-sparsity as it is"
        raise PruneKitError(f"a sparsity of {share:.2%} can't be met: {reach / sum(sizes):.2%} {what}")
    largest = max(importances) or 1.0
    weights = [max(1 - (importance / largest) ** power, LEAST_WEIGHT) for importance in importances]

    def counts(scale: float) -> list[int]:
        shares = (scale * weight * size for weight, size in zip(weights, sizes))
        return [max(low, min(high, math.floor(share))) for low, high, share in zip(least, most, shares)]

    low, high = 0.0, 2 / LEAST_WEIGHT
    for _ in range(100):  # floats lie no closer then
        middle = (low + high) / 2
        low, high = (middle, high) if sum(counts(middle)) <= total else (low, middle)
    found = counts(low)
    # What is missing is less than one weight of each group, but where shares of many groups become whole at once
    order = sorted(range(len(sizes)), key=lambda i: low * weights[i] * sizes[i] % 1, reverse=True)
    while missing := total - sum(found):
        for index in [index for index in order if found[index] < most[index]][:missing]:
            found[index] += 1
    return found


def _layers(plan: ZerosPlan) -> dict[Any, list[str]]:
    groups = defaultdict(list)
    for name, weight in plan.weights.items():
        groups[None if weight.layer is None else (weight.stack, weight.layer)].append(name)
    return groups


def with_importance(plan: ZerosPlan, importance: Mapping[tuple[str, int], float]) -> ZerosPlan:
    """The plan with budgets by layers' importance. PruneKitError if a layer has none, or there is no budget."""
    check_shared_out(plan.wish)
    for group in _layers(plan):
        if group is not None and group not in importance:
            raise PruneKitError(
                f"no importance is known of {group[0]} layer {group[1]}: scan it, too, give rows that reach it, or "
                "leave it out with --modules"
            )
    return replace(plan, importance=dict(importance))


def _budgets(plan: ZerosPlan, total: int, zeros: dict[str, int]) -> dict[str, int]:
    """Zeros of each tensor: the same share of all, or of all in a layer whose budget follows its importance."""
    sizes = plan.sizes
    groups: dict[Any, list[str]] = {None: list(plan.weights)}
    counts = [total]
    if plan.importance is not None:
        groups = _layers(plan)
        known = [plan.importance[group] for group in groups if group is not None]
        importances = [plan.importance.get(group, sum(known) / max(1, len(known))) for group in groups]
        counts = allocate(
            [sum(sizes[name] for name in names) for names in groups.values()],
            importances,
            total,
            plan.wish.power,
            plan.wish.maximum,
            [sum(zeros[name] for name in names) for names in groups.values()],
        )
    budgets: dict[str, int] = {}
    for names, count in zip(groups.values(), counts, strict=True):
        least = [zeros[name] for name in names]
        shares = allocate([sizes[name] for name in names], [0.0] * len(names), count, least=least)
        budgets |= dict(zip(names, shares, strict=True))
    return budgets


def tensor_bytes(values) -> memoryview:
    """A torch tensor's values as they are in a file."""
    import torch

    return memoryview(values.view(-1).view(torch.uint8).numpy())


# Of a tensor's name and values: its scores, both in the checkpoint's layout
Scores = Callable[[str, Any], Any]


def magnitude(name: str, values):
    return values.abs()


def cut_zeros(plan: ZerosPlan, scores: Scores = magnitude) -> ZerosCut:
    """Zero the weights that score lowest; magnitudes need no data.

    Reads the chosen weights two to four times, a tensor at a time. Raises PruneKitError if the sparsity can't be met.
    """
    import torch

    from .zeros_pick import Cut, RowCut, find_cuts, sort_keys

    wish, sizes = plan.wish, plan.sizes

    def keys_of(name: str, values=None):
        values = plan.source.read(name) if values is None else values
        found = scores(name, values)
        if wish.score != "magnitude" and not torch.isfinite(found).all():
            raise PruneKitError(f"{name}: its {wish.score} scores aren't finite; try --dtype float32")
        return sort_keys(found, values)

    def all_keys(what: str) -> Iterator[tuple[str, Any]]:
        for name in tqdm(plan.weights, desc=what, leave=False, disable=None):
            yield name, keys_of(name)

    zeros = count_zeros(plan.source, plan.weights)
    if wish.sparsity is not None:
        count = sum(sizes.values())
        total = math.floor(Fraction(str(wish.sparsity)) * count + Fraction(1, 2))
        allocate([count], [0.0], total, least=[sum(zeros.values())])  # raises if it can't be met
    cuts: dict[str, Cut | RowCut] = {}
    if wish.threshold is not None:
        key = int(sort_keys(torch.tensor(wish.threshold), torch.tensor(1.0)))
        cuts |= dict.fromkeys(plan.weights, Cut(key))
    elif wish.pattern:
        cuts |= {name: RowCut(wish.pattern[0], w.inputs, wish.pattern[1]) for name, w in plan.weights.items()}
    elif wish.scope == "global":
        cuts |= find_cuts(partial(all_keys, "select"), total)
    else:
        budgets = _budgets(plan, total, zeros)
        for name, keys in all_keys("select"):
            if wish.scope == "row":
                cuts[name] = RowCut(budgets[name], plan.weights[name].inputs)
            else:
                cuts |= find_cuts(partial(iter, [(name, keys)]), budgets[name])

    def zeroed(name: str):
        values = plan.source.read(name)
        return values.masked_fill_(cuts[name].mask(keys_of(name, values)), 0)

    def compute(name: str) -> memoryview:
        return tensor_bytes(zeroed(name))

    after = {name: cut.count or 0 for name, cut in cuts.items()}
    if wish.sparsity is None:  # then only the masks can say it
        after = {name: int((cuts[name].mask(k) | (k == 0)).sum()) for name, k in all_keys("count anew")}
    tensors = plan.source.tensors | {
        name: replace(plan.source.tensors[name], compute=partial(compute, name)) for name in plan.weights
    }
    return ZerosCut(plan, replace(plan.source, tensors=tensors), zeroed, after, sum(zeros.values()))


def say_zeros(cut: ZerosCut) -> str:
    """What became zero, for a user."""
    found = cut.record()
    shares = found["tensors"].values()
    return (
        f"{found['zeros']:,} of {found['weights']:,} weights zero, {found['sparsity']:.2%} (before: "
        f"{cut.zeros_before:,}); {min(shares):.1%} to {max(shares):.1%} of a tensor, "
        f"{found['of_all_parameters']:.1%} of all parameters\nnote: {NO_GAIN}"
    )
