"""Drop experts on calibration data, layer by layer behind the cut ones, and refit what is left of each mixture.

Experts are scored and dropped; then each expert's down projection is refitted by ridge least squares to what is missing
of the uncut layer's state, one expert after the other, and the router by a Gauss-Newton step of its own. What doesn't
bring held-out rows nearer is left as it was.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

from prunekit.data.batches import Calibration
from prunekit.errors import PruneKitError
from prunekit.model.offload import bring
from prunekit.model.parts import Experts, find_part
from prunekit.model.replay import Store, in_memory, record_calls

from .cut import calibrated_on
from .experts import SCORES, ExpertsCut, ExpertsPlan, drop
from .kv_fit import loss_behind
from .sides import RIDGES, LeastSquares, Sides, states_between

MADE_UP = 0.5  # share of the error that comes into a layer for which its refit makes up
ROUNDS = 2  # of refits of all experts and of the router
STEPS = (1.0, 0.5, 0.25, 0.1)  # of a Gauss-Newton step of the router: its length is that which leaves least
SKETCH = 128  # dimensions that outputs are projected to, to compare them; fewer: none are
SKETCHED = 2**27  # numbers, at most, of all experts' outputs on the tokens that choose


@dataclass
class Tokens:
    """What a mixture gets and shall write, flat, padding left out; those of the rows that judge come last."""

    x: torch.Tensor  # (n, hidden) in the model's dtype, from the cut layers before
    original: torch.Tensor  # the same in the uncut model
    wanted: torch.Tensor  # (n, hidden) fp32: what the mixture should write
    weight: torch.Tensor  # (n,) fp32
    fitted: int  # how many come first that are fitted on

    @property
    def parts(self) -> dict[bool, slice]:
        """By whether they judge."""
        return {False: slice(0, self.fitted), True: slice(self.fitted, None)}


def written(experts: Experts, x: torch.Tensor, size: int = 4096) -> torch.Tensor:
    """(n, hidden) fp32: what a mixture writes of states (n, hidden)."""
    return torch.cat([experts.block(part[None])[0].float() for part in x.split(size)])


# --- which experts ----------------------------------------------------------------------------------------------------


def saliency(experts: Experts, x: torch.Tensor, weighted: bool) -> torch.Tensor:
    """(experts,): how often each is chosen; with `weighted` REAP: the mean of share * ‖output‖ where it is.

    REAP: Lasby et al. 2025, 2510.13999, eq. 9.
    """
    _, shares, chosen = experts.router(x)
    scores = torch.zeros(len(experts))
    for expert in range(len(experts)):
        mine, place = (chosen == expert).nonzero(as_tuple=True)
        if not weighted:
            scores[expert] = len(mine)
        elif len(mine):
            norms = output(experts, expert, x[mine]).norm(dim=1)
            scores[expert] = (shares[mine, place].float() * norms).mean()
    return scores


def output(experts: Experts, expert: int, x: torch.Tensor) -> torch.Tensor:
    """(n, hidden) fp32: what an expert gives for states."""
    return (experts.neurons(expert, x) @ down(experts)[expert].T).float()


def down(experts: Experts) -> torch.Tensor:
    """(experts, hidden, width): a view of their down projections."""
    value = experts.module.down_proj
    return value.transpose(1, 2) if getattr(experts.module, "is_transposed", False) else value


def least_missed(experts: Experts, tokens: Tokens, keep: int, chosen: int) -> list[int]:
    """The experts that go until `keep` are left, in that order: next goes the one without which the mixture errs least.

    Errors are those of the mixture as it routes then: the tokens of an expert that is gone go to the next one. All
    experts' outputs are computed, on as many tokens as `SKETCHED` allows, and compared in `SKETCH` random dimensions.
    """
    count, hidden = len(experts), tokens.x.shape[1]
    width = min(hidden, SKETCH)
    size = max(1, SKETCHED // (count * width))
    step = max(1, math.ceil(tokens.fitted / size))
    some = slice(0, tokens.fitted, step)
    x, wanted, weight = tokens.x[some], tokens.wanted[some], tokens.weight[some]
    if width < hidden:
        generator = torch.Generator().manual_seed(0)
        to = torch.randn(hidden, width, generator=generator).to(x.device) / width**0.5
    else:
        to = torch.eye(hidden, device=x.device)
    if shared := experts.shared:
        wanted = wanted - (shared.share(x) * shared.mlp(x)).float()
    outputs = torch.stack([output(experts, expert, x) @ to for expert in range(count)])
    return eliminate(experts.router(x)[0].float(), outputs, wanted @ to, weight, keep, chosen, experts.normed)


def eliminate(
    logits: torch.Tensor,
    outputs: torch.Tensor,
    wanted: torch.Tensor,
    weight: torch.Tensor,
    keep: int,
    chosen: int,
    normed: bool,
) -> list[int]:
    """The experts that go, in that order, of a mixture in which each token goes to its `chosen` likeliest ones.

    logits: (n, experts); outputs: (experts, n, d); wanted: (n, d); weight: (n,). Shares are the softmax over those that
    are there, with `normed` divided by the sum of those chosen.
    """
    alive = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    rows, gone = torch.arange(len(logits), device=logits.device)[:, None], []
    while int(alive.sum()) > keep:
        chances = logits.masked_fill(~alive, -torch.inf).softmax(1)
        top, who = chances.topk(chosen + 1, 1)
        given = top[..., None] * outputs[who, rows]
        total = given[:, :chosen].sum(1)
        shares = top[:, :chosen].sum(1) if normed else torch.ones_like(weight)
        before = (wanted - total / shares[:, None]).square().sum(1)
        cost = torch.zeros(len(alive), device=logits.device)
        for place in range(chosen):  # its expert goes, the next one comes in
            rest = total - given[:, place] + given[:, chosen]
            left = shares - top[:, place] + top[:, chosen] if normed else 1 - top[:, place]
            after = (wanted - rest / left.clamp_min(1e-9)[:, None]).square().sum(1)
            cost.index_add_(0, who[:, place], weight * (after - before))
        if not normed:  # the shares of all others grow, too, when one goes that wasn't chosen
            scale = 1 / (1 - chances).clamp_min(1e-9)
            change = (scale.square() - 1) * total.square().sum(1, keepdim=True)
            change = change - 2 * (scale - 1) * (total * wanted).sum(1, keepdim=True)
            cost += (weight[:, None] * change.scatter(1, who[:, :chosen], 0.0)).sum(0)
        gone.append(int(cost.masked_fill(~alive, torch.inf).argmin()))
        alive[gone[-1]] = False
    return gone


def choose(plan: ExpertsPlan, experts: Experts, tokens: Tokens, score: str, number: int) -> list[int]:
    """The experts that layer `number` keeps, rising."""
    if score == "error":
        gone = least_missed(experts, tokens, plan.experts, plan.chosen)
        return [expert for expert in range(len(experts)) if expert not in gone]
    if score == "random":
        scores = torch.rand(len(experts), generator=torch.Generator().manual_seed(number))
    else:
        scores = saliency(experts, tokens.original[: tokens.fitted], score == "reap")
    return sorted(scores.topk(plan.experts).indices.tolist())


def keep(experts: Experts, kept: list[int]) -> None:
    """Drop the other experts in memory: they have no place in the router any more."""
    for module, names in ((experts.module, ("gate_up_proj", "down_proj")), (experts.router, ("weight",))):
        for name in names:
            setattr(module, name, nn.Parameter(getattr(module, name)[kept].clone(), requires_grad=False))
        module.num_experts = len(kept)


# --- refits -----------------------------------------------------------------------------------------------------------


def _solve(parts: dict[bool, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> torch.Tensor | None:
    """D (outputs, inputs) of y = D x with the ridge that leaves least on the rows that judge; None if none helps.

    parts: (x, y, weight) by whether they judge.
    """
    fit, judge = LeastSquares(), LeastSquares()
    for judges, part in parts.items():
        (judge if judges else fit).add(*part)
    if not len(parts[False][0]) or not len(parts[True][0]) or not fit.xx.diagonal().sum() > 0:
        return None
    solutions = [fit.solve(ridge) for ridge in RIDGES]
    left, best = min((judge.left(solution), number) for number, solution in enumerate(solutions))
    return solutions[best] if left < 1 else None


def refit_down(experts: Experts, tokens: Tokens) -> None:
    """Each expert's down projection, one after the other, to what is missing where it is chosen; the shared one's, too.

    Ridge regression toward what is there: block coordinate descent on one least-squares problem.
    """
    _, shares, chosen = experts.router(tokens.x)
    missing = tokens.wanted - written(experts, tokens.x)
    everyone = torch.arange(len(tokens.x), device=tokens.x.device)

    def fit(features: torch.Tensor, mine: torch.Tensor, weights: torch.Tensor) -> None:
        """features: (m, width) fp32 of tokens `mine`, rising. weights: (hidden, width), changed in place."""
        border = int((mine < tokens.fitted).sum())
        halves = {False: slice(0, border), True: slice(border, None)}
        y, weight = missing[mine], tokens.weight[mine]
        change = _solve({judges: (features[part], y[part], weight[part]) for judges, part in halves.items()})
        if change is not None:
            before = weights.clone()
            weights += change.to(weights.dtype)
            missing[mine] = y - features @ (weights - before).float().T

    if shared := experts.shared:
        features = shared.share(tokens.x) * shared.neurons(tokens.x)
        fit(features.float(), everyone, shared.mlp.down_proj.weight.data)
    for expert, weights in enumerate(down(experts)):
        mine, place = (chosen == expert).nonzero(as_tuple=True)
        fit((shares[mine, place, None] * experts.neurons(expert, tokens.x[mine])).float(), mine, weights.data)


def missed(experts: Experts, tokens: Tokens) -> float:
    """Weighted squares that are missing on the rows that judge."""
    part = tokens.parts[True]
    return float((tokens.wanted[part] - written(experts, tokens.x[part])).square().sum(1) @ tokens.weight[part])


def refit_router(experts: Experts, tokens: Tokens) -> None:
    """A Gauss-Newton step of the router's rows, each by least squares, at the length that leaves least; or none.

    What the mixture writes, y, changes with the logit of an expert that is chosen by share * (its output - y): what is
    missing along that is the change of the logit that the expert would want, which its row is to give.
    """
    _, shares, chosen = experts.router(tokens.x)
    y = written(experts, tokens.x)
    missing = tokens.wanted - y
    if shared := experts.shared:
        y = y - (shared.share(tokens.x) * shared.mlp(tokens.x)).float()
    step = torch.zeros_like(experts.router.weight, dtype=torch.float32)
    for expert in range(len(experts)):
        mine, place = (chosen == expert).nonzero(as_tuple=True)
        x = tokens.x[mine]
        slope = shares[mine, place, None].float() * (output(experts, expert, x) - y[mine])
        size = slope.square().sum(1)
        change = (slope * missing[mine]).sum(1) / size.clamp_min(1e-12)
        border = int((mine < tokens.fitted).sum())
        all_of_it = x.float(), change[:, None], tokens.weight[mine] * size
        halves = {False: slice(0, border), True: slice(border, None)}
        solution = _solve({judges: tuple(each[part] for each in all_of_it) for judges, part in halves.items()})
        if solution is not None:
            step[expert] = solution[0]
            missing[mine] = missing[mine] - slope * (x.float() @ solution[0])[:, None]
    before = experts.router.weight.data.clone()
    best, weight = missed(experts, tokens), before
    for length in STEPS:
        experts.router.weight.data = before + (length * step).to(before.dtype)
        if (now := missed(experts, tokens)) < best:
            best, weight = now, experts.router.weight.data
    experts.router.weight.data = weight


def refit(experts: Experts, tokens: Tokens) -> None:
    for _ in range(ROUNDS):
        refit_down(experts, tokens)
        refit_router(experts, tokens)
    refit_down(experts, tokens)


# --- the model --------------------------------------------------------------------------------------------------------


class _Layer:
    """What a layer's mixture reads and writes on one side, per batch."""

    def __init__(self) -> None:
        self.read: list[torch.Tensor] = []
        self.wrote: list[torch.Tensor] = []
        self.between: list[torch.Tensor] = []


