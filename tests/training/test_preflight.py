"""What launchers refuse before anything is written: environment, port, disk, and the command itself."""

import contextlib
import json
import os
import socket
import subprocess
import sys

import pytest
from helpers.paths import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunekit.errors import PruneKitError
from prunekit.msswift.line import parse
from prunekit.training.preflight import (
    check_best,
    check_disk,
    check_environment,
    check_port,
    check_saved,
    free_ports,
    main,
)

# --- the best checkpoint ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "--val_dataset v --eval_steps 50 --save_steps 50",
        "--val_dataset v --eval_steps 100 --save_steps 50",
        "--val_dataset v --save_steps 50",  # ms-swift evaluates as often
        "--split_dataset_ratio 0.1 --save_strategy epoch",
    ],
)
def test_a_line_that_will_name_a_best_checkpoint_passes(line):
    check_best(parse("sft", line.split()))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--eval_steps 50 --save_steps 50", "nothing is evaluated"),
        ("--val_dataset v --eval_strategy no", "nothing is evaluated"),
        ("--val_dataset v --eval_steps 25 --save_steps 100", "evaluated every 25 steps and saved every 100"),
        ("--val_dataset v --eval_strategy epoch --save_steps 100", r"\(epoch, steps\)"),
    ],
)
def test_a_line_that_may_name_no_best_checkpoint_is_refused(line, message):
    with pytest.raises(PruneKitError, match=message) as error:
        check_best(parse("sft", line.split()))
    assert "CHECKPOINT=last" in str(error.value)


# --- the environment ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["NPROC_PER_NODE", "MAX_PIXELS"])
@pytest.mark.parametrize("value", ["abc", "0", "-1", "1.5", "²", "1" * 5000])
def test_a_number_of_the_environment_that_is_none_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(PruneKitError, match=f"{name}=.* is no whole number above 0"):
        check_environment()


def test_processes_are_those_of_all_nodes(monkeypatch):
    monkeypatch.delenv("NPROC_PER_NODE", raising=False)
    monkeypatch.setenv("NNODES", "")
    assert check_environment() == 1
    monkeypatch.setenv("NPROC_PER_NODE", "4")
    monkeypatch.setenv("NNODES", "2")
    assert check_environment() == 8


def test_a_folder_of_images_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("ROOT_IMAGE_DIR", "absent")
    with pytest.raises(PruneKitError, match="ROOT_IMAGE_DIR=absent: no such folder"):
        check_environment()


# --- port and disk --------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """server(address): the port of a listening socket and the socket, as a server makes it."""
    made = []

    def listen(address: str) -> tuple[int, socket.socket]:
        made.append(socket.socket())
        made[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made[-1].bind((address, 0))
        made[-1].listen()
        return made[-1].getsockname()[1], made[-1]

    yield listen
    for listening in made:
        listening.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "0.0.0.0"])
def test_a_port_is_in_use_while_something_listens_on_any_address(server, address):
    port, listening = server(address)
    with pytest.raises(PruneKitError, match=f"port {port} is in use"):
        check_port(port)
    listening.close()
    check_port(port)


def test_a_port_with_connections_of_a_server_that_just_ended_is_not_swifts_to_take(server):
    port, listening = server("127.0.0.1")
    client = socket.create_connection(("127.0.0.1", port))
    connection, _ = listening.accept()
    connection.close()  # the server's end closes first: this leaves it in TIME_WAIT
    client.close()
    listening.close()
    with socket.socket() as swift, pytest.raises(OSError, match="in use"):
        swift.bind(("", port))  # as ms-swift's find_free_port tries
    with pytest.raises(PruneKitError, match=f"port {port} is in use"):
        check_port(port, patience=0)


def test_free_ports_are_different_and_free():
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        check_port(port, patience=0)


def test_a_small_disk_is_refused_with_both_sizes(tmp_path):
    check_disk(tmp_path / "new" / "out", 1)
    with pytest.raises(
        PruneKitError,
        match=r"GB free, out may need 25000000000\.0 GB \(25 times the model's 1000000000\.00 GB",
    ):
        check_disk(tmp_path / "new" / "out", 10**18, 25)


def test_a_file_as_parent_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PruneKitError, match="no folder that you may write to"):
        check_disk(tmp_path / "file" / "out", 1)


def answers(result: subprocess.CompletedProcess) -> dict[str, str]:
    return dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)


