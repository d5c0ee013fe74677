"""Score removals with the seam they make healed, so that a choice is made for the model that will be trained."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from prunekit.data.batches import Calibration
from prunekit.model.parts import find_mixer
from prunekit.model.replay import find_stack
from prunekit.surgery.layers import check_healable, find_seams
from prunekit.surgery.layers_fit import fit_layers
from prunekit.surgery.sides import Projection, Sides, reached

from .removal import BASELINE, Removal
from .scanner import Scanner, Trace


class HealedScanner:
    """A scanner whose model has its seams healed after each cut, as `manual_select.py --heal` heals them.

    That is the layer before each seam, of a candidate as of what is gone already. The layers behind seams stay as they
    are: to refit them costs most of healing, and chooses the same (docs/knockout.md). Raises PruneKitError for a family
    that can't be healed.
    """

    def __init__(self, scanner: Scanner, data: Calibration):
        self.scanner, self.data = scanner, data
        self.model, self.stacks = scanner.model, scanner.checkpoint.family.stacks
        for index in range(len(scanner.batches)):
            scanner.refer(index)  # to the uncut model, while it is
        projections = [
            Projection(layer, row, name)
            for row in self.stacks.values()
            for layer in getattr(*find_stack(self.model, row))
            for name in (find_mixer(layer, row), row.mlp[-1])
        ]
        parameters = [p for projection in projections for p in projection.parameters.values()]
        self.uncut = [(parameter, parameter.data) for parameter in parameters]
        self.healed: tuple[Removal, ...] = ()
        # Of the model as it is healed now: each batch's pass, and what it scores
        self.runs: list[tuple[Trace, dict[str, list]]] = []

    @contextlib.contextmanager
    def uncut_weights(self) -> Iterator[None]:
        """Within the block the model has its own weights, outside of it the refitted ones."""
        refitted = [parameter.data for parameter, _ in self.uncut]
        for parameter, data in self.uncut:
            parameter.data = data
        try:
            yield
        finally:
            for (parameter, _), data in zip(self.uncut, refitted):
                parameter.data = data

    def heal(self, gone: Sequence[Removal]) -> None:
        """Refit the model for this cut, from its own weights."""
        if tuple(gone) == self.healed:
            return
        self.runs = []
        for parameter, data in self.uncut:
            parameter.data = data.clone()
        if gone and find_seams(plan := self.scanner.plan(gone)):
            check_healable(plan)
            fit_layers(plan, self.model, self.data, behind=False)
        self.healed = tuple(gone)

    def measure(
        self,
        gone: Sequence[Removal],
        candidates: Sequence[Removal],
        scored: Callable[[], None] = lambda: None,
    ) -> list[dict[str, Any]]:
        """What `Scanner.measure` returns, for every batch: the model healed after the cut, and each candidate's."""
        self.heal(gone)
        scanner, batches = self.scanner, range(len(self.scanner.batches))
        with torch.inference_mode():
            runs = self._runs_without(gone)
            records: list[dict[str, Any]] = [
                {"scores": {BASELINE: score}, "influence": trace.influence, "seconds": trace.seconds}
                for trace, score in runs
            ]
            for stack in self.stacks:
                mine = sorted(k for k in candidates if k.stack == stack)
                for candidate, start in self._refitted(stack, gone, mine):
                    for index in batches:
                        final = scanner.final_without(candidate, gone, runs[index][0], scanner.batches[index], start)
                        scores = records[index]["scores"]
                        scores[str(candidate)] = scores[BASELINE] if final is None else scanner.score(final, index)
                    scored()
        return records

    def _runs_without(self, gone: Sequence[Removal]) -> list[tuple[Trace, dict[str, list]]]:
        """Every batch run without `gone`, for which the model is healed, and scored: once, while that is so."""
        scanner, room = self.scanner, self.scanner.state_bytes
        if not self.runs:
            scanner.state_bytes //= len(scanner.batches)  # all batches' states are kept at once
            with scanner.without(gone):
                traces = [scanner.trace(batch, gone) for batch in scanner.batches]
            scanner.state_bytes = room
            self.runs = [(trace, scanner.score(trace.final, index)) for index, trace in enumerate(traces)]
        return self.runs

    def _refitted(
        self, stack: str, gone: Sequence[Removal], candidates: Sequence[Removal]
    ) -> Iterator[tuple[Removal, int]]:
        """Each candidate while the layer before its seam is refitted, and the first position that is then changed."""
        family, sides = self.scanner.checkpoint.family, None
        kept = self.scanner.kept(stack, gone)
        for candidate in candidates:
            plan = self.scanner.plan([*gone, candidate])
            seams = find_seams(plan)
            if seams:
                check_healable(plan)
            if sides is None:
                with self.uncut_weights():
                    rows = reached(self.model, family, stack, self.data.fit, self.data.held_out)
                sides = Sides(self.model, family, stack, *rows, plan=plan)
            seam = next((s for s in seams if s.stack == stack and candidate.layer in s.gone), None)
            if seam is None:  # nothing is left before it
                yield candidate, kept.index(candidate.layer)
                continue
            trial = sides.without(plan)
            with self.uncut_weights():
                targets = trial.targets(seam.before)
            refit = trial.refit(seam.before, targets)
            try:
                yield candidate, kept.index(seam.before)
            finally:
                refit.take_back()
