"""Plays prunekit.scan, prunekit.evaluate and the fits of cuts for tests of loop.sh: tiny models have no tokenizer.

A sitecustomize.py calls `main` in every Python process. It records their command lines beside ms-swift's (STUB_CALLS,
event "python") and does on disk what the real ones do: cuts by the weights alone, scores from STUB_SCORES, JSON with
{"end of a model's path": token_acc}, else 0.9; the loss is 1 - token_acc. STUB_BREAK names what ends with exit code
3: a script, or a folder that it would write.
"""

import json
import os
import sys
from pathlib import Path
from types import ModuleType

from helpers.paths import ROOT

CUTS = ("manual_select.py", "expert_cut.py", "width_cut.py", "kv_cut.py", "vocab_cut.py")


def main() -> None:
    argv = sys.orig_argv[1:]
    name = argv[1] if argv[:1] == ["-m"] else Path(argv[0]).name if argv else ""
    if name == "prunekit.loop":
        draw_nothing()
    if name not in (*CUTS, "prunekit.scan", "prunekit.evaluate", "prunekit.speed", "prunekit.card"):
        return
    if "--dry-run" in argv:
        return
    with Path(os.environ["STUB_CALLS"]).open("a") as calls:
        calls.write(json.dumps({"event": "python", "argv": argv}) + "\n")
    if os.environ.get("STUB_BREAK") in (name, *(Path(out).name for out in given(argv, "--out"))):
        print(f"{name}: CUDA out of memory", file=sys.stderr)
        sys.stderr.flush()
        os._exit(3)
    values = {flag: given(argv, flag) for flag in ("--model", "--out", "--json", "--text", "--vision")}
    if name == "prunekit.scan":
        scan(values["--model"][0], Path(values["--out"][0]))
    elif name == "prunekit.speed":
        speed(argv[2 : argv.index("--batches")], Path(given(argv, "--json")[0]))
    elif name == "prunekit.card":
        Path(given(argv, "--out")[0]).mkdir()
    elif name == "prunekit.evaluate":
        evaluate(values["--model"], Path(values["--json"][0]))
    else:
        cut(name, argv, values)
    sys.stdout.flush()
    os._exit(0)


def draw_nothing() -> None:
    """Have loop.png be an empty file: to draw it takes longer than all else that prunekit.loop does."""
    report = sys.modules["prunekit.report"] = ModuleType("prunekit.report")
    report.__path__ = [str(ROOT / "prunekit/report")]
    report.draw_loop = lambda loop, path: path.touch()


def given(argv: list[str], flag: str) -> list[str]:
    if flag not in argv:
        return []
    begin = argv.index(flag) + 1
    end = next((i for i in range(begin, len(argv)) if argv[i].startswith("--")), len(argv))
    return argv[begin:end]


def score(model: str) -> float:
    scores = json.loads(os.environ.get("STUB_SCORES", "{}"))
    return next((value for end, value in scores.items() if model.endswith(end)), 0.9)


def evaluate(models: list[str], file: Path) -> None:
    results = [
        {"model": model, "datasets": {"val": {"token_acc": score(model), "loss": 1 - score(model)}}} for model in models
    ]
    file.write_text(json.dumps(results))


def speed(models: list[str], file: Path) -> None:
    """Seconds as many as text layers: attention and MLP take half of a layer's each."""
    from prunekit.checkpoint import statistics

    found = []
    for model in (model for model in models if not model.startswith("--")):
        times = dict.fromkeys(("prefill", "decode"), statistics(model)["num_hidden_layers"])
        parts = dict.fromkeys(times, {"attention": 0.5, "mlp": 0.5})
        found.append({"model": model, "batches": {"1": times}, "parts": parts})
    file.write_text(json.dumps({"models": found}))


def scan(model: str, out: Path) -> None:
    """A path that takes text layers from the fourth on (DeepStack feeds three), each for 0.01 of loss."""
    from prunekit.checkpoint import fingerprint, layer_numbers, open_checkpoint

    checkpoint = open_checkpoint(model)
    names = [f"text-{layer:02d}" for layer in layer_numbers(checkpoint, "text")[3:]]
    path = [{"removed": names[:count], "loss": 0.1 + 0.01 * count} for count in range(len(names) + 1)]
    out.mkdir(parents=True)
    found = {"settings": {"fingerprint": fingerprint(checkpoint)}, "greedy": {"path": path}}
    (out / "scan.json").write_text(json.dumps(found))


def cut(name: str, argv: list[str], values: dict[str, list[str]]) -> None:
    from helpers.cuts import first_experts

    from prunekit.checkpoint import open_checkpoint
    from prunekit.surgery import kv, layers, vocabulary, width
    from prunekit.surgery.cut import write_cut

    source = open_checkpoint(values["--model"][0])
    if name == "manual_select.py":
        made = layers.cut_layers(layers.plan_layers(source, *(map(int, values[f"--{s}"]) for s in ("text", "vision"))))
    elif name == "expert_cut.py":
        made = first_experts(source.path, int(given(argv, "--experts")[0]))
    elif name == "vocab_cut.py":
        made = vocabulary.cut_vocabulary(vocabulary.plan_vocabulary(source, int(given(argv, "--size")[0])), {})
    elif name == "kv_cut.py":
        made = kv.cut_kv(kv.plan_kv(source, int(given(argv, "--kv-heads")[0])))
    else:
        number, share = given(argv, "--heads"), given(argv, "--neuron-share")
        made = width.cut_width(
            width.plan_width(
                source, int(number[0]) if number else None, neuron_share=float(share[0]) if share else None
            )
        )
    write_cut(made, values["--out"][0])
