"""What all cuts have in common: an outline is not to be written; a cut is, with its account, whole or not at all."""

import contextlib
import importlib
import sys
from argparse import Namespace
from dataclasses import dataclass, replace

import pytest
from helpers.calibration import PADDED, write_texts
from helpers.checkpoints import assert_same_weights
from helpers.paths import TINY_VL

from prunekit import errors
from prunekit.checkpoint import HISTORY, Checkpoint, fingerprint, history, open_checkpoint, statistics, write_checkpoint
from prunekit.checkpoint.card import model_card
from prunekit.checkpoint.records import COMMAND
from prunekit.errors import PruneKitError
from prunekit.surgery.cut import Account, calibrated_on, write_cut
from prunekit.surgery.kv import cut_kv, plan_kv
from prunekit.surgery.layers import cut_layers, plan_layers
from prunekit.surgery.script import open_input
from prunekit.surgery.width import cut_width, plan_width
from prunekit.surgery.zeros import cut_zeros, plan_zeros
from prunekit.surgery.zeros_wish import Wish

PLANS = {
    "kv": lambda checkpoint: plan_kv(checkpoint, 1),
    "width": lambda checkpoint: plan_width(checkpoint, head_share=0.5, neuron_share=0.5),
    "masked": lambda checkpoint: plan_width(checkpoint, head_share=0.5, mask=True),
}
CUTS = {
    "layers": lambda checkpoint: cut_layers(plan_layers(checkpoint, text=[1, 3])),
    "kv": lambda checkpoint: cut_kv(PLANS["kv"](checkpoint)),
    "width": lambda checkpoint: cut_width(PLANS["width"](checkpoint)),
    "zeros": lambda checkpoint: cut_zeros(plan_zeros(checkpoint, Wish(sparsity=0.5))),
}


@dataclass(frozen=True)
class Copy:
    """A cut of nothing, which has much to say of itself; `computed` is what its first tensor is computed by."""

    source: Checkpoint
    computed: object = None

    @property
    def result(self) -> Checkpoint:
        name, tensor = next(iter(self.source.tensors.items()))
        return replace(self.source, tensors=self.source.tensors | {name: replace(tensor, compute=self.computed)})

    def account(self) -> Account:
        return Account("copy", {"text": [7]}, {"loss": 0.5}, {"of": "all"}, {"warnings": ["in vain"]})


@pytest.fixture
def source(tiny):
    return open_checkpoint(tiny("qwen3"))


def run_out():
    raise PruneKitError("no more")


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("kind", PLANS)
def test_an_outline_is_no_checkpoint_and_cannot_be_written(kind, limit, source, tmp_path):
    outline = PLANS[kind](source).outline
    assert not isinstance(outline, Checkpoint)  # which mypy refuses where one is wanted
    with pytest.raises(AttributeError):
        write_checkpoint(outline, tmp_path / "out", {"stage": "copy"}, max_shard_bytes=limit)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", PLANS)
def test_an_outline_has_the_sizes_of_what_will_come_out(kind, source, tmp_path):
    plan = PLANS[kind](source)
    write_cut((cut_kv if kind == "kv" else cut_width)(plan), tmp_path / "out")
    assert statistics(plan.outline) == statistics(tmp_path / "out")


# --- what is written of a cut -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CUTS)
def test_the_entry_has_the_whole_account_and_is_what_the_history_says(kind, source, tmp_path):
    cut = CUTS[kind](source)
    entry, account = write_cut(cut, tmp_path / "out"), cut.account()
    told = {key: getattr(account, key) for key in ("stage", "removed", "metrics", "settings")} | account.more
    assert told.items() <= entry.items()
    assert history(tmp_path / "out") == [entry]


def test_entries_of_a_cuts_own_stand_beside_those_that_all_have(source, tmp_path):
    entry = write_cut(Copy(source), tmp_path / "out")
    assert (entry["metrics"], entry["settings"], entry["warnings"]) == ({"loss": 0.5}, {"of": "all"}, ["in vain"])


