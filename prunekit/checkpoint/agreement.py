"""Whether config.json and the tensors say the same of a model's layers, heads and shapes."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from prunekit.errors import PruneKitError
from prunekit.families import configs, spot_of, text_value

from .format import Checkpoint, Outline
from .quantised import weights_of


def layer_numbers(checkpoint: Outline, stack: str) -> list[int]:
    """The numbers of a stack's layers, [0, …, n-1]; PruneKitError if config and tensors don't agree."""
    row = checkpoint.family.stacks[stack]
    parts = configs(checkpoint.config, row)
    pattern = re.compile(rf"{row.prefix}(\d{{1,9}})\.")
    found = sorted({int(match[1]) for name in checkpoint.tensors if (match := pattern.match(name))})
    said = parts[0][row.count]
    if len(found) != said or found[-1] != said - 1:
        raise PruneKitError(
            f"{checkpoint.path}: config.json says {row.count} = {said}, the weights hold {stack} layers "
            f"{_ranges(found) or 'none'}; the folder is damaged, copy or download it again"
        )
    return found


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}-{b}" if a != b else f"{a}" for a, b in runs)


def attending(checkpoint: Outline) -> list[int]:
    """The numbers of the text layers that have queries, keys and values: all but those of linear attention."""
    row = checkpoint.family.text
    pattern = re.compile(rf"{row.prefix}(\d{{1,9}})\.{re.escape(row.q)}\.weight")
    return sorted(int(match[1]) for name in weights_of(checkpoint) if (match := pattern.fullmatch(name)))


class Heads(NamedTuple):
    """How many heads of queries, and of keys and values, a layer's attention has, and how wide each is."""

    query: int
    kv: int  # as many as of queries in families without shared KV heads
    dim: int


def heads(checkpoint: Outline) -> Heads:
    """Those of the text stack."""
    family = checkpoint.family
    config = configs(checkpoint.config, family.text)[0]
    count = config[family.heads]
    kv_heads = (family.kv_heads and config.get(family.kv_heads)) or count
    head_dim = (family.head_dim and config.get(family.head_dim)) or family.head_dim_default
    return Heads(count, kv_heads, head_dim or config[family.hidden] // count)


def is_tied(checkpoint: Outline) -> bool:
    """Whether the output head shares the embedding's weights, by config or else by the family's habit."""
    for part in (checkpoint.config, *configs(checkpoint.config, checkpoint.family.text)):
        if part.get("tie_word_embeddings") is not None:
            return part["tie_word_embeddings"]
    return checkpoint.family.tied_by_default


def check_agreement(checkpoint: Checkpoint) -> None:
    """PruneKitError if a count in the config isn't that of the tensors, so that nothing later meets such a number."""
    family, row, file = checkpoint.family, checkpoint.family.text, checkpoint.path / "config.json"
    for stack in family.stacks:
        layer_numbers(checkpoint, stack)
    said, *again = configs(checkpoint.config, row)
    sizes = (family.hidden, family.heads, family.kv_heads, family.head_dim)
    for key in filter(None, sizes):
        if any(key in said and key in part and said[key] != part[key] for part in again):
            raise PruneKitError(f"{file}: says {key} twice, and not the same; mend it or download it again")
    shapes = _said_shapes(checkpoint)
    tables = [(re.compile(name), text_value(checkpoint.config, key), key) for name, key in family.tables.items()]
    for name, tensor in weights_of(checkpoint).items():
        shape: tuple[int, ...] | None = None
        keys = ""
        if within := row.within(name):
            spot = spot_of(within[1])
            if spot.kind == "weight":
                shape, keys = shapes.get((spot.name, spot.experts), (None, ""))
            if shape and spot.stacked and len(tensor.shape) == 3:  # which releases turn one way or the other
                shape = (tensor.shape[0], *(shape if shape == tensor.shape[1:] else shape[::-1]))
        elif table := next((table for table in tables if table[1] and table[0].fullmatch(name)), None):
            shape, keys = (table[1], said[family.hidden]), f"{table[2]}, {family.hidden}"
        flat = len(tensor.shape) == 1 and shape and math.prod(shape)  # of weights whose rows their file doesn't say
        if shape and tensor.shape not in (shape, (flat,)):
            raise PruneKitError(
                f"{checkpoint.path}: {name} is {list(tensor.shape)}, by config.json ({keys}) it would be "
                f"{list(shape)}; mend "
                "config.json or download it again"
            )
    if family.taps and family.vision:
        blocks, part = len(layer_numbers(checkpoint, "vision")), configs(checkpoint.config, family.vision)[0]
        taps = part.get(family.taps.key, list(family.taps.default))
        if not isinstance(taps, list) or taps != [block for block in range(blocks) if block in taps]:
            raise PruneKitError(f"{file}: {family.taps.key} {taps} isn't a rising list of the blocks 0 to {blocks - 1}")
        mergers = {
            match[1] for name in checkpoint.tensors if (match := re.match(rf"{family.taps.mergers}(\d+)\.", name))
        }
        if mergers != {str(number) for number in range(len(taps))}:
            raise PruneKitError(
                f"{file}: {family.taps.key} has {len(taps)} taps, the weights hold {len(mergers)} mergers; mend it"
            )


def _said_shapes(checkpoint: Checkpoint) -> dict[tuple[str, bool], tuple[tuple[int, int], str]]:
    """By a projection's name in a text layer, and whether it is an expert's: its shape by the config, and the keys."""
    family, row = checkpoint.family, checkpoint.family.text
    query, kv, dim = heads(checkpoint)
    config = configs(checkpoint.config, row)[0]
    hidden, head_dim = config[family.hidden], family.head_dim or family.hidden
    plain = {row.o: ((hidden, query * dim), f"{family.heads}, {head_dim}")}
    if row.qkv:
        plain[row.qkv] = (((query + 2 * kv) * dim, hidden), f"{family.heads}, {family.hidden}")
    else:
        plain[row.q] = ((query * dim * (1 + row.gated), hidden), f"{family.heads}, {head_dim}")
        keys = f"{family.kv_heads or family.heads}, {head_dim}"
        plain |= dict.fromkeys((row.k, row.v), ((kv * dim, hidden), keys))
    said = {(name, False): shape for name, shape in plain.items()}
    for experts, key in ((False, row.width), (True, row.experts)):
        if key:
            neurons, keys = config.get(key) or 4 * hidden, f"{key}, {family.hidden}"
            said |= dict.fromkeys([(name, experts) for name in row.mlp[:-1]], ((neurons, hidden), keys))
            said[row.mlp[-1], experts] = ((hidden, neurons), keys)
    if row.inputs_first:
        said = {name: (shape[::-1], keys) for name, (shape, keys) in said.items()}
    return said
