"""The steps of loop.sh: each reads loop.json, decides one thing, writes it down and says it in lines for the shell.

    python -m prunekit.loop begin --into runs/small.loop --model checkpoints/base --target-params 0.7 --keep 0.97 ...
    python -m prunekit.loop next --into runs/small.loop
    python -m prunekit.loop trials --into runs/small.loop --model checkpoints/base
    python -m prunekit.loop choose --into runs/small.loop --model checkpoints/base --scan scan.json --trials trials.json
    python -m prunekit.loop judge --into runs/small.loop
    python -m prunekit.loop publish --into runs/small.loop --out checkpoints/small
    python -m prunekit.loop reached --into runs/small.loop

next answers ROUND=, FROM= (a folder within INTO; empty: the base), TEACHER= (so, too), MOST= (the parameters that may
go), LEAVES= (the share of them down to which layers are worth a scan), WANTS= (the targets that are not reached),
SCANNED=1 (a failed round has scanned this model) and KEPT=; or END=, why there is no other round. judge answers
VERDICT=good, longer (to be recovered for longer) or back. trials and choose answer command lines; choose ends with exit
code 3 where nothing fits, and with 4 where smaller cuts are worth a trial first (trials --finer). end answers STAGE=,
the next of the stages behind the last round, and FROM=, the folder that it begins with; judge-end is judge for that.
reached ends with exit code 3 where not all targets are.
"""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

from prunekit.arguments import Parser, positive_float, positive_int, share
from prunekit.checkpoint import (
    Checkpoint,
    fingerprint,
    heads,
    history_entry,
    open_checkpoint,
    statistics,
    write_checkpoint,
)
from prunekit.checkpoint.provenance import contents, data_record
from prunekit.checkpoint.records import COMMAND
from prunekit.errors import PruneKitError, run_script
from prunekit.model.load import check_causal
from prunekit.surgery.experts import check_experts
from prunekit.surgery.vocabulary_files import read_tokenizer

from .candidates import check_reachable, cut_lines, from_path, from_trials, list_trials, sizes
from .choice import KINDS, METRICS, absolute_targets, choose, missing, table, useful_share
from .state import END_STAGES, PICTURE, Loop
from .timing import KEYS, Timing


def begin(args: argparse.Namespace) -> None:
    checkpoint = open_checkpoint(args.model)
    check_causal(checkpoint)
    kinds = args.cuts.split()
    if not kinds or not set(kinds) <= set(KINDS) or len(kinds) != len(set(kinds)):
        raise PruneKitError(f"CUTS={args.cuts}: choose from {' '.join(KINDS)}, each once")
    base = sizes(checkpoint)
    if "experts" in kinds:
        _check_experts(checkpoint)
    if "vocabulary" in kinds:
        read_tokenizer(checkpoint)
        if args.metric == "token_acc":
            raise PruneKitError(
                "METRIC=token_acc: CUTS has vocabulary, whose cuts write a text in other tokens; judge by exact_match, "
                "cer, reward or loss"
            )
    if args.target_speed is not None and args.target_speed <= 1:
        raise PruneKitError(f"TARGET_SPEED={args.target_speed:g}: give how many times as fast, above 1")
    targets = absolute_targets(base, args.target_params, args.target_bytes, args.target_kv, args.target_speed)
    if args.target_speed:
        base["speed"] = 1.0
    reached = sorted(targets.keys() - missing(targets, base).keys())
    if reached:
        raise PruneKitError(f"TARGET_{reached[0].upper()}: {args.model} is as small as that already; leave it out")
    check_reachable(checkpoint, kinds, {unit: target for unit, target in targets.items() if unit != "speed"})
    settings = {
        "model": args.model,
        "fingerprint": fingerprint(checkpoint),
        "data": contents(map(data_record, args.data)),
        "targets": targets,
        "keep": args.keep,
        "metric": args.metric,
        "cuts": kinds,
        "share": args.share,
    }
    if args.target_speed:
        settings["speed_of"] = args.speed_of
    if args.into:
        loop = Loop.begin(args.into, settings, base)
        if args.base_scores:
            loop.note_base(args.base_scores)
        if args.base_speed:
            loop.note_speed(args.base_speed)
            check_reachable(checkpoint, kinds, {"speed": targets["speed"]}, loop.timing(checkpoint))
        loop.save()