def _watch(sides: Sides, number: int, experts: Experts, teacher: bool) -> _Layer:
    """Run layer `number` on a side; the teacher goes on behind it, the student stays in front of it."""
    seen, side = _Layer(), sides.teacher if teacher else sides.student

    def keep_both(_, inputs, result):
        seen.read.append(sides.store(inputs[0]))
        seen.wrote.append(sides.store(result))

    side.step(number)
    with (
        states_between(sides.layers[number], sides.row, sides.store) as seen.between,
        experts.block.register_forward_hook(keep_both),
    ):
        side.step(number + 1, keep=teacher)
    return seen


def tokens_of(sides: Sides, number: int, experts: Experts) -> Tokens:
    """What the mixture of layer `number` gets and shall write; the teacher is behind that layer then."""
    uncut, own = (_watch(sides, number, experts, teacher) for teacher in (True, False))
    device = sides.teacher.device
    parts: dict[str, list[torch.Tensor]] = {"x": [], "original": [], "wanted": [], "weight": []}
    fitted = 0
    for index, wrote in enumerate(uncut.wrote):
        between = own.between[index].to(device).float()
        gap = uncut.between[index].to(device).float() - between
        wanted = wrote.to(device).float() + MADE_UP * gap
        weight = sides.weight(index, between + wanted).to(device)
        counted = sides.batches[index]["attention_mask"].flatten().bool().to(device)
        each = own.read[index].to(device), uncut.read[index].to(device), wanted
        for name, value in zip(parts, each):
            parts[name].append(value.flatten(0, -2)[counted])
        parts["weight"].append(weight[counted])
        fitted += int(counted.sum()) * (index not in sides.judged)
    return Tokens(**{name: torch.cat(each) for name, each in parts.items()}, fitted=fitted)