def test_the_architectures_of_model_and_teacher_and_the_chat_template_are_printed(preflight, tiny):
    result = preflight(
        "--model",
        tiny("qwen3"),
        "--teacher",
        tiny("llama"),
        "--template",
        "qwen3",
    )
    assert result.returncode == 0, result.stderr
    expected = {"MODEL_TYPE": "qwen3", "TEACHER_TYPE": "llama", "TEMPLATE": "qwen3"}
    assert expected.items() <= answers(result).items()


def test_the_lines_own_type_and_template_are_answered(preflight, tiny):
    line = ["--model_type", "qwen3_emb", "--template", "qwen3_emb"]
    found = answers(preflight("--model", tiny("qwen3"), "--template", "qwen3", "--swift", "sft", "--", *line))
    assert (found["MODEL_TYPE"], found["TEMPLATE"]) == ("qwen3_emb", "qwen3_emb")


def test_a_bad_swift_line_is_refused_in_one_line_before_the_model_is_read(preflight, tiny):
    result = preflight("--model", "absent", "--swift", "sft", "--", "--max_lenght", 5)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --max_lenght: `swift sft` has no such flag: did you mean --max_length?\n"


@pytest.mark.parametrize(
    ("line", "settings", "message"),
    [
        ("--optimizer head_rates --deepspeed zero2", "", "--optimizer head_rates: works with plain DDP only"),
        ("--optimizer active_heads --tuner_type lora", "", "--optimizer active_heads: works with --tuner_type full"),
        ("--callbacks gradual_pruning", "sparsity=0.7 evnts=5", "PRUNEKIT_GRADUAL: 'evnts=5' isn't one of"),
        ("--callbacks keep_zeros --deepspeed zero3", "", "ZeRO-3 and FSDP split weights up"),
        ("--callbacks keep_zeros --deepspeed mine.json", "", "ZeRO-3 and FSDP split weights up"),
        ("--callbacks dynamic_sparsity --deepspeed zero2", "", "dynamic_sparsity: works with plain DDP only"),
    ],
)
def test_what_a_plugin_would_refuse_is_refused_before_it_is_loaded(
    line, settings, message, tiny, tmp_path, monkeypatch
):
    monkeypatch.setenv("PRUNEKIT_GRADUAL", settings)
    monkeypatch.setattr("prunekit.msswift.line.check_packages", lambda args: None)
    monkeypatch.chdir(tmp_path)
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    (tmp_path / "mine.json").write_text(json.dumps({"zero_optimization": zero}))
    plugins = [str(ROOT / f"plugins/{name}.py") for name in ("head_rates", "sparsity")]
    words = ["--tuner_type", "full", "--torch_dtype", "float32", "--external_plugins", *plugins, *line.split()]
    head = ["--model", str(tiny("gpt2")), "--out", str(tmp_path / "out"), "--swift", "sft"]
    monkeypatch.setattr(sys, "argv", ["preflight", *head, "--", *words])
    with pytest.raises(PruneKitError, match=message):
        main()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--save_strategy no", "--save_strategy no: what is trained is published from a checkpoint"),
        ("--fp16 true --use_cpu true", "DTYPE=float16: nothing trains in it on a CPU"),
    ],
)
def test_a_training_that_would_fail_or_keep_nothing_is_refused(preflight, tiny, line, message):
    result = preflight("--model", tiny("gpt2"), "--swift", "sft", "--", *line.split())
    assert result.returncode == 2 and message in result.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('--deepspeed={"zero_optimization":{"stage":3}}', '"stage3_gather_16bit_weights_on_model_save": true'),
        ("--fsdp=fsdp2", '"state_dict_type": "FULL_STATE_DICT"'),
        ('--fsdp={"fsdp_config":{"state_dict_type":"SHARDED_STATE_DICT"}}', '"state_dict_type": "FULL_STATE_DICT"'),
        ('--fsdp={"fsdp_config":{"state_dict_type":"FULL_STATE_DICT"}}', ""),
        ('--deepspeed={"zero_optimization":{"stage":3}} --tuner_type=lora', ""),  # of an adapter all is saved
        ("--deepspeed=zero3", ""),
        ("--deepspeed=zero3_offload", ""),
        ('--deepspeed={"zero_optimization":{"stage":3,"gather_16bit_weights_on_model_save":true}}', ""),
    ],
)
def test_a_training_whose_checkpoints_would_lack_weights_is_refused(line, message):
    args = parse("sft", ["--tuner_type", "full", *line.split()])
    with pytest.raises(PruneKitError, match=message) if message else contextlib.nullcontext():
        check_saved(args)


