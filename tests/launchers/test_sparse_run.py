"""sparse_run.sh: cycles that are there aren't made again, the sparsest good one is published, bad settings refused."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers.cuts import sparsify
from helpers.lab import executable, wait_for
from safetensors.torch import load_file

from prunekit.checkpoint import history
from prunekit.errors import PruneKitError
from prunekit.training.cycles import best_cycle


@pytest.fixture
def cycles(lab):
    """A lab whose dense model is measured already: the real evaluation would need a tokenizer."""
    folder = lab.out.with_name("out.cycles")
    folder.mkdir(parents=True)
    lab.env |= {"GPUS": "", "CYCLES": "2", "SPARSITY": "0.6", "MODULES": "language_model"}
    measured(folder / "dense.json", 2.0)
    return folder


def measured(file, *losses):
    scores = [{"model": "m", "datasets": {"val": {"token_acc": 0.5, "loss": loss}}} for loss in losses]
    file.write_text(json.dumps(scores))


def done(folder, model, number, sparsity, *losses):
    sparsify(model, folder / str(number), sparsity=sparsity, modules="language_model")
    measured(folder / f"{number}.json", *losses)


def zeros(folder):
    return sum(int((values == 0).sum()) for values in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize(("last", "published"), [(2.1, 2), (2.4, 1)], ids=["good", "too bad"])
def test_the_sparsest_good_cycle_is_published_and_none_is_made_again(last, published, lab, cycles, tiny):
    done(cycles, tiny("qwen3_vl"), 1, 0.3, 2.5, 2.05)
    done(cycles, tiny("qwen3_vl"), 2, 0.6, 3.5, last)
    result = lab.run("sparse_run.sh", STUB_DRAWS=1)
    assert result.returncode == 0, result.stderr
    assert not lab.calls(), "nothing was trained"
    assert zeros(lab.out) == zeros(cycles / str(published))
    entry = history(lab.out)[-1]
    assert entry["stage"] == "sparse_run" and entry["settings"]["cycle"] == published
    assert entry["sparsity"]["sparsity"] == pytest.approx(0.3 * published, abs=1e-4)
    assert (cycles / "quality.png").exists() and (lab.out / "sparsity.png").exists()
    assert not lab.work.exists()


def test_the_published_folder_has_the_command_of_the_whole_run(lab, cycles, tiny):
    done(cycles, tiny("qwen3_vl"), 1, 0.3, 2.5, 2.05)
    done(cycles, tiny("qwen3_vl"), 2, 0.6, 3.5, 2.1)
    lab.run("sparse_run.sh", "--max_steps", 7)
    command = (lab.out / "command.sh").read_text()
    shutil.move(lab.out, lab.folder / "first")
    (lab.folder / "command.sh").write_text(command)
    again = subprocess.run(["bash", "command.sh"], cwd=lab.folder, env=lab.env, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "--max_steps 7" in command and (lab.out / "command.sh").read_text() == command
    assert history(lab.out)[-1]["settings"] == history(lab.folder / "first")[-1]["settings"]


def test_a_run_killed_after_publishing_is_only_cleaned_up_and_refused_with_other_settings(lab, cycles, tiny):
    done(cycles, tiny("qwen3_vl"), 1, 0.3, 2.5, 2.05)
    done(cycles, tiny("qwen3_vl"), 2, 0.6, 3.5, 2.1)
    mv = lab.folder / "env/bin/mv"
    executable(mv, '#!/bin/sh\ncase "$*" in *"out.run "*) exit 1 ;; esac\nexec /bin/mv "$@"\n')
    assert lab.run("sparse_run.sh").returncode == 1
    assert lab.out.exists() and lab.work.exists()
    mv.unlink()
    for other, message in (({"WORSE": "0.2", "CYCLES": "1"}, "other settings"), ({"RESTART": "1"}, "exists; choose")):
        result = lab.run("sparse_run.sh", **other)
        assert result.returncode == 2 and message in result.stderr
    inode = lab.out.stat().st_ino
    result = lab.run("sparse_run.sh")
    assert result.returncode == 0, result.stderr
    assert lab.out.stat().st_ino == inode and not lab.work.exists()


@pytest.mark.parametrize("part", ["sparsify.py", "prunekit.evaluate"])
def test_a_signal_ends_what_the_launcher_waits_for_and_it_at_once(part, lab, cycles, tiny):
    if part == "prunekit.evaluate":
        (cycles / "dense.json").unlink()
    hang = f'#!/bin/sh\ncase "$*" in *{part}*) touch hangs; exec sleep 60 ;; esac\nexec {sys.executable} "$@"\n'
    executable(lab.folder / "env/bin/python", hang)
    process = lab.start("sparse_run.sh")
    wait_for((lab.folder / "hangs").exists)
    process.terminate()
    assert process.wait(timeout=30) == 143
    assert not lab.left()


@pytest.mark.slow
def test_a_signal_ends_a_trainer_that_ignores_it_behind_a_launcher_behind_this_one(lab, cycles):
    process = lab.until_hanging("sparse_run.sh", STUB_HANG_AT=1, STUB_STUBBORN=1)
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert not lab.left()


def test_after_a_cycle_that_is_too_bad_there_is_no_other(lab, cycles, tiny):
    done(cycles, tiny("qwen3_vl"), 1, 0.3, 3.5, 3.0)
    result = lab.run("sparse_run.sh")
    assert result.returncode == 2 and "no cycle is good enough: the best lost 171.8%" in result.stderr
    assert not lab.calls() and not lab.out.exists()


def test_a_cycle_whose_loss_is_nan_is_one_that_is_too_bad(lab, cycles, tiny):
    done(cycles, tiny("qwen3_vl"), 1, 0.3, 2.5, 2.05)
    done(cycles, tiny("qwen3_vl"), 2, 0.6, float("nan"), float("nan"))
    for _ in range(2):
        result = lab.run("sparse_run.sh", CYCLES="3", OVERWRITE="1", STUB_DRAWS=1)
        assert (result.returncode, result.stderr) == (0, "")
        assert "pruned NaN, retrained NaN; lower --learning_rate" in result.stdout
        assert "no more cycles: that is over WORSE=0.15" in result.stdout
        assert history(lab.out)[-1]["settings"]["cycle"] == 1
    assert not lab.calls()


def test_where_all_came_to_nan_one_line_says_so_however_often(lab, cycles, tiny):
    done(cycles, tiny("qwen3_vl"), 1, 0.3, 2.5, float("nan"))
    for _ in range(2):
        result = lab.run("sparse_run.sh")
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert "no cycle is good enough: the loss came to NaN; lower --learning_rate" in result.stderr
    measured(cycles / "dense.json", float("nan"))
    assert "the dense model's loss is NaN" in lab.run("sparse_run.sh").stderr


def test_cycles_of_which_none_was_good_enough_are_good_with_another_gate(lab, cycles, tiny):
    done(cycles, tiny("qwen3_vl"), 1, 0.3, 3.5, 3.0)
    done(cycles, tiny("qwen3_vl"), 2, 0.6, 3.5, 3.1)
    assert "no cycle is good enough" in lab.run("sparse_run.sh").stderr
    result = lab.run("sparse_run.sh", WORSE="9")
    assert result.returncode == 0 and history(lab.out)[-1]["settings"]["cycle"] == 2, result.stderr


def test_a_cycle_is_trained_with_its_zeros_kept_and_only_once(lab, cycles):
    for _ in range(2):  # both end where the stub's model, which has no tokenizer, is evaluated
        result = lab.run("sparse_run.sh", "--max_steps", 4)
        assert result.returncode != 0
    [call] = lab.calls("sft")
    argv = call["argv"]

    def last(flag):
        return argv[len(argv) - argv[::-1].index(flag) :]

    assert last("--callbacks")[0] == "keep_zeros" and last("--max_steps")[0] == "4"
    assert last("--model")[0].endswith("out.cycles/1.sparse")
    plugins = list(itertools.takewhile(lambda word: not word.startswith("--"), last("--external_plugins")))
    names = [plugin.rpartition("/")[2] for plugin in plugins]
    assert names[0] == "images_and_answers.py" and names[-1] == "sparsity.py"
    assert zeros(cycles / "1") == zeros(cycles / "1.sparse") > 0


@pytest.mark.parametrize("refit", ["", "1"])
def test_cycles_are_refitted_on_the_training_data_if_asked_for(refit, lab, cycles):
    lab.run("sparse_run.sh", REFIT=refit)
    flags = json.loads((cycles / "settings.json").read_text())["flags"]
    assert ("--refit" in flags) == ("--calib" in flags) == bool(refit)


def test_cycles_half_forgotten_are_not_taken_for_those_of_other_settings(lab, cycles, tiny):
    """Killed while it forgets, when files are gone and folders aren't."""
    done(cycles, tiny("qwen3_vl"), 1, 0.3, 2.5, 2.05)
    (cycles / "settings.json").write_text('{"model": "another"}')
    rm = lab.folder / "env/bin/rm"
    executable(rm, '#!/bin/sh\nshift\nfind "$@" -maxdepth 1 -type f -delete\nexit 1\n')
    assert lab.run("sparse_run.sh", RESTART=1).returncode == 1
    rm.unlink()
    result = lab.run("sparse_run.sh")
    assert result.returncode == 2 and "holds cycles with other settings" in result.stderr, result.stderr


