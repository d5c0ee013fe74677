"""Narrower layers: fewer attention heads and MLP neurons. A plan (pure), scores that choose, a cut (bytes)."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from tqdm import tqdm

from prunekit.checkpoint import (
    DTYPE_BYTES,
    Checkpoint,
    Heads,
    Outline,
    attending,
    float_bytes,
    heads,
)
from prunekit.errors import PruneKitError
from prunekit.families import configs

from .cut import Account, OfPlan
from .drafts import drop_drafts
from .width_parts import Part, check_shapes, find_parts, mlp_widths, narrow, neurons_key

SCORES = ("magnitude", "activation", "entropy", "variance", "taylor")
ROUND = 8  # a share of the neurons is rounded to such multiples, which matrix units like


@dataclass(frozen=True)
class Kept:
    """What one layer keeps, by numbers in the input, rising. None: all of it."""

    heads: list[int] | None = None  # None of linear attention, too, whose heads all stay
    kv_heads: list[int] | None = None
    neurons: list[list[int]] | None = None  # of each expert; one list where there are no experts

    def along(self, part: Part) -> list[list[int]] | None:
        """What stays along a tensor's axis: one list, or of stacked experts one each. None: all of it."""
        if part.role in ("in", "out"):
            return self.neurons if part.stacked or not self.neurons else [self.neurons[part.expert or 0]]
        numbers = self.kv_heads if part.role in ("k", "v") else self.heads
        return None if numbers is None else [numbers]


@dataclass(frozen=True)
class Scores:
    """How much each head and neuron of a layer matters; more is more. numpy arrays, None where nothing was scored."""

    heads: Any = None  # (heads,); None of linear attention, too
    neurons: Any = None  # (experts, neurons); (1, neurons) where there are no experts


@dataclass(frozen=True)
class WidthPlan:
    """How many heads and neurons stay; which ones, scores decide."""

    source: Checkpoint
    outline: Outline  # of what will come out: `choose` computes the tensors
    heads: Heads | None  # that each layer keeps; None: all
    neurons: dict[str, int]  # neurons that each MLP keeps, by config key
    heads_masked: bool  # zeroed where they are read, not removed
    neurons_masked: bool
    notes: list[str]  # what the user should know, one line each
    across: bool = False  # the numbers are means of all layers, each keeps as many as its scores say


@dataclass(frozen=True)
class WidthCut(OfPlan):
    """A checkpoint of narrower layers, whose changed tensors are computed when they are written."""

    plan: WidthPlan
    result: Checkpoint
    score: str
    scores: dict[int, Scores]  # by layer, like what it keeps
    kept: dict[int, Kept]
    settings: dict[str, Any] = field(default_factory=dict)  # of the fit, like metrics
    metrics: dict[str, float] = field(default_factory=dict)

    def account(self) -> Account:
        """Besides what every entry has: heads that each layer lost, numbered as in the input, and what all scored."""
        plan, before = self.plan, heads(self.source)
        removed: dict[str, Any] = {}
        more: dict[str, Any] = {}
        if plan.heads:
            removed["heads"] = before.query - plan.heads.query
            if not plan.heads_masked and plan.heads.kv < before.kv:
                removed["kv_heads"] = before.kv - plan.heads.kv
            layers = [layer for layer in sorted(self.kept) if self.kept[layer].heads is not None]
            more["heads_removed"] = [
                [head for head in range(before.query) if head not in (self.kept[layer].heads or ())] for layer in layers
            ]
            more["head_scores"] = [[float(f"{score:.4g}") for score in self.scores[layer].heads] for layer in layers]
            if len(layers) < len(self.kept):
                more["head_layers"] = layers  # of which these are
        widths = mlp_widths(plan.source, find_parts(plan.source))
        removed |= {key: widths[key] - number for key, number in plan.neurons.items()}
        masked = ["heads"] * bool(plan.heads and plan.heads_masked)
        masked += ["neurons"] * bool(plan.neurons and plan.neurons_masked)
        settings = {"score": self.score, "masked": masked} | ({"across_layers": True} if plan.across else {})
        settings |= self.settings
        return Account("width_cut", removed, self.metrics or None, settings, more)


