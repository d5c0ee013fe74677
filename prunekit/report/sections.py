"""The sections of a report card, from what report.json holds (prunekit/card.py says how it is made)."""

import math
from typing import Any

from .page import Part, Section, code, heading, paragraph, picture, rows_beside, table

PARTS = ("text", "vision", "embedding", "other")
SMALLER_IS_BETTER = ("loss", "cer")
FOLLOWING = "Intervals: 95%, paired bootstrap over the rows. Coloured: the interval leaves zero out."


def sections_of(report: dict[str, Any]) -> list[Section]:
    names = report["names"]  # of the base, then of the models
    found = [Section("At a glance", [_glance(report, names)])]
    found += [Section("What was cut", _cuts(report, names[1:])), Section("Size", _sizes(report, names))]
    if report["speed"]:
        quantised = [name for name, size in zip(names, report["sizes"]) if size.get("quantised")]
        found.append(Section("Speed", _speed(report["speed"], names, quantised)))
    if report["quality"]:
        found.append(Section("Quality", _quality(report, names)))
    found.append(Section("The way", _way(report, names[1:])))
    return [*found, Section("How to serve it", _serving(report["serving"], names[1:]))]


def _glance(report: dict[str, Any], names: list[str]) -> Part:
    """A row a model: what it is smaller, faster and worse by. Quality is that on the first data set."""
    sizes, speeds = report["sizes"], (report["speed"] or {}).get("rows", [])
    speeds = [] if any("error" in row for row in speeds) else speeds
    dataset, quality = next(iter(report["quality"].items()), ("", None))
    head = ["", "parameters", "KV bytes per token"]
    batch = max(speeds[0]["batches"], key=int) if speeds else ""
    head += [f"decoding, tokens/s at batch {batch}"] * bool(speeds)
    head += [f"{report['metric']} on {dataset}", "difference", "95%"] if quality else []
    rows: list[list[Any]] = []
    for place, name in enumerate(names):
        row: list[Any] = [name]
        for key in ("parameters", "kv_bytes_per_token"):
            row.append(_against(sizes[place][key], sizes[0][key], f"{sizes[place][key]:,}"))
        if speeds:
            rate, base = (speeds[i]["batches"][batch]["decode_rate"] for i in (place, 0))
            row.append(_against(rate, base, f"{rate:,.0f}", smaller_is_better=False))
        if quality and not place:
            row += [f"{quality['scores'][0][report['metric']]:.4f}", "", ""]
        elif quality:
            scores, differences = quality["scores"], quality["differences"]
            row += _score_cells(scores[0], scores[place], differences[place - 1], report["metric"])[1:]
        rows.append(row)
    return table(head, rows)


def _against(new: float, old: float, shown: str, smaller_is_better: bool = True) -> tuple[str, str]:
    """A value, and in brackets its change against the base's."""
    change, mark = _change(new, old, smaller_is_better)
    return f"{shown} ({change})" if change else shown, mark


def _change(new: float, old: float, smaller_is_better: bool = True) -> tuple[str, str]:
    """new against old in per cent, for a cell."""
    if not old or new == old:
        return "", ""
    share = (new - old) / old
    return f"{share:+.1%}", "better" if (share < 0) == smaller_is_better else "worse"


def _beside(values: list[Any], form: str = ",", smaller_is_better: bool = True) -> list[Any]:
    """The base's value, and each model's with its change."""
    cells: list[Any] = [f"{values[0]:{form}}"]
    for value in values[1:]:
        cells += [f"{value:{form}}", _change(value, values[0], smaller_is_better)]
    return cells


def _head(first: str, names: list[str]) -> list[str]:
    return [first, names[0], *(cell for name in names[1:] for cell in (name, "change"))]


def _cuts(report: dict[str, Any], names: list[str]) -> list[Part]:
    parts = []
    for name, anatomy in zip(names, report["anatomy"]):
        lost = [
            f"{stack} {'blocks' if stack == 'vision' else 'layers'} {', '.join(map(str, sorted(way['gone'])))}"
            for stack, way in anatomy["stacks"].items()
            if way["gone"]
        ]
        lost += [
            f"{what} {bar[0]:,} to {bar[1]:,}" for what, bar in anatomy["widths"].items() if bar[0] != bar[1]
        ] + anatomy["notes"]
        said = f"{name}, layers numbered as in the base. Gone or less: {'; '.join(lost) or 'nothing'}."
        parts += [picture(anatomy["picture"], f"{name} beside its base, layer by layer"), paragraph(said)]
    return parts


