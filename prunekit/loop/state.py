"""loop.json: what a loop is for, and what came of each of its rounds. Whole or as before, whatever happens."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from prunekit.checkpoint import Outline, open_checkpoint, read_json, write_json
from prunekit.errors import PruneKitError
from prunekit.report.results import read_results
from prunekit.rules import COUNT, FLAG, NAMES, NUMBER, OBJECT, REAL, TEXT, Items, Keys, Values, check

from .candidates import loss_by, sizes
from .choice import Candidate, affordable, kept_share, missing, round_share
from .timing import Timing, part_sizes, read_parts, read_share

LOOP, PICTURE, SECONDS = "loop.json", "loop.png", "seconds"
EVALUATION, LONGER = "evaluation.json", "longer.json"  # of a round's result, and of what was recovered for longer
SPEED = "speed.json"  # of a result beside the base, by turns
TEACHER, CACHE = "teacher", "teacher.cache"  # in a round that cut the vocabulary, and what that one says (CACHE=)
END = "end"  # the folder of stages behind the last round
END_STAGES = ("kv", "lora", "rl")
_CANDIDATE = {"kind": TEXT, "name": TEXT, "cost": REAL, "saved": Values(REAL), "flags": NAMES, "chosen": FLAG}
_ROUND = Keys(
    {"round": COUNT, "good": FLAG, "from": NUMBER, "folder": TEXT, "kept": REAL, "sizes": Values(REAL), "most": REAL,
     "wanted": Values(REAL), "candidates": Items(Keys(_CANDIDATE, tuple(_CANDIDATE)))},
    ("round", "from", "most", "wanted"),
)  # fmt: skip
_ENDED = Keys(
    {"stage": TEXT, "good": FLAG, "from": TEXT, "folder": TEXT, "kept": REAL, "sizes": Values(REAL)},
    ("stage", "good", "from"),
)
_LOOP = Keys(
    {
        "settings": Keys({"targets": Values(REAL), "keep": REAL, "metric": TEXT, "share": REAL, "model": TEXT,
                          "speed_of": TEXT}),
        "base": Keys({"sizes": Values(REAL), "scores": OBJECT, "parts": Values(REAL)}),
        "rounds": Items(_ROUND),
        "end": Items(_ENDED),
    },
    ("settings", "base", "rounds"),
)  # fmt: skip


class Loop:
    """What a folder's loop.json says. `settings`, `base` and `rounds` are as they are in it."""

    def __init__(self, folder: Path, new: dict[str, Any] | None = None):
        """`new`: what a loop begins with that isn't written down yet."""
        self.folder, self.file = folder, folder / LOOP
        content = read_json(self.file) if new is None else new
        check(content, _LOOP, self.file)
        self.content: dict[str, Any] = content
        self.settings, self.base, self.rounds = content["settings"], content["base"], content["rounds"]
        self.ended: list[dict[str, Any]] = content.setdefault("end", [])

    @classmethod
    def begin(cls, folder: Path, settings: dict[str, Any], base: Mapping[str, float]) -> "Loop":
        """A new loop, or the one that is there if it has the same settings; PruneKitError for one with others.

        It is to be saved, once all is noted that it needs of its base.

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
            return loop
        return cls(folder, {"settings": settings, "base": {"sizes": base}, "rounds": []})

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
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

    def affordable(self) -> float:
        """The loss that the next round's cuts may cost, by what the rounds so far lost of theirs."""
        kept = {0: 1.0} | {each["round"]: each["kept"] for each in self.rounds if "good" in each}
        judged = [(_cost(each), kept[each["from"]] - each["kept"]) for each in self._chosen()]
        return affordable(judged, self.last_good["kept"] - self.settings["keep"])

    def failed_cost(self) -> float:
        """The least that the cuts cost by which a round that began where the next one does has failed."""
        start = self.last_good["round"]
        tried = (_cost(each) for each in self._chosen() if each["from"] == start and not each["good"])
        return min(tried, default=math.inf)

    def known(self) -> list[Candidate]:
        """What the last failed round that began where this one does could have cut: its costs are this round's, too."""
        start = self.last_good["round"]
        tried = [each for each in self._chosen() if each["from"] == start and not each["good"]]
        return [
            Candidate(**{field.name: each[field.name] for field in fields(Candidate)} | {"flags": tuple(each["flags"])})
            for each in (tried[-1]["candidates"] if tried else ())
        ]

    def _chosen(self) -> list[dict[str, Any]]:
        """Judged rounds whose cuts the loop chose itself."""
        return [each for each in self.rounds if "good" in each and "candidates" in each]

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
            what = "fits into the round's share (ROUND_SHARE)"
            if self.failed_cost() < math.inf:
                what += " and costs less than what failed"
            self.rounds[-1] |= {"nothing": f"nothing that is left to cut {what}"}
        self.save()

    def scores(self, file: Path) -> dict[str, float]:
        """Of the first model in an evaluation, on its one data set, but for those that are NaN or infinite.

        PruneKitError if the metric wasn't measured.
        """
        found: dict[str, Any] = next(iter(read_results(file)[0]["datasets"].values()), {})
        if self.settings["metric"] not in found:
            raise PruneKitError(
                f"{file}: has no {self.settings['metric']} (METRIC), only {', '.join(found)}: name one of these, or "
                "have it measured (EVALUATE_ARGS)"
            )
        return {key: value for key, value in found.items() if isinstance(value, int | float)}

    def note_base(self, file: Path) -> None:
        """Note what the base scores. PruneKitError for one of which no share can be kept."""
        self.base["scores"], metric = self.scores(file), self.settings["metric"]
        if metric not in self.base["scores"]:
            raise PruneKitError(f"METRIC={metric}: the base's is NaN or infinite: of that no share can be kept")
        self.kept(self.base["scores"])

    def note_speed(self, file: Path) -> None:
        """Note where the base's seconds go: of it what cuts are estimated to save."""
        self.base["parts"] = read_parts(file, self.settings["speed_of"])

    def timing(self, model: Outline, share: float = 1.0) -> Timing | None:
        """What estimates seconds, from a model on that took this share of the base's; None where no speed is wanted.

        Where the base's parts weren't measured (a dry run), they take as long as they have parameters.
        """
        if "speed" not in self.settings["targets"]:
            return None
        base = part_sizes(open_checkpoint(self.settings["model"]))
        parts = self.base.get("parts") or {
            part: base[part] / (base["attention"] + base["mlp"]) for part in ("attention", "mlp")
        }
        return Timing(parts, base).measured(model, share)

    def measured_sizes(self, folder: Path, speed: Path) -> dict[str, float]:
        """A result's sizes, its speed as it was measured beside the base; or that of what it was trained from."""
        found = sizes(folder)
        if "speed" not in self.settings["targets"]:
            return found
        trained = speed.parent.parent.name == END and not speed.exists()
        share = self.best()[1]["sizes"]["speed"] if trained else read_share(speed, self.settings["speed_of"])
        return found | {"speed": share}

    def kept(self, scores: dict[str, float]) -> float:
        """The share of the base's metric; nothing of it where that is NaN or infinite."""
        metric, base = self.settings["metric"], self.base["scores"]
        if metric not in scores:
            return 0.0
        now = loss_by(scores, base.get("tokens")) if metric == "loss" else scores[metric]
        return kept_share(metric, base[metric], scores[metric] if now is None else now)

    def judge(self, result: str) -> dict[str, Any]:
        """The round as its evaluations say: `good`, and `tries`; it stays open while it may be recovered for longer.

        `result`: the folder that EVALUATION is of.
        """
        this = self.next_round()
        this |= self._judged(self.folder / str(this["round"]), result)
        self.save()
        return this

    def _judged(self, here: Path, result: str, again: bool = True) -> dict[str, Any]:
        """What the evaluations in a folder say of its result; `good` is missing where it may be tried `again`."""
        tries: list[dict[str, Any]] = []
        for file, name in ((EVALUATION, result), (LONGER, "longer")):
            if (here / file).exists():
                scores = self.scores(here / file)
                tries.append({"folder": name, "scores": scores, "kept": self.kept(scores)})
        if not tries:
            raise PruneKitError(f"{here / EVALUATION}: isn't there: nothing of {here.name} is measured")
        best = max(tries, key=lambda each: each["kept"])
        good = best["kept"] >= self.settings["keep"]
        found: dict[str, Any] = {"tries": tries, "kept": best["kept"], "folder": best["folder"]}
        if good or not again or (here / LONGER).exists():
            found |= {"good": good, "sizes": self.measured_sizes(here / best["folder"], here / SPEED)}
        return found

    # --- behind the last round

    def best(self) -> tuple[Path, dict[str, Any]]:
        """(checkpoint, what is known of it) that is the loop's result: of the last stage or round that kept enough."""
        if kept := [each for each in self.ended if each["good"]]:
            return self.folder / END / kept[-1]["stage"] / kept[-1]["folder"], kept[-1]
        return self.model(self.last_good["round"]), self.last_good

    def next_stage(self, wanted: Sequence[str]) -> str | None:
        """The first of the stages wanted behind the last round that isn't judged yet."""
        done = {each["stage"] for each in self.ended}
        return next((stage for stage in wanted if stage not in done), None)

    def skip_stage(self, stage: str, why: str) -> None:
        self.ended.append({"stage": stage, "good": False, "from": str(self.best()[0]), "nothing": why})
        self.save()

    def judge_stage(self, stage: str, result: str) -> dict[str, Any]:
        """What its evaluations say of it; `good` is missing, and nothing written down, where it may be tried again."""
        found = {"stage": stage, "from": str(self.best()[0])}
        found |= self._judged(self.folder / END / stage, result, again=stage == "kv")
        if "good" in found:
            self.ended.append(found)
            self.save()
        return found

    def tidy(self, keep: str) -> None:
        """Remove checkpoints of judged rounds, but for the results of all `good` ones, of the `last` of these, or all.

        What a round has measured stays.
        """
        if keep == "all":
            return
        last = self.last_good["round"]
        for each in self.rounds:
            if "good" in each:
                stays = each["good"] and (keep == "good" or each["round"] == last)
                # A teacher with fewer tokens teaches the rounds behind it, too
                teacher = {TEACHER, CACHE} if each["good"] else set()
                _clear(self.folder / str(each["round"]), {"scan", each["folder"] * stays, *teacher})
        for each in self.ended:
            _clear(self.folder / END / each["stage"], {each.get("folder", "") * each["good"]})

    def teacher(self, number: int) -> Path | None:
        """The teacher of what was cut from this round: the base with as few tokens; None: the base itself."""
        while number:
            if (found := self.folder / str(number) / TEACHER).exists():
                return found
            number = self.rounds[number - 1]["from"]
        return None


def _cost(this: Mapping[str, Any]) -> float:
    """The loss that was expected of a round's cuts."""
    return sum(each["cost"] for each in this["candidates"] if each["chosen"])


def _clear(folder: Path, stays: set[str]) -> None:
    """Remove a folder's folders but for those of these names."""
    for each in folder.iterdir() if folder.is_dir() else ():
        if each.name in stays or not each.is_dir():
            continue
        if each.is_symlink():
            each.unlink()
        else:
            shutil.rmtree(each)