def _walk(sides: Sides, plan: ExpertsPlan, quiet: bool | None) -> Iterator[tuple[int, Experts, Tokens]]:
    """(layer, mixture, tokens) of each mixture. As it is when the next one is asked for, the student goes on with it.

    Raises PruneKitError for activations that aren't finite.
    """
    for number, layer in enumerate(tqdm(sides.layers, desc="experts", disable=quiet)):
        on_disk = bring(layer)
        if number in plan.layers:
            experts = find_part(layer, sides.row, sides.row.mlp[-1])
            assert isinstance(experts, Experts)
            tokens = tokens_of(sides, number, experts)
            if not bool(tokens.wanted.isfinite().all()):
                raise PruneKitError(
                    f"{plan.source.path}: layer {number} has activations that are not finite; try --dtype float32"
                )
            yield number, experts, tokens
            del tokens
        else:
            sides.teacher.step(number + 1)
        sides.student.step(number + 1)
        if on_disk:
            layer.to("meta")


@torch.no_grad()
def order_experts(
    plan: ExpertsPlan, model: nn.Module, data: Calibration, quiet: bool | None = None
) -> dict[int, list[int]]:
    """By layer the experts that `error` drops down to the plan's number, in that order; the model stays as it is.

    Each mixture gets what the uncut model gives: behind cut ones `fit_experts` may choose others. Raises as that.
    """
    family, row = plan.source.family, plan.source.family.text
    sides = Sides(model, family, "text", data.fit, range(0), record_calls(model, row, data.fit))
    return {
        number: least_missed(experts, tokens, plan.experts, plan.chosen)
        for number, experts, tokens in _walk(sides, plan, quiet)
    }


