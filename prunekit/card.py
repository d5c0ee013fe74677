"""A report card of pruned models beside their base: one page to show, report.html, and the same as .md and .json.

    python -m prunekit.card checkpoints/pruned checkpoints/mqa --base checkpoints/base --dataset data/test.jsonl

What was cut, drawn; sizes, and what fits into which GPU; speed and memory, measured here, by turns; quality on your
rows with intervals of the paired differences, and the rows that were lost; every stage on the way; how to serve it.
Without --dataset there is no quality, with --no-speed no speed.
"""

import argparse
import gc
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prunekit import errors
from prunekit.arguments import Parser, natural
from prunekit.checkpoint import (
    Checkpoint,
    check_out,
    fingerprint,
    finite,
    new_folder,
    open_checkpoint,
    quantisation,
    statistics,
    write_json,
)
from prunekit.checkpoint.card import measured_said, removed_said
from prunekit.checkpoint.lineage import Lineage, folders_of, lineage
from prunekit.checkpoint.records import COMMAND
from prunekit.data.answers import Judged
from prunekit.data.rows import Rows
from prunekit.errors import PruneKitError, run_script
from prunekit.evaluate import add_arguments, judge_model, prepare
from prunekit.families import positions
from prunekit.loop.state import SECONDS, Loop
from prunekit.report.quality import PICTURES, quality_of
from prunekit.rules import REAL
from prunekit.serving.lines import serving_lines
from prunekit.serving.memory import BATCH_CONTEXT, USABLE, fits
from prunekit.serving.speed import measure_speed
from prunekit.speed import add_speed_arguments, pace_of

FILES = {"report.html", "report.md", "report.json"}
BARS = {
    "heads": "num_attention_heads", "KV heads": "num_key_value_heads", "neurons": "neurons", "experts": "num_experts",
}  # fmt: skip


def is_report(folder: Path) -> bool:
    """Whether a folder holds a report, and nothing besides."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return FILES <= names <= FILES | {PICTURES}


REPLACED: dict[str, Any] = {"kind": "report alone", "is_kind": is_report}


def names_of(paths: list[Path]) -> list[str]:
    """What a report calls models: the folder's name, or all of the path where two folders are named alike."""
    short = [path.absolute().name for path in paths]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths)]


# --- what was cut, and sizes ------------------------------------------------------------------------------------------


def size_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """`statistics`, the positions, and what `fits`."""
    numbers, places = statistics(checkpoint), positions(checkpoint.config)
    method = (quantisation(checkpoint.config) or {}).get("quant_method")
    weights = numbers["bytes"] if method else None
    fitting = fits(numbers["parameters"], numbers["kv_bytes_per_token"], places, weights)
    return {**numbers, "positions": places, "fits": fitting, "quantised": method}


def notes_of(way: Lineage) -> list[str]:
    """What shapes don't show: heads and weights that are zero."""
    notes = []
    for number, stage in enumerate(way.stages, 1):
        masked = (stage.get("settings") or {}).get("masked")
        if masked and isinstance(masked, list):
            notes.append(f"stage {number} zeroed {' and '.join(map(str, masked))} instead of removing them")
        if sparsity := stage.get("sparsity"):
            notes.append(f"stage {number} left {sparsity['sparsity']:.0%} of the layers' weights at zero")
    return notes


def cut_of(name: str, way: Lineage, base: dict[str, Any], model: dict[str, Any], path: Path) -> dict[str, Any]:
    """A drawing of a model beside its base, and what it shows. `base` and `model` are their sizes."""
    from prunekit.report.anatomy import Anatomy, draw_anatomy  # matplotlib

    def said(key: str) -> str:
        change = f" ({(model[key] - base[key]) / base[key]:+.0%})" if base[key] and model[key] != base[key] else ""
        return f"{model[key]:,}{change}"

    widths = {what: (base[key], model[key]) for what, key in BARS.items() if base[key] and model[key]}
    bars = {"text": [(what, *width) for what, width in widths.items()], "vision": [("blocks", 1, 1)]}
    if base["vocab_size"] and model["vocab_size"]:
        widths["tokens"] = (base["vocab_size"], model["vocab_size"])
    title = f"{name}: {said('parameters')} parameters, {said('kv_bytes_per_token')} bytes of KV cache a token"
    draw_anatomy(Anatomy(title, way.stacks, bars, way.taps, notes_of(way), widths.get("tokens")), path)
    return {
        "stacks": {stack: asdict(each) for stack, each in way.stacks.items()},
        "taps": way.taps,
        "widths": widths,
        "notes": notes_of(way),
        "picture": f"{PICTURES}/{path.name}",
    }


