"""lib/gpu_check.sh with stubs in the places of ms-swift and nvidia-smi: its rows and exit codes (docs/gpu.md)."""

import re
import subprocess
from pathlib import Path

import pytest


def rows(text: str) -> dict[str, str]:
    """{row: ok or failed} of the table."""
    return dict(re.findall(r"^(\w+) +(ok|failed) +\d+ s ", text, re.MULTILINE))


@pytest.fixture
def check(lab):
    """check(*rows, **env): these rows of the check on a machine with two GPUs, or as env says."""

    def run(*names: str, **env: str):
        settings = {"RUN": lab.folder / "check", "STUB_GPUS": "2"} | env
        process = lab.start("lib/gpu_check.sh", *names, **settings)
        out, err = process.communicate(timeout=600)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


def test_without_a_gpu_it_ends_with_one_line(check, lab):
    done = check(STUB_GPUS="")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "no GPU" in done.stderr and not (lab.folder / "check").exists()


def test_a_folder_that_is_no_check_is_left_alone(check, lab):
    done = check(RUN=lab.folder / "adapter")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert (lab.folder / "adapter/adapter_config.json").exists()


def test_a_row_that_there_isnt_is_refused_in_one_line(check):
    done = check("zero5")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "zero5" in done.stderr


@pytest.mark.slow
def test_rows_that_run_are_ok_in_a_table_with_the_machine_above_it(check, lab):
    done = check("zero2", "distil_server")
    assert rows(done.stdout) == {"zero2": "ok", "distil_server": "ok"}, done.stdout + done.stderr
    assert done.returncode == 0
    table = (lab.folder / "check/table.txt").read_text()
    assert rows(table) == rows(done.stdout) and "torch 2." in table and "ms-swift 4." in table


@pytest.mark.slow
def test_a_row_that_fails_names_its_log_and_the_others_run_on(check, lab):
    done = check("distil_server", "full_run", STUB_SERVER="dead")
    assert rows(done.stdout) == {"distil_server": "failed", "full_run": "ok"}, done.stdout + done.stderr
    assert done.returncode == 1
    [log] = re.findall(r"^distil_server .* (/\S+)$", done.stdout, re.MULTILINE)
    assert "no room for the KV cache" in Path(log).read_text()


@pytest.mark.slow
@pytest.mark.ci
def test_rows_that_cut_and_judge_run_here_too(check, lab):
    done = check("heal", "kv", "evaluate", MODEL="", DATASET="", VAL_DATASET="")
    assert rows(done.stdout) == {"heal": "ok", "kv": "ok", "evaluate": "ok"}, done.stdout + done.stderr
    assert "held-out loss" in (lab.folder / "check/kv.log").read_text()