# --- plan -------------------------------------------------------------------------------------------------------------


def _plan_heads(checkpoint: Checkpoint, keep: int | None, share: float | None, groups: int | None, mask: bool) -> Heads:
    """Heads that each layer keeps; PruneKitError for numbers that can't be."""
    family = checkpoint.family
    count, kv_heads, dim = heads(checkpoint)
    hidden = configs(checkpoint.config, family.text)[0][family.hidden]
    size = count // kv_heads
    if groups is not None:
        if family.kv_heads is None:
            raise PruneKitError(f"--kv-groups: {family.model_type} has no form with shared KV heads; use --heads")
        if not 1 <= groups <= kv_heads:
            raise PruneKitError(f"--kv-groups {groups}: the model has {kv_heads}; choose 1 to {kv_heads}")
    elif size == 1 and family.kv_heads is not None:
        groups = None  # every head has a KV head of its own, which goes with it
    else:
        groups = kv_heads
    sizes = [1] if groups is None or family.kv_heads is None else range(1, size + 1)
    each = range(1, count + 1) if groups is None or family.kv_heads is None else [groups]
    allowed = sorted({number * n for number in each for n in sizes} - {count})
    divisors = not mask and family.removable_heads == "divisors"
    if divisors:
        allowed = [number for number in allowed if hidden % number == 0]
    wanted, said = (size * groups, f"--kv-groups {groups}") if groups else (None, "")
    if keep is not None:
        wanted, said = keep, f"--heads {keep}"
    elif share is not None:
        said = f"--head-share {share}"
        wanted = next((n for n in allowed if abs(n / count - share) < 0.005), None)  # 0.67 is two thirds
    if wanted not in allowed:
        why = f"{kv_heads} KV heads, each shared by {size}" if size > 1 else "a KV head for each"
        if family.kv_heads is None:
            why = "none of them shared"
        if divisors:
            why += f", and transformers wants a divisor of {family.hidden} {hidden}"
        instead = f"keep one of {', '.join(map(str, allowed))}" if allowed else "none can go"
        if not allowed and divisors and groups != kv_heads:  # one KV head with one query head always can stay
            others = [number for number in range(1, kv_heads) if any(hidden % (number * n) == 0 for n in sizes)]
            if others:
                instead = f"with so many KV heads there is none: give --kv-groups {' or '.join(map(str, others))}"
        raise PruneKitError(f"{said}: the model has {count} attention heads ({why}); {instead}")
    return Heads(int(wanted), int(wanted) if groups is None else groups, dim)


def _plan_neurons(widths: dict[str, int], keep: int | None, share: float | None) -> dict[str, int]:
    if keep is not None and len(widths) > 1:
        listed = " and ".join(f"{width} ({key})" for key, width in widths.items())
        raise PruneKitError(f"--neurons {keep}: the model's MLPs have {listed}; use --neuron-share")
    if share is not None and not 0 < share < 1:
        raise PruneKitError(f"--neuron-share {share}: give a share to keep, between 0 and 1")
    kept: dict[str, int] = {}
    for key, width in widths.items():
        step = ROUND if width % ROUND == 0 else 1
        kept[key] = max(step, round(width * share / step) * step) if share is not None else keep or 0
        if not 0 < kept[key] < width:
            said = f"--neurons {keep}" if share is None else f"--neuron-share {share}"
            instead = f"keep 1 to {width - 1} of them" if width > 1 else "none can go"
            raise PruneKitError(f"{said}: the model has {width} ({key}); {instead}")
    return kept