def _check_experts(checkpoint: Checkpoint) -> None:
    try:
        check_experts(checkpoint)
    except PruneKitError as error:
        raise PruneKitError(f"CUTS has experts: {error}") from None


def next_round(args: argparse.Namespace) -> None:
    loop = Loop(args.into)
    if not args.dry_run:
        loop.tidy(args.keep_rounds)
    if end := loop.end(args.max_rounds):
        print(f"END={end}")
        return
    this = loop.next_round()
    start = loop.last_good
    print(f"ROUND={this['round']}")
    print(f"FROM={'' if this['from'] == 0 else loop.model(this['from']).relative_to(loop.folder)}")
    teacher = loop.teacher(this["from"])
    print(f"TEACHER={teacher.relative_to(loop.folder) if teacher else ''}")
    print(f"MOST={this['most']:.0f}")
    left = 1 - useful_share(this["most"], this["wanted"], start["sizes"])
    # Rounded down, or a path might end above its target; of a little that is missing a layer may be the least that goes
    print(f"LEAVES={min(max(math.floor(left * 1e4 + 1e-6), 1), 9999) / 1e4:.4f}")
    print(f"WANTS={' '.join(this['wanted'])}")
    print(f"SCANNED={1 if any(each.kind == 'layers' for each in loop.known()) else ''}")
    print(f"KEPT={start['kept']:.4f}")


def trials(args: argparse.Namespace) -> None:
    for name, script, flags in _trials(Loop(args.into), open_checkpoint(args.model), args.finer):
        print(name, script, *flags)


def _trials(loop: Loop, checkpoint: Checkpoint, finer: bool) -> list[tuple[str, str, list[str]]]:
    kinds, this, timing = loop.settings["cuts"], loop.rounds[-1], _timing(loop, checkpoint)
    return list_trials(checkpoint, kinds, this["wanted"], this["most"], timing, loop.known(), finer)


def _timing(loop: Loop, checkpoint: Checkpoint) -> Timing | None:
    """Of the round's first model, which took what was measured of it."""
    return loop.timing(checkpoint, loop.last_good["sizes"].get("speed", 1.0))


def choose_cuts(args: argparse.Namespace) -> int:
    loop = Loop(args.into)
    this = loop.rounds[-1]
    checkpoint = open_checkpoint(args.model)
    timing = _timing(loop, checkpoint)
    candidates = from_path(checkpoint, args.scan, timing) if args.scan else []
    for file in args.trials:
        candidates += from_trials(checkpoint, file, timing)
    measured = {each.name for each in candidates}
    candidates += [each for each in loop.known() if each.name not in measured]
    most = loop.affordable()
    if math.isfinite(most):
        print(
            f"by what the rounds so far lost, cuts that cost {most:+.4f} of loss would keep the gate", file=sys.stderr
        )
    chosen = choose(candidates, this["wanted"], this["most"], most_loss=most, failed=loop.failed_cost())
    too_dear = not chosen or sum(each.cost for each in chosen) > most
    tried = {each.flags for each in candidates}
    if too_dear and not args.finer and any(tuple(f) not in tried for *_, f in _trials(loop, checkpoint, finer=True)):
        print("nothing that was tried will do: smaller cuts are tried", file=sys.stderr)
        return 4
    loop.note_choice(candidates, chosen)
    print(table(candidates, chosen, this["wanted"]), file=sys.stderr)
    for line in cut_lines(chosen, checkpoint if args.heal else None):
        print(*line)
    return 0 if chosen else 3


