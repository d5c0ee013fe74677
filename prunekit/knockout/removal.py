"""A layer or experts that are knocked out: how they are spelled, which a command names, what is left without them."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prunekit.arguments import Parser
from prunekit.checkpoint import Checkpoint, layer_numbers
from prunekit.errors import PruneKitError
from prunekit.surgery.experts import check_experts, plan_experts
from prunekit.surgery.layers import LayersPlan, parse_numbers, plan_layers

BASELINE = "baseline"  # the whole model, among the names of removals
STACKS = ("text", "vision")
EIGHTHS = 8  # of a mixture's experts: the numbers that "all" means
MEAN, WORST = GATES = "mean", "worst"  # whose quality makes a removal cheap: all rows', the worst group's of them
NAME = re.compile(r"(text|vision)-(\d{2,5})", re.ASCII)


@dataclass(frozen=True, order=True)
class Removal:
    """One layer to do without, numbered as in the whole model. As text it is `text-03`, its name everywhere."""

    stack: str
    layer: int

    def __str__(self) -> str:
        return f"{self.stack}-{self.layer:02d}"

    @classmethod
    def parse(cls, name: str) -> "Removal":
        """From its name. ValueError for any other text."""
        if not (match := NAME.fullmatch(name)):
            raise ValueError(f"{name!r} is no name like text-03")
        return cls(match[1], int(match[2]))

    @property
    def json(self) -> dict[str, Any]:
        """What a record of this removal says of which it is."""
        return {"name": str(self)} | asdict(self)


@dataclass(frozen=True)
class FewerExperts:
    """Each mixture with so many of its experts: what `expert_cut.py` can make. As text it is `experts-12`.

    `gone`: (layer, which of its experts) of those that go; empty where only the name is of use.
    """

    experts: int
    gone: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def __str__(self) -> str:
        return f"experts-{self.experts:02d}"

    @property
    def json(self) -> dict[str, Any]:
        return {"name": str(self), "stack": "experts", "layer": None, "experts": self.experts}


Candidate = Removal | FewerExperts


def parse_removals(text: str) -> list[Removal]:
    """From PRUNEKIT_REMOVE: words like `text:3,7-9` or `vision-02`, a stack once at the most."""
    removals: list[Removal] = []
    for word in text.split():
        match = re.fullmatch("(text|vision)[:-](.+)", word)
        if not match or any(removal.stack == match[1] for removal in removals):
            raise PruneKitError(f"PRUNEKIT_REMOVE: {word!r} names no layers; write it like 'text:3,7 vision:2'")
        removals += [Removal(match[1], number) for number in parse_numbers([match[2]])]
    return removals


def plan_without(checkpoint: Checkpoint, gone: Iterable[Removal]) -> LayersPlan:
    """The cut that takes all these layers together. Raises as `plan_layers`."""
    gone = list(gone)
    return plan_layers(checkpoint, *([removal.layer for removal in gone if removal.stack == s] for s in STACKS))


def list_removals(checkpoint: Checkpoint, text: str, vision: str, notes: list[str] | None = None) -> list[Removal]:
    """Each layer named, to be removed alone: "all", "none" or numbers and ranges like "0-3,10".

    Raises PruneKitError for layers that can't be removed. Of "all" they are left out, unless none can; `notes` gets a
    line that says so.
    """
    removals: list[Removal] = []
    fixed: dict[str, list[Removal]] = {}  # by why they can't go
    for stack, wanted in zip(STACKS, (text.strip(), vision.strip())):
        if wanted == "all":
            numbers = layer_numbers(checkpoint, stack) if stack in checkpoint.family.stacks else []
        else:
            numbers = parse_numbers(wanted.split()) if wanted != "none" else []
        for removal in (Removal(stack, number) for number in numbers):
            try:
                plan_without(checkpoint, [removal])
                removals.append(removal)
            except PruneKitError as error:
                if wanted != "all":
                    raise
                fixed.setdefault(str(error), []).append(removal)
    if fixed and not removals:
        raise PruneKitError(next(iter(fixed)))
    if notes is not None:
        notes += [f"left out: {', '.join(map(str, mine))}: {why}" for why, mine in fixed.items()]
    return removals


def list_experts(checkpoint: Checkpoint, wanted: str) -> list[int]:
    """Numbers of experts a mixture, falling: "all" (seven eighths of them, six, ...), "none", or like "96,64".

    Raises PruneKitError for a model without mixtures, and for numbers that they can't keep.
    """
    if wanted.strip() == "all":
        possible = check_experts(checkpoint)
        numbers = {max(possible.start, possible.stop * part // EIGHTHS) for part in range(1, EIGHTHS)}
    else:
        numbers = set(parse_numbers(wanted.split())) if wanted.strip() != "none" else set()
    for number in numbers:
        plan_experts(checkpoint, number)
    return sorted(numbers, reverse=True)


def knockout_parser(description: str | None, what: str) -> Parser:
    """What the commands on knockouts have in common: the model, the folder of `what` they make, the layers."""
    parser = Parser(description=description)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--model-type", help="ms-swift's, default: the model's own model_type")
    parser.add_argument("--out", type=Path, required=True, help=f"folder of the {what}; an unfinished one is continued")
    parser.add_argument("--text", default="all", help="text layers: all, none, or like 0-3,10 (default: all)")
    parser.add_argument("--vision", default="all", help="vision blocks, likewise")
    parser.add_argument("--by", metavar="COLUMN", help="score each group of rows, too: by skill, source, task, ...")
    parser.add_argument("--gate", choices=GATES, default=MEAN, help="what counts: all rows, or the worst group of --by")
    return parser