def plan_width(
    checkpoint: Checkpoint,
    heads_kept: int | None = None,
    head_share: float | None = None,
    neurons: int | None = None,
    neuron_share: float | None = None,
    kv_groups: int | None = None,
    mask: bool = False,
    across: bool = False,
) -> WidthPlan:
    """Plan to keep so many attention heads and MLP neurons of each text layer, the same number in all of them.

    Shares are those that stay. `kv_groups` keeps so many KV heads, each with its query heads. Every KV head keeps the
    same number of query heads. With `mask`, and for heads of families whose head size is hidden / heads, what goes is
    zeroed where it is read (o_proj, down_proj) and shapes stay. With `across` these numbers are means, and layers keep
    more or fewer by importance: only where all that goes is zeroed, since configs have one number for all. Raises
    PruneKitError for numbers that can't be. Reads no weights and writes no file; which heads and neurons stay, `choose`
    decides.
    """
    family, row = checkpoint.family, checkpoint.family.text
    cut_heads = any(value is not None for value in (heads_kept, head_share, kv_groups))
    cut_neurons = neurons is not None or neuron_share is not None
    if not cut_heads and not cut_neurons:
        raise PruneKitError("nothing to cut; name what stays with --heads, --kv-groups or --neurons")
    parts, notes = find_parts(checkpoint), []
    check_shapes(checkpoint, parts)
    heads_masked = mask or family.removable_heads == "none"
    heads_of = None
    if cut_heads:
        heads_of = _plan_heads(checkpoint, heads_kept, head_share, kv_groups, heads_masked)
        if heads_masked:
            why = "" if mask else f" ({family.model_type}: the size of a head is {family.hidden} / {family.heads})"
            notes.append(f"heads are zeroed, not removed{why}: the model gets neither smaller nor faster by it")
    kept = _plan_neurons(mlp_widths(checkpoint, parts), neurons, neuron_share) if cut_neurons else {}
    if across and ((heads_of and not heads_masked) or (kept and not mask)):
        raise PruneKitError("--across-layers: configs have one number for all layers: zero what goes, with --mask")
    if across and kv_groups is not None:
        raise PruneKitError("--across-layers: chooses single heads; give --heads or --head-share, not --kv-groups")
    if kept and mask:
        notes.append("neurons are zeroed, not removed: the model gets neither smaller nor faster by it")

    config, shapes = copy.deepcopy(checkpoint.config), checkpoint.shapes()
    for part in configs(config, row):
        if heads_of and not heads_masked:
            numbers = zip((family.heads, family.kv_heads, family.head_dim), heads_of)
            part |= {key: number for key, number in numbers if key}
        if not mask:
            part |= kept
    plan = WidthPlan(checkpoint, checkpoint, heads_of, kept, heads_masked, mask, notes, across)
    for name, where in parts.items():
        if (number := _kept_number(plan, where)) and not _masks(plan, where):
            shape = list(shapes[name].shape)
            shape[where.axis] = number * where.unit(heads(checkpoint).dim) * where.halves
            if where.turned and shape[1] == shape[2]:  # transformers sees by the shape alone what is to be turned
                raise PruneKitError(
                    f"{number} neurons of each expert: {name} would be square, and read with its axes exchanged; "
                    "keep fewer or more"
                )
            shapes[name] = replace(shapes[name], shape=tuple(shape))
    if heads_of and not heads_masked or kept and not mask:
        notes += drop_drafts(checkpoint, config, shapes)
    return replace(plan, outline=Outline(checkpoint.path, config, shapes))


def _kept_number(plan: WidthPlan, part: Part) -> int | None:
    if part.role in ("in", "out"):
        return plan.neurons.get(neurons_key(plan.source.family.text, part.stacked or part.expert is not None))
    return plan.heads and (plan.heads.kv if part.role in ("k", "v") else plan.heads.query)


def _masks(plan: WidthPlan, part: Part) -> bool:
    return plan.neurons_masked if part.role in ("in", "out") else plan.heads_masked


# --- scores and choice ------------------------------------------------------------------------------------------------


def best(scores, number: int) -> list[int]:
    """Numbers of the highest scores, rising; of equal ones, the first."""
    return sorted((-scores).argsort(kind="stable")[:number].tolist())