def _verdict(loop: Loop, what: str, found: dict[str, Any]) -> str:
    """Say how much what was judged keeps, draw it if it is decided; good, longer or back."""
    from prunekit.report import draw_loop

    metric, last = loop.settings["metric"], found["tries"][-1]
    score = f"{last['scores'][metric]:.4f}" if metric in last["scores"] else "is NaN or infinite"
    print(
        f"{what}: {metric} {score}, {last['kept']:.1%} of the base's "
        f"{loop.base['scores'][metric]:.4f}; KEEP={loop.settings['keep']:g}"
    )
    if "good" not in found:
        return "longer"
    draw_loop(loop.content, loop.folder / PICTURE)
    return "good" if found["good"] else "back"


def judge(args: argparse.Namespace) -> None:
    loop = Loop(args.into)
    this = loop.judge(args.result)
    verdict = _verdict(loop, f"round {this['round']}", this)
    if verdict != "longer":
        log_to_wandb(loop, this)
    print(f"VERDICT={verdict}")


def end(args: argparse.Namespace) -> None:
    loop = Loop(args.into)
    if not args.dry_run:
        loop.tidy(args.keep_rounds)
    wanted = args.stages.split()
    while stage := loop.next_stage(wanted):
        model = loop.best()[0]
        has = heads(open_checkpoint(model)).kv
        if stage != "kv" or args.dry_run or has > args.kv_heads:
            break
        loop.skip_stage(stage, f"has {has} KV heads already")
    if stage and (loop.good or args.dry_run):
        print(f"STAGE={stage}")
        print(f"FROM={model}")


def judge_end(args: argparse.Namespace) -> None:
    loop = Loop(args.into)
    found = loop.judge_stage(args.stage, args.result)
    verdict = _verdict(loop, f"end, {args.stage}", found)
    if verdict == "back":
        print(f"{args.stage} is left out: what comes next begins with {found['from']}")
    print(f"VERDICT={verdict}")


def publish(args: argparse.Namespace) -> None:
    loop = Loop(args.into)
    if not loop.good:
        raise PruneKitError(
            f"no round kept {loop.settings['keep']:g} of the base's {loop.settings['metric']}: the base is the last "
            f"good model, and {args.out} isn't written; recover for longer, allow less a round, or keep less"
        )
    folder, best = loop.best()
    checkpoint = open_checkpoint(folder)
    numbers = statistics(checkpoint)
    metrics = next(each["scores"] for each in best["tries"] if each["folder"] == best["folder"])
    settings = {key: loop.settings[key] for key in ("targets", "keep", "metric", "cuts", "share")}
    settings |= {"rounds": len(loop.rounds), "round": loop.last_good["round"], "kept": best["kept"]}
    if loop.ended:
        settings["end"] = {each["stage"]: each["good"] for each in loop.ended}
    entry = history_entry("loop", loop.settings["model"], numbers, numbers, None, metrics, settings)
    extra = [file for file in (loop.folder / COMMAND, loop.folder / PICTURE) if file.exists()]
    write_checkpoint(checkpoint, args.out, entry, args.overwrite, extra_files=extra)
    base = loop.base["sizes"]
    stages = "".join(f", then {each['stage']}" for each in loop.ended if each["good"])
    faster = f", {1 / best['sizes']['speed']:.2f} times as fast" if "speed" in best["sizes"] else ""
    print(
        f"round {loop.last_good['round']} is the last good one{stages}: {best['sizes']['params'] / base['params']:.1%} "
        f"of the parameters{faster}, {best['kept']:.1%} of the base's {loop.settings['metric']}; "
        f"published as {args.out}"
    )
    for each in loop.ended:
        if not each["good"]:
            print(f"{each['stage']}: left out: {each.get('nothing') or 'it would keep ' + format(each['kept'], '.1%')}")


def reached(args: argparse.Namespace) -> int:
    """0: what was published has reached all targets; 3: not all, and it says which, and why there is no other round."""
    loop = Loop(args.into)
    if wanted := missing(loop.settings["targets"], loop.best()[1]["sizes"]):
        why = loop.end(args.max_rounds) or "MAX_ROUNDS were done"
        print(f"not reached: {', '.join(f'TARGET_{unit.upper()}' for unit in wanted)}: {why}")
        return 3
    return 0


