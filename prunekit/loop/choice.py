"""The loop's decisions, as arithmetic: how much a round may cut, what is cheapest, whether a model keeps enough.

Nothing here reads a file or imports a library: candidates with a cost and what they save go in, a set comes out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prunekit.errors import PruneKitError

KINDS = ("layers", "experts", "heads", "neurons", "kv", "vocabulary")  # what may be cut, in the order in which it is
SIZES = {"params": "parameters", "bytes": "bytes", "kv": "kv_bytes_per_token"}  # what targets are of, in `statistics`
UNITS = SIZES | {"speed": "of the base's seconds"}  # and what is measured by a clock (timing.py)
METRICS = ("token_acc", "exact_match", "cer", "reward", "loss")
DEAR, LITTLE = 10.0, 0.01  # a step so many times as dear as the set so far, or as so much loss, waits for another round
NEAR = 0.4  # of a round's share is spent where nothing is left between the model and its gate: 10% of 25%


@dataclass(frozen=True)
class Candidate:
    """One cut that was tried and measured. Of each kind at most one is chosen: larger ones hold the smaller."""

    kind: str
    name: str
    cost: float  # what it adds to the loss, healed or refitted, in nats a token
    saved: Mapping[str, float]  # by UNITS' keys: parameters, bytes of weights, of KV cache a token, share of seconds
    flags: tuple[str, ...]  # of the script that makes this cut


def gain(saved: Mapping[str, float], wanted: Mapping[str, float]) -> float:
    """How much of what is wanted is saved, each target's part from 0 to 1: at most as many as there are targets."""
    return sum(min(saved[unit], wish) / wish for unit, wish in wanted.items())


def choose(
    candidates: Sequence[Candidate],
    wanted: Mapping[str, float],
    most: float,
    dear: float = DEAR,
    most_loss: float = math.inf,
    failed: float = math.inf,
) -> list[Candidate]:
    """The set that costs least for what it saves of `wanted`, with at most `most` parameters gone.

    From nothing, step by step: of all candidates that could be added, or stand in for the one of their kind, that with
    the least loss per unit of the target gained; until all that is `wanted` (by UNITS' keys, above 0) is saved, nothing
    that gains fits, or what does is `dear` times as dear as the set so far: a budget needn't be spent, the next round
    looks again. It costs at most `most_loss`; where all that fits costs more, it is the one that costs least, since
    that is an estimate, and the gate decides. All costs less than `failed`, which a round from here has tried. What
    goes beyond the target is no gain. Costs of different kinds are added up. In KINDS' order; empty where nothing fits.
    """
    chosen: dict[str, Candidate] = {}
    while (found := total(list(chosen.values()))) and (now := gain(found, wanted)) < len(wanted) - 1e-9:
        steps, spent = [], sum(c.cost for c in chosen.values())
        for each in candidates:
            set_with = [*(c for kind, c in chosen.items() if kind != each.kind), each]
            saved = total(set_with)
            more = gain(saved, wanted) - now
            cost = sum(c.cost for c in set_with)
            if more > 1e-9 and saved["params"] <= most and cost < failed:
                steps.append(((cost - spent) / more, each.name, each, cost))
        within = [step for step in steps if step[3] <= most_loss]
        if not within and steps and not chosen:
            return [min(steps, key=lambda step: (step[3], step[1]))[2]]
        if not within:
            break
        rate, _, best, _ = min(within, key=lambda step: step[:2])
        if chosen and rate > dear * max(LITTLE, spent / now):
            break
        chosen[best.kind] = best
    return sorted(chosen.values(), key=lambda each: KINDS.index(each.kind))


def affordable(judged: Sequence[tuple[float, float]], room: float) -> float:
    """The loss that a round's cuts may cost (nats a token), if `room` is the share of the base's quality left to lose.

    `judged` has of each round before what its cuts cost and the share that it lost of what it began with, once it had
    recovered: their sums say what a nat loses. Infinite where no round has lost anything.
    """
    cost, lost = (sum(numbers) for numbers in zip(*judged)) if judged else (0.0, 0.0)
    return room * cost / lost if cost > 0 and lost > 0 else math.inf


