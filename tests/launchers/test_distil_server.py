"""distil.sh and its server: which GPUs it has, and that none is left behind."""

import json
from pathlib import Path

import pytest
from helpers.lab import check_flags, free_port, values


@pytest.mark.parametrize(
    ("gpus", "rollout", "training"),
    [("0,1", "1", "0"), ("0", "1", "0"), ("0,1,2,10", "10", "0,1,2"), ("0,1,2,3", "0,1", "2,3")],
)
def test_a_rollout_server_takes_some_gpus_and_training_the_others(lab, gpus, rollout, training):
    port = free_port()
    proxy = {
        "http_proxy": "http://127.0.0.1:9",
        "NO_PROXY": "intranet",
    }  # a cluster's proxy is not for local servers
    result = lab.run("distil.sh", GPUS=gpus, ROLLOUT_GPUS=rollout, ROLLOUT_PORT=port, **proxy)
    assert result.returncode == 0, result.stderr
    [server], [trainer] = lab.calls("rollout"), lab.calls("rlhf")
    assert server["env"]["CUDA_VISIBLE_DEVICES"] == rollout
    assert "NPROC_PER_NODE" not in server["env"]
    assert values(server["argv"], "--port") == [str(port)]
    assert values(server["argv"], "--vllm_data_parallel_size") == [str(len(rollout.split(",")))]
    assert trainer["env"]["CUDA_VISIBLE_DEVICES"] == training
    assert trainer["env"]["NPROC_PER_NODE"] == str(len(training.split(",")))
    assert values(trainer["argv"], "--vllm_mode") == ["server"]
    assert values(trainer["argv"], "--vllm_server_port") == [str(port)]
    assert trainer["env"]["no_proxy"] == "127.0.0.1,intranet"
    assert lab.left() == []
    assert lab.out.exists()


def test_an_engine_of_several_gpus_takes_them_from_those_of_the_server(lab):
    split = ("--vllm_tensor_parallel_size", "2")
    lab.run("distil.sh", *split, GPUS="0,1,2,3,10", ROLLOUT_GPUS="1,2,3,10", STUB_FAIL_AT=1)
    [server] = lab.calls("rollout")
    assert values(server["argv"], "--vllm_tensor_parallel_size") == ["2"]
    assert values(server["argv"], "--vllm_data_parallel_size") == ["2"], "more than there are GPUs end the server"
    result = lab.run("distil.sh", *split, GPUS="0,1,2,3", OUTPUT=lab.folder / "another")
    assert result.returncode == 2
    assert "--vllm_tensor_parallel_size 2: ROLLOUT_GPUS=3 can't be shared out" in result.stderr


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"STUB_FAIL_AT": "1"}, "distil failed (exit code 3)"),
        ({"STUB_SERVER": "dead"}, "the server ended before it answered"),
        ({"STUB_SERVER": "silent", "ROLLOUT_DEADLINE": "3"}, "/health/ within 3 s"),
    ],
    ids=["trainer fails", "server dies", "server is silent"],
)
def test_no_server_is_left_after_a_failure(lab, env, message):
    result = lab.run("distil.sh", GPUS="0,1", ROLLOUT_PORT=free_port(), **env)
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1]
    assert len(lab.calls("rlhf")) == ("STUB_FAIL_AT" in env)
    assert lab.left() == []
    assert not lab.out.exists()


def test_sigterm_ends_the_server_and_the_trainer(lab):
    process = lab.until_hanging("distil.sh", GPUS="0,1", ROLLOUT_PORT=free_port(), STUB_HANG_AT=1)
    assert len(lab.left()) > 4
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert lab.left() == []


def test_after_kill_9_the_next_run_ends_the_server_that_holds_the_port(lab):
    port = free_port()
    process = lab.until_hanging("distil.sh", GPUS="0,1", ROLLOUT_PORT=port, STUB_HANG_AT=3)
    process.kill()
    process.wait()
    result = lab.run("distil.sh", GPUS="0,1", ROLLOUT_PORT=port)
    assert result.returncode == 0, result.stderr
    assert values(lab.calls("rlhf")[-1]["argv"], "--resume_from_checkpoint") == ["ckpt/out.run/checkpoint-2"]
    assert lab.left() == []


def test_other_settings_are_refused_before_a_server_starts(lab):
    port = free_port()
    lab.run("distil.sh", GPUS="0,1", ROLLOUT_PORT=port, STUB_FAIL_AT=1)
    result = lab.run("distil.sh", "--max_length", "5", GPUS="0,1", ROLLOUT_PORT=port)
    assert result.returncode == 2
    assert "other settings" in result.stderr
    assert len(lab.calls("rollout")) == 1


@pytest.mark.parametrize(("gpus", "mode"), [("", None), ("0", "colocate")])
def test_with_one_gpu_or_none_there_is_no_server(lab, gpus, mode):
    lab.run("distil.sh", GPUS=gpus, STUB_FAIL_AT=1)
    [call] = lab.calls()
    assert ("--use_vllm" in call["argv"]) == bool(mode)
    assert not mode or values(call["argv"], "--vllm_mode") == [mode]