def log_to_wandb(loop: Loop, this: dict[str, Any]) -> None:
    """One W&B run a round, with what could be cut and what was. Whatever goes wrong there is one line on stderr."""
    if os.environ.get("WANDB_MODE") == "disabled":  # to import it takes longer than all else here
        return
    try:
        import wandb

        with wandb.init(
            name=f"loop/round-{this['round']}",
            job_type="loop",
            config=loop.settings,
            settings=wandb.Settings(console="off", silent=True),
        ) as run:
            columns: list[Any] = ["kind", "name", "cost", "parameters", "kv_bytes_per_token", "speed", "chosen"]
            rows = [
                [
                    each["kind"],
                    each["name"],
                    each["cost"],
                    *map(each["saved"].get, ("params", "kv", "speed")),
                    each["chosen"],
                ]
                for each in this.get("candidates", [])
            ]
            log: dict[str, Any] = {"way": wandb.Image(str(loop.folder / PICTURE)), "kept": this["kept"]}
            if rows:
                log["candidates"] = wandb.Table(columns=columns, data=rows)
            run.log(log)
    except Exception as error:  # W&B raises many kinds; none is worth a loop
        line = " ".join(str(error).split()) or type(error).__name__
        print(f"warning: W&B has no round {this['round']} ({line}); {loop.file} has it", file=sys.stderr)


def main() -> int | None:
    parser = Parser(description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    doing = {"begin": begin, "next": next_round, "trials": trials, "choose": choose_cuts, "judge": judge,
             "end": end, "judge-end": judge_end, "publish": publish, "reached": reached}  # fmt: skip
    for name in doing:
        step = steps.add_parser(name)
        step.add_argument("--into", type=Path, required=name != "begin", help="folder of the loop")
        if name in ("begin", "trials", "choose"):
            step.add_argument("--model", required=True)
        if name in ("next", "reached"):
            step.add_argument("--max-rounds", type=positive_int, default=8)
    parts = steps.choices
    parts["begin"].add_argument("--data", nargs="*", default=[], help="what rounds train and are measured on")
    parts["begin"].add_argument("--base-scores", type=Path, help="evaluation of the base")
    parts["begin"].add_argument("--target-params", type=share)
    parts["begin"].add_argument("--target-bytes", type=positive_float)
    parts["begin"].add_argument("--target-kv", type=share)
    parts["begin"].add_argument("--target-speed", type=positive_float)
    parts["begin"].add_argument("--speed-of", choices=tuple(KEYS), default="decoding")
    parts["begin"].add_argument("--base-speed", type=Path, help="measurement of the base, with its parts")
    parts["begin"].add_argument("--keep", type=share, required=True)
    parts["begin"].add_argument("--metric", choices=METRICS, required=True)
    parts["begin"].add_argument("--cuts", required=True, help="kinds, with spaces between")
    parts["begin"].add_argument("--share", type=share, required=True, help="of the weights, at most, in a round")
    for name in ("next", "end"):
        parts[name].add_argument("--keep-rounds", choices=("good", "last", "all"), default="good")
        parts[name].add_argument("--dry-run", action="store_true", help="remove nothing")
    parts["end"].add_argument("--stages", required=True, help=f"of {' '.join(END_STAGES)}, with spaces between")
    parts["end"].add_argument("--kv-heads", type=positive_int, default=1)
    parts["judge-end"].add_argument("--stage", choices=END_STAGES, required=True)
    parts["judge-end"].add_argument("--result", required=True, help="what of it is measured first")
    parts["choose"].add_argument("--scan", type=Path)
    parts["choose"].add_argument("--trials", type=Path, nargs="*", default=[])
    parts["trials"].add_argument("--finer", action="store_true", help="cuts of a quarter of the size")
    parts["choose"].add_argument("--finer", action="store_true", help="those were tried, too")
    parts["choose"].add_argument("--heal", action="store_true", help="layers, where there is something to heal")
    parts["judge"].add_argument("--result", default="distilled", help="what of a round is measured first")
    parts["publish"].add_argument("--out", required=True)
    parts["publish"].add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    return doing[args.step](args)


if __name__ == "__main__":
    run_script(main)
