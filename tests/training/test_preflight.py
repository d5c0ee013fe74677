"""What launchers refuse before anything is written: each check by itself, in this process."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import EMBEDDED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file

from prunekit.checkpoint import layer_numbers, open_checkpoint
from prunekit.checkpoint.remote_code import check_no_remote_code
from prunekit.errors import PruneKitError
from prunekit.msswift.line import check_rewards, parse
from prunekit.training.preflight import (
    check_adapter,
    check_best,
    check_dataset,
    check_disk,
    check_environment,
    check_port,
    check_targets,
    check_teacher,
    free_ports,
    main,
    open_here,
)

ROW = {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}]}
PLUGINS = Path(__file__).resolve().parents[2] / "plugins"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """data(row, ...): write these rows to data.jsonl in the current folder, where image.png is too."""
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8)).save("image.png")

    def write(*rows) -> str:
        Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return "data.jsonl"

    return write


# --- data sets ------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
MESSAGES = st.lists(JSON | st.fixed_dictionaries({"role": JSON, "content": JSON}), max_size=3)
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "messages": MESSAGES | JSON,
        "images": JSON | st.lists(JSON | st.just({"path": "x"})),
        "a": JSON,
    },
)
LINES = st.lists((ROWS | JSON).map(lambda row: json.dumps(row).encode()) | st.binary(max_size=60), max_size=4)


@given(LINES, st.sampled_from([(), ("a",)]))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_file_passes_or_is_a_users_error_of_one_line(tmp_path_factory, lines, columns):
    file = tmp_path_factory.getbasetemp() / "garbage.jsonl"
    file.write_bytes(b"\n".join(lines))
    try:
        check_dataset(str(file), columns)
    except PruneKitError as error:
        assert "\n" not in str(error)  # noqa: PT017


@given(st.text(max_size=40))
@settings(deadline=None)
def test_any_name_passes_or_is_a_users_error(name):
    with contextlib.suppress(PruneKitError):
        check_dataset(name)


@pytest.mark.parametrize("line", ["[" * 100_000, "1" * 5000, '{"messages": ', "[]".encode("utf-16"), b"\xff"])
def test_what_breaks_json_parsers_is_a_users_error(tmp_path, line):
    file = tmp_path / "data.jsonl"
    file.write_bytes(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(PruneKitError, match="data.jsonl"):
        check_dataset(str(file))


@pytest.mark.parametrize(
    "images",
    [
        ["image.png"],
        "image.png",
        [{"path": "image.png"}],
        [{"bytes": "aGVsbG8=", "path": None}],
        ["https://a.b/c.png"],
        ["data:image/png;base64,aGVsbG8="],
        ["aGVsbG8" * 50],
        [],
        None,
    ],
    ids=str,
)
def test_every_form_of_image_that_swift_takes_passes(data, images):
    check_dataset(data(ROW | {"images": images}))


@pytest.mark.parametrize(
    "images", [["gone.png"], "gone.png", [{"path": "gone.png"}], ["image.png", "gone.png"]], ids=str
)
def test_a_missing_image_is_named_with_its_line(data, images):
    with pytest.raises(PruneKitError, match=r"data.jsonl line 2 names an image that is not there: 'gone.png'"):
        check_dataset(data(ROW, ROW | {"images": images}))


def test_images_are_looked_up_where_swift_looks(data, tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    Path("image.png").rename("pictures/a.png")
    name = data(ROW | {"images": ["a.png"]})
    with pytest.raises(PruneKitError):
        check_dataset(name)
    monkeypatch.setenv("ROOT_IMAGE_DIR", "pictures")
    check_dataset(name)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([], "is not a JSON object"),
        ({"messages": "hello"}, 'has no list "messages"'),
        ({"messages": []}, 'has no list "messages"'),
        ({"messages": [{"role": "user"}]}, 'has a message without "role" and "content"'),
        (ROW, 'has no column "solution"'),
    ],
    ids=str,
)
def test_a_bad_row_is_named_with_its_line(data, row, problem):
    good = ROW | {"solution": "a"}
    with pytest.raises(PruneKitError, match=f"data.jsonl line 3 {problem}"):
        check_dataset(data(good, good, row), ["solution"])


def test_an_empty_file_and_an_empty_line_are_refused(data):
    with pytest.raises(PruneKitError, match="is empty: it needs at least one row"):
        check_dataset(data())
    Path("data.jsonl").write_text("\n" + json.dumps(ROW))
    with pytest.raises(PruneKitError, match="line 1 is empty"):
        check_dataset("data.jsonl")


@pytest.mark.parametrize("name", ["data.jsonl#100", "odd#7.jsonl", "odd.jsonl#7"])
def test_a_number_of_rows_may_follow_the_name(data, name):
    Path(data(ROW)).rename("odd.jsonl" if name == "odd.jsonl#7" else "odd#7.jsonl" if "odd" in name else "data.jsonl")
    check_dataset(name)


@pytest.mark.parametrize(
    "name",
    ["org/name", "org/name#500", "HF::org/gsm8k-v1.1", "ms::org/name:subset/other#5", "org/name:default"],
)
def test_a_hubs_name_is_left_to_swift(data, name):
    check_dataset(name)


@pytest.mark.parametrize(
    "name",
    ["org/name.jsonl", "org/name.csv#5", "name", "a/b/c", "/org/name", "folder/name", "folder", "", "hf::x"],
)
def test_what_is_neither_here_nor_a_hubs_name_is_refused(data, name):
    Path("folder").mkdir()
    with pytest.raises(PruneKitError, match="is not there"):
        check_dataset(name)


@pytest.mark.parametrize("suffix", [".csv", ".txt", ".parquet", ".csv#5"])
def test_tables_and_texts_are_left_to_swift(tmp_path, suffix):
    (tmp_path / f"data{suffix.partition('#')[0]}").write_text("a,b\n1,2\n")
    check_dataset(f"{tmp_path}/data{suffix}")


@pytest.mark.parametrize("name", ["data.tsv", "data.jsonl.gz", "data", "data.JSONL"])
def test_a_file_that_swift_cannot_read_is_refused(tmp_path, name):
    (tmp_path / name).write_text(json.dumps(ROW))
    with pytest.raises(PruneKitError, match=f"{name}: ms-swift reads .arrow, .csv"):
        check_dataset(f"{tmp_path}/{name}")


# --- rewards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "orms['mine'] = Reward",
        "orms = {'mine': Reward}",
        "orms.update(mine=1)\ndef mine(): pass",
        "for f in (mine,): orms[f.__name__] = f\nclass mine: pass",
        "for name in ('mine', 'other'): orms[name] = make(name)",
        "orms |= {'mine': Reward}",
        "register(orms, 'mine')",
    ],
)
def test_every_way_of_registering_a_reward_is_seen(tmp_path, code):
    plugin = tmp_path / "plugin.py"
    plugin.write_text(f"from swift.rewards import orms\n{code}\n")
    check_rewards(["mine", "accuracy"], [plugin])
    with pytest.raises(PruneKitError, match="unknown reward yours: choose from .*accuracy"):
        check_rewards(["yours"], [plugin])


def test_the_projects_rewards_are_known_and_listed():
    plugins = sorted(PLUGINS.glob("*.py"))
    check_rewards(["ocr_cer", "ocr_rambling", "soft_overlong"], plugins)
    with pytest.raises(PruneKitError, match="choose from .*ocr_cer.*ocr_script"):
        check_rewards(["ocr_wer"], plugins)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not there"),
        (b"def broken(:", "is not Python"),
        (b"\xff\xfe", "is not Python"),
        (b"\0", "is not Python"),
    ],
)
def test_a_plugin_that_cannot_be_read_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "plugin.py").write_bytes(content)
    with pytest.raises(PruneKitError, match=f"plugin.py {message}") as error:
        check_rewards([], [tmp_path / "plugin.py"])
    assert "\n" not in str(error.value)


def test_a_plugin_is_read_and_not_run(tmp_path):
    (tmp_path / "plugin.py").write_text("raise SystemExit('ran')\norms['mine'] = 1\n")
    check_rewards(["mine"], [tmp_path / "plugin.py"])


# --- code in checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("key", ["auto_map", "auto\\u005fmap"])
def test_a_checkpoint_that_brings_code_is_refused(own, monkeypatch, file, key):
    model = own("qwen3")
    check_no_remote_code(model)
    padding = json.dumps("x" * 2**20)
    (model / file).write_text(f'{{"padding": {padding}, "inner": {{"{key}": {{"AutoModel": "evil.Model"}}}}}}')
    with pytest.raises(PruneKitError, match=rf"{file} names Python code to run .*TRUST_REMOTE_CODE=1"):
        check_no_remote_code(model)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    check_no_remote_code(model)


# --- teachers and adapters ------------------------------------------------------------------------------------


def change_json(file: Path, change) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def teacher_of(own, family: str, change=lambda tokenizer: None):
    folder = own(family)
    if not (folder / "tokenizer.json").exists():
        shutil.copy(EMBEDDED / "tokenizer.json", folder)
    change_json(folder / "tokenizer.json", change)
    return open_checkpoint(folder)


@pytest.fixture
def student(tmp_path, tiny):
    folder = shutil.copytree(tiny("qwen3"), tmp_path / "student")
    shutil.copy(EMBEDDED / "tokenizer.json", folder)
    return open_checkpoint(folder)


def swap(tokenizer):
    vocabulary = tokenizer["model"]["vocab"]
    first, second, *_ = vocabulary
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def test_a_teacher_with_other_words_by_the_same_numbers_is_refused(student, own):
    check_teacher(student, teacher_of(own, "llama", lambda tokenizer: None))
    with pytest.raises(PruneKitError, match=r"own-qwen3: another vocabulary .*: token \d+ is .*, not .*"):
        check_teacher(student, teacher_of(own, "qwen3", swap))


def test_a_teacher_that_knows_more_tokens_behind_the_students_passes(student, own):
    more = {"id": 5000, "content": "<think>"}
    check_teacher(student, teacher_of(own, "llama", lambda tokenizer: tokenizer["added_tokens"].append(more)))


def test_a_teacher_without_a_tokenizer_needs_as_large_a_vocabulary(student, own):
    teacher = own("llama")
    (teacher / "tokenizer.json").unlink(missing_ok=True)
    teacher = open_checkpoint(teacher)
    check_teacher(student, replace(teacher, config=teacher.config | {"vocab_size": student.config["vocab_size"]}))
    with pytest.raises(PruneKitError, match="own-llama: a vocabulary of 7 tokens"):
        check_teacher(student, replace(teacher, config=teacher.config | {"vocab_size": 7}))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": ["a"]}}'])
def test_a_tokenizer_that_cannot_be_read_is_a_users_error(student, own, content):
    teacher = own("qwen3")
    (teacher / "tokenizer.json").write_text(content)
    with pytest.raises(PruneKitError, match="tokenizer.json: "):
        check_teacher(student, open_checkpoint(teacher))


def test_a_teacher_must_see_as_its_student_does(tiny, own):
    student, same = open_checkpoint(tiny("qwen3_vl")), tiny("qwen3_vl_moe")
    check_teacher(student, open_checkpoint(same))
    blind = own("qwen3")
    change_json(
        blind / "config.json",
        lambda config: config.update(vocab_size=student.config["text_config"]["vocab_size"]),
    )
    with pytest.raises(PruneKitError, match="own-qwen3: sees no images"):
        check_teacher(student, open_checkpoint(blind))
    other = own("qwen3_vl")
    change_json(other / "config.json", lambda config: config["vision_config"].update(patch_size=7))
    with pytest.raises(PruneKitError, match="own-qwen3_vl: cuts images by patch_size 7"):
        check_teacher(student, open_checkpoint(other))


@pytest.fixture
def adapter(tmp_path):
    """adapter(name=shape, ...): a LoRA adapter with these matrices."""

    def write(matrices: dict[str, tuple[int, ...]], config='{"peft_type": "LORA"}') -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(config)
        tensors = {f"base_model.model.{name}.weight": np.zeros(shape, "f4") for name, shape in matrices.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return write


def fitting(base, layer: int = 0) -> dict[str, tuple[int, int]]:
    name = f"model.layers.{layer}.self_attn.q_proj"
    outputs, inputs = base.tensors[f"{name}.weight"].shape
    return {f"{name}.lora_A": (4, inputs), f"{name}.lora_B": (outputs, 4)}


def test_an_adapter_of_this_base_passes(tiny, adapter):
    base = open_checkpoint(tiny("qwen3"))
    check_adapter(adapter(fitting(base)), base)


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_an_adapter_of_another_width_is_refused(tiny, adapter, side):
    base = open_checkpoint(tiny("qwen3"))
    matrices = {name: (shape[0] + 1, shape[1] + 1) for name, shape in fitting(base).items() if side in name}
    with pytest.raises(
        PruneKitError, match=r"adapter: trained for model.layers.0.self_attn.q_proj of \d+ (in|out)puts"
    ):
        check_adapter(adapter(matrices), base)


def test_an_adapter_for_layers_that_are_gone_is_refused(tiny, adapter):
    base = open_checkpoint(tiny("qwen3"))
    last = len(layer_numbers(base, "text"))
    matrices = {name.replace(".0.", f".{last}."): shape for name, shape in fitting(base).items()}
    with pytest.raises(PruneKitError, match=rf"adapter: trained for text layer {last}, of which .* has {last}"):
        check_adapter(adapter(matrices), base)


def test_an_adapter_of_gpt2_whose_weights_lie_the_other_way_round_passes(tiny, adapter):
    base = open_checkpoint(tiny("gpt2"))
    [(name, tensor)] = [item for item in base.tensors.items() if re.search(r"\b0\.attn\.c_attn\.weight", item[0])]
    inputs, outputs = tensor.shape
    module = name.removesuffix(".weight")
    check_adapter(adapter({f"{module}.lora_A": (4, inputs), f"{module}.lora_B": (outputs, 4)}), base)


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj"], ["self_attn.q_proj"], ["nonesuch", "v_proj"]], ids=str)
def test_targets_that_are_there_pass(tiny, targets):
    check_targets(targets, open_checkpoint(tiny("qwen3")))


@pytest.mark.parametrize("targets", [["q_proj,v_proj"], ["proj"], ["layers"], ["model.q_proj"]], ids=str)
def test_targets_of_which_none_is_there_are_refused(tiny, targets):
    with pytest.raises(PruneKitError, match=r"--target_modules .*has no such module: .*like q_proj k_proj"):
        check_targets(targets, open_checkpoint(tiny("qwen3")))


@pytest.mark.parametrize("config", ["", "[]", "{}", '{"peft_type": 3}', "{"])
def test_an_adapter_without_a_config_is_refused(tiny, adapter, config):
    with pytest.raises(PruneKitError, match="adapter_config.json"):
        check_adapter(adapter({}, config), open_checkpoint(tiny("qwen3")))


@pytest.mark.parametrize("damage", ["missing", "empty", "torn", "no tensors"])
def test_an_adapter_with_damaged_weights_is_refused(tiny, adapter, damage):
    base = open_checkpoint(tiny("qwen3"))
    folder = adapter({} if damage == "no tensors" else fitting(base))
    weights = folder / "adapter_model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage != "no tensors":
        weights.write_bytes(b"" if damage == "empty" else weights.read_bytes()[:-5])
    with pytest.raises(PruneKitError, match="adapter_model.safetensors"):
        check_adapter(folder, base)


def test_a_hubs_name_is_refused_and_its_folder_in_the_cache_named(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prunekit.checkpoint.folder._from_hub_cache", lambda name: tiny("qwen3"))
    with pytest.raises(PruneKitError, match=f"org/model: ms-swift would fetch it .*give its folder, {tiny('qwen3')}"):
        open_here(Path("org/model"))


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


@pytest.mark.parametrize("port", ["0", "65536", "-1", "many", "", "²"])
def test_what_is_no_port_is_refused(port):
    with pytest.raises(PruneKitError, match="from 1 to 65535"):
        check_port(port)


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


# --- the command ----------------------------------------------------------------------------------------------


@pytest.fixture
def preflight(tmp_path):
    def run(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "prunekit.training.preflight", "--out", tmp_path / "out", *arguments]
        return subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True)

    return run


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


def test_lengths_for_a_merged_line_are_answered(preflight, tiny):
    line = ["--rlhf_type", "gkd", "--lmbda", "1", "--max_length", "100", "--max_completion_length", "16"]
    found = answers(preflight("--model", tiny("gpt2"), "--swift", "rlhf", "--", *line))
    assert (found["MAX_LENGTH"], found["COMPLETION_LENGTH"], found["ENGINE_LENGTH"]) == ("48", "", "")
    line[line.index("100")] = "40"
    found = answers(preflight("--model", tiny("gpt2"), "--swift", "rlhf", "--", *line))
    assert found["MAX_LENGTH"] == ""


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


def test_an_encoder_is_sent_to_the_script_that_trains_it(preflight, tiny):
    result = preflight("--model", tiny("bert"), "--swift", "sft", "--", "--max_steps", 1)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "ner_run.py" in result.stderr


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


def test_data_sets_of_the_whole_swift_line_are_checked(preflight, tiny, data):
    head = ["--model", tiny("qwen3"), "--template", "qwen3", "--swift", "sft", "--"]
    assert preflight(*head, "--dataset", data(ROW)).returncode == 0
    result = preflight(*head, "--dataset", data(ROW), "--dataset", "absent.jsonl")
    assert result.returncode == 2
    assert "absent.jsonl is not there" in result.stderr


@pytest.mark.parametrize("flag", ["--val-dataset", "--val_dataset", "--val_dataset=absent.jsonl"])
def test_the_users_flag_is_checked_in_place_of_the_launchers(preflight, tiny, data, flag):
    line = ["--val_dataset", data(ROW), flag, *["absent.jsonl"] * ("=" not in flag)]
    result = preflight("--model", tiny("gpt2"), "--", *line)
    assert result.returncode == 2
    assert "absent.jsonl is not there" in result.stderr


def test_columns_renamed_by_swift_leave_rows_to_it(preflight, tiny, data):
    line = ["--columns", '{"conversation": "messages"}', "--dataset", data({"conversation": []})]
    result = preflight("--model", tiny("gpt2"), "--", *line)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("config", ['{"model_type": "mamba"}', "{}"])
def test_an_unknown_architecture_is_refused(preflight, own, config):
    model = own("qwen3")
    (model / "config.json").write_text(config)
    result = preflight("--model", model)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "model_type" in result.stderr