@pytest.mark.parametrize("lmbda", [{"LMBDA": "0"}, {"flags": ["--lmbda", "0.0"]}], ids=str)
def test_without_answers_of_the_students_own_no_gpu_is_kept_for_a_server(lab, lmbda):
    lab.run("distil.sh", *lmbda.pop("flags", []), GPUS="0,1", STUB_FAIL_AT=1, **lmbda)
    [call] = lab.calls()
    assert call["argv"][0] == "rlhf" and "--use_vllm" not in call["argv"]
    assert call["env"]["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.parametrize(
    ("gpus", "env", "rollout"),
    [("0,1,2,3", {}, "3"), ("0,1,2,3,4,5,6,7", {}, "6,7"), ("0,1,2,3,4,5,6,7", {"PLAIN": "1"}, "7")],
)
def test_a_quarter_of_the_gpus_generates(lab, gpus, env, rollout):
    lab.run("distil.sh", GPUS=gpus, STUB_FAIL_AT=1, **env)
    assert lab.calls("rollout")[0]["env"]["CUDA_VISIBLE_DEVICES"] == rollout


def test_vllm_shares_all_gpus_if_none_are_kept_for_it(lab):
    lab.run("distil.sh", GPUS="0,1", ROLLOUT_GPUS="", STUB_FAIL_AT=1)
    [call] = lab.calls()
    assert values(call["argv"], "--vllm_mode") == ["colocate"]
    assert call["env"]["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_ports_are_free_ones_and_may_be_others_when_a_run_goes_on(lab):
    for fail in ({"STUB_FAIL_AT": "3"}, {}):
        result = lab.run("distil.sh", GPUS="0,1", **fail)
    assert result.returncode == 0, result.stderr
    ports = []
    for server, trainer in zip(lab.calls("rollout"), lab.calls("rlhf")):
        [port] = values(server["argv"], "--port")
        assert values(trainer["argv"], "--vllm_server_port") == [port]
        ports += [port, *values(trainer["argv"], "--vllm_server_group_port")]
    assert len(set(ports)) == 4 and not {"8000", "51216"} & set(ports)
    assert "--resume_from_checkpoint" in trainer["argv"]


def test_flags_for_vllm_reach_the_server(lab, parsers):
    user = [
        "--vllm_max_model_len",
        "60",
        "--vllm_enforce_eager",
        "true",
        "--vllm_server_timeout",
        "9",
        "--max_steps",
        "3",
    ]
    lab.run("distil.sh", *user, GPUS="0,1", STUB_FAIL_AT=1)
    [server] = lab.calls("rollout")
    assert values(server["argv"], "--vllm_max_model_len") == ["60"]
    assert values(server["argv"], "--vllm_enforce_eager") == ["true"]
    check_flags(parsers["rollout"], server["argv"][1:])


def test_flags_by_which_questions_are_written_reach_the_server_that_writes_them(lab, parsers):
    user = ["--system", "Read.", "--max-pixels=1024", "--enable_thinking", "true", "--learning_rate", "1e-5"]
    lab.run("distil.sh", *user, GPUS="0,1", STUB_FAIL_AT=1)
    [server] = lab.calls("rollout")
    check_flags(parsers["rollout"], server["argv"][1:])
    told = {flag: values(server["argv"], flag) for flag in ("--system", "--max-pixels", "--enable_thinking")}
    assert told == {"--system": ["Read."], "--max-pixels": ["1024"], "--enable_thinking": ["true"]}
    assert "--learning_rate" not in server["argv"]


@pytest.mark.parametrize(("gpus", "kind"), [("0", "rlhf"), ("0,1", "rollout")])
def test_the_engine_is_as_long_as_a_row_and_its_answer_and_no_longer_than_the_model(lab, gpus, kind):
    settings = json.loads((Path(lab.env["MODEL"]) / "config.json").read_text())
    positions = settings["text_config"]["max_position_embeddings"]
    for flags, length in ((["--max_length", "30", "--max_completion_length", "10"], 40), ([], positions)):
        lab.run("distil.sh", *flags, GPUS=gpus, STUB_FAIL_AT=1, RESTART="1")
        assert values(lab.calls(kind)[-1]["argv"], "--vllm_max_model_len") == [str(length)]


def test_a_server_computes_in_16_bits_whatever_is_trained(lab):
    lab.run("distil.sh", GPUS="0,1", DEEPSPEED="", STUB_FAIL_AT=1)
    assert values(lab.calls("rlhf")[0]["argv"], "--torch_dtype") == ["float32"]
    assert values(lab.calls("rollout")[0]["argv"], "--torch_dtype") == ["bfloat16"]


def test_of_several_nodes_the_first_has_the_server_and_the_others_train_on_all_gpus(lab):
    nodes = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "GPUS": "0,1"}
    main = lab.until_hanging("distil.sh", NODE_RANK=0, STUB_HANG_AT=1, **nodes)
    other = lab.run("distil.sh", NODE_RANK=1, **nodes)
    assert other.returncode == 0, other.stderr
    main.terminate()
    main.communicate(timeout=60)
    assert len(lab.calls("rollout")) == 1
    here, there = lab.calls("rlhf")
    assert [call["env"]["CUDA_VISIBLE_DEVICES"] for call in (here, there)] == ["0", "0,1"]
    assert [values(call["argv"], "--gradient_accumulation_steps") for call in (here, there)] == [
        ["5"],
        ["5"],
    ], "of 3 GPUs"
