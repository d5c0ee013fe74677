"""Every script and every kind of file: whatever is wrong ends with one line on stderr, exit code 2 and nothing written.

Scripts run in this process, a few milliseconds each, under a limit of memory and time that only a script which takes an
absurd number at its word can meet.
"""

import contextlib
import copy
import importlib
import io
import json
import math
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers.paths import ROOT
from helpers.tiny_models import FAMILIES
from helpers.tiny_taggers import save_tagger, write_rows
from matplotlib.figure import Figure

from prunekit.checkpoint import INDEX, fingerprint, open_checkpoint
from prunekit.errors import run_script
from prunekit.surgery.cut import write_cut
from prunekit.surgery.layers import cut_layers, plan_layers

SECONDS, MEMORY = 20, 2 * 2**30  # of one script; a good one takes a hundredth of it
BAD = [
    "5",
    5.5,
    -1,
    0,
    True,
    None,
    [],
    {},
    [5],
    {"a": 1},
    "\ud800",
    math.nan,
    math.inf,
    10**9,
    10**18,
    10**400,
    [[]] * 3,
]


class Stream(io.TextIOWrapper):
    """A stream like the interpreter's own: strict where that is."""

    def __init__(self, errors: str):
        super().__init__(io.BytesIO(), encoding="utf-8", errors=errors, write_through=True)

    def text(self) -> str:
        return self.buffer.getvalue().decode(errors="replace")


def _too_long(number, frame):
    raise TimeoutError(f"not done in {SECONDS} seconds")


@contextlib.contextmanager
def limits():
    """At most SECONDS and MEMORY more than now."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, _too_long)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))
        signal.signal(signal.SIGALRM, handler)


def run(name: str, *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a script's or module's main with this command line."""
    main = importlib.import_module(name.removesuffix(".py")).main
    out, err, argv = Stream("strict"), Stream("backslashreplace"), sys.argv
    sys.argv = [name, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), limits():
            run_script(main)
    except SystemExit as end:
        return end.code, out.text(), err.text()
    except BaseException as error:  # what would be a traceback
        return 1, out.text(), f"{err.text()}Traceback: {type(error).__name__}: {str(error)[:200]}"
    finally:
        sys.argv = argv
    raise AssertionError("run_script ends the process")