def keep_heads(scores, kv_count: int, number: Heads) -> tuple[list[int], list[int]]:
    """(query heads, KV heads) to keep of a layer: so many. Every KV head kept keeps as many query heads."""
    import numpy as np

    groups = np.asarray(scores, float).reshape(kv_count, -1)
    if groups.shape[1] == 1 and number.kv in (number.query, kv_count):  # a KV head for each
        kept = best(groups[:, 0], number.query)
        return kept, (kept if number.kv == number.query else list(range(kv_count)))
    kv_kept = best(groups.sum(1), number.kv)
    each, size = number.query // number.kv, groups.shape[1]
    return [group * size + head for group in kv_kept for head in best(groups[group], each)], kv_kept


def keep_neurons(scores, plan: WidthPlan) -> list[list[int]]:
    """Neurons to keep of a layer's experts, or of its one MLP. scores: (experts, neurons)."""
    number = plan.neurons[neurons_key(plan.source.family.text, len(scores) > 1)]
    return [best(each, number) for each in scores]


def keep(plan: WidthPlan, scores: Scores) -> Kept:
    """What a layer with these scores keeps."""
    kept: dict[str, Any] = {}
    if plan.heads and scores.heads is not None:
        kept["heads"], kept["kv_heads"] = keep_heads(scores.heads, heads(plan.source).kv, plan.heads)
    if plan.neurons:
        kept["neurons"] = keep_neurons(scores.neurons, plan)
    return Kept(**kept)


