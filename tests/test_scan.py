"""The fast scan as a command: what is measured once, continued, refused."""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import transformers
from helpers.calibration import write_texts
from helpers.paths import EMBEDDED, ROOT
from helpers.scans import LAYERS
from helpers.tiny_words import save_speaking_and_rows

from prunekit import scan
from prunekit.checkpoint import open_checkpoint, statistics
from prunekit.errors import PruneKitError
from prunekit.knockout import cluster, scanner, search
from prunekit.knockout.search import CRITERION
from prunekit.knockout.sweep import read_scan
from prunekit.surgery.experts import plan_experts


def run(*arguments, **kwargs):
    command = [sys.executable, "-m", "prunekit.scan", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)


@pytest.fixture
def here(script_here):
    """As `run`, in this process."""
    return partial(script_here, "prunekit.scan")


@pytest.fixture(scope="session")
def finished(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("scan") / "scan"
    arguments = ("--model", EMBEDDED, "--dataset", texts, "--out", out, "--greedy", 2, "--batch-tokens", 200)
    result = run(*arguments, env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"})  # what is imported comes on stderr
    assert result.returncode == 0, result.stderr
    return out, result


def without_times(out):
    result = json.loads((out / "scan.json").read_text())
    for entry in result["removals"]:
        del entry["latency_saved"]
    return result


def test_a_scan_scores_every_layer_and_block(finished):
    out, _ = finished
    removals = json.loads((out / "scan.json").read_text())["removals"]
    assert [entry["name"] for entry in removals] == [str(layer) for layer in LAYERS]
    keys = ("token_acc", "loss", "kl", "block_influence", "latency_saved", "parameters_saved")
    assert all(entry[key] is not None for entry in removals for key in keys[:3] + keys[5:])
    assert all(entry[key] is not None for entry in removals if entry["stack"] == "text" for key in keys)


def test_a_scan_ends_by_saying_what_is_cheap_and_which_set(finished):
    lines = finished[1].stdout.splitlines()
    assert lines[0].startswith("baseline: token_acc ")
    assert lines[-1].startswith("without ")


def test_a_scan_imports_nothing_that_it_has_no_use_for(finished):
    imported = {line.rpartition("|")[2].strip() for line in finished[1].stderr.splitlines()}
    assert {"torch", "pandas", "scipy", "sklearn", "matplotlib"} & imported == {"torch"}


def test_a_finished_scan_is_not_repeated(here, finished, texts):
    out, _ = finished
    before = (out / "records.jsonl").read_bytes()
    again = here("--model", EMBEDDED, "--dataset", texts, "--out", out, "--greedy", 2, "--batch-tokens", 200)
    assert again.returncode == 0
    assert (out / "records.jsonl").read_bytes() == before


@pytest.mark.parametrize("end", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=[pytest.mark.slow, pytest.mark.ci])])
def test_an_interrupted_scan_is_continued_by_the_same_command(here, finished, texts, tmp_path, end):
    out = tmp_path / "scan"
    arguments = ["--model", EMBEDDED, "--dataset", texts, "--out", out, "--greedy", 2, "--batch-tokens", 200]
    process = subprocess.Popen(
        [sys.executable, "-m", "prunekit.scan", *map(str, arguments)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    records = out / "records.jsonl"
    while not (records.exists() and records.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(end)
    assert process.wait() == (-signal.SIGKILL if end == signal.SIGKILL else 130)
    kept = records.read_bytes()
    assert not (out / "scan.json").exists()
    assert here(*arguments).returncode == 0
    assert records.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    assert without_times(out) == without_times(finished[0])


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes_of_torchrun_find_what_one_does(finished, texts, tmp_path):
    out = tmp_path / "scan"
    arguments = ["--model", EMBEDDED, "--dataset", texts, "--out", out, "--greedy", 2, "--batch-tokens", 200]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m"]
    done = subprocess.run(
        [*map(str, command), "prunekit.scan", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("baseline: ") == 1
    assert without_times(out) == without_times(finished[0])


def test_the_path_s_loss_is_that_of_the_checkpoint_cut_on_disk(here, finished, texts, script_here, tmp_path):
    scanned = json.loads((finished[0] / "scan.json").read_text())
    entry = scanned["greedy"]["path"][-1]
    numbers = {stack: [n[-2:] for n in entry["removed"] if n.startswith(stack)] for stack in ("text", "vision")}
    flags = [word for stack, layers in numbers.items() if layers for word in (f"--{stack}", *layers)]
    script_here("manual_select.py", "--model", EMBEDDED, "--out", tmp_path / "cut", *flags)
    words = ("--model", tmp_path / "cut", "--dataset", texts, "--out", tmp_path / "s")
    assert here(*words, "--text", "0", "--vision", "none").returncode == 0
    baseline = json.loads((tmp_path / "s" / "scan.json").read_text())["baseline"]
    assert baseline["loss"] == pytest.approx(entry["loss"], rel=1e-4)
    assert baseline["token_acc"] == entry["token_acc"]


def test_a_path_alone_is_that_of_the_whole_scan(here, finished, texts, tmp_path):
    out = tmp_path / "s"
    flags = ("--greedy", 2, "--batch-tokens", 200, "--path-only")
    assert here("--model", EMBEDDED, "--dataset", texts, "--out", out, *flags).returncode == 0
    alone, whole = (json.loads((folder / "scan.json").read_text()) for folder in (out, finished[0]))
    assert alone["removals"] == []
    assert alone["greedy"] == whole["greedy"]


def test_a_healed_path_is_better_than_the_plain_one(here, finished, texts, tmp_path):
    flags = ("--greedy", 1, "--heal", "--calib", texts, "--vision", "none", "--text", "1-7")
    done = here("--model", EMBEDDED, "--dataset", texts, "--out", tmp_path / "s", *flags)
    assert done.returncode == 0, done.stderr
    healed = json.loads((tmp_path / "s" / "scan.json").read_text())
    [_, entry] = healed["greedy"]["path"]
    plain = next(e for e in healed["removals"] if e["name"] == entry["removed"][0])
    assert entry[CRITERION] < plain[CRITERION]


def test_a_race_is_in_the_result_with_what_it_left_undecided(here, texts, tmp_path):
    done = here("--model", EMBEDDED, "--dataset", texts, "--out", tmp_path / "s", "--race", "--best", 3)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "s" / "scan.json").read_text())
    assert len(result["best"]) == 3
    assert all(isinstance(entry["decided"], bool) for entry in result["removals"])


@pytest.mark.parametrize(
    "line, said",
    [("", "line 3"), ("{", "line 3"), ('{"text": ""}', "line 3"), ('{"messages": []}', "line 3")],
)
def test_a_bad_row_is_named_by_its_line(here, line, said, texts, tmp_path):
    lines = texts.read_text().splitlines()
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]))
    done = here("--model", EMBEDDED, "--dataset", tmp_path / "bad.jsonl", "--out", tmp_path / "s")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert said in done.stderr
    assert not (tmp_path / "s").exists()


