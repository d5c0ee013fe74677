"""The table at the end of a pipeline: every stage's size, quality and time, as text, JSON and a picture.

    python -m prunekit.summary --stages base=checkpoints/base mqa=runs/demo/mqa --evaluation runs/demo/test.json \\
        --seconds runs/demo/seconds --out runs/demo

Sizes are read from the checkpoints, quality from what `prunekit.evaluate --json` wrote. `--line FOLDER` prints one
checkpoint's numbers in one line instead. Of evaluations `--by` a column, each group's exact match follows.
"""

import re
from pathlib import Path
from typing import Any

from prunekit.arguments import Parser
from prunekit.checkpoint import history, statistics, write_json
from prunekit.errors import PruneKitError, run_script
from prunekit.report import draw_stages, shared_groups
from prunekit.report.results import read_results
from prunekit.rules import REAL


def line(folder: Path) -> str:
    """Parameters, KV bytes per token and the last evaluation of a stage's result; "" for what is no checkpoint."""
    if not (folder / "config.json").is_file():
        return ""
    numbers = statistics(folder)
    entries = history(folder)
    metrics = (entries[-1].get("metrics") if entries else None) or {}
    metrics = {key: value for key, value in metrics.items() if REAL.holds(value)}
    text = f"{numbers['parameters'] / 1e6:.2f}M parameters  {numbers['kv_bytes_per_token']:,} KV bytes/token"
    for key in ("eval_token_acc", "reward"):
        if key in metrics:
            text += f"  {key} {metrics[key]:.3f}"
    return text


def read_evaluations(files: list[Path]) -> dict[str, dict[str, dict[str, float]]]:
    """Scores by resolved model folder and data set, from files of `prunekit.evaluate --json`."""
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for file in files:
        for result in read_results(file):
            scores.setdefault(str(Path(result["model"]).resolve()), {}).update(result["datasets"])
    return scores


def summarise(stages: list[tuple[str, Path]], scores, dataset: str, seconds: Path | None) -> list[dict[str, Any]]:
    """A row for each stage; `token_acc` and `exact_match` are those on `dataset`, other data sets come by name."""
    rows = []
    for name, folder in stages:
        numbers = statistics(folder)
        measured = scores.get(str(folder.resolve()), {})
        if None in [measured.get(dataset, {}).get(key) for key in ("token_acc", "exact_match")]:
            raise PruneKitError(f"no evaluation of {folder} on {dataset}: run prunekit.evaluate --json on both first")
        spent = seconds / name if seconds else None
        rows.append(
            {
                "stage": name,
                "folder": str(folder),
                "parameters": numbers["parameters"],
                "kv_bytes_per_token": numbers["kv_bytes_per_token"],
                "token_acc": measured[dataset]["token_acc"],
                "exact_match": measured[dataset]["exact_match"],
                **({"groups": measured[dataset]["groups"]} if "groups" in measured[dataset] else {}),
                "seconds": _seconds(spent) if spent and spent.is_file() else 0,
                "datasets": measured,
            }
        )
    return rows


def _seconds(file: Path) -> int:
    if not (match := re.fullmatch(r"\s*(\d{1,15})\s*", file.read_text(errors="replace"), re.ASCII)):
        raise PruneKitError(f"{file}: holds no number of seconds; mend or remove it")
    return int(match[1])


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, with the change against the first; without seconds if no stage has any."""
    base, timed = rows[0], any(row["seconds"] for row in rows)
    head = f"{'stage':22}{'parameters':>12}{'':>7}{'KV B/token':>12}{'token_acc':>11}{'exact match':>13}"
    lines = [head + (f"{'seconds':>9}" if timed else "")]
    for row in rows:
        share = row["parameters"] / base["parameters"]
        lines.append(
            f"{row['stage']:22}{row['parameters']:>12,}{share:>7.0%}{row['kv_bytes_per_token']:>12,}"
            f"{row['token_acc']:>11.4f}{row['exact_match']:>13.4f}" + (f"{row['seconds']:>9}" if timed else "")
        )
    return "\n".join(lines)


def groups_table(rows: list[dict[str, Any]]) -> str:
    """Exact match of each group of rows (columns) at every stage; "" where the evaluations have no groups."""
    groups = shared_groups(rows)
    if not groups:
        return ""
    widths = [max(9, len(group) + 2) for group in groups]
    lines = [f"{'exact match':22}" + "".join(f"{group:>{width}}" for group, width in zip(groups, widths))]
    for row in rows:
        values = (row["groups"][group]["exact_match"] for group in groups)
        lines.append(f"{row['stage']:22}" + "".join(f"{value:>{width}.3f}" for value, width in zip(values, widths)))
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--line", type=Path, metavar="FOLDER")
    parser.add_argument("--stages", nargs="+", default=[], metavar="NAME=FOLDER", help="the first is the base model")
    parser.add_argument("--evaluation", nargs="+", default=[], type=Path, help="files of prunekit.evaluate --json")
    parser.add_argument("--dataset", default="test", help="name of the data set that the table shows")
    parser.add_argument("--seconds", type=Path, help="folder with a file of seconds for each stage")
    parser.add_argument("--out", type=Path, help="folder for summary.json and stages.png")
    args = parser.parse_args()
    if args.line:
        print(line(args.line))
        return
    if not args.stages or not args.evaluation or not args.out:
        parser.error("--stages, --evaluation and --out are needed")
    stages = [(name, Path(folder)) for name, _, folder in (stage.partition("=") for stage in args.stages)]
    for (name, _), given in zip(stages, args.stages):
        if not name or "/" in name or given.partition("=")[2] == "":
            parser.error(f"--stages {given}: write it NAME=FOLDER")
    rows = summarise(stages, read_evaluations(args.evaluation), args.dataset, args.seconds)
    print(table(rows))
    if by_group := groups_table(rows):
        print(f"\n{by_group}")
    for name in sorted({other for row in rows for other in row["datasets"]} - {args.dataset}):
        print(f"\n{name}")
        for row in rows:
            if name in row["datasets"]:
                scores = row["datasets"][name].items()
                values = "  ".join(f"{key} {value:.4f}" for key, value in scores if REAL.holds(value))
                print(f"  {row['stage']:20}{values}")
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "summary.json", {"stages": rows})
    draw_stages(rows, args.out / "stages.png")


if __name__ == "__main__":
    run_script(main)