@torch.no_grad()
def fit_experts(
    plan: ExpertsPlan,
    model: nn.Module,
    data: Calibration,
    score: str = SCORES[0],
    refitted: bool = True,
    store: Store = in_memory,
    quiet: bool | None = None,
) -> ExpertsCut:
    """Drop experts of `model` by their score, and refit what is left; the cut writes what it then has.

    `score`: `error`, of what is written without an expert (`least_missed`); `reap` or `frequency`, of the uncut model;
    `random`, to compare with. `model` is the uncut one: it ends up cut, layers that accelerate keeps on disk are loaded
    one after the other and are gone when they are done. `store` says where states and what is to be written are kept.
    Metrics are the loss on the held-out rows, `held_out_loss_uncut` and `held_out_loss`. Memory: one layer, the states
    of all tokens in front of it a few times, and `SKETCHED` numbers. PruneKitError for activations that aren't finite.
    """
    family, row = plan.source.family, plan.source.family.text
    batches = [*data.fit, *data.held_out]
    judged = range(len(data.fit), len(batches))
    sides = Sides(model, family, "text", batches, judged, record_calls(model, row, batches), store)
    kept: dict[int, list[int]] = {}
    values: dict[str, torch.Tensor] = {}
    for number, experts, tokens in _walk(sides, plan, quiet):
        kept[number] = choose(plan, experts, tokens, score, number)
        keep(experts, kept[number])
        if refitted and row.plain_residual:
            refit(experts, tokens)
            values |= _values(plan, number, experts, kept[number], store)
        del tokens
    held_out = dict(zip(judged, data.held_out))
    losses = {
        "held_out_loss_uncut": loss_behind(sides.teacher, model, held_out),
        "held_out_loss": loss_behind(sides.student, model, held_out),
    }
    settings = calibrated_on(data) | {"refitted": refitted} | ({"made_up": MADE_UP} if refitted else {})
    arrays = {name: partial(_array, value) for name, value in values.items()}
    return ExpertsCut(plan, drop(plan, kept, arrays), score, kept, settings, losses)


def _array(value: torch.Tensor):
    return value.float().numpy()


def _values(plan: ExpertsPlan, number: int, experts: Experts, kept: list[int], store: Store) -> dict[str, torch.Tensor]:
    """The refitted tensors of a layer as the checkpoint has them, by name."""
    row, source = plan.source.family.text, plan.source
    of_down, values = store(down(experts).cpu()), {}
    for name, place in plan.places.items():
        if place.layer != number:
            continue
        if place.router and name.endswith(".weight"):
            values[name] = store(experts.router.weight.detach().cpu())
        elif place.linear == row.mlp[-1] and not name.endswith("bias"):
            if place.expert is None:  # stacked, as in memory or turned
                same = source.tensors[name].shape[1:] == of_down.shape[1:]
                values[name] = of_down if same else of_down.transpose(1, 2)
            elif place.expert in kept:
                values[name] = of_down[kept.index(place.expert)]
    if shared := experts.shared:
        own = f"{row.mlp[-1].rpartition('.')[0]}.{shared.name}.down_proj"
        for name in row.tensors_of(source.tensors, number, own):
            values[name] = store(shared.mlp.down_proj.weight.detach().cpu())
    return values