# --- the way ----------------------------------------------------------------------------------------------------------


def way_of(way: Lineage, model: Path) -> list[dict[str, Any]]:
    """Of each stage what its entry says, and its command where its folder is still there."""
    found = []
    for stage, folder in zip(way.stages, folders_of(way.stages, model)):
        metrics = stage.get("metrics") or {}
        seconds = metrics.get("train_runtime", stage.get("seconds"))
        file = folder / COMMAND if folder else None
        found.append(
            {
                "stage": stage.get("stage", "?"),
                "input": stage.get("input"),
                "folder": str(folder) if folder else None,
                "removed": removed_said(stage.get("removed")),
                "parameters": stage.get("parameters"),
                "kv_bytes_per_token": stage.get("kv_bytes_per_token"),
                "measured": measured_said(metrics),
                "token_acc": metrics.get("eval_token_acc"),
                "seconds": seconds if REAL.holds(seconds) else None,
                "time": stage.get("time", ""),
                "command": file.read_text(errors="replace") if file and file.is_file() else None,
            }
        )
    return found


def draw_way_of(report: dict[str, Any], path: Path) -> str | None:
    """Quality against size on the first data set, and as the last model's trainings logged it; None: no figures."""
    from prunekit.report.way import draw_way

    base = report["sizes"][0]

    def shares(numbers: dict[str, Any]) -> dict[str, float]:
        return {key: (numbers[key] or 0) / (base[key] or 1) for key in ("parameters", "kv_bytes_per_token")}

    logged = [
        shares(stage) | {"quality": stage["token_acc"]} for stage in report["way"][-1] if REAL.holds(stage["token_acc"])
    ]
    measured = []
    dataset, found = next(iter(report["quality"].items()), ("", None))
    if found:
        qualities = [scores[report["metric"]] for scores in found["scores"]]
        ends = [None, *(difference[report["metric"]] for difference in found["differences"])]
        for name, numbers, quality, end in zip(report["names"], report["sizes"], qualities, ends):
            interval = {key: qualities[0] + end[key] for key in ("low", "high")} if end else {}
            measured.append({"name": name, "quality": quality} | shares(numbers) | interval)
    if not measured and not logged:
        return None
    draw_way(measured, logged, f"{report['metric']} on {dataset}" if found else "token_acc", path)
    return f"{PICTURES}/{path.name}"


def loop_of(folder: Path, base: Checkpoint) -> dict[str, Any]:
    """Rounds and end of a loop, and every line that it ran, with its seconds. PruneKitError for one of another base."""
    loop = Loop(folder)
    if loop.settings.get("fingerprint") != fingerprint(base):
        raise PruneKitError(f"--loop {folder}: began with another base than {base.path}; name what it began with")
    file, lines = folder / SECONDS, []
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
        where, seconds, command = [*line.split(" ", 2), "", ""][:3]
        lines.append({"where": where, "seconds": int(seconds) if seconds.isdecimal() else None, "command": command})
    return {"settings": loop.settings, "base": loop.base, "rounds": loop.rounds, "end": loop.ended, "lines": lines}


# --- the whole --------------------------------------------------------------------------------------------------------


def judge_all(
    paths: list[Path], templates: list[str | None], datasets: dict[str, Rows], args: argparse.Namespace
) -> dict[str, list[Judged]]:
    """By data set what each model makes of the rows that all of them take."""
    found = []
    for path, template in zip(paths, templates):
        found.append(judge_model(path, template, datasets, dict(args.rewards), args))
        gc.collect()  # an engine is a circle: it would stay beside the next one
    return {name: [each[name].among(rows) for each in found] for name, rows in datasets.items()}