@pytest.mark.parametrize("kind", CUTS)
def test_the_entry_has_the_sizes_of_both_folders(kind, source, tmp_path):
    entry = write_cut(CUTS[kind](source), tmp_path / "out")
    before, after = statistics(source.path), statistics(tmp_path / "out")
    assert {key: entry[f"{key}_before"] for key in before} == before
    assert {key: entry[key] for key in after} == after


@pytest.mark.parametrize("kind", CUTS)
def test_the_entry_says_which_model_was_cut_and_the_result_is_another(kind, source, tmp_path):
    entry = write_cut(CUTS[kind](source), tmp_path / "out")
    assert (entry["input"], entry["input_fingerprint"]) == (str(source.path), fingerprint(source))
    assert fingerprint(open_checkpoint(tmp_path / "out")) != fingerprint(source)


def test_a_cut_of_a_cut_tells_of_both_and_each_says_of_what(source, tmp_path):
    write_cut(CUTS["layers"](source), tmp_path / "one")
    write_cut(CUTS["kv"](open_checkpoint(tmp_path / "one")), tmp_path / "two")
    first, second = history(tmp_path / "two")
    assert [first] == history(tmp_path / "one")
    assert second["input_fingerprint"] == fingerprint(open_checkpoint(tmp_path / "one"))


def test_the_card_is_of_the_folders_own_sizes_and_history(source, tmp_path):
    write_cut(CUTS["layers"](source), tmp_path / "one")
    write_cut(CUTS["kv"](open_checkpoint(tmp_path / "one")), out := tmp_path / "two")
    card = model_card(open_checkpoint(out).config, statistics(out), history(out))
    assert (out / "README.md").read_text() == card


@pytest.mark.parametrize("command", ["# run in here\npython cut.py\n", None])
def test_the_command_is_the_scripts_and_a_library_call_leaves_none(command, source, tmp_path, monkeypatch):
    monkeypatch.setattr(errors, "command", command)
    write_cut(Copy(source), tmp_path / "out")
    file = tmp_path / "out" / COMMAND
    assert (file.read_text() if file.exists() else None) == command


def test_shards_are_as_large_as_told(source, tmp_path):
    write_cut(CUTS["kv"](source), tmp_path / "one", max_shard_bytes=2**40)
    write_cut(CUTS["kv"](source), tmp_path / "many", max_shard_bytes=2**15)
    assert [len(list((tmp_path / name).glob("*.safetensors"))) > 1 for name in ("one", "many")] == [False, True]
    assert_same_weights(tmp_path / "one", tmp_path / "many")


@pytest.mark.parametrize("kind", CUTS)
def test_a_cut_can_be_written_again(kind, source, tmp_path):
    cut = CUTS[kind](source)
    for name in ("one", "two"):
        write_cut(cut, tmp_path / name)
    assert_same_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("kind", CUTS)
def test_what_is_cut_stays_as_it_is(kind, tiny, tmp_path):
    source = open_checkpoint(tiny("qwen3"))
    write_cut(CUTS[kind](source), tmp_path / "out")
    assert source == open_checkpoint(tiny("qwen3"))