def test_other_settings_for_cycles_that_are_there_are_refused(lab, cycles):
    (cycles / "settings.json").write_text('{"model": "another"}')
    result = lab.run("sparse_run.sh")
    assert result.returncode == 2 and "holds cycles with other settings" in result.stderr


@pytest.mark.parametrize("other", [{"CHECKPOINT": "last"}, {"GLOBAL_BATCH": "4"}, {"DTYPE": "bfloat16"}], ids=str)
def test_cycles_that_trained_in_another_way_are_refused(other, lab, cycles, tiny):
    done(cycles, tiny("qwen3_vl"), 1, 0.3, 3.5, 3.0)  # so bad that no other is made
    assert "no cycle is good enough" in lab.run("sparse_run.sh").stderr
    result = lab.run("sparse_run.sh", **other)
    assert result.returncode == 2 and "holds cycles with other settings" in result.stderr


@pytest.mark.parametrize("what", ["model", "rows"])
def test_cycles_of_another_model_or_other_rows_are_refused(what, lab, cycles, own):
    folder = own("qwen3_vl")
    line = [sys.executable, "-m", "prunekit.training.cycles", "plan", "--model", folder, "--sparsity", "0.6",
    "--into", cycles,
            "--data", lab.folder / "train.jsonl"]  # fmt: skip
    assert subprocess.run(line).returncode == 0
    os.utime(folder / "model.safetensors", (1, 1))
    assert subprocess.run(line).returncode == 0, "the same model, touched"
    changed = folder / "config.json" if what == "model" else lab.folder / "train.jsonl"
    changed.write_text(
        changed.read_text().replace("10000.0", "20000.0").replace('"?"', '"!"').replace("<image>?", "<image>!")
    )
    result = subprocess.run(line, capture_output=True, text=True)
    assert result.returncode == 2 and "of another model or other data" in result.stderr


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"SPARSITY": "1.5"}, "between 0 and 1"),
        ({"START": "0.9"}, "0 < start <= sparsity < 1"),
        ({"SCHEDULE": "linear"}, "choose exponential or cubic"),
        ({"CYCLES": "0"}, "give 1 or more"),
        ({"MODULES": "nothing"}, "matches no weight"),
        ({"MODEL": "absent"}, "absent: no such folder"),
        ({"WORSE": "0"}, "a positive share"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "cycles run on one node"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(env, message, lab):
    result = lab.run("sparse_run.sh", GPUS="", **env)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1 and not lab.out.parent.exists()


def test_of_good_cycles_the_sparsest_is_the_best():
    found = [{"cycle": n, "sparsity": n / 10, "worse": w} for n, w in enumerate((0.01, 0.1, 0.05, 0.3))]
    assert best_cycle(found, 0.15)["cycle"] == 2
    with pytest.raises(PruneKitError, match="the best lost 1.0%"):
        best_cycle(found, 0.001)
