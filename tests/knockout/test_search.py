"""The fast scan as a command and its searches: what is measured once, chosen, continued, refused."""

import contextlib
import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers.paths import EMBEDDED, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit import scan
from prunekit.checkpoint import open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.knockout import cluster, scanner
from prunekit.knockout.generation import answer_without, score_generation
from prunekit.knockout.records import Records, paired
from prunekit.knockout.removal import Removal
from prunekit.knockout.scanner import Job
from prunekit.knockout.search import CRITERION, Scan, find_path

LAYERS = [Removal("text", i) for i in range(8)] + [Removal("vision", i) for i in range(6)]


def run(*arguments, **kwargs):
    command = [sys.executable, "-m", "prunekit.scan", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)


def record(gone, batch, scores):
    return {"gone": gone, "batch": batch, "scores": scores, "influence": {}, "seconds": {"all": 1.0}}


def sample(loss, right=1, tokens=2):
    return {"right": [right], "loss": [loss], "kl": [0.0], "tokens": [tokens]}


# --- records


def test_what_a_kill_tore_is_dropped_and_the_rest_kept(tmp_path):
    file = tmp_path / "records.jsonl"
    records = Records(file)
    for batch in range(3):
        records.add(record([], batch, {"baseline": sample(1.0)}))
    whole = file.read_text()
    file.write_text(whole[: whole.rindex("{", 0, -30)])
    assert sorted(Records(file).scores) == [((), 0), ((), 1)]
    Records(file).add(record([], 2, {"baseline": sample(1.0)}))
    assert sorted(Records(file).scores) == [((), 0), ((), 1), ((), 2)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: "{", lambda r: "5", lambda r: "[]", lambda r: "{}", lambda r: "[" * 100_000, lambda r: "1" * 5000,
        lambda r: json.dumps(r | {"gone": 3}), lambda r: json.dumps(r | {"gone": [3]}),
        lambda r: json.dumps(r | {"batch": "0"}),
        lambda r: json.dumps(r | {"scores": [1]}), lambda r: json.dumps(r | {"scores": {"baseline": {}}}),
        lambda r: json.dumps(r | {"scores": {"baseline": sample(1.0) | {"loss": [1.0, 2.0]}}}),
        lambda r: json.dumps(r | {"scores": {"baseline": sample("1")}}),
        lambda r: json.dumps(r | {"influence": {"a": 1}}),
        lambda r: json.dumps(r | {"seconds": {}}),
        lambda r: json.dumps({key: value for key, value in r.items() if key != "influence"}),
    ],
)  # fmt: skip
def test_a_damaged_record_is_named_by_its_line(tmp_path, damage):
    good = record([], 0, {"baseline": sample(1.0)})
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps(good) + "\n" + damage(good) + "\n")
    with pytest.raises(PruneKitError, match="records.jsonl line 2.*run again") as refused:
        Records(file)
    assert "\n" not in str(refused.value)


def test_records_in_no_encoding_are_a_users_error(tmp_path):
    (tmp_path / "records.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(PruneKitError, match="line 1"):
        Records(tmp_path / "records.jsonl")


def test_a_record_of_more_candidates_adds_to_the_batch_s_earlier_ones():
    records = Records(None)
    records.add(record([], 0, {"baseline": sample(1.0), "text-00": sample(2.0)}))
    records.add(record([], 0, {"baseline": sample(1.0), "text-01": sample(3.0)}))
    assert set(records.scores[(), 0]) == {"baseline", "text-00", "text-01"}


def test_a_table_has_the_samples_that_all_names_were_scored_on():
    records = Records(None)
    records.add(record([], 0, {"baseline": sample(1.0), "text-00": sample(2.0)}))
    records.add(record([], 1, {"baseline": sample(1.0)}))
    assert len(records.table([], ["baseline"])["baseline"]["loss"]) == 2
    assert len(records.table([], ["baseline", "text-00"])["baseline"]["loss"]) == 1


@given(st.integers(3, 40), st.floats(-2, 2), st.integers(0, 99))
def test_a_paired_difference_is_the_one_per_token_and_its_error_that_of_a_ratio(count, shift, seed):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 9, count).astype(float)
    noise = generator.normal(size=count)
    one = {"loss": generator.normal(size=count), "tokens": tokens}
    other = {"loss": one["loss"] + shift * tokens + noise, "tokens": tokens}
    mean, error = paired({"a": other, "b": one}, "a", "b", "loss")
    assert mean == pytest.approx(shift + noise.sum() / tokens.sum(), abs=1e-9)
    rest = noise - noise.sum() / tokens.sum() * tokens
    assert error == pytest.approx(math.sqrt(count / (count - 1) * (rest**2).sum()) / tokens.sum(), abs=1e-9)