def test_an_encoder_is_refused_before_anything_is_written(here, tiny, texts, tmp_path):
    done = here("--model", tiny("bert"), "--dataset", texts, "--out", tmp_path / "s")
    assert (done.returncode, "bert" in done.stderr) == (2, True)
    assert not (tmp_path / "s").exists()


def test_other_settings_in_the_same_folder_are_refused(here, finished, texts):
    done = here("--model", EMBEDDED, "--dataset", texts, "--out", finished[0], "--tokens", 100)
    assert (done.returncode, "other settings" in done.stderr) == (2, True)


def test_a_folder_in_use_is_refused(here, texts, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = here("--model", EMBEDDED, "--dataset", texts, "--out", tmp_path)
    assert (done.returncode, "in use" in done.stderr) == (2, True)


def test_generation_from_texts_is_refused(here, texts, tmp_path):
    done = here("--model", EMBEDDED, "--dataset", texts, "--out", tmp_path / "s", "--generate", 5)
    assert (done.returncode, "--generate" in done.stderr) == (2, True)
    assert not (tmp_path / "s").exists()


def test_a_layer_out_of_range_is_refused(here, texts, tmp_path):
    done = here("--model", EMBEDDED, "--dataset", texts, "--out", tmp_path / "s", "--text", 8)
    assert (done.returncode, "8" in done.stderr) == (2, True)


def test_a_model_whose_own_loss_is_no_number_is_named(scan_here, speaking, texts):
    model = transformers.AutoModelForCausalLM.from_pretrained(speaking)
    model.transformer.ln_f.bias.data.fill_(float("nan"))
    model.save_pretrained(speaking)
    with pytest.raises(PruneKitError, match="its loss is NaN with all its layers.*--dtype"):
        scan_here(speaking, texts, "--text", 1)


def test_what_has_no_loss_is_said_with_its_error(capsys):
    known = {"token_acc": 0.5, "loss": 1.0, "samples": 8, "tokens": 9, "parameters": 10}
    layer, experts = (
        {"name": name, "token_acc": 0.1, "loss": None, "error": "loss is NaN", "generation": None}
        for name in ("text-03", "experts-02")
    )
    found = {"counts_suffix": True, "baseline": known, "removals": [layer], "best": ["text-03"], "greedy": None}
    scan.print_scan(found | {"experts": [experts]})
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["text-03", "loss", "is", "NaN"], ["experts-02", "loss", "is", "NaN"]
    ]  # fmt: skip


