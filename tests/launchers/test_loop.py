"""loop.sh: rounds until the targets are reached, gates that fail, kills, folders put in place by hand, bad settings."""

import json
import math
import shutil
import signal

import pytest
import transformers
from helpers.cuts import cut_width
from helpers.lab import executable, values, wait_for
from helpers.paths import ROOT
from helpers.tiny_words import save_speaking

from prunekit.checkpoint import fingerprint, history, open_checkpoint, statistics
from prunekit.surgery.vocabulary import plan_vocabulary


@pytest.fixture
def loop(lab):
    """A lab in which scans, evaluations and fits take no time (helpers/stub_measuring.py)."""
    executable(lab.folder / "stubs/sitecustomize.py", "from helpers.stub_measuring import main\n\nmain()\n")
    lab.env |= {
        "PYTHONPATH": f"{lab.folder}/stubs:{ROOT}:{ROOT}/tests:{lab.folder}/packages",
        "GPUS": "",
        "TARGET_PARAMS": "0.75",
        "CUTS": "layers neurons",
        "DISTIL_STEPS": "0",
        "CARD": "",
        "WANDB_MODE": "disabled",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return lab


def scores(**by_end):
    return json.dumps({end.replace("_", "/"): value for end, value in by_end.items()})


def state(lab):
    return json.loads((lab.folder / "ckpt/out.loop/loop.json").read_text())


def scripts(lab):
    """What ran, in order: scripts and launchers' stages."""
    lines = [json.loads(line) for line in lab.calls_file.read_text().splitlines()]
    return [
        line["argv"][1] if line["argv"][0] == "-m" else line["argv"][0].split("/")[-1]
        for line in lines
        if line["event"] in ("python", "start")
    ]


@pytest.mark.slow
def test_what_one_training_needs_around_it_is_not_handed_to_the_next(loop):
    loop.run("loop.sh", GPUS="0", MAX_ROUNDS=1, RECOVER_STEPS=4, DISTIL_STEPS=4)
    [recovery], [distillation] = loop.calls("sft"), loop.calls("rlhf")
    assert recovery["env"]["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "colocate" in distillation["argv"] and "PYTORCH_CUDA_ALLOC_CONF" not in distillation["env"]


@pytest.mark.slow
def test_rounds_go_on_until_the_target_is_reached_and_the_last_one_is_published(loop):
    result = loop.run("loop.sh", TARGET_PARAMS="0.8", ROUND_SHARE="0.15", DISTIL_STEPS=9)
    assert result.returncode == 0, result.stderr
    found = state(loop)
    assert len(found["rounds"]) > 1 and all(each["good"] for each in found["rounds"])
    assert statistics(loop.out)["parameters"] <= 0.8 * statistics(loop.env["MODEL"])["parameters"]
    assert "all targets are reached" in result.stdout
    entry = history(loop.out)[-1]
    assert entry["stage"] == "loop" and entry["settings"]["round"] == len(found["rounds"])
    assert (loop.out / "loop.png").exists() and (loop.out / "command.sh").exists() and not loop.work.exists()
    assert {call["env"]["CUDA_VISIBLE_DEVICES"] for call in loop.calls()} == {""}
    teachers = [values(call["argv"], "--teacher_model") for call in loop.calls("rlhf")]
    assert teachers == [[loop.env["MODEL"]]] * len(found["rounds"]), "the first model, in every round"


def test_a_base_that_cannot_be_measured_takes_nothing_away_that_was_put_there_by_hand(loop):
    mine = loop.folder / "ckpt/out.loop/1/cut/mine"
    mine.parent.mkdir(parents=True)
    mine.touch()
    assert loop.run("loop.sh", STUB_BREAK="prunekit.evaluate").returncode == 3
    assert mine.exists() and [path.name for path in (loop.folder / "ckpt/out.loop").iterdir()] == ["1"]


@pytest.mark.parametrize(("layer", "heals"), [(0, False), (3, True)])
def test_first_layers_which_nothing_can_heal_are_cut_as_they_are(loop, layer, heals):
    settings = {"fingerprint": fingerprint(open_checkpoint(loop.env["MODEL"]))}
    path = [{"removed": [f"text-{layer:02d}"][:count], "loss": 0.1} for count in (0, 1)]
    file = loop.folder / "ckpt/out.loop/1/scan/scan.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"settings": settings, "greedy": {"path": path}}))
    result = loop.run("loop.sh", MAX_ROUNDS=1, CUTS="layers")
    assert result.returncode == 3, result.stderr
    [cut] = [call["argv"] for call in loop.calls(event="python") if call["argv"][0].endswith("manual_select.py")]
    assert ("--heal" in cut, "--calib" in cut) == (heals, heals)


def test_a_round_is_what_a_person_would_do_and_all_that_could_be_cut_is_written_down(loop):
    loop.run("loop.sh", MAX_ROUNDS=1, DISTIL_STEPS=9, CUTS="layers heads neurons kv")
    assert scripts(loop)[:2] == ["prunekit.evaluate", "prunekit.scan"]
    assert scripts(loop)[-3:] == ["sft", "rlhf", "prunekit.evaluate"]
    [this] = state(loop)["rounds"]
    chosen = [each for each in this["candidates"] if each["chosen"]]
    assert {each["kind"] for each in this["candidates"]} >= {"layers", "heads", "neurons"}
    assert 0 < len(chosen) < len(this["candidates"])
    assert sum(each["saved"]["params"] for each in chosen) <= this["most"]
    folder = loop.folder / "ckpt/out.loop/1"
    assert {path.name for path in folder.iterdir()} == {"scan", "distilled", "trials.json", "evaluation.json"}


def test_below_the_gate_a_round_is_recovered_for_longer(loop):
    result = loop.run("loop.sh", MAX_ROUNDS=1, RECOVER_STEPS=7, STUB_SCORES=scores(_1_recovered=0.8))
    assert result.returncode in (0, 3), result.stderr
    [this] = state(loop)["rounds"]
    assert this["good"] and this["folder"] == "longer"
    steps = [values(call["argv"], "--max_steps") for call in loop.calls("sft")]
    assert steps == [["7"], ["14"]]


@pytest.mark.ci
@pytest.mark.parametrize("good", [0, 1])
def test_after_two_failed_rounds_the_last_good_model_is_published_if_there_is_one(good, loop):
    failing = {f"_{number}_{name}": 0.5 for number in (good + 1, good + 2) for name in ("recovered", "longer")}
    result = loop.run("loop.sh", TARGET_PARAMS="0.6", ROUND_SHARE="0.2", STUB_SCORES=scores(**failing))
    rounds = state(loop)["rounds"]
    assert [each["good"] for each in rounds] == [True] * good + [False] * 2
    assert [each["from"] for each in rounds] == [0] * good + [good] * 2
    assert rounds[-1]["most"] == pytest.approx(rounds[-2]["most"] / 2)
    assert scripts(loop).count("prunekit.scan") == good + 1, "from the same model there is nothing new to see"
    if good:
        assert result.returncode == 3 and "not reached: TARGET_PARAMS: two rounds failed" in result.stdout
        assert history(loop.out)[-1]["settings"]["round"] == 1
    else:
        assert result.returncode == 1 and not loop.out.exists()
        assert "the base is the last good model" in result.stderr


@pytest.mark.ci
def test_where_all_costs_more_than_the_gate_bears_smaller_cuts_are_tried_before_a_training_is_spent(loop):
    folder = save_speaking("llama", loop.folder / "wide")
    config = transformers.AutoConfig.from_pretrained(folder, intermediate_size=512)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    found = scores(_1_recovered=0.885, _2_recovered=0.88)
    shares = {"0.875": 0.895, "0.7656": 0.88, "0.9184": 0.865, "0.8367": 0.85, "0.9592": 0.875, "0.9796": 0.88}
    settings = {
        "MODEL": "wide",
        "CUTS": "neurons",
        "MAX_ROUNDS": "2",
        "ROUND_SHARE": "0.2",
        "TARGET_PARAMS": "0.6",
        "STUB_SCORES": json.dumps(json.loads(found) | {f"share-{share}": score for share, score in shares.items()}),
    }
    broken = loop.run("loop.sh", **settings, STUB_BREAK="neuron-share-0.9796")
    assert "CUDA out of memory" in broken.stderr
    result = loop.run("loop.sh", **settings)
    assert result.returncode == 3, result.stderr
    first, second = state(loop)["rounds"]
    assert [each["name"] for each in first["candidates"] if each["chosen"]] == ["neurons 0.7656"]
    assert [each["name"] for each in second["candidates"] if each["chosen"]] == ["neurons 0.9592"]
    assert len(second["candidates"]) == 4 and second["good"]
    tried = [values(call["argv"], "--neuron-share") for call in loop.calls(event="python") if "--out" in call["argv"]]
    assert tried.count(["0.9184"]) == tried.count(["0.9592"]) == 1, "nothing that was measured is made again"


@pytest.mark.ci
def test_a_speed_is_estimated_for_the_choice_and_measured_after_the_round(loop):
    """The stub takes a second a text layer, of which there are five."""
    result = loop.run("loop.sh", TARGET_PARAMS="", TARGET_SPEED="1.5", ROUND_SHARE="0.9", CUTS="layers")
    assert result.returncode == 0, result.stderr
    assert scripts(loop) == [
        "prunekit.evaluate", "prunekit.speed", "prunekit.scan", "manual_select.py", "sft", "prunekit.evaluate",
        "prunekit.speed",
    ]  # fmt: skip
    found = state(loop)
    [this] = found["rounds"]
    assert found["settings"]["targets"] == {"speed": pytest.approx(1 / 1.5)}
    assert found["base"]["parts"] == {"attention": 0.5, "mlp": 0.5}
    [chosen] = [each for each in this["candidates"] if each["chosen"]]
    assert chosen["saved"]["speed"] == pytest.approx(0.4), "by the estimate"
    assert this["sizes"]["speed"] == pytest.approx(0.6) and "1.67 times as fast" in result.stdout, "by the clock"


@pytest.mark.ci
def test_experts_are_tried_chosen_and_cut_by_the_line_that_a_person_would_type(loop):
    save_speaking("mixtral", loop.folder / "speaking")
    settings = {
        "MODEL": "speaking",
        "CUTS": "experts",
        "MAX_ROUNDS": "1",
        "ROUND_SHARE": "0.5",
        "TARGET_PARAMS": "0.76",
    }
    result = loop.run("loop.sh", **settings, STUB_SCORES='{"experts-4": 0.89}')
    assert result.returncode == 3, result.stderr
    lines = [line for line in result.stdout.splitlines() if "expert_cut.py" in line]
    assert [f"--experts {n} --calib" in line for n, line in zip((5, 4), lines, strict=True)] == [True, True], lines
    [this] = state(loop)["rounds"]
    assert [each["name"] for each in this["candidates"] if each["chosen"]] == ["experts 4"]
    assert [entry["stage"] for entry in history(loop.out)] == ["expert_cut", "full_run", "loop"]
    assert statistics(loop.out)["num_experts"] == 4


@pytest.mark.ci
def test_where_tokens_go_the_teacher_loses_the_same(loop):
    model = save_speaking("qwen3_vl", loop.folder / "speaking")
    before, left = statistics(model)["parameters"], statistics(plan_vocabulary(open_checkpoint(model), 384).outline)
    settings = {"MODEL": "speaking", "CUTS": "vocabulary", "METRIC": "loss", "KEEP": "0.1", "DISTIL_STEPS": 9}
    result = loop.run("loop.sh", **settings, TARGET_PARAMS=f"{math.ceil(left['parameters'] / before * 1e6) / 1e6}")
    assert result.returncode == 0, result.stderr
    [call] = loop.calls("rlhf")
    [teacher] = values(call["argv"], "--teacher_model")
    assert teacher.endswith("out.loop/1/teacher") and statistics(loop.folder / teacher)["vocab_size"] == 384
    assert (loop.folder / teacher / "tokenizer.json").read_bytes() == (loop.out / "tokenizer.json").read_bytes()
    assert [entry["stage"] for entry in history(loop.out)] == ["vocab_cut", "full_run", "distil", "loop"]


@pytest.mark.ci
def test_stages_behind_the_last_round_follow_each_other_and_one_below_the_gate_is_left_out(loop):
    settings = {"END": "kv lora rl", "LORA_DATASET": "train.jsonl", "RL_DATASET": "train.jsonl", "MAX_ROUNDS": 1}
    failing = scores(end_lora_merged=0.5)
    result = loop.run("loop.sh", **settings, END_STEPS=5, LORA_ARGS="--max_steps 6", STUB_BREAK="kv_cut.py")
    assert result.returncode == 1 and "round end/kv stopped: kv_cut.py's messages" in result.stderr
    before = scripts(loop)
    result = loop.run("loop.sh", **settings, END_STEPS=5, LORA_ARGS="--max_steps 6", STUB_SCORES=failing)
    assert result.returncode in (0, 3), result.stderr
    assert scripts(loop)[len(before) :] == [
        "kv_cut.py", "sft", "prunekit.evaluate", "sft", "export", "prunekit.evaluate", "rlhf", "prunekit.evaluate",
    ]  # fmt: skip
    found = {each["stage"]: each for each in state(loop)["end"]}
    assert [each["good"] for each in found.values()] == [True, False, True]
    kv = str(loop.folder / "ckpt/out.loop/end/kv/recovered").removeprefix(f"{loop.folder}/")
    assert found["lora"]["from"] == found["rl"]["from"] == kv
    assert "lora: left out: it would keep 55.6%" in result.stdout
    assert statistics(loop.out)["num_key_value_heads"] == 1
    assert [entry["stage"] for entry in history(loop.out)][-2:] == ["rl_run", "loop"]
    assert not (loop.folder / "ckpt/out.loop/end/lora/merged").exists()


@pytest.mark.slow
def test_a_killed_loop_leaves_no_process_and_repeats_nothing_that_is_done(loop):
    process = loop.until_hanging("loop.sh", MAX_ROUNDS=1, STUB_HANG_AT=3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = scripts(loop)
    result = loop.run("loop.sh", MAX_ROUNDS=1)
    assert result.returncode in (0, 3), result.stderr
    assert scripts(loop)[len(before) :] == ["sft", "prunekit.evaluate"]
    assert "--resume_from_checkpoint" in loop.calls("sft")[1]["argv"]
    wait_for(lambda: not loop.left())


@pytest.mark.ci
@pytest.mark.parametrize("stage", ["width_cut.py", "prunekit.scan"])
def test_a_stage_that_breaks_ends_the_round_in_its_own_words_and_the_same_command_goes_on(stage, loop):
    result = loop.run("loop.sh", MAX_ROUNDS=1, STUB_BREAK=stage)
    assert result.returncode == 1
    assert f"{stage}: CUDA out of memory\nerror: round 1 stopped: {stage}'s messages are above" in result.stderr
    assert loop.run("loop.sh", MAX_ROUNDS=1).returncode in (0, 3)
    assert scripts(loop).count(stage) >= 2


@pytest.mark.slow
def test_a_loop_half_forgotten_is_not_taken_for_one_of_other_settings(loop):
    assert loop.run("loop.sh", STUB_FAIL_AT=3).returncode == 1
    rm = loop.folder / "env/bin/rm"
    forgets = 'case "$*" in *.loop*) find "$@" -maxdepth 1 -type f -delete; exit 1 ;; esac'
    executable(rm, f'#!/bin/sh\nshift\n{forgets}\nexec /bin/rm -rf "$@"\n')
    assert loop.run("loop.sh", RESTART=1, TARGET_PARAMS="0.9").returncode == 1
    rm.unlink()
    result = loop.run("loop.sh", TARGET_PARAMS="0.9")
    assert result.returncode == 2 and "holds a loop with another targets" in result.stderr, result.stderr


@pytest.mark.slow
def test_a_loop_killed_behind_its_publishing_ends_as_it_would_have(loop):
    executable(loop.folder / "env/bin/mv", '#!/bin/sh\ncase "$*" in *"out.run "*) exit 1 ;; esac\nexec /bin/mv "$@"\n')
    assert loop.run("loop.sh", MAX_ROUNDS=1, TARGET_PARAMS="0.5").returncode == 1 and loop.out.exists()
    (loop.folder / "env/bin/mv").unlink()
    for other, message in (({"TARGET_PARAMS": "0.6"}, "another targets"), ({"RESTART": 1}, "exists; choose")):
        result = loop.run("loop.sh", **{"MAX_ROUNDS": 1, "TARGET_PARAMS": "0.5"} | other)
        assert result.returncode == 2 and message in result.stderr, result.stderr
    result = loop.run("loop.sh", MAX_ROUNDS=1, TARGET_PARAMS="0.5")
    assert result.returncode == 3 and "is there already\nnot reached: TARGET_PARAMS: " in result.stdout, result.stderr
    assert not loop.work.exists()


@pytest.mark.slow
def test_a_cut_of_two_kinds_that_broke_in_the_second_goes_on_there(loop):
    settings = {"CUTS": "neurons kv", "TARGET_PARAMS": "0.9", "TARGET_KV": "0.5", "MAX_ROUNDS": "1"}
    result = loop.run("loop.sh", **settings, STUB_BREAK="cut")
    assert result.returncode == 1 and "stopped: kv_cut.py's messages" in result.stderr, result.stderr
    before = scripts(loop)
    result = loop.run("loop.sh", **settings)
    assert result.returncode in (0, 3), result.stderr
    assert scripts(loop)[len(before) :] == ["kv_cut.py", "sft", "prunekit.evaluate"]
    assert [entry["stage"] for entry in history(loop.out)] == ["width_cut", "kv_cut", "full_run", "loop"]


def test_a_loop_goes_on_with_a_folder_that_a_person_put_in_place(loop):
    here = loop.folder / "ckpt/out.loop/1"
    assert loop.run("loop.sh", STUB_BREAK="prunekit.scan").returncode == 1
    cut_width(loop.env["MODEL"], here / "cut", neuron_share=0.25)
    result = loop.run("loop.sh", TARGET_PARAMS="0.75", MAX_ROUNDS=1)
    assert result.returncode in (0, 3), result.stderr
    assert scripts(loop) == ["prunekit.evaluate", "prunekit.scan", "sft", "prunekit.evaluate"]
    assert [entry["stage"] for entry in history(loop.out)][0] == "width_cut"


def test_a_teacher_with_fewer_tokens_has_a_cache_of_its_own(loop):
    here, settings = loop.folder / "ckpt/out.loop/1", {"DISTIL_STEPS": 9, "CACHE": "cache"}
    assert loop.run("loop.sh", **settings, STUB_BREAK="prunekit.scan").returncode == 1
    for name in ("cut", "teacher"):
        shutil.copytree(loop.env["MODEL"], here / name)
    result = loop.run("loop.sh", "--dry-run", **settings)
    assert result.returncode == 0, result.stderr
    [line] = [line for line in result.stdout.splitlines() if "distil.sh" in line]
    assert " TEACHER=ckpt/out.loop/1/teacher CACHE=ckpt/out.loop/1/teacher.cache " in line


def test_a_loop_of_another_base_or_for_other_targets_is_refused_in_one_line(loop, pruned):
    assert loop.run("loop.sh", STUB_BREAK="prunekit.scan").returncode == 1
    before = (loop.folder / "ckpt/out.loop/loop.json").read_text()
    for what, more in (("targets", {"TARGET_PARAMS": "0.5"}), ("fingerprint", {"MODEL": str(pruned)})):
        result = loop.run("loop.sh", **more)
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
        assert f"holds a loop with another {what}" in result.stderr
    assert (loop.folder / "ckpt/out.loop/loop.json").read_text() == before


def test_a_dry_run_prints_the_lines_and_writes_nothing(loop):
    before = sorted(loop.folder.rglob("*"))
    result = loop.run("loop.sh", "--dry-run", "--learning_rate", "3e-5", TARGET_SPEED="1.5", END="kv", CARD=1)
    assert result.returncode == 0, result.stderr
    lines = [line[2:] for line in result.stdout.splitlines() if line.startswith("+ ")]
    ends = [line for line in lines if "out.loop/end/" in line]
    assert ["kv_cut.py" in ends[0], "full_run.sh" in ends[1]] == [True, True] and "prunekit.card" in lines[-1]
    assert any(line.startswith("python -m prunekit.speed") and "--parts" in line for line in lines)
    for start in ("python -m prunekit.evaluate", "python -m prunekit.scan", f"python {ROOT}/width_cut.py", "MODEL="):
        assert any(line.startswith(start) for line in lines), lines
    assert any("full_run.sh" in line and "--learning_rate 3e-5" in line for line in lines)
    assert sorted(loop.folder.rglob("*")) == before


def test_flags_of_stages_may_be_on_several_lines(loop):
    result = loop.run("loop.sh", "--dry-run", RECOVER_ARGS="--learning_rate 3e-5\n  --max_length 99\n")
    assert result.returncode == 0, result.stderr
    [line, *_] = [line for line in result.stdout.splitlines() if "full_run.sh" in line]
    assert "--learning_rate 3e-5 --max_length 99" in line


def test_what_a_loop_computes_in_is_said_to_all_that_computes(loop):
    result = loop.run("loop.sh", "--dry-run", DTYPE="bfloat16", END="kv", CARD=1)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("+ ")]
    for name in ("evaluate", "scan", "card", "kv_cut.py"):
        assert [line for line in lines if name in line], name
        assert all("--dtype bfloat16" in line for line in lines if name in line and "vocab" not in line), lines


def test_a_finished_loop_is_refused_as_any_output_that_exists(loop):
    shutil.copytree(loop.env["MODEL"], loop.out)
    result = loop.run("loop.sh")
    assert result.returncode == 2 and "exists; choose another OUT or pass --overwrite" in result.stderr


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"TARGET_PARAMS": ""}, "no target"),
        ({"TARGET_BYTES": "5e9"}, "TARGET_BYTES: {model} is as small as that already"),
        ({"TARGET_PARAMS": "", "TARGET_KV": "0.5", "CUTS": "neurons"}, "TARGET_KV: is"),
        ({"TARGET_PARAMS": "0.3", "CUTS": "kv"}, "TARGET_PARAMS: is"),
        ({"REUSE": "1"}, "REUSE=1: is for a single training"),
        ({"METRIC": "reward"}, "of which rewards?"),
        ({"METRIC": "exact_match"}, "has no exact_match (METRIC)"),
        ({"STUB_SCORES": '{"qwen3_vl": 0}'}, "of that no share can be kept"),
        ({"MODEL": "absent"}, "absent: no such folder"),
        ({"CUTS": "kv kv"}, "each once"),
        ({"TARGET_SPEED": "0.5"}, "TARGET_SPEED=0.5: give how many times as fast"),
        ({"CUTS": "layers vocabulary"}, "tokenizer.json"),
        (
            {"CUTS": "layers vocabulary", "END": "rl", "RL_DATASET": "train.jsonl", "ALGORITHM": "OPD"},
            "ALGORITHM=OPD: its TEACHER has the tokens",
        ),
        ({"CUTS": "layers experts"}, "CUTS has experts: {model}: qwen3_vl without a mixture of experts"),
        ({"MAX_ROUNDS": "99999999"}, "GB free, out may need"),
        ({"DISTIL_STEPS": "9", "GPUS": "0,1", "STUB_GPUS": "2", "ROLLOUT_GPUS": "9"}, "there is no GPU 9 here"),
        ({"DISTIL_STEPS": "9", "CACHE": "cache", "LMBDA": "1"}, "leave one out"),
        pytest.param({"END": "kv", "END_KV": "3"}, "kv-heads 3", marks=pytest.mark.slow),
        pytest.param({"END": "lora", "LORA_DATASET": "absent.jsonl"}, "absent.jsonl is not", marks=pytest.mark.slow),
        ({"END": "rl", "RL_DATASET": "train.jsonl", "RL_ARGS": "--reward_funcs ocr_cer"}, "--reward_weights gives 4"),
    ],
    ids=str,
)
def test_what_can_come_to_nothing_is_refused_in_one_line_and_leaves_nothing(env, message, loop):
    result = loop.run("loop.sh", **env)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and message.format(model=loop.env["MODEL"]) in result.stderr
    assert not loop.out.parent.exists() or list(loop.out.parent.iterdir()) == []