# --- searches, on made-up removals


class MadeUp(Scan):
    """A scan whose removals cost what `costs` says, give or take `noise`, in batches of four samples."""

    def __init__(self, costs, noise=0.0, batches=64):
        self.checkpoint, self.records = open_checkpoint(EMBEDDED), Records(None)
        self.job = Job(str(EMBEDDED), "made up")
        self.world, self.batches, self.costs, self.noise = 1, batches, costs, noise
        self.parameters = 2_349_088
        self.measured = {name: 0 for name in costs}

    def measure(self, gone, candidates, batches, what):
        names, base = [str(k) for k in gone], sum(self.costs[str(k)] for k in gone)
        for index in batches:
            known = self.records.scores.get((tuple(names), index), {})
            draws = np.random.default_rng(index)
            common = draws.normal(size=4)
            scores = {}
            for name in ["baseline", *(str(k) for k in candidates)]:
                if name in known:
                    continue
                own = np.random.default_rng([index, sum(map(ord, name))]).normal(size=4) * self.noise
                cost = base + self.costs.get(name, 0.0)
                scores[name] = {
                    "right": list(-common - cost - own),  # token_acc tells them apart as the loss does
                    "loss": list(5 + common + cost + own),
                    "kl": [cost] * 4,
                    "tokens": [1] * 4,
                }
                if name in self.measured:
                    self.measured[name] += 1
            self.records.add(record(names, index, scores))


def costs(values):
    return {str(layer): value for layer, value in zip(LAYERS, values)}


@settings(deadline=None, max_examples=25)
@given(st.permutations([0.1 * i for i in range(14)]), st.integers(1, 13))
def test_a_race_finds_the_best_of_removals_that_differ_clearly(values, keep):
    scan = MadeUp(costs(values), noise=0.05)
    best, undecided = scan.race([], LAYERS, keep, {str(k): 1.0 for k in LAYERS}, share=1.0)
    assert set(best) == set(sorted(scan.costs, key=scan.costs.get)[:keep])
    assert not undecided


def test_a_race_measures_clear_cases_least():
    scan = MadeUp(costs([0.0, 0.01, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5]), noise=0.3)
    scan.race([], LAYERS, 1, {str(k): 1.0 for k in LAYERS}, share=1.0)
    assert scan.measured["text-02"] < scan.measured["text-01"] / 4


def test_a_race_ends_with_its_share_of_the_work_and_names_what_is_undecided():
    scan = MadeUp(costs([0.0] * 14), noise=1.0)
    best, undecided = scan.race([], LAYERS, 5, {str(k): 1.0 for k in LAYERS}, share=0.25)
    assert len(best) == 5
    assert undecided
    assert max(scan.measured.values()) <= 0.4 * scan.batches


def test_a_race_for_all_there_are_decides_at_once():
    scan = MadeUp(costs([0.1 * i for i in range(14)]))
    best, undecided = scan.race([], LAYERS, 14, {str(k): 1.0 for k in LAYERS}, share=1.0)
    assert (len(best), undecided) == (14, set())


def test_the_greedy_path_removes_what_costs_least_per_parameter():
    values = [1.0] * 14
    values[3], values[9] = 0.11, 0.10  # a text layer is 1.27 times a vision block
    path = find_path(MadeUp(costs(values)), LAYERS, 2, None, None)
    assert [entry["removed"] for entry in path] == [[], ["text-03"], ["text-03", "vision-01"]]


def test_the_greedy_path_ends_at_the_parameters_asked_for():
    scan = MadeUp(costs([0.1 * i for i in range(14)]))
    path = find_path(scan, LAYERS, None, 0.75, None)
    assert path[-1]["parameters"] <= 0.75 * scan.parameters < path[-2]["parameters"]