def test_help_shows_an_example(here):
    assert "python -m prunekit.scan --model" in here("--help").stdout


@pytest.fixture
def scan_here(monkeypatch, tmp_path):
    """scan_here(model, dataset, *arguments): what OUT/scan.json says."""

    def run_here(model, dataset, *arguments):
        out = tmp_path / "out"
        command = ["scan", "--model", model, "--dataset", dataset, "--out", out, "--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", [*map(str, command)])
        scan.main()
        return json.loads((out / "scan.json").read_text())

    return run_here


@pytest.fixture
def refused(scan_here, monkeypatch, tmp_path):
    """refused(...): the one line, asserting that no model was loaded and nothing written."""
    monkeypatch.setattr(scanner, "load_model", lambda *_: pytest.fail("a model was loaded"))

    def run_here(*arguments):
        with pytest.raises(PruneKitError) as error:
            scan_here(*arguments)
        assert not (tmp_path / "out").exists()
        assert "\n" not in str(error.value)
        return str(error.value)

    return run_here


@pytest.mark.parametrize(
    "arguments",
    [
        ("--tokens", "-1"), ("--batch-tokens", "0"), ("--max-length", "0"), ("--best", "0"), ("--greedy", "-5"),
        ("--generate", "-1"), ("--generate-tokens", "0"), ("--race-share", "nan"), ("--target-params", "1e400"),
        ("--path-only",),
        ("--device", "gpu"), ("--processes", "0"), ("--gpus-per-task", "-1"), ("--template", "no_such"),
        ("--model-type", "no_such"), ("--text", "none", "--vision", "none"), ("--dataset", "org/name"),
        ("--heal",), ("--heal", "--calib", "nowhere.jsonl", "--greedy", "1"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_bad_argument_is_refused_in_one_line(refused, answers, arguments):
    said = refused(EMBEDDED, answers, *arguments)
    assert arguments[0] in said or arguments[-1] in said or "nowhere.jsonl" in said


def test_healing_on_a_cluster_is_refused_before_anything_is_measured(refused, texts, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    said = refused(EMBEDDED, texts, "--greedy", 1, "--heal", "--calib", texts)
    assert "unset RAY_ADDRESS" in said


def test_vision_blocks_are_not_healed_on_rows_without_images(refused, texts):
    assert "no row has an image" in refused(EMBEDDED, texts, "--greedy", 1, "--heal", "--calib", texts)


def test_processes_on_a_cluster_are_refused(refused, texts, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert "unset RAY_ADDRESS" in refused(EMBEDDED, texts, "--processes", 2)


def test_a_model_without_its_tokenizer_is_refused(refused, tiny, answers, texts):
    for rows in (answers, texts):
        assert "has no tokenizer" in refused(tiny("qwen3"), rows)


def test_a_vision_block_of_a_text_model_is_refused(refused, tiny, texts):
    assert "has no vision blocks" in refused(tiny("qwen3"), texts, "--vision", "0")


def test_a_task_of_a_cluster_takes_one_gpu_at_the_most(monkeypatch, texts, scan_here):
    asked = []

    def run_tasks(function, items, *, gpus):
        asked.append(gpus)
        return [(item, function(item)) for item in items]

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(cluster, "connected", contextlib.nullcontext)
    monkeypatch.setattr(cluster, "run_tasks", run_tasks)
    scan_here(EMBEDDED, texts, "--gpus-per-task", 4, "--text", 7, "--vision", "none")
    assert set(asked) == {1}


def test_answers_that_were_cut_are_counted_and_warned_of(scan_here, answers, capsys):
    flags = ("--text", "7", "--vision", "none", "--generate", 4, "--generate-tokens", 1, "--greedy", 1)
    found = scan_here(EMBEDDED, answers, *flags)
    generation = found["removals"][0]["generation"]
    assert (generation["samples"], generation["n_cut"], generation["max_new_tokens"]) == (4, 4, 1)
    assert [point["generation"]["n_cut"] for point in found["greedy"]["path"]] == [4, 4]
    assert "warning: 12 of 12 answers were cut at 1 tokens" in capsys.readouterr().err


def test_each_file_of_rows_is_read_once(scan_here, answers, tmp_path, opens):
    calib, dataset = tmp_path / "calib.jsonl", tmp_path / "dataset.jsonl"
    for file in (calib, dataset):
        file.write_bytes(answers.read_bytes())
    counts = opens(calib), opens(dataset)
    flags = ("--text", "6-7", "--vision", "none", "--generate", 2, "--generate-tokens", 1, "--greedy", 1)
    scan_here(EMBEDDED, dataset, *flags, "--heal", "--calib", calib)
    assert [count() for count in counts] == [1, 1]


def test_numbers_of_experts_are_scored_beside_layers_and_once(scan_here, tmp_path, monkeypatch):
    model, rows = save_speaking_and_rows("mixtral", tmp_path)
    calib = write_texts(tmp_path / "calib.jsonl")
    flags = ("--text", "1", "--experts", "5,3", "--calib", calib, "--calib-tokens", 600, "--tokens", 600)
    found = scan_here(model, rows, *flags)
    assert found["best"] == ["text-01"]
    assert [entry["name"] for entry in found["experts"]] == ["experts-05", "experts-03"]
    for entry in found["experts"]:
        plan = plan_experts(open_checkpoint(model), entry["experts"])
        assert entry["parameters"] == statistics(plan.outline)["parameters"]
        assert entry["loss"] != found["baseline"]["loss"] and entry["kl"] > 0
        assert entry.keys() == found["removals"][0].keys() | {"experts"}
    before = (tmp_path / "out/records.jsonl").read_bytes()
    monkeypatch.setattr(search, "order_experts", lambda *_: pytest.fail("chosen again"))
    assert scan_here(model, rows, *flags)["experts"] == found["experts"]
    assert (tmp_path / "out/records.jsonl").read_bytes() == before
    assert read_scan(tmp_path / "out/scan.json")["experts"] == found["experts"]


def test_numbers_of_experts_scored_on_a_cluster_are_those_of_one_machine(scan_here, tmp_path, monkeypatch):
    model, rows = save_speaking_and_rows("mixtral", tmp_path)
    calib = write_texts(tmp_path / "calib.jsonl")
    flags = ("--text", "none", "--experts", "5,3", "--calib", calib, "--calib-tokens", 600, "--tokens", 600)
    here = scan_here(model, rows, *flags, "--batch-tokens", 200)
    (tmp_path / "out").rename(tmp_path / "here")
    done = []

    def sent(value):
        return pickle.loads(pickle.dumps(value))  # noqa: S301

    def run_tasks(function, items, *, gpus):
        """As on other machines; what was begun first may end last."""
        for item in reversed(items):
            done.append(function.__name__)
            yield item, sent(sent(function)(sent(item)))

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(cluster, "connected", contextlib.nullcontext)
    monkeypatch.setattr(cluster, "run_tasks", run_tasks)
    assert scan_here(model, rows, *flags, "--batch-tokens", 200)["experts"] == here["experts"]
    assert done.count("experts_that_go") == 1 and done.count("measure_batch") > 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("--experts", "all"), "--experts needs --calib"), (("--calib", "texts"), "--calib is for --heal and --experts"),
     (("--experts", "all", "--calib", "texts"), "qwen3_vl without a mixture of experts")],
)  # fmt: skip
def test_experts_that_cannot_be_scored_are_refused(flags, message, refused, texts):
    assert message in refused(EMBEDDED, texts, *(texts if flag == "texts" else flag for flag in flags))


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes_heal_and_answer_as_one_does(here, answers, tmp_path):
    """With torchrun and gloo: candidates and rows are shared out, and both processes agree on every choice."""
    flags = ("--greedy", 2, "--heal", "--calib", answers, "--generate", 5, "--generate-tokens", 3, "--text", "4-7")
    found = []
    for name, scan_by, more in (("one", here, ()), ("two", run, ("--processes", 2))):
        out = tmp_path / name
        done = scan_by("--model", EMBEDDED, "--dataset", answers, "--out", out, "--vision", "none", *flags, *more)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("baseline: ") == 1
        found.append(without_times(out))
    [one, two] = found
    assert two == one
    assert one["greedy"]["healed"] and len(one["greedy"]["path"]) == 3


@pytest.mark.slow
def test_a_bad_row_ends_several_processes_in_one_line_before_they_start(texts, tmp_path):
    (tmp_path / "bad.jsonl").write_text(texts.read_text() + "{\n")
    done = run("--model", EMBEDDED, "--dataset", tmp_path / "bad.jsonl", "--out", tmp_path / "s", "--processes", 2)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