def test_lengths_for_a_merged_line_are_answered(preflight, tiny):
    line = ["--rlhf_type", "gkd", "--lmbda", "1", "--max_length", "100", "--max_completion_length", "16"]
    found = answers(preflight("--model", tiny("gpt2"), "--swift", "rlhf", "--", *line))
    assert (found["MAX_LENGTH"], found["COMPLETION_LENGTH"], found["ENGINE_LENGTH"]) == ("48", "", "")
    line[line.index("100")] = "40"
    found = answers(preflight("--model", tiny("gpt2"), "--swift", "rlhf", "--", *line))
    assert found["MAX_LENGTH"] == ""


def test_rewards_may_need_no_column(preflight, tiny):
    """REWARD_COLUMNS=() in rl_run.sh."""
    assert preflight("--model", tiny("gpt2"), "--needed-columns", "--swift", "rlhf", "--").returncode == 0


def test_processes_of_the_environment_count(preflight, tiny, monkeypatch):
    line = ["--rlhf_type", "grpo", "--num_generations", "2"]
    head = ["--model", tiny("gpt2"), "--swift", "rlhf", "--"]
    assert preflight(*head, *line).returncode == 2
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    assert preflight(*head, *line).returncode == 0


def test_the_teacher_of_the_line_is_the_one_that_is_checked(preflight, tiny):
    head = ["--model", tiny("gpt2"), "--teacher", tiny("gpt2"), "--swift", "rlhf", "--"]
    result = preflight(*head, "--rlhf_type", "gkd", "--teacher_model", "absent")
    assert (result.returncode, result.stderr) == (2, "error: absent: no such folder\n")


@pytest.mark.parametrize(
    ("tuner", "command"), [("full", "python ner_run.py does"), ("lora", "python ner_run.py --lora-rank 16 does")]
)
def test_an_encoder_is_sent_to_the_script_that_trains_it(preflight, tiny, tuner, command):
    result = preflight("--model", tiny("bert"), "--swift", "sft", "--", "--max_steps", 1, "--tuner_type", tuner)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert command in result.stderr


def test_free_ports_are_answered_when_asked_for(preflight, tiny):
    found = answers(preflight("--model", tiny("gpt2"), "--free-ports", 2))
    assert len({int(port) for port in found["FREE_PORTS"].split(",")}) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frobnicate", "--swift", "sft", "--"], "unrecognized arguments: --frobnicate"),
        (["--swift", "pt", "--"], "argument --swift: invalid choice: 'pt'"),
        (["--template", "nonesuch"], "--template nonesuch is unknown"),
        (["--model-type", "nonesuch"], "--model_type nonesuch is unknown"),
        (["--disk-factor", "nan"], "'nan' is no number"),
        (["--port", "0"], "'0' is no whole number of 1 or more"),
        (["--port", "65536"], "port 65536 is none: choose one from 1 to 65535"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(preflight, tiny, arguments, message):
    result = preflight("--model", tiny("gpt2"), *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=12) | st.sampled_from(
    ["--", "--swift", "sft", "rlhf", "--port", "--free-ports", "1", "-1", "nan", "--disk-factor", "--adapter",
     "--teacher",
     "--dataset", "--columns", "--checkpoint", "best", "--template", "--max_steps", "--overwrite", ".", "x" * 300,
     "--help=1"]
)  # fmt: skip


@given(words=st.lists(WORDS, max_size=6))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_arguments_are_answered_or_refused_in_one_line(monkeypatch, capsys, tiny, tmp_path, words):
    arguments = ["preflight", "--model", tiny("gpt2"), "--out", tmp_path / "out", *words]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    monkeypatch.setattr("os.environ", {**os.environ})
    try:
        main()
    except PruneKitError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
    except SystemExit as done:
        assert not done.code  # noqa: PT017  # --help
    else:
        assert "MODEL_TYPE=gpt2\n" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", ['{"model_type": "mamba"}', "{}"])
def test_an_unknown_architecture_is_refused(preflight, own, config):
    model = own("qwen3")
    (model / "config.json").write_text(config)
    result = preflight("--model", model)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "model_type" in result.stderr