def snapshot(folder: Path) -> set[tuple[str, int]]:
    return {(str(path), path.lstat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def refusal(code: int, err: str) -> str | None:
    """What is wrong with a refusal; None if it is one: exit code 2, one line (after argparse's usage)."""
    lines = err.splitlines()
    if lines and lines[0].startswith("usage: "):
        lines = [line for line in lines if not line.startswith((" ", "usage: "))]
    if code != 2 or len(lines) != 1 or "error: " not in lines[0]:
        return f"exit code {code}, {err[-300:]!r}"
    return None


class Tries:
    """Collects what isn't as it should be, over many command lines in one folder."""

    def __init__(self, folder: Path):
        self.folder, self.count, self.found = folder, 0, []

    def refused(self, what: object, name: str, *arguments: object) -> None:
        """This command line must be refused, and leave nothing."""
        self._try(what, name, arguments, must=True)

    def survived(self, what: object, name: str, *arguments: object) -> None:
        """This command line must be refused, and leave nothing; or else it ends well."""
        self._try(what, name, arguments, must=False)

    def _try(self, what, name, arguments, must):
        before = snapshot(self.folder)
        code, _, err = run(name, *arguments)
        self.count += 1
        problem = refusal(code, err)
        if code == 0 and not must:
            problem = None
        elif problem is None and snapshot(self.folder) != before:
            problem = "something was written"
        if problem:
            self.found.append(f"{name} {str(what)[:150]}: {problem}")

    def check(self):
        assert not self.found, f"{len(self.found)} of {self.count}:\n" + "\n".join(self.found[:20])


@pytest.fixture
def tries(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path, **_: path.touch()
    )  # drawn, not rendered: that takes long
    return Tries(tmp_path)


@pytest.fixture
def linked(tiny, tmp_path):
    """linked(family): a folder of that family's files as hard links, and its config, to be changed by `put`."""

    def make(family: str, name: str = "model") -> Path:
        return link(tiny(family), tmp_path / name)

    return make


def link(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder, copy_function=os.link))


def put(file: Path, content) -> None:
    """Write a file anew: text and bytes as they are, anything else as JSON."""
    file.unlink(missing_ok=True)
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def places(value, path=()):
    """Every place in a JSON document, as a path of keys; of lists the first two items and the last."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in sorted({0, 1, len(value) - 1} & set(range(len(value)))):
            yield from places(value[index], (*path, index))


def changed(document, path, value):
    """The document with this value at this place; DELETED takes it away."""
    document = copy.deepcopy(document)
    *parents, last = path
    inner = document
    for key in parents:
        inner = inner[key]
    if value is DELETED:
        del inner[last]
    else:
        inner[last] = value
    return document


DELETED = object()
RAW = ["", "{", "[", "null", "5", "[]", "{}", '"x"', b"\xff\xfe{}", "[" * 100_000, '{"a":' * 50_000, "1" * 5000,
       '{"a": 1, "a": ' + "9" * 5000 + "}", "\x00", '"\ud800"', "[{}]", "[[]]", "{}{}"]  # fmt: skip


def mutations(document, values=(*BAD, DELETED)):
    for path in places(document):
        for value in values:
            yield (
                f"{path} = {'deleted' if value is DELETED else repr(value)[:40]}",
                changed(document, path, value),
            )


# --- config.json -----------------------------------------------------------------------------------------------------

CHEAP = {  # what reads a config, with arguments that its model can be cut by
    "prunekit.inspect": (),
    "prunekit.summary": (),
    "manual_select.py": ("--text", "4", "--dry-run"),
    "kv_cut.py": ("--kv-heads", "1", "--dry-run"),
    "width_cut.py": ("--heads", "2", "--neuron-share", "0.5", "--dry-run"),
    "sparsify.py": ("--sparsity", "0.5", "--dry-run"),
    "prunekit.critical": (),
    "prunekit.training.cycles": (),
}


def words(name: str, model) -> tuple:
    match name:
        case "prunekit.inspect" | "prunekit.critical":
            return (model,)
        case "prunekit.summary":
            return ("--line", model)
        case "prunekit.training.cycles":
            return ("plan", "--model", model, "--sparsity", "0.5")
    return ("--model", model, *CHEAP[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_any_key_of_any_config_is_checked(family, linked, tries):
    folder = linked(family)
    config = json.loads((folder / "config.json").read_text())
    for what, content in mutations(config):
        put(folder / "config.json", content)
        tries.survived(what, "prunekit.inspect", folder)
    tries.check()


NEEDED = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "model_type",
    "n_layer",
    "n_embd",
    "n_head",
)
READ = {  # keys without which, or with nonsense for which, no text layer can be counted or cut
    "llama": ["num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
              "vocab_size", "intermediate_size", "max_position_embeddings", "architectures", "model_type"],
    "gpt2": ["n_layer", "n_embd", "n_head", "n_positions", "vocab_size"],
}  # fmt: skip


@pytest.mark.parametrize("name", CHEAP)
@pytest.mark.parametrize("family", READ)
def test_every_script_refuses_a_config_that_its_tensors_do_not_bear_out(name, family, linked, tries):
    if family == "gpt2" and name == "kv_cut.py":
        pytest.skip("has no KV heads to merge")
    folder = linked(family)
    config = json.loads((folder / "config.json").read_text())
    for key in READ[family]:
        for value in BAD:
            if value is None and key not in NEEDED or value == [] and key == "architectures":
                continue
            put(folder / "config.json", config | {key: value})
            tries.refused(f"{key} = {value!r:.40}", name, *words(name, folder))
    tries.check()


@pytest.mark.parametrize("name", ["prunekit.inspect", "manual_select.py", "sparsify.py", "width_cut.py", "kv_cut.py"])
def test_the_parts_of_a_config_of_a_vision_model_are_checked(name, linked, tries):
    folder = linked("qwen3_vl")
    config = json.loads((folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        for value in (*BAD, DELETED):
            put(folder / "config.json", changed(config, (part,), value))
            tries.refused(f"{part} = {value!r:.40}", name, *words(name, folder))
    for taps in ([1, 1, 4], [4, 3, 1], [1, 3, 6], [1, 3], [1, "3", 4], [True, 3, 4], "134", 3, {"1": 1}, [-1, 3, 4],
                 [1, 3, 10**30], [1, 3, math.nan], [[1], 3, 4], None, []):  # fmt: skip
        put(folder / "config.json", changed(config, ("vision_config", "deepstack_visual_indexes"), taps))
        tries.refused(f"taps = {taps}", name, *words(name, folder))
    tries.check()


@pytest.mark.parametrize("name", CHEAP)
def test_a_config_that_is_no_json_object_is_refused(name, linked, tries):
    folder = linked("llama")
    for content in RAW:
        put(folder / "config.json", content)
        tries.refused(content[:20], name, *words(name, folder))
    tries.check()


# --- weights ---------------------------------------------------------------------------------------------------------


def header(entries, length=None, data=b"") -> bytes:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


@pytest.mark.parametrize("name", ["prunekit.inspect", "manual_select.py", "sparsify.py"])
def test_a_damaged_header_is_refused(name, linked, tries):
    folder = linked("llama")
    whole = (folder / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    entries = json.loads(whole[8 : 8 + size])
    data = whole[8 + size :]
    tensor = "model.norm.weight"
    damaged = [content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content for content in RAW]
    damaged += [header(content) for content in damaged]
    damaged += [header(entries, length, data) for length in (0, 1, size - 1, size + 1, 2**32, 2**63, 2**64 - 1)]
    damaged += [whole[:keep] for keep in (0, 7, 8, size, size + 8, len(whole) - 1)] + [whole + b"\0"]
    for key in ("dtype", "shape", "data_offsets"):
        for value in (
            *BAD,
            DELETED,
            [10**18] * 2,
            [2**31] * 30,
            [0, -1],
            [9, 3],
            ["0", "128"],
            [10**4200] * 1000,
        ):
            damaged.append(header(changed(entries, (tensor, key), value), data=data))
    damaged.append(header(changed(entries, (tensor,), entries["model.layers.0.input_layernorm.weight"]), data=data))
    damaged.append(header(json.dumps(entries).replace(tensor, "lm_head.weight", 1)[:-1].encode()
                          + b', "lm_head.weight": {}}', data=data))  # fmt: skip
    damaged.append(header(json.dumps(entries).replace("[32]", f"[{'9' * 5000}]", 1).encode(), data=data))
    for content in damaged:
        put(folder / "model.safetensors", content)
        tries.refused(content[:60], name, *words(name, folder))
    tries.check()


@pytest.mark.parametrize("name", ["prunekit.inspect", "manual_select.py"])
def test_a_damaged_index_is_refused(name, tiny, tmp_path, tries):
    folder = link(tiny("llama", max_shard_size="20KB"), tmp_path / "model")
    index = json.loads((folder / INDEX).read_text())
    shard = index["weight_map"]["model.norm.weight"]
    (tmp_path / "outside.safetensors").write_bytes((folder / shard).read_bytes())
    for content in RAW:
        put(folder / INDEX, content)
        tries.refused(content[:20], name, *words(name, folder))
    outside = ["../outside.safetensors", str(tmp_path / "outside.safetensors"), "x" * 300 + ".safetensors",
               "gone.safetensors", "\ud800.safetensors", "a\0.safetensors", "a\n.safetensors"]  # fmt: skip
    for value in (*BAD, *outside, DELETED):
        put(folder / INDEX, changed(index, ("weight_map", "model.norm.weight"), value))
        tries.refused(value, name, *words(name, folder))
        put(folder / INDEX, changed(index, ("weight_map",), value))
        tries.refused(("map", value), name, *words(name, folder))
    put(folder / INDEX, index)
    (folder / shard).unlink()
    tries.refused("a missing shard", name, *words(name, folder))
    tries.check()


# --- pruning_info.json -----------------------------------------------------------------------------------------------


@pytest.fixture
def cut(tiny, tmp_path):
    """A vision model that was cut, with its history."""
    plan = plan_layers(open_checkpoint(tiny("qwen3_vl")), text=[3], vision=[2])
    write_cut(cut_layers(plan), tmp_path / "model")
    return tmp_path / "model"


HISTORY_READERS = {
    "prunekit.inspect": (),
    "prunekit.critical": (),
    "prunekit.summary": (),
    "prunekit.report.__main__": (),
    "manual_select.py": ("--text", "3", "--dry-run"),
}


@pytest.mark.parametrize("name", HISTORY_READERS)
def test_any_history_is_taken_or_refused(name, cut, tmp_path, tries):
    [entry] = json.loads((cut / "pruning_info.json").read_text())["history"]
    entry |= {"metrics": {"eval_token_acc": 0.5}, "settings": {"heal": "x"},
              "sparsity": {"zeros": 1, "weights": 2, "sparsity": 0.5, "of_all_parameters": 0.1,
                           "tensors": {"model.layers.0.mlp.up_proj.weight": 0.5}}}  # fmt: skip
    document = {"history": [entry]}
    contents = [(content[:20], content) for content in RAW] + list(mutations(document))
    for what, content in contents:
        put(cut / "pruning_info.json", content)
        argv = (cut,) if name == "prunekit.report.__main__" else words(name, cut)
        tries.survived(what, name, *argv)
        for figure in cut.glob("*.png"):
            figure.unlink()
    tries.check()


def test_a_history_that_is_no_list_of_entries_is_refused_before_a_cut(cut, tmp_path, tries):
    [entry] = json.loads((cut / "pruning_info.json").read_text())["history"]
    for key in ("removed", "parameters_by_component_before", "stage", "num_hidden_layers_before", "settings"):
        for value in ([5], "5", 5.5, {"text": "4"}, {"text": [0.5]}):
            if key == "stage" and value == "5" or key == "settings" and isinstance(value, dict):
                continue
            put(cut / "pruning_info.json", {"history": [entry | {key: value}]})
            tries.refused(
                f"{key} = {value}", "manual_select.py", "--model", cut, "--text", "3", "--out", tmp_path / "o"
            )
            tries.refused(f"{key} = {value}", "prunekit.critical", cut)
    tries.check()


# --- ranking.json ----------------------------------------------------------------------------------------------------

RANKING = {
    "metric": "token_acc",
    "removals": [
        {"name": "text-03", "stack": "text", "layer": 3, "relative": 1.0},
        {"name": "text-02", "stack": "text", "layer": 2, "relative": 0.97},
        *({"name": f"text-{n:02d}", "stack": "text", "layer": n, "relative": None} for n in (0, 1, 4)),
    ],
    "greedy": {"healed": False, "bend": None, "path": [
        {"removed": [], "relative": 1.0}, {"removed": ["text-03"], "relative": 0.99}]},
}  # fmt: skip


def ranking_readers(model, ranking) -> dict[str, tuple]:
    select = ("--model", model, "--from-ranking", ranking, "--max-fraction", "1", "--dry-run")
    return {
        "manual_select.py": select,
        "manual_select.py independent": (*select, "--independent"),
        "sparsify.py": ("--model", model, "--sparsity", "0.5", "--scope", "layer", "--layer-importance", "knockout",
                        "--ranking", ranking, "--dry-run"),
    }  # fmt: skip


@pytest.mark.parametrize("reader", ranking_readers("", ""))
def test_any_ranking_is_taken_or_refused(reader, linked, tmp_path, tries):
    file, folder = tmp_path / "ranking.json", linked("llama")
    ranking = RANKING | {"fingerprint": fingerprint(open_checkpoint(folder))}
    for what, content in [*((content[:20], content) for content in RAW), *mutations(ranking)]:
        put(file, content)
        tries.survived(what, reader.split()[0], *ranking_readers(folder, file)[reader])
    for content in RAW:
        put(file, content)
        tries.refused(content[:20], reader.split()[0], *ranking_readers(folder, file)[reader])
    put(file, changed(ranking, ("removals", 0, "stack"), "vision") | {"greedy": None})
    tries.refused("vision on text", reader.split()[0], *ranking_readers(folder, file)[reader])
    tries.check()


@pytest.mark.parametrize(
    "path",
    [5, "x", [], {}, [5], [{}], [{"removed": 5, "relative": 1.0}], [{"removed": ["text"], "relative": 1.0}],
     [{"removed": ["text-x"], "relative": 1.0}], [{"removed": ["text-03"], "relative": "1"}],
     [{"removed": [["text-03"]], "relative": 1}]],
)  # fmt: skip
def test_a_greedy_path_of_the_wrong_shape_is_refused(path, linked, tmp_path, tries):
    file, folder = tmp_path / "ranking.json", linked("llama")
    ranking = RANKING | {"fingerprint": fingerprint(open_checkpoint(folder))}
    for greedy in ({"healed": False, "path": path}, path or 5):
        put(file, ranking | {"greedy": greedy})
        tries.refused(greedy, "manual_select.py", *ranking_readers(folder, file)["manual_select.py"])
    tries.check()


# --- what runs leave -------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tiny, tmp_path):
    """What ms-swift leaves of a training of llama: checkpoint-5, trainer_state.json, logging.jsonl."""
    folder = tmp_path / "run"
    folder.mkdir()
    link(tiny("llama"), folder / "checkpoint-5")
    put(folder / "checkpoint-5" / "trainer_state.json", {"global_step": 5})
    put(folder / "logging.jsonl", json.dumps({"loss": 1.0, "global_step/max_steps": "1/5"}) + "\n")
    return folder


def test_any_trainer_state_and_log_is_taken_or_refused(run_folder, tiny, tmp_path, tries):
    publish = ("--run", run_folder, "--base", tiny("llama"), "--out", tmp_path / "out", "--stage", "x")
    (run_folder / "checkpoint-²").mkdir()
    put(run_folder / "checkpoint-²" / "trainer_state.json", {})
    state = {"global_step": 5, "best_model_checkpoint": "checkpoint-5"}
    record = {"loss": 1.0, "global_step/max_steps": "1/5", "best_model_checkpoint": "checkpoint-5"}
    for what, content in [*((content[:20], content) for content in RAW), *mutations(state)]:
        put(run_folder / "checkpoint-5" / "trainer_state.json", content)
        tries.survived(what, "prunekit.training.publish", "--run", run_folder, "--find-resume")
        tries.survived(what, "prunekit.training.publish", *publish)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    put(run_folder / "checkpoint-5" / "trainer_state.json", state)
    for what, content in [*((content[:20], content) for content in RAW), *mutations(record)]:
        put(run_folder / "logging.jsonl", content)
        tries.survived(what, "prunekit.training.publish", *publish, "--checkpoint", "best")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        tries.survived(what, "prunekit.report.__main__", run_folder)
    tries.check()


def test_any_record_of_sparsity_is_drawn_or_refused(cut, tries):
    event = {
        "sparsity": 0.5,
        "before": {"loss": 1.0},
        "after": {"loss": 2.0},
        "retrained": {"loss": 1.5},
        "step": 1,
    }
    document = {"metric": "loss", "events": [event]}
    for what, content in [*((content[:20], content) for content in RAW), *mutations(document)]:
        put(cut / "sparsity.json", content)
        tries.survived(what, "prunekit.report.__main__", cut)
        (cut / "quality.png").unlink(missing_ok=True)
    tries.check()


def test_any_evaluation_is_taken_or_refused(tiny, tmp_path, tries):
    model = tiny("llama")
    results = [{"model": str(model), "parameters": 5, "datasets": {"test": {"token_acc": 0.5, "exact_match": 0.5}}}]
    (tmp_path / "seconds").mkdir()
    put(tmp_path / "seconds" / "base", "5\n")
    argv = ("--stages", f"base={model}", "--evaluation", tmp_path / "e.json", "--seconds", tmp_path / "seconds",
            "--out", tmp_path / "out")  # fmt: skip
    for what, content in [*((content[:20], content) for content in RAW), *mutations(results)]:
        put(tmp_path / "e.json", content)
        tries.survived(what, "prunekit.summary", *argv)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    put(tmp_path / "e.json", results)
    for seconds in ("", "x", "nan", b"\xff", "9" * 5000):
        put(tmp_path / "seconds" / "base", seconds)
        tries.refused(seconds, "prunekit.summary", *argv)
    for stages in (["base"], ["=x"], [f"base={tmp_path}"], ["base="]):
        tries.refused(stages, "prunekit.summary", "--stages", *stages, *argv[2:])
    tries.check()


def test_any_folder_of_cycles_is_taken_or_refused(cut, tiny, tmp_path, tries):
    cycles = tmp_path / "cycles"
    cycles.mkdir()
    entry = {"stage": "sparsify", "sparsity": {"sparsity": 0.5, "tensors": {}}}
    link(tiny("llama"), cycles / "1")
    put(cycles / "1" / "pruning_info.json", {"history": [entry]})
    scores = {"loss": 1.0, "token_acc": 0.5}
    files = {
        "dense.json": [{"model": "m", "datasets": {"val": scores}}],
        "1.json": [{"model": "m", "datasets": {"val": scores}}] * 2,
        "settings.json": {"modules": None},
    }
    for name, document in files.items():
        put(cycles / name, document)
    judge = ("judge", "--cycles", cycles)
    assert run("prunekit.training.cycles", *judge)[0] == 0
    publish = ("publish", "--cycles", cycles, "--base", tiny("llama"), "--out", tmp_path / "out")
    found = json.loads((cycles / "cycles.json").read_text())
    for name, document in (files | {"cycles.json": found}).items():
        before = (cycles / name).read_bytes()
        for what, content in [*((content[:20], content) for content in RAW), *mutations(document)]:
            put(cycles / name, content)
            reader = judge if name in ("dense.json", "1.json") else publish
            code, _, err = run("prunekit.training.cycles", *reader)
            tries.count += 1
            if code not in (0, 3) and (problem := refusal(code, err)):
                tries.found.append(f"{name} {what}: {problem}")
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
        put(cycles / name, before)
    tries.check()


# --- rows of token classifiers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    return save_tagger("bert", tmp_path_factory.mktemp("tagger") / "model")


@pytest.fixture(scope="module")
def ner_rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def test_bad_rows_are_refused_by_all_that_read_them(tagger, tmp_path, tries):
    pytest.importorskip("seqeval")
    row = {"tokens": ["ana", "oslo"], "ner_tags": ["B-PER", "B-LOC"]}
    contents = [(content[:20], content) for content in RAW]
    contents += [(value, {"tokens": value, "ner_tags": value}) for value in BAD]
    contents += [(value, row | {"tokens": value}) for value in BAD] + [(v, row | {"ner_tags": v}) for v in BAD]
    contents += [(v, row | {"tokens": ["ana", v]}) for v in BAD if v != "5"]
    contents += [("other", row | {"ner_tags": ["B-X", "O"]}), ("short", row | {"ner_tags": ["O"]})]
    for name, argv in {
        "ner_run.py": ("--model", tagger, "--out", tmp_path / "out", "--dataset"),
        "prunekit.ner": ("--model", tagger, "--dataset"),
        "deploy.py": ("--model", tagger, "--dataset"),
    }.items():
        for suffix in (".jsonl", ".txt"):
            for what, content in contents:
                if suffix == ".txt" and not isinstance(content, bytes):
                    continue
                put(tmp_path / f"rows{suffix}", content)
                tries.refused(what, name, *argv, tmp_path / f"rows{suffix}")
    tries.check()


# --- numbers on the command line -------------------------------------------------------------------------------------

NUMBERS = ["nan", "inf", "-inf", "1e400", "-1", "0", "abc", "", "9" * 5000]


def flags(tagger, model, ranking, rows, out) -> list[tuple]:
    """(script, good words, flag, values that are no good)."""
    surgery = ("--model", model, "--dry-run")
    ranked = (*surgery, "--text", "1")
    measured = ("--model", tagger, "--dataset", rows)
    trained = ("--model", tagger, "--dataset", rows, "--out", out)
    return [
        ("manual_select.py", ranked, "--max-shard-gb", NUMBERS),
        ("manual_select.py", (*surgery, "--from-ranking", ranking), "--keep-above", [v for v in NUMBERS if v != "0"]),
        ("manual_select.py", (*surgery, "--from-ranking", ranking), "--max-layers", NUMBERS),
        ("manual_select.py", (*surgery, "--from-ranking", ranking), "--max-fraction", NUMBERS),
        ("manual_select.py", surgery, "--text", [*NUMBERS[:4], "-1", "abc", "9" * 5000, "1-" + "9" * 5000, "²"]),
        ("kv_cut.py", surgery, "--kv-heads", NUMBERS),
        ("kv_cut.py", (*surgery, "--kv-heads", "1"), "--max-shard-gb", NUMBERS),
        ("width_cut.py", surgery, "--heads", NUMBERS),
        ("width_cut.py", surgery, "--head-share", NUMBERS),
        ("width_cut.py", surgery, "--kv-groups", NUMBERS),
        ("width_cut.py", surgery, "--neurons", NUMBERS),
        ("width_cut.py", surgery, "--neuron-share", NUMBERS),
        ("sparsify.py", surgery, "--sparsity", NUMBERS),
        ("sparsify.py", surgery, "--threshold", NUMBERS),
        ("sparsify.py", surgery, "--pattern", [*NUMBERS, "2:2", "0:4", "2:" + "9" * 5000]),
        ("sparsify.py", (*surgery, "--sparsity", "0.5"), "--power", NUMBERS),
        ("sparsify.py", (*surgery, "--sparsity", "0.5"), "--max-sparsity", NUMBERS),
        ("sparsify.py", (*surgery, "--sparsity", "0.5"), "--modules", ["(", "[", "x" * 100_000, "zzz"]),
        ("deploy.py", measured, "--limit", NUMBERS),
        ("deploy.py", measured, "--length", NUMBERS),
        ("deploy.py", measured, "--batches", NUMBERS),
        ("deploy.py", measured, "--seconds", NUMBERS),
        ("deploy.py", measured, "--rounds", NUMBERS),
        ("deploy.py", measured, "--threads", NUMBERS),
        ("deploy.py", measured, "--device", ["nonsense", "", "cuda:99"]),
        ("prunekit.ner", measured, "--limit", NUMBERS),
        ("ner_run.py", trained, "--temperature", NUMBERS),
        ("ner_run.py", trained, "--hard-share", [v for v in NUMBERS if v != "0"]),
        ("ner_run.py", trained, "--hidden-weight", [v for v in NUMBERS if v != "0"]),
        ("ner_run.py", trained, "--max-length", NUMBERS),
        ("ner_run.py", trained, "--learning_rate", [v for v in NUMBERS if v != "0"]),
        ("ner_run.py", trained, "--num_train_epochs", ["nan", "inf", "1e400", "abc"]),
        ("ner_run.py", trained, "--per_device_train_batch_size", ["0", "-1", "nan", "abc"]),
        ("ner_run.py", trained, "--gradient_accumulation_steps", ["0", "-1", "nan"]),
        ("ner_run.py", trained, "--lr_scheduler_type", ["nonsense"]),
        ("ner_run.py", trained, "--optim", ["nonsense"]),
        ("ner_run.py", trained, "--deepspeed", ["gone.json"]),
        ("ner_run.py", trained, "--weight_decay", ["nan", "abc"]),
        ("prunekit.training.cycles", ("plan", "--model", model), "--sparsity", NUMBERS),
        ("prunekit.training.cycles", ("plan", "--model", model, "--sparsity", "0.5"), "--start", NUMBERS),
        ("prunekit.training.cycles", ("plan", "--model", model, "--sparsity", "0.5"), "--cycles", NUMBERS),
        ("prunekit.training.cycles", ("plan", "--model", model, "--sparsity", "0.5"), "--worse", NUMBERS),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(flags(*[""] * 5))))
def test_flags_that_are_no_good_are_refused(number, tagger, ner_rows, linked, tmp_path, tries):
    put(tmp_path / "ranking.json", RANKING)
    name, good, flag, values = flags(tagger, linked("llama"), tmp_path / "ranking.json", ner_rows, tmp_path / "out")[
        number
    ]
    for value in values:
        tries.refused(f"{flag} {value[:20]}", name, *good, f"{flag}={value}")
    tries.check()


# --- paths -----------------------------------------------------------------------------------------------------------

LONG, NOT_UTF8 = "x" * 256, os.fsdecode(b"caf\xe9")


def bad_models(folder: Path) -> list:
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "file").write_text("x")
    (folder / "empty").mkdir()
    (folder / "weights").mkdir()
    (folder / "weights" / "config.json").mkdir()
    return [folder / "gone", folder / LONG, folder / ("y/" * 3000), folder / "loop", folder / "file",
            folder / "file" / "x", folder / "empty", folder / "weights", folder / NOT_UTF8, folder / "a\nb", "",
            "/dev/null",
            "org/name", "é/name", "-"]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CHEAP if name != "prunekit.summary"])
def test_a_model_that_is_no_folder_of_one_is_refused(name, tmp_path, tries):
    for model in bad_models(tmp_path):
        tries.refused(ascii(str(model)[-30:]), name, *words(name, model))
    tries.check()


OUTS = {
    "manual_select.py": ("--text", "1"),
    "kv_cut.py": ("--kv-heads", "1"),
    "width_cut.py": ("--heads", "2"),
    "sparsify.py": ("--sparsity", "0.5"),
    "deploy.py": (),
    "ner_run.py": ("--dataset",),
}


@pytest.mark.parametrize("name", OUTS)
def test_an_out_that_cannot_be_made_is_refused(name, tagger, ner_rows, linked, tmp_path, tries):
    model = tagger if name in ("deploy.py", "ner_run.py") else linked("llama")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "file").write_text("x")
    used = tmp_path / "used"
    used.mkdir()
    put(used / "mine", "x")
    more = (*OUTS[name], ner_rows) if name == "ner_run.py" else OUTS[name]
    for out in (tmp_path / "loop", tmp_path / "a", tmp_path / "a" / "x", tmp_path / "file", tmp_path / "file" / "x",
                used, tmp_path / LONG, tmp_path / ("x" * 255), tmp_path / ("x" * 240), tmp_path / ("y/" * 3000),
                tmp_path / NOT_UTF8, "/proc/x", "/dev/null", "/dev/null/x", model, model / "..", "/", ""):  # fmt: skip
        for flag in ((), ("--overwrite",)):
            tries.refused((ascii(str(out)[-30:]), flag), name, "--model", model, "--out", out, *more, *flag)
    tries.check()


def as_nobody(*command: object) -> subprocess.CompletedProcess:
    """Run as a user to whom folders can be closed, which they can't be to root."""
    if os.getuid() == 0:
        command = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", *command)
    return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.fixture
def shared_model(tiny):
    """A folder that everybody may read, with a model in it; pytest's own are closed to others."""
    if os.getuid() == 0 and (not shutil.which("setpriv") or as_nobody(sys.executable, "-c", "").returncode):
        pytest.skip("nobody can't run this Python")
    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(tiny("llama"), Path(name) / "model")
        for path in [Path(name), *Path(name).rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield Path(name) / "model"
        Path(name).chmod(0o755)


@pytest.mark.parametrize("closed", ["", "config.json", "model.safetensors", ".."])
def test_a_model_that_may_not_be_read_is_refused(closed, shared_model):
    (shared_model / closed).chmod(0o000)
    done = as_nobody(sys.executable, "-m", "prunekit.inspect", shared_model)
    assert refusal(done.returncode, done.stderr) is None, done.stderr
    assert "Permission denied" in done.stderr and str(shared_model) in done.stderr


def test_an_out_in_a_folder_that_may_not_be_written_is_refused_before_the_work(shared_model):
    words = ("--model", shared_model, "--text", 1, "--out", shared_model.parent / "a/b")
    done = as_nobody(sys.executable, "manual_select.py", *words)
    assert refusal(done.returncode, done.stderr) is None and done.stdout == "", done.stderr
    assert f"{shared_model.parent} is no folder that you may write to" in done.stderr