def _sizes(report: dict[str, Any], names: list[str]) -> list[Part]:
    sizes = report["sizes"]
    rows = [["parameters", *_beside([size["parameters"] for size in sizes])]]
    for part in PARTS:
        counts = [size["parameters_by_component"].get(part, 0) for size in sizes]
        if any(counts):
            rows.append([f"parameters: {part}", *_beside(counts)])
    if all(size.get("vocab_size") for size in sizes):
        rows.append(["tokens of the vocabulary", *_beside([size["vocab_size"] for size in sizes])])
    rows.append(["bytes on disk", *_beside([size["bytes"] for size in sizes])])
    rows.append(["KV bytes per token", *_beside([size["kv_bytes_per_token"] for size in sizes])])
    fitting = []
    for card in sizes[0]["fits"]:
        fits = [size["fits"][card] for size in sizes]
        fitting.append([f"{card} GB: longest context, tokens", *_beside([f["context"] for f in fits], ",", False)])
        fitting.append([f"{card} GB: batch, rows", *_beside([f["batch"] for f in fits], ",", False)])
    arithmetic, places = report["arithmetic"], ", ".join(f"{size['positions']:,}" for size in sizes)
    note = (
        f"By arithmetic, not measured: {arithmetic['usable']:.0%} of a card's memory, less the weights at 2 bytes a "
        "parameter (quantised ones as they are on disk), over the KV cache's bytes per token; activations are not "
        f"counted. A context is at most the model's positions ({places}); rows of a batch have "
        f"{min(arithmetic['batch_context'], *(size['positions'] for size in sizes)):,} tokens or a model's positions."
    )
    return [table(_head("", names), rows), heading("What fits"), table(_head("", names), fitting, note)]


def _speed(speed: dict[str, Any], names: list[str], quantised: list[str]) -> list[Part]:
    pace, found = speed["pace"], speed["rows"]
    if failed := [(name, row["error"]) for name, row in zip(names, found) if "error" in row]:
        return [paragraph(f"{name} could not be measured: {error}") for name, error in failed]
    rows: list[list[Any]] = []
    for size in found[0]["batches"]:
        batches = [row["batches"][size] for row in found]
        for what, key, unit, factor, form in (
            (f"prefill of {pace['prompt']} tokens", "prefill", "ms", 1000, ",.1f"),
            ("prefill", "prefill_rate", "tokens/s", 1, ",.0f"),
            ("decoding", "decode", "ms a token", 1000, ",.2f"),
            ("decoding", "decode_rate", "tokens/s", 1, ",.1f"),
        ):
            values = [batch[key] * factor for batch in batches]
            rows.append([f"batch {size}: {what}, {unit}", *_beside(values, form, not key.endswith("rate"))])
    rows.append(["peak memory, MB", *_beside([row["peak_memory"] / 1e6 for row in found], ",.0f")])
    note = (
        f"On {found[0]['machine']}, in {found[0]['dtype']}, by transformers, text only, {pace['tokens']} tokens "
        f"decoded with a KV cache; each model in processes of its own, by turns, of {pace['rounds']} the best turn's "
        "median. Peak memory is the process's, libraries included, or what torch took of the GPU."
    )
    if quantised:
        note += (
            f" transformers computes with {' and '.join(quantised)} as with a model that isn't quantised, after "
            "unpacking: how fast it is in vLLM, and how small, these rows don't say."
        )
    return [table(_head("", names), rows, note)]


def _quality(report: dict[str, Any], names: list[str]) -> list[Part]:
    parts: list[Part] = []
    for dataset, found in report["quality"].items():
        parts.append(heading(f"{dataset}, {found['rows']:,} rows"))
        parts.append(_scores(found["scores"], found["differences"], names, FOLLOWING))
        for number, name in enumerate(names[1:]):
            if groups := found["groups"]:
                rows = [
                    [group, each["samples"], *(_score_cells(each["scores"][0], each["scores"][number + 1],
                                                            each["differences"][number], report["metric"]))]
                    for group, each in groups.items()
                ]  # fmt: skip
                parts.append(table([f"{name}: {report['metric']}", "rows", names[0], name, "difference", "95%"], rows))
            if found["right_then_wrong"][number] is not None:
                parts += _worst(name, names[0], found["right_then_wrong"][number], found["worst"][number])
    return parts


def _score_cells(base: dict[str, float], model: dict[str, float], differences: dict[str, Any], key: str) -> list[Any]:
    difference = differences[key]
    sure = difference["low"] > 0 or difference["high"] < 0
    better = (difference["difference"] < 0) == (key in SMALLER_IS_BETTER)
    mark = "" if not sure else "better" if better else "worse"
    interval = f"{difference['low']:+.4f} to {difference['high']:+.4f}"
    return [f"{base[key]:.4f}", f"{model[key]:.4f}", (f"{difference['difference']:+.4f}", mark), interval]