def test_the_greedy_path_ends_where_nothing_more_can_be_removed():
    path = find_path(MadeUp(costs([0.1 * i for i in range(14)])), LAYERS, 99, None, None)
    taps = open_checkpoint(EMBEDDED).config["vision_config"]["deepstack_visual_indexes"]
    assert len(path[-1]["removed"]) == 14 - 2 * len(taps)  # each tap needs a block, and a text layer to enter


def test_a_raced_path_is_the_full_one_where_removals_differ_clearly():
    values = [((i * 5) % 14) * 0.1 for i in range(14)]
    full = find_path(MadeUp(costs(values)), LAYERS, 4, None, None)
    raced = find_path(MadeUp(costs(values), noise=0.02), LAYERS, 4, None, 1.0)
    assert [entry["removed"] for entry in raced] == [entry["removed"] for entry in full]


def test_a_removal_scored_on_few_samples_is_set_off_the_baseline_on_all():
    scan = MadeUp(costs([0.5] * 14))
    scan.measure([], [], range(64), "")
    scan.measure([], LAYERS[:1], range(3), "")
    base, found = scan.score([], "baseline"), scan.score([], "text-00")
    assert found["loss"] - base["loss"] == pytest.approx(0.5, abs=1e-4)
    assert found["samples"] == 12


# --- the command


@pytest.fixture(scope="session")
def finished(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("scan") / "scan"
    result = run("--model", EMBEDDED, "--dataset", texts, "--out", out, "--greedy", 2, "--batch-tokens", 200)
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


def test_a_finished_scan_is_not_repeated(finished, texts):
    out, _ = finished
    before = (out / "records.jsonl").read_bytes()
    assert (
        run("--model", EMBEDDED, "--dataset", texts, "--out", out, "--greedy", 2, "--batch-tokens", 200).returncode == 0
    )
    assert (out / "records.jsonl").read_bytes() == before


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_scan_is_continued_by_the_same_command(finished, texts, tmp_path, end):
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
    assert run(*arguments).returncode == 0
    assert records.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    assert without_times(out) == without_times(finished[0])


@pytest.mark.slow
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


def test_the_path_s_loss_is_that_of_the_checkpoint_cut_on_disk(finished, texts, script, tmp_path):
    scanned = json.loads((finished[0] / "scan.json").read_text())
    entry = scanned["greedy"]["path"][-1]
    numbers = {stack: [n[-2:] for n in entry["removed"] if n.startswith(stack)] for stack in ("text", "vision")}
    flags = [word for stack, layers in numbers.items() if layers for word in (f"--{stack}", *layers)]
    script("manual_select.py", "--model", EMBEDDED, "--out", tmp_path / "cut", *flags)
    assert (
        run(
            "--model",
            tmp_path / "cut",
            "--dataset",
            texts,
            "--out",
            tmp_path / "s",
            "--text",
            "0",
            "--vision",
            "none",
        ).returncode
        == 0
    )
    baseline = json.loads((tmp_path / "s" / "scan.json").read_text())["baseline"]
    assert baseline["loss"] == pytest.approx(entry["loss"], rel=1e-4)
    assert baseline["token_acc"] == entry["token_acc"]


def test_a_healed_path_is_better_than_the_plain_one(finished, texts, tmp_path):
    flags = ("--greedy", 1, "--heal", "--calib", texts, "--vision", "none", "--text", "1-7")
    done = run("--model", EMBEDDED, "--dataset", texts, "--out", tmp_path / "s", *flags)
    assert done.returncode == 0, done.stderr
    healed = json.loads((tmp_path / "s" / "scan.json").read_text())
    [_, entry] = healed["greedy"]["path"]
    plain = next(e for e in healed["removals"] if e["name"] == entry["removed"][0])
    assert entry[CRITERION] < plain[CRITERION]


def test_a_race_is_in_the_result_with_what_it_left_undecided(texts, tmp_path):
    done = run("--model", EMBEDDED, "--dataset", texts, "--out", tmp_path / "s", "--race", "--best", 3)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "s" / "scan.json").read_text())
    assert len(result["best"]) == 3
    assert all(isinstance(entry["decided"], bool) for entry in result["removals"])


@pytest.mark.parametrize(
    "line, said",
    [("", "line 3"), ("{", "line 3"), ('{"text": ""}', "line 3"), ('{"messages": []}', "line 3")],
)
def test_a_bad_row_is_named_by_its_line(line, said, texts, tmp_path):
    lines = texts.read_text().splitlines()
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]))
    done = run("--model", EMBEDDED, "--dataset", tmp_path / "bad.jsonl", "--out", tmp_path / "s")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert said in done.stderr
    assert not (tmp_path / "s").exists()