# --- whole or not at all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("computed, error", [(run_out, PruneKitError), (lambda: b"too short", ValueError)])
def test_a_tensor_that_cannot_be_computed_leaves_nothing(computed, error, source, tmp_path):
    with pytest.raises(error):
        write_cut(Copy(source, computed), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_cannot_be_computed_leaves_what_was_to_be_replaced(source, tmp_path):
    entry = write_cut(CUTS["layers"](source), tmp_path / "out")
    files = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(PruneKitError, match="no more"):
        write_cut(Copy(source, run_out), tmp_path / "out", overwrite=True)
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == files
    assert history(tmp_path / "out") == [entry] and list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_used_out_is_refused_before_anything_is_computed(source, tmp_path):
    entry = write_cut(CUTS["layers"](source), tmp_path / "out")
    with pytest.raises(PruneKitError, match="exists; choose another OUT"):
        write_cut(Copy(source, run_out), tmp_path / "out")
    assert history(tmp_path / "out") == [entry]


def test_a_damaged_history_is_refused_before_anything_is_computed(own):
    folder = own("llama")
    (folder / HISTORY).write_text("{")
    with pytest.raises(PruneKitError, match=f"{HISTORY}: can't be read as JSON"):
        open_input(Namespace(model=folder, out=None))


def test_a_used_out_is_replaced_when_told(source, tmp_path):
    write_cut(CUTS["layers"](source), tmp_path / "out")
    entry = write_cut(CUTS["kv"](source), tmp_path / "out", overwrite=True)
    assert history(tmp_path / "out") == [entry]


def test_what_is_cut_is_never_replaced(own):
    source = open_checkpoint(own("qwen3"))
    with pytest.raises(PruneKitError, match="is or holds the input"):
        write_cut(Copy(source, run_out), source.path, overwrite=True)
    assert statistics(source.path) == statistics(source) and history(source.path) == []


@pytest.mark.parametrize("line", ["kv_cut --kv-heads 1", "manual_select --text 1", "sparsify --sparsity 0.5"])
@pytest.mark.parametrize("flag", ["--calib-tokens 9", "--max-length 9", "--device cpu", "--dtype float16"])
def test_what_is_said_of_calibration_is_refused_without_data(line, flag, tiny, tmp_path, monkeypatch):
    name, *words = line.split()
    files = ["--model", str(tiny("llama")), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [name, *files, *words, *flag.split()])
    with pytest.raises(PruneKitError, match=f"{flag.split()[0]}: is for --calib; give that, too, or leave it out"):
        importlib.import_module(name).main()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line, fills",
    [
        ("kv_cut --kv-heads 1", True),
        ("width_cut --head-share 0.5", False),
        ("width_cut --head-share 0.5 --calib", True),
        ("manual_select --text 1", False),
        ("manual_select --text 1 --heal --calib", True),
        ("vocab_cut --keep-share 0.9 --calib", False),
    ],
)
def test_a_cut_that_fills_zeros_says_so(line, fills, tmp_path, monkeypatch, capsys):
    name, *words = line.split()
    script, sparse, data = importlib.import_module(name), tmp_path / "sparse", write_texts(tmp_path / "texts.jsonl")
    write_cut(CUTS["zeros"](open_checkpoint(TINY_VL)), sparse)
    monkeypatch.setattr(script, "model_and_calibration", lambda *_: sys.exit(0), raising=False)  # before a fit
    words += [str(data)] * ("--calib" in words)
    monkeypatch.setattr("sys.argv", [name, "--model", str(sparse), "--dry-run", *words])
    with contextlib.suppress(SystemExit):
        script.main()
    assert (f"fills zeros of {sparse}" in capsys.readouterr().err) == fills


# --- data -------------------------------------------------------------------------------------------------------------


def test_settings_say_which_rows_a_cut_was_fitted_on_and_how_many_tokens():
    data = replace(PADDED, record={"path": "rows.jsonl", "sha256": "0", "count": 2})
    settings = {"calibration_data": [data.record], "calibration_tokens": 38}
    assert calibrated_on(data) == {"calib": "rows.jsonl"} | settings
    assert calibrated_on(data, "heal") == {"heal": "rows.jsonl"} | settings


@pytest.mark.parametrize(
    "line",
    [
        "kv_cut --kv-heads 1",
        "width_cut --head-share 0.5",
        "manual_select --text 1 --heal",
        "sparsify --sparsity 0.5 --refit",
        "vocab_cut --keep-share 0.9",
    ],
)
def test_a_disk_without_room_is_refused_before_a_fit(line, tmp_path, monkeypatch):
    name, *words = line.split()
    script = importlib.import_module(name)
    for work in ("model_and_calibration", "fit", "fit_vocabulary"):
        monkeypatch.setattr(script, work, lambda *_: pytest.fail("it went to work"), raising=False)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Namespace(free=1000))
    data = tmp_path / "texts.jsonl"
    files = ["--model", TINY_VL, "--out", tmp_path / "new/out", "--calib", write_texts(data)]
    monkeypatch.setattr("sys.argv", [name, *map(str, files), *words])
    with pytest.raises(PruneKitError, match=r"new/out: needs .* MB, 0\.0 MB are free"):
        script.main()
    assert [*tmp_path.iterdir()] == [data]