def useful_share(most: float, wanted: Mapping[str, float], now: Mapping[str, float]) -> float:
    """The share of its parameters that it is of use to take from a model of size `now`, of which `most` may go."""
    share = most / now["params"]
    if not wanted.keys().isdisjoint(("kv", "speed")):  # of which a parameter may save much or nothing
        return share
    return min(share, max(wish / now[unit] for unit, wish in wanted.items()))


def total(chosen: Sequence[Candidate]) -> dict[str, float]:
    """What all of them save together, taken as independent of each other."""
    return {unit: sum(each.saved.get(unit, 0.0) for each in chosen) for unit in UNITS}


def round_share(most: float, kept: float, keep: float, failed: int) -> float:
    """The share of its weights that a model may lose in the next round.

    `most` of them while all is kept, NEAR of that at the gate `keep`, in proportion between them; half of it after each
    round that failed since the last good one.
    """
    room = min(1.0, max(0.0, (kept - keep) / (1 - keep))) if keep < 1 else 0.0
    return most * (NEAR + (1 - NEAR) * room) / 2**failed


def kept_share(metric: str, base: float, now: float) -> float:
    """The share of the base's quality that is kept. PruneKitError for a base of which no share can be kept.

    Of token_acc, exact match and rewards the share of the score, of cer (errors per character) of what is right, of the
    loss (nats a token) of the probability of a token: what perplexity is divided by.
    """
    if metric == "loss":
        return math.exp(min(base - now, 700.0))
    before, after = (1 - base, 1 - now) if metric == "cer" else (base, now)
    if before <= 0:
        raise PruneKitError(f"METRIC={metric}: the base has {base:.4g}: of that no share can be kept; name another")
    return after / before


def absolute_targets(
    base: Mapping[str, float],
    params: float | None,
    size: float | None,
    kv: float | None,
    speed: float | None = None,
) -> dict[str, float]:
    """Targets by UNITS' keys, from shares of the base's, bytes, and how many times as fast. PruneKitError for none."""
    shares = {"params": params, "kv": kv}
    targets = {unit: share * base[unit] for unit, share in shares.items() if share is not None}
    targets |= {} if size is None else {"bytes": size}
    targets |= {} if speed is None else {"speed": 1 / speed}
    if not targets:
        raise PruneKitError(
            "no target: name a share of the parameters or of the KV cache, bytes of weights, or a speed"
        )
    return targets


def missing(targets: Mapping[str, float], numbers: Mapping[str, float]) -> dict[str, float]:
    """How far sizes (by UNITS' keys) are above targets of the same; what is reached is left out."""
    return {unit: numbers[unit] - target for unit, target in targets.items() if numbers[unit] > target}


def amount(unit: str, value: float) -> str:
    """So much of a unit, in words."""
    return f"{value:.1%} {UNITS[unit]}" if unit == "speed" else f"{value:,.0f} {UNITS[unit]}"


def table(candidates: Sequence[Candidate], chosen: Sequence[Candidate], wanted: Mapping[str, float]) -> str:
    """What could be cut, the cheapest a unit first, as text: what it saves, what it costs, and what is chosen (*)."""
    order = sorted(candidates, key=lambda each: each.cost / max(gain(each.saved, wanted), 1e-9))
    lines = [f"  {'parameters':>12}{'KV B/token':>12}{'loss':>9}{'loss / target':>15}  cut"]
    for each in order:
        part = gain(each.saved, wanted)
        rate = f"{each.cost / part:>15.4f}" if part > 0 else f"{'-':>15}"
        lines.append(
            f"{'*' if each in chosen else ' '} {each.saved['params']:>12,.0f}{each.saved['kv']:>12,.0f}"
            f"{each.cost:>+9.4f}{rate}  {each.name}"
        )
    return "\n".join(lines)