def _scores(scores: list[dict[str, Any]], differences: list[dict[str, Any]], names: list[str], note: str) -> Part:
    rows = []
    for name, score, difference in zip(names[1:], scores[1:], differences):
        rows += [[f"{key}: {name}", *_score_cells(scores[0], score, difference, key)] for key in difference]
    return table(["", names[0], "cut", "difference", "95%"], rows, note)


def _worst(name: str, base: str, counts: list[int], worst: list[dict[str, Any]]) -> list[Part]:
    lost, gained = counts
    said = f"{base} is right and {name} wrong on {lost} rows, the other way round on {gained}."
    if not worst:
        return [paragraph(said)]
    rows = [
        {
            "pictures": row["pictures"],
            "said": [("row", f"{row['row']}{', ' + row['group'] if row['group'] else ''}"),
                     ("question", row["question"]), ("truth", row["truth"]), (name, row["answer"] or "nothing")],
        }
        for row in worst
    ]  # fmt: skip
    return [paragraph(f"{said} The worst {len(worst)}, farthest from the truth first:"), rows_beside(rows)]


def _way(report: dict[str, Any], names: list[str]) -> list[Part]:
    parts: list[Part] = [picture(report["way_picture"], "quality against size")] if report["way_picture"] else []
    parts += _loop(report["loop"]) if report.get("loop") else []
    shown: set[str] = set()
    for name, stages in zip(names, report["way"]):
        if not stages:
            parts.append(paragraph(f"{name} is the base."))
            continue
        rows = [
            [
                f"{number}. {stage['stage']}", stage["removed"], _count(stage["parameters"]),
                _count(stage["kv_bytes_per_token"]), stage["measured"],
                "" if stage["seconds"] is None else f"{stage['seconds']:,.0f}", stage["time"],
            ]
            for number, stage in enumerate(stages, 1)
        ]  # fmt: skip
        head = ["stage", "removed", "parameters", "KV B/token", "measured by itself", "seconds", "done"]
        parts += [heading(name), table(head, rows)]
        for stage in stages:
            if (command := stage["command"]) and command not in shown:
                shown.add(command)
                parts.append(code(command))
    note = (
        "Removed layers are numbered as in a stage's own input. Seconds are those of training or cutting, where a "
        "stage has kept them; commands those of stages whose folders are still there."
    )
    return [*parts, paragraph(note)]


def _loop(loop: dict[str, Any]) -> list[Part]:
    """The rounds that led there, what was measured of each, and every line that ran."""
    base, metric, keep = loop["base"], loop["settings"]["metric"], loop["settings"]["keep"]
    units = [unit for unit in ("params", "kv", "speed") if unit in base["sizes"]]
    rows = []
    steps = [(f"round {each['round']}", each) for each in loop["rounds"]]
    for name, each in [*steps, *((f"then {each['stage']}", each) for each in loop["end"])]:
        if not (sizes := each.get("sizes")):
            continue
        cut = "; ".join(found["name"] for found in each.get("candidates", ()) if found["chosen"])
        start = "the base" if each["from"] == 0 else f"round {each['from']}" if name.startswith("round") else ""
        score = next(
            tried["scores"].get(metric, math.nan) for tried in each["tries"] if tried["folder"] == each["folder"]
        )
        shares = [f"{sizes[unit] / base['sizes'][unit]:.1%}" for unit in units]
        verdict = ("kept", "better") if each["good"] else ("left out", "worse")
        rows.append([name, start, cut, *shares, f"{score:.4f}", f"{each['kept']:.1%}", verdict])
    labels = {"params": "parameters", "kv": "KV cache", "speed": "seconds"}
    head = ["", "from", "cut", *(labels[unit] for unit in units), metric, "of the base's", f"gate {keep:.0%}"]
    found = [heading("Rounds"), picture(loop["picture"], "quality against size, round by round"), table(head, rows)]
    if lines := loop["lines"]:
        took = sum(line["seconds"] or 0 for line in lines)
        seconds = [[line["where"], line["command"].split(" --")[0], line["seconds"]] for line in lines]
        found.append(table(["where", "line", "seconds"], seconds, f"Together {took:,} s."))
        found.append(code("\n".join(line["command"] for line in lines)))
    return found


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _serving(serving: list[list[dict[str, Any]]], names: list[str]) -> list[Part]:
    parts = []
    for name, engines in zip(names, serving):
        parts.append(heading(name))
        for engine in engines:
            missing = f" The folder lacks {', '.join(engine['missing'])}." if engine["missing"] else ""
            parts.append(paragraph(f"{engine['engine']}, {engine['checked']}.{missing}"))
            parts.append(code("\n".join(engine["lines"])))
    return parts