def test_an_encoder_is_refused_before_anything_is_written(tiny, texts, tmp_path):
    done = run("--model", tiny("bert"), "--dataset", texts, "--out", tmp_path / "s")
    assert (done.returncode, "bert" in done.stderr) == (2, True)
    assert not (tmp_path / "s").exists()


def test_other_settings_in_the_same_folder_are_refused(finished, texts):
    done = run("--model", EMBEDDED, "--dataset", texts, "--out", finished[0], "--tokens", 100)
    assert (done.returncode, "other settings" in done.stderr) == (2, True)


def test_a_folder_in_use_is_refused(texts, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = run("--model", EMBEDDED, "--dataset", texts, "--out", tmp_path)
    assert (done.returncode, "in use" in done.stderr) == (2, True)


def test_generation_from_texts_is_refused(texts, tmp_path):
    done = run("--model", EMBEDDED, "--dataset", texts, "--out", tmp_path / "s", "--generate", 5)
    assert (done.returncode, "--generate" in done.stderr) == (2, True)
    assert not (tmp_path / "s").exists()


def test_a_layer_out_of_range_is_refused(texts, tmp_path):
    done = run("--model", EMBEDDED, "--dataset", texts, "--out", tmp_path / "s", "--text", 8)
    assert (done.returncode, "8" in done.stderr) == (2, True)


def test_help_shows_an_example():
    assert "python -m prunekit.scan --model" in run("--help").stdout


# --- what is refused and read, in this process


@pytest.fixture
def scan_here(monkeypatch, tmp_path):
    """scan_here(model, dataset, *arguments): what OUT/scan.json says."""

    def run_here(model, dataset, *arguments):
        out = tmp_path / "out"
        command = [
            "scan",
            "--model",
            model,
            "--dataset",
            dataset,
            "--out",
            out,
            "--device",
            "cpu",
            *arguments,
        ]
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


@pytest.fixture(scope="session")
def answers(tmp_path_factory):
    """Questions and answers."""
    file = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    rows = [
        [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b" * (n % 3 + 1)}]
        for n in range(1, 13)
    ]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    "arguments",
    [
        ("--tokens", "-1"), ("--batch-tokens", "0"), ("--max-length", "0"), ("--best", "0"), ("--greedy", "-5"),
        ("--generate", "-1"), ("--generate-tokens", "0"), ("--race-share", "nan"), ("--target-params", "1e400"),
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


def test_a_cluster_s_answers_are_those_of_one_machine(monkeypatch, answers):
    job = Job(str(EMBEDDED), str(answers), device="cpu")
    removals = [[Removal("text", 7)], [Removal("text", 3), Removal("vision", 2)]]
    here = Scan(job, None, quiet=True).generate(removals, 5, 3)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(cluster, "run_tasks", lambda function, items, gpus: [(i, function(i)) for i in reversed(items)])
    assert Scan(job, None, quiet=True).generate(removals, 5, 3) == here
    assert [found["samples"] for found in here] == [5, 5]


def test_shares_of_the_rows_answered_by_several_are_those_of_all(answers):
    job = Job(str(EMBEDDED), str(answers), device="cpu")
    gone = (Removal("text", 3),)
    whole = score_generation(job, 7, 3, [answer_without((job, gone, 7, 3, 0, 1))])
    shares = [answer_without((job, gone, 7, 3, n, 3)) for n in range(3)]
    assert [len(part) for part, _ in shares] == [3, 2, 2]
    assert score_generation(job, 7, 3, shares) == whole


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


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes_heal_and_answer_as_one_does(answers, tmp_path):
    """With torchrun and gloo: candidates and rows are shared out, and both processes agree on every choice."""
    flags = (
        "--greedy",
        2,
        "--heal",
        "--calib",
        answers,
        "--generate",
        5,
        "--generate-tokens",
        3,
        "--text",
        "4-7",
    )
    found = []
    for name, more in (("one", ()), ("two", ("--processes", 2))):
        out = tmp_path / name
        done = run("--model", EMBEDDED, "--dataset", answers, "--out", out, "--vision", "none", *flags, *more)
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
