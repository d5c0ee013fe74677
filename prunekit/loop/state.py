"""loop.json: what a loop is for, and what came of each of its rounds. Whole or as before, whatever happens."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prunekit.checkpoint import read_json, write_json
from prunekit.errors import PruneKitError
from prunekit.report.results import read_results
from prunekit.rules import COUNT, FLAG, NUMBER, OBJECT, REAL, TEXT, Items, Keys, Values, check

from .candidates import sizes
from .choice import Candidate, kept_share, missing, round_share

LOOP, PICTURE = "loop.json", "loop.png"
EVALUATION, LONGER = "evaluation.json", "longer.json"  # of a round's result, and of what was recovered for longer
_ROUND = Keys(
    {"round": COUNT, "good": FLAG, "from": NUMBER, "folder": TEXT, "kept": REAL, "sizes": Values(REAL), "most": REAL,
     "wanted": Values(REAL)},
    ("round", "from", "most", "wanted"),
)  # fmt: skip
_LOOP = Keys(
    {
        "settings": Keys({"targets": Values(REAL), "keep": REAL, "metric": TEXT, "share": REAL, "model": TEXT}),
        "base": Keys({"sizes": Values(REAL), "scores": OBJECT}),
        "rounds": Items(_ROUND),
    },
    ("settings", "base", "rounds"),
)


class Loop:
    """What a folder's loop.json says. `settings`, `base` and `rounds` are as they are in it."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / LOOP
        content = read_json(self.file)
        check(content, _LOOP, self.file)
        self.content: dict[str, Any] = content
        self.settings, self.base, self.rounds = content["settings"], content["base"], content["rounds"]

    @classmethod
    def begin(cls, folder: Path, settings: dict[str, Any], base: dict[str, float]) -> "Loop":
        """A new loop, or the one that is there if it has the same settings; PruneKitError for one with others.

        What only says where things lie is left out of account (`model`), and how they are trained isn't in them: a
        stage that ran out of memory goes on with smaller batches.
        """
        if (folder / LOOP).exists():
            loop = cls(folder)
            old, new = ({k: v for k, v in each.items() if k != "model"} for each in (loop.settings, settings))
            if changed := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
                raise PruneKitError(
                    f"{folder} holds a loop with another {', '.join(changed)}: repeat its settings ({LOOP}), choose "
                    "another OUTPUT, or set RESTART=1 to forget it"
                )
            loop.settings["model"] = settings["model"]
            loop.save()
            return loop
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / LOOP, {"settings": settings, "base": {"sizes": base}, "rounds": []})
        return cls(folder)

    def save(self) -> None:
        write_json(self.file, self.content)

    @property
    def good(self) -> list[dict[str, Any]]:
        return [each for each in self.rounds if each.get("good")]

    @property
    def last_good(self) -> dict[str, Any]:
        """The last round that kept enough, or else what the base would be as one: `round` 0, `kept`, `sizes`."""
        return self.good[-1] if self.good else {"round": 0, "kept": 1.0, "sizes": self.base["sizes"]}

    def model(self, number: int) -> Path:
        """The checkpoint of a judged round; of 0 the base's."""
        if number == 0:
            return Path(self.settings["model"])
        return self.folder / str(number) / self.rounds[number - 1]["folder"]

    @property
    def failed(self) -> int:
        """Rounds that failed since the last good one."""
        judged = [each["good"] for each in self.rounds if "good" in each]
        return judged[::-1].index(True) if True in judged else len(judged)

    def wanted(self) -> dict[str, float]:
        """What the last good model must still lose, by SIZES' keys."""
        return missing(self.settings["targets"], self.last_good["sizes"])

    def share(self) -> float:
        """The share of its parameters that it may lose in the next round."""
        kept, keep = self.last_good["kept"], self.settings["keep"]
        return round_share(self.settings["share"], kept, keep, self.failed)

    def end(self, most_rounds: int) -> str | None:
        """Why there is no other round; None if there is."""
        judged = [each for each in self.rounds if "good" in each]
        if not self.wanted():
            return "all targets are reached"
        if self.failed > 1:
            return (
                f"two rounds failed, the second with half of what the first cut: KEEP={self.settings['keep']:g} ends it"
            )
        if self.rounds and self.rounds[-1].get("nothing"):
            return self.rounds[-1]["nothing"]
        if len(judged) >= most_rounds:
            return f"MAX_ROUNDS={most_rounds} are done"
        return None

    def next_round(self) -> dict[str, Any]:
        """The round that isn't judged yet, begun if there is none."""
        if not self.rounds or "good" in self.rounds[-1]:
            number = len(self.rounds) + 1
            start = self.last_good
            most = self.share() * start["sizes"]["params"]
            self.rounds.append(
                {"round": number, "from": start["round"], "share": self.share(), "most": most, "wanted": self.wanted()}
            )
            self.save()
        return self.rounds[-1]

    def note_choice(self, candidates: Sequence[Candidate], chosen: Sequence[Candidate]) -> None:
        """Write down what the round could have cut, and what it does."""
        self.rounds[-1]["candidates"] = [asdict(each) | {"chosen": each in chosen} for each in candidates]
        if not chosen:
            self.rounds[-1] |= {"nothing": "nothing that is left to cut fits into the round's share (ROUND_SHARE)"}
        self.save()

    def scores(self, file: Path) -> dict[str, float]:
        """Of the first model in an evaluation, on its one data set. PruneKitError if the metric isn't among them."""
        found: dict[str, Any] = next(iter(read_results(file)[0]["datasets"].values()), {})
        if found.get(self.settings["metric"]) is None:
            raise PruneKitError(
                f"{file}: has no {self.settings['metric']} (METRIC), only {', '.join(found)}: name one of these, or "
                "have it measured (EVALUATE_ARGS)"
            )
        return {key: value for key, value in found.items() if isinstance(value, int | float)}

    def note_base(self, file: Path) -> None:
        """Write down what the base scores. PruneKitError for one of which no share can be kept."""
        self.base["scores"] = self.scores(file)
        self.kept(self.base["scores"])
        self.save()

    def kept(self, scores: dict[str, float]) -> float:
        metric = self.settings["metric"]
        return kept_share(metric, self.base["scores"][metric], scores[metric])

    def judge(self, result: str) -> dict[str, Any]:
        """The round as its evaluations say: `good`, and `tries`; it stays open while it may be recovered for longer.

        `result`: the folder that EVALUATION is of.
        """
        this = self.next_round()
        here = self.folder / str(this["round"])
        tries: list[dict[str, Any]] = []
        for file, name in ((EVALUATION, result), (LONGER, "longer")):
            if (here / file).exists():
                scores = self.scores(here / file)
                tries.append({"folder": name, "scores": scores, "kept": self.kept(scores)})
        if not tries:
            raise PruneKitError(f"{here / EVALUATION}: isn't there: nothing of round {this['round']} is measured")
        best = max(tries, key=lambda each: each["kept"])
        good = best["kept"] >= self.settings["keep"]
        found: dict[str, Any] = {"tries": tries, "kept": best["kept"], "folder": best["folder"]}
        if good or (here / LONGER).exists():
            found |= {"good": good, "sizes": sizes(here / best["folder"])}
        this |= found
        self.save()
        return this

    def tidy(self, keep: str) -> None:
        """Remove checkpoints of judged rounds, but for the results of all `good` ones, of the `last` of these, or all.

        What a round has measured stays.
        """
        last = self.last_good["round"]
        for each in self.rounds if keep != "all" else ():
            if "good" not in each:
                continue
            stays = each["good"] and (keep == "good" or each["round"] == last)
            for folder in (self.folder / str(each["round"])).iterdir():
                if folder.name == "scan" or not folder.is_dir() or (stays and folder.name == each["folder"]):
                    continue
                if folder.is_symlink():
                    folder.unlink()
                else:
                    shutil.rmtree(folder)
