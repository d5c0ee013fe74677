"""Recovery in three phases: what each is told, what is repeated, and what was cut last."""

import re
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
from helpers.cuts import cut_width
from helpers.lab import check_flags, executable, values, wait_for
from helpers.tiny_models import FAMILIES, load

from prunekit.checkpoint import append_history, attending, history, open_checkpoint
from prunekit.critical import critical_parameters
from prunekit.errors import PruneKitError
from prunekit.surgery.cut import write_cut
from prunekit.surgery.kv import cut_kv, plan_kv
from prunekit.surgery.layers import cut_layers, plan_layers
from prunekit.training.publish import publish


@pytest.fixture
def narrow(lab, tiny, tmp_path):
    """A lab whose MODEL lost half of its heads."""
    cut_width(tiny("qwen3_vl"), tmp_path / "narrow", head_share=0.5)
    lab.env["MODEL"] = str(tmp_path / "narrow")
    return lab


def test_phases_follow_each_other_and_only_the_first_is_of_what_was_cut(narrow, parsers):
    result = narrow.run("progressive_run.sh", GPUS="", STEPS2=7, ACCUMULATE=2, RUN_NAME="mine")
    assert result.returncode == 0, result.stderr
    calls = [call["argv"] for call in narrow.calls()]
    assert [values(argv, "--run_name") for argv in calls] == [["mine-1"], ["mine-2"], ["mine-3"]]
    folders = [narrow.env["MODEL"], "ckpt/out-phase1", "ckpt/out-phase2", "ckpt/out"]
    assert [values(argv, "--model") for argv in calls] == [[folder] for folder in folders[:3]]
    assert [values(argv, "--freeze_parameters_ratio") if i == 0 else "--freeze_parameters_ratio" in argv
            for i, argv in enumerate(calls)] == [["1"], False, False]  # fmt: skip
    assert [values(argv, "--gradient_accumulation_steps") for argv in calls] == [["2"], ["2"], ["8"]]
    assert values(calls[1], "--max_steps") == ["7"]
    rates = [float(values(argv, "--learning_rate")[0]) for argv in calls]
    assert rates == sorted(rates, reverse=True)
    for argv in calls:
        check_flags(parsers["sft"], argv[1:])
    stages = [entry["stage"] for entry in history(narrow.out)]
    assert stages == ["width_cut", *(f"progressive_run-{number}" for number in (1, 2, 3))]


def test_in_phase_1_ms_swift_trains_nothing_but_what_was_cut(narrow):
    from swift.arguments.tuner_args import TunerArguments
    from swift.model import MODEL_MAPPING
    from swift.utils import activate_parameters, freeze_parameters

    narrow.run("progressive_run.sh", GPUS="", STUB_FAIL_AT=1)
    argv = narrow.calls()[0]["argv"]
    flags = {name: values(argv, f"--freeze_{name}") == ["true"] for name in ("vit", "aligner")}
    arguments = SimpleNamespace(
        model_meta=MODEL_MAPPING["qwen3_vl"], tuner_type="full", freeze_parameters=[], trainable_parameters=[],
        freeze_llm=False,
        **{f"freeze_{name}": flag for name, flag in flags.items()},
    )  # fmt: skip
    TunerArguments._init_multimodal_full(arguments)
    model = load(narrow.env["MODEL"])
    freeze_parameters(model, 1.0, arguments.freeze_parameters)
    (pattern,) = values(argv, "--trainable_parameters_regex")
    activate_parameters(model, arguments.trainable_parameters, pattern)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == trained_by(narrow.env["MODEL"])


def test_phase_1_can_train_the_most_important_heads_of_any_model_and_the_others_what_they_are_told(lab, parsers):
    result = lab.run("progressive_run.sh", GPUS="", TRAIN1="heads", HEADS1="0.25", HEAD_RATES="weak=0.2")
    assert result.returncode == 0, result.stderr
    first, *others = lab.calls()
    assert values(first["argv"], "--optimizer") == ["important_heads"]
    assert "--trainable_parameters_regex" not in first["argv"]
    assert not any("--optimizer" in call["argv"] for call in others)
    assert [call["env"]["HEAD_RATES"] for call in (first, *others)] == ["weak_share=0.75", "weak=0.2", "weak=0.2"]
    check_flags(parsers["sft"], first["argv"][1:])
    commands = [(lab.out.with_name(name) / "command.sh").read_text() for name in ("out-phase1", "out")]
    assert [command.splitlines()[-1].split()[0] for command in commands] == ["HEAD_RATES=weak_share=0.75", "swift"]


