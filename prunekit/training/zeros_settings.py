"""What a user can say of sparsity in training: when it deepens, when zeros move. No torch: launchers read it, too."""

import math
import os
from dataclasses import dataclass, fields

from prunekit.errors import PruneKitError


def cubic(start: float, end: float, share: float) -> float:
    """Sparsity after a share of the way, most of it early (Zhu & Gupta, 1710.01878)."""
    return end + (start - end) * (1 - share) ** 3


def exponential(start: float, end: float, share: float) -> float:
    """Sparsity after a share of the way, by the same factor at each step of it."""
    return start * (end / start) ** share


SCHEDULES = {"cubic": cubic, "exponential": exponential}


@dataclass(frozen=True)
class Gradual:
    """Pruning by magnitude in one run: at each of `events`, evenly spread over the run, training between them."""

    sparsity: float  # in the end, of the matrices chosen
    start: float | None = None  # at the first event; half of it by default
    events: int = 4
    schedule: str = "exponential"
    scope: str = "global"
    modules: str | None = None  # as sparsify.py's
    worse: float | None = None  # no more pruning once the metric, retrained, is so much worse than before it all

    def __post_init__(self):
        start = self.sparsity / 2 if self.start is None else self.start
        object.__setattr__(self, "start", start)
        if not 0 < start <= self.sparsity < 1:
            raise PruneKitError(f"sparsity={self.sparsity} start={start}: 0 < start <= sparsity < 1 is needed")
        if self.events < 1:
            raise PruneKitError(f"events={self.events}: at least 1")
        if self.schedule not in SCHEDULES:
            raise PruneKitError(f"schedule={self.schedule}: choose one of {', '.join(SCHEDULES)}")
        if self.scope not in ("global", "layer"):
            raise PruneKitError(f"scope={self.scope}: global or layer")
        if self.worse is not None and not self.worse > 0:
            raise PruneKitError(f"worse={self.worse}: a positive share, like 0.15")

    def levels(self) -> list[float]:
        """The sparsity after each event: `start` after the first, `sparsity` after the last."""
        last = self.events - 1
        follow = SCHEDULES[self.schedule]
        assert self.start is not None  # __post_init__ has filled it in
        return [follow(self.start, self.sparsity, i / last) for i in range(last)] + [self.sparsity]

    def steps(self, max_steps: int) -> list[int]:
        """The steps before which the events are: each is followed by as many steps as the others."""
        return [event * max_steps // self.events for event in range(self.events)]


@dataclass(frozen=True)
class Dynamic:
    """Sparse training that moves its zeros every `interval` steps (RigL, Evci et al., 1911.11134)."""

    interval: int = 100
    share: float = 0.3  # of each matrix's weights that are not zero: as many move at the first time
    until: float = 0.75  # of the run; the share falls to 0 there, along a cosine
    sparsity: float | None = None  # zeros made by magnitude when training begins; None: those that are there
    modules: str | None = None

    def __post_init__(self):
        if self.interval < 1:
            raise PruneKitError(f"interval={self.interval}: at least 1 step")
        for name in ("share", "until"):
            if not 0 < getattr(self, name) <= 1:
                raise PruneKitError(f"{name}={getattr(self, name)}: above 0, at most 1")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise PruneKitError(f"sparsity={self.sparsity}: a share, between 0 and 1")

    def share_at(self, step: int, max_steps: int) -> float:
        """Share that moves before this step; 0 where nothing does."""
        end = self.until * max_steps
        if step % self.interval or not 0 < step < end:
            return 0.0
        return self.share / 2 * (1 + math.cos(math.pi * step / end))


def parse_settings(kind: type, text: str, variable: str):
    """Settings from words like `sparsity=0.7 events=4`; PruneKitError names `variable` and what is wrong in it."""
    known, found = {item.name: item.type for item in fields(kind)}, {}
    for word in text.split():
        name, _, value = word.partition("=")
        if name not in known or name in found:
            raise PruneKitError(f"{variable}: {word!r} isn't one of {', '.join(known)}, each once, as name=value")
        convert = next(c for c in (float, int, str) if c.__name__ in str(known[name]))
        try:
            found[name] = convert(value)
        except ValueError:
            raise PruneKitError(f"{variable}: {word!r} needs a number") from None
    try:
        return kind(**found)
    except PruneKitError as error:
        raise PruneKitError(f"{variable}: {error}") from None
    except TypeError:
        raise PruneKitError(f"{variable}: say how sparse it shall be, like sparsity=0.7") from None


SPLIT_UP = "ZeRO-3 and FSDP split weights up: train sparse models with DEEPSPEED=zero2 or DDP"
VARIABLES = {"gradual_pruning": (Gradual, "PRUNEKIT_GRADUAL"), "dynamic_sparsity": (Dynamic, "PRUNEKIT_DYNAMIC")}


def settings_of(callback: str):
    """What the environment says for a callback of plugins/sparsity.py; PruneKitError as `parse_settings`."""
    kind, variable = VARIABLES[callback]
    return parse_settings(kind, os.environ.get(variable, ""), variable)