def magnitudes(checkpoint: Checkpoint, quiet: bool | None = None) -> dict[int, Scores]:
    """Scores by the weights alone, by layer.

    A head's is the Frobenius norm of what it makes of a layer's input, O_h V_h, which no change of V's basis changes; a
    neuron's is the product of the norms of its weights in all projections. Raises PruneKitError where one isn't finite.
    """
    import numpy as np

    row = checkpoint.family.text
    count, kv_count, width = heads(checkpoint)
    parts, attend = find_parts(checkpoint), attending(checkpoint)
    by_layer: dict[int, list[str]] = {}
    for name, part in parts.items():
        by_layer.setdefault(part.layer, []).append(name)

    def weight(layer: int, linear: str):
        names = row.tensors_of(checkpoint.tensors, layer, linear)
        array = checkpoint.read_array(next(name for name, kind in names.items() if kind == "weight"))
        return array.T if row.inputs_first else array

    @np.errstate(invalid="ignore", over="ignore")  # what isn't finite is told at its end
    def score(layer: int) -> Scores:
        of_heads = None
        if layer in attend:
            o = weight(layer, row.o).reshape(-1, count, width)
            v = weight(layer, row.v)[-kv_count * width :]  # of fused ones, v is the last
            v = v.reshape(kv_count, width, -1)
            inner = np.einsum("ohi,ohj->hij", o, o, optimize=True)
            outer = np.einsum("gix,gjx->gij", v, v, optimize=True).repeat(count // kv_count, 0)
            of_heads = np.sqrt(np.maximum((inner * outer).sum((1, 2)), 0))
        norms: dict[int, Any] = {}
        for name in by_layer[layer]:
            part = parts[name]
            if part.role not in ("in", "out") or checkpoint.tensors[name].shape[1:] == ():
                continue
            array = checkpoint.read_array(name)
            for expert, each in enumerate(array) if part.stacked else [(part.expert or 0, array)]:
                axis = part.axis - part.stacked
                squares = np.square(each).sum(axis=1 - axis).reshape(part.halves, -1)
                norms[expert] = norms.get(expert, 1.0) * np.sqrt(squares).prod(0)
        neurons = np.stack([norms[expert] for expert in sorted(norms)])
        if not all(np.isfinite(each).all() for each in (of_heads, neurons) if each is not None):
            raise PruneKitError(
                f"{checkpoint.path}: layer {layer} has weights that are NaN or too large to score: take a "
                "checkpoint from before its training diverged"
            )
        return Scores(of_heads, neurons)

    return {layer: score(layer) for layer in tqdm(sorted(by_layer), desc="magnitudes", leave=False, disable=quiet)}


def best_across(rows: Sequence[Any], number: int) -> list[list[int]]:
    """What each of these rows of scores keeps if they keep `number` on average: the highest of all, each row its best.

    Scores must be comparable between rows. Exactly number * rows are kept.
    """
    import numpy as np

    first = [int(np.argmax(row)) for row in rows]
    left = [(-float(s), place, i) for place, row in enumerate(rows) for i, s in enumerate(row) if i != first[place]]
    kept = [[i] for i in first]
    for _, place, i in sorted(left)[: (number - 1) * len(rows)]:
        kept[place].append(i)
    return [sorted(each) for each in kept]


def keep_all(plan: WidthPlan, scores: dict[int, Scores]) -> dict[int, Kept]:
    """What layers with these scores keep."""
    if not plan.across:
        return {layer: keep(plan, each) for layer, each in scores.items()}
    kept = {layer: Kept() for layer in scores}
    if plan.heads:
        attend = [layer for layer, each in scores.items() if each.heads is not None]
        found = best_across([scores[layer].heads for layer in attend], plan.heads.query)
        kept |= {layer: replace(kept[layer], heads=each) for layer, each in zip(attend, found)}
    for key, number in plan.neurons.items():
        many = key == plan.source.family.text.experts
        layers = [layer for layer, each in scores.items() if (len(each.neurons) > 1) == many]
        rows = iter(best_across([row for layer in layers for row in scores[layer].neurons], number))
        kept |= {layer: replace(kept[layer], neurons=[next(rows) for _ in scores[layer].neurons]) for layer in layers}
    return kept


Change = Callable[[str, Any], Any]  # (name, array) -> array: a refit of a tensor, before it is cut


def refits(plan: WidthPlan) -> bool:
    """Whether there is a loss to refit for, and projections to fold a refit into."""
    return plan.source.family.causal and plan.source.family.text.plain_residual


def choose(
    plan: WidthPlan, score: str, scores: dict[int, Scores], changes: dict[str, list[Change]] | None = None
) -> WidthCut:
    """The cut in which each layer keeps what scores highest. `changes`: refits, by tensor, in their order."""
    kept = keep_all(plan, scores)
    parts, changes = find_parts(plan.source), changes or {}
    tensors = {name: tensor for name, tensor in plan.source.tensors.items() if name in plan.outline.tensors}
    for name in {**parts, **changes}:
        part, cut = parts.get(name), None
        if part and (not _masks(plan, part) or part.role in ("o", "out")) and (stays := kept[part.layer].along(part)):
            cut = part, stays
        if cut or name in changes:
            compute = partial(_written, plan, name, cut, changes.get(name, []))
            tensors[name] = replace(tensors[name], shape=plan.outline.tensors[name].shape, compute=compute)
    result = replace(plan.source, config=plan.outline.config, tensors=tensors)
    return WidthCut(plan, result, score, scores, kept)


def cut_width(plan: WidthPlan) -> WidthCut:
    """By the weights alone."""
    return choose(plan, "magnitude", magnitudes(plan.source))


def _written(
    plan: WidthPlan, name: str, cut: tuple[Part, list[list[int]]] | None, changes: Sequence[Change]
) -> memoryview:
    import numpy as np

    source = plan.source
    tensor = source.tensors[name]
    array: Any
    if changes:
        array = source.read_array(name)
    else:  # bits, whatever they mean
        array = np.frombuffer(source.read_bytes(name), f"<u{DTYPE_BYTES[tensor.dtype]}").reshape(tensor.shape)
    for change in changes:
        array = change(name, array)
    if cut:
        part, stays = cut
        of = partial(narrow, unit=part.unit(heads(source).dim), zero=_masks(plan, part))
        if part.stacked:
            each = replace(part, axis=part.axis - 1)
            array = np.stack([of(a, each, kept) for a, kept in zip(array, stays, strict=True)])
        else:
            array = of(array, part, stays[0])
    if changes:
        return float_bytes(array, tensor.dtype, name)
    return np.ascontiguousarray(array).data.cast("B")