def write_report(
    folder: Path,
    checkpoints: list[Checkpoint],
    ways: list[Lineage],
    judged: dict[str, list[Judged]],
    speed: dict[str, Any] | None,
    serving: list[list[dict[str, Any]]],
    loop: dict[str, Any] | None,
    args: argparse.Namespace,
) -> None:
    """All files of a report. The first checkpoint is the base."""
    from prunekit.report.loop import draw_loop
    from prunekit.report.page import write_pages
    from prunekit.report.sections import sections_of

    pictures = folder / PICTURES
    pictures.mkdir()
    paths = [args.base, *args.models]
    names, sizes = names_of(paths), [size_of(checkpoint) for checkpoint in checkpoints]
    report: dict[str, Any] = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": errors.command,
        "names": names,
        "models": [str(path) for path in paths],
        "sizes": sizes,
        "arithmetic": {"usable": USABLE, "batch_context": BATCH_CONTEXT},
        "anatomy": [
            cut_of(name, way, sizes[0], size, pictures / f"model-{number}.png")
            for number, (name, way, size) in enumerate(zip(names[1:], ways, sizes[1:]), 1)
        ],
        "speed": speed,
        "metric": "token_acc" if args.no_generate else "exact_match",
        "quality": {name: quality_of(each, args.by, args.examples, pictures) for name, each in judged.items()},
        "way": [way_of(way, checkpoint.path) for way, checkpoint in zip(ways, checkpoints[1:])],
        "loop": loop,
        "serving": serving,
    }
    report["way_picture"] = draw_way_of(report, pictures / "way.png")
    if loop:
        draw_loop(loop, pictures / "loop.png")
        loop["picture"] = f"{PICTURES}/loop.png"
    write_json(folder / "report.json", finite(report))
    title = f"{', '.join(names[1:])} beside {names[0]}"
    write_pages(folder, title, f"Made by Prune-Kit, {report['made']}", sections_of(report))


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="folders that stages wrote")
    parser.add_argument("--base", required=True, type=Path, help="the model that they were made from")
    parser.add_argument("--out", type=Path, help="folder to write (default: report, beside the last MODEL)")
    parser.add_argument("--loop", type=Path, help="folder of the loop that led there (OUTPUT.loop): its rounds, too")
    parser.add_argument("--overwrite", action="store_true", help="replace a report at OUT")
    parser.add_argument("--dataset", nargs="+", default=[], help="messages: JSONL, or FILE#20 for 20 rows")
    parser.add_argument("--examples", type=natural, default=12, help="lost rows to show of each model (default: 12)")
    add_arguments(parser.add_argument_group("quality"))
    speed = parser.add_argument_group("speed")
    speed.add_argument("--no-speed", action="store_true", help="don't measure it")
    add_speed_arguments(speed)
    parser.add_argument("--check-serving", action="store_true", help="run vLLM and llama.cpp, where they are installed")
    args = parser.parse_args()
    args.out = args.out or args.models[-1].absolute().parent / "report"
    if not args.dataset and (args.by or args.rewards or args.plugins):
        parser.error("--by, --rewards and --plugins are for rows: name some by --dataset")
    return args


def main() -> None:
    args = arguments()
    paths = [args.base, *args.models]
    checkpoints = [open_checkpoint(path, quantised=True) for path in paths]
    check_out(args.out, *(checkpoint.path for checkpoint in checkpoints), overwrite=args.overwrite, **REPLACED)
    loop = loop_of(args.loop, checkpoints[0]) if args.loop else None
    ways = [lineage(checkpoints[0], checkpoint) for checkpoint in checkpoints[1:]]
    datasets, templates = prepare(checkpoints, args)
    pace = None if args.no_speed else pace_of(checkpoints, args)

    speed = None
    if pace:  # before this process takes anything of the GPU
        speed = {"pace": asdict(pace), "rows": measure_speed([checkpoint.path for checkpoint in checkpoints], pace)}
    serving = [serving_lines(checkpoint, args.check_serving) for checkpoint in checkpoints[1:]]  # before it, too
    judged = judge_all(paths, templates, datasets, args) if datasets else {}
    with new_folder(args.out, args.overwrite, **REPLACED) as folder:
        write_report(folder, checkpoints, ways, judged, speed, serving, loop, args)
    print(f"wrote {args.out / 'report.html'}, report.md and report.json")


if __name__ == "__main__":
    run_script(main)