def test_the_last_phase_has_four_times_the_rows_a_step(narrow):
    narrow.run("progressive_run.sh", GPUS="", GLOBAL_BATCH=6)
    batches = [
        int(values(call["argv"], "--per_device_train_batch_size")[0])
        * int(values(call["argv"], "--gradient_accumulation_steps")[0])
        for call in narrow.calls()
    ]
    assert batches == [6, 6, 24]


def test_a_killed_run_leaves_no_process_and_goes_on_in_its_phase(narrow):
    process = narrow.start("progressive_run.sh", GPUS="", STUB_HANG_AT=3)
    wait_for(lambda: process.poll() is not None or narrow.calls(event="hang"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    wait_for(lambda: not narrow.left())
    assert not narrow.out.with_name("out-phase1").exists()
    result = narrow.run("progressive_run.sh", GPUS="")
    assert result.returncode == 0, result.stderr
    starts = [call["argv"] for call in narrow.calls()]
    assert len(starts) == 4 and "--resume_from_checkpoint" in starts[1]


def test_finished_phases_are_not_repeated_and_a_finished_output_is_refused(narrow):
    assert narrow.run("progressive_run.sh", GPUS="", STUB_FAIL_AT=1).returncode != 0
    assert narrow.run("progressive_run.sh", GPUS="").returncode == 0
    again = narrow.run("progressive_run.sh", GPUS="")
    assert (again.returncode, again.stderr) == (
        2, "error: ckpt/out: exists; choose another OUTPUT or pass --overwrite\n"
    )  # fmt: skip
    narrow.out.rename(narrow.out.with_name("moved"))
    done = narrow.run("progressive_run.sh", GPUS="")
    assert done.stdout.count("is there already") == 2 and done.returncode == 0
    assert len(narrow.calls()) == 1 + 3 + 1


def test_a_run_that_overwrites_goes_on_in_its_phase_too(narrow):
    shutil.copytree(narrow.env["MODEL"], narrow.out)
    in_the_way = narrow.out.with_name("out-phase2")
    in_the_way.touch()
    assert narrow.run("progressive_run.sh", "--overwrite", GPUS="").returncode == 2
    in_the_way.unlink()
    result = narrow.run("progressive_run.sh", "--overwrite", GPUS="")
    assert result.returncode == 0, result.stderr
    models = [values(call["argv"], "--model")[0].rpartition("/")[2] for call in narrow.calls()]
    assert models == ["narrow", "out-phase1", "out-phase2"]
    assert history(narrow.out)[-1]["stage"] == "progressive_run-3"


def two_nodes(narrow, python):
    """The launcher at work on two nodes, whose Python is this script."""
    executable(narrow.folder / "env/bin/python", python)
    setting = {"GPUS": "", "NNODES": 2, "MASTER_ADDR": "a", "STUB_MEET": 1}
    return [narrow.start("progressive_run.sh", NODE_RANK=rank, **setting) for rank in (0, 1)]


@pytest.mark.slow
def test_a_node_that_publishes_nothing_waits_for_the_phase_that_another_does(narrow):
    slow = f'#!/bin/sh\ncase "$*" in *training.publish*--out*) sleep 2 ;; esac\nexec {sys.executable} "$@"\n'
    for node in two_nodes(narrow, slow):
        _, err = node.communicate(timeout=120)
        assert node.returncode == 0, err
    assert len(narrow.calls()) == 6 and history(narrow.out)[-1]["stage"] == "progressive_run-3"


@pytest.mark.slow
def test_a_node_does_not_wait_for_a_phase_that_another_failed_to_publish(narrow):
    broken = f'#!/bin/sh\ncase "$*" in *training.publish*--out*) exit 1 ;; esac\nexec {sys.executable} "$@"\n'
    for node, said in zip(two_nodes(narrow, broken), ("", "the first node has failed")):
        _, err = node.communicate(timeout=120)
        assert node.returncode == 1 and said in err


def test_a_check_of_phases_is_of_all_three_and_writes_nothing(narrow):
    before = sorted(narrow.folder.rglob("*"))
    result = narrow.run("progressive_run.sh", GPUS="", CHECK=1)
    assert result.returncode == 0, result.stderr
    assert sorted(narrow.folder.rglob("*")) == before and not narrow.calls()


def test_a_model_that_wasnt_cut_is_refused_in_one_line(lab):
    result = lab.run("progressive_run.sh", GPUS="")
    assert result.returncode == 2 and not lab.calls()
    assert re.fullmatch(r"error: .*: nothing was cut from it since it was trained; .*\n", result.stderr)


@pytest.mark.parametrize("optimizer", ["head_rates", "active_heads"])
def test_bad_rates_of_heads_are_refused_before_anything_runs(optimizer, lab):
    result = lab.run("full_run.sh", "--optimizer", optimizer, GPUS="", HEAD_RATES="weak=7")
    assert (result.returncode, lab.calls()) == (2, [])
    assert result.stderr == "error: HEAD_RATES: weak=7.0: give 0 to 1\n"


def trained_by(folder):
    """Names of the parameters that phase 1 trains, as ms-swift finds them."""
    pattern = re.compile(critical_parameters(open_checkpoint(folder)))
    return {name for name, _ in load(folder).named_parameters() if pattern.search(name)}


@pytest.mark.parametrize("family", FAMILIES)
def test_of_narrow_layers_the_parts_that_were_cut_are_trained(family, tiny, tmp_path):
    cut_width(tiny(family), tmp_path / "heads", head_share=0.5)
    cut_width(tiny(family), tmp_path / "neurons", neuron_share=0.5)
    checkpoint = open_checkpoint(tiny(family))
    row = checkpoint.family.text
    of_heads, of_neurons = (trained_by(tmp_path / name) for name in ("heads", "neurons"))
    layers = {re.match(rf"{row.prefix}(\d+)", name)[1] for name in of_heads}
    assert layers == {str(number) for number in attending(checkpoint)} and not of_heads & of_neurons
    assert any(name.endswith(f"{row.o}.weight") for name in of_heads)
    assert any(row.mlp[-1] in name or name.endswith(".experts.down_proj") for name in of_neurons)


def test_the_layers_beside_removed_ones_are_trained_by_their_new_numbers(tiny, tmp_path):
    checkpoint = open_checkpoint(tiny("qwen3_vl"))
    write_cut(cut_layers(plan_layers(checkpoint, text=[2], vision=[5])), tmp_path / "one")
    write_cut(cut_layers(plan_layers(open_checkpoint(tmp_path / "one"), text=[0])), tmp_path / "two")
    names = trained_by(tmp_path / "two")
    layers = {tuple(re.search(r"(language_model|visual)\.(?:layers|blocks)\.(\d+)", name).groups()) for name in names}
    assert layers == {("language_model", "0"), ("language_model", "1"), ("visual", "4")}


def test_what_was_packed_and_unpacked_is_as_critical_as_before(tiny, tmp_path):
    write_cut(cut_layers(plan_layers(open_checkpoint(tiny("llama")), text=[2])), tmp_path / "cut")
    before = critical_parameters(open_checkpoint(tmp_path / "cut"))
    for stage in ("pack", "unpack"):
        append_history(tmp_path / "cut", {"stage": stage, "removed": None})
    assert critical_parameters(open_checkpoint(tmp_path / "cut")) == before


def test_a_training_in_between_ends_what_is_critical(tiny, tmp_path):
    write_cut(cut_layers(plan_layers(open_checkpoint(tiny("llama")), text=[2])), tmp_path / "cut")
    publish(tmp_path / "cut", tmp_path / "trained", tmp_path / "cut", "full_run")
    with pytest.raises(PruneKitError, match="nothing was cut from it since it was trained"):
        critical_parameters(open_checkpoint(tmp_path / "trained"))
    write_cut(cut_kv(plan_kv(open_checkpoint(tmp_path / "trained"), 1)), tmp_path / "merged")
    assert all(".self_attn." in name for name in trained_by(tmp_path / "merged"))
