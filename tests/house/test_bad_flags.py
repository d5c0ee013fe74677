"""Numbers on the command line of every script: what is no good is refused."""

import pytest
from helpers.bad_input import RANKING, put
from helpers.tiny_taggers import write_rows

NUMBERS = ["nan", "inf", "-inf", "1e400", "-1", "0", "abc", "", "9" * 5000]


def flags(tagger, model, ranking, rows, out) -> list[tuple]:
    """(script, good words, flag, values that are no good)."""
    surgery = ("--model", model, "--dry-run")
    ranked = (*surgery, "--text", "1")
    shared_out = (*surgery, "--sparsity", "0.5", "--layer-importance", "knockout", "--ranking", ranking)
    measured = ("--model", tagger, "--dataset", rows)
    trained = ("--model", tagger, "--dataset", rows, "--out", out)
    return [
        ("manual_select.py", ranked, "--max-shard-gb", NUMBERS),
        ("manual_select.py", (*surgery, "--from-ranking", ranking), "--keep-above", [v for v in NUMBERS if v != "0"]),
        ("manual_select.py", (*surgery, "--from-ranking", ranking), "--max-layers", NUMBERS),
        ("manual_select.py", (*surgery, "--from-ranking", ranking), "--max-fraction", NUMBERS),
        ("manual_select.py", surgery, "--text", [*NUMBERS[:4], "-1", "abc", "9" * 5000, "1-" + "9" * 5000, "²"]),
        ("kv_cut.py", surgery, "--kv-heads", NUMBERS),
        ("kv_cut.py", (*surgery, "--kv-heads", "1"), "--max-shard-gb", NUMBERS),
        ("width_cut.py", surgery, "--heads", NUMBERS),
        ("width_cut.py", surgery, "--head-share", NUMBERS),
        ("width_cut.py", surgery, "--kv-groups", NUMBERS),
        ("width_cut.py", surgery, "--neurons", NUMBERS),
        ("width_cut.py", surgery, "--neuron-share", NUMBERS),
        ("vocab_cut.py", (*surgery, "--calib", rows), "--size", NUMBERS),
        ("vocab_cut.py", (*surgery, "--calib", rows), "--keep-share", NUMBERS),
        ("vocab_cut.py", (*surgery, "--calib", rows, "--size", "64"), "--multiple", NUMBERS),
        ("expert_cut.py", (*surgery, "--calib", rows), "--experts", NUMBERS),
        ("sparsify.py", surgery, "--sparsity", NUMBERS),
        ("sparsify.py", surgery, "--threshold", NUMBERS),
        ("sparsify.py", surgery, "--pattern", [*NUMBERS, "2:2", "0:4", "2:" + "9" * 5000]),
        ("sparsify.py", shared_out, "--power", NUMBERS),
        ("sparsify.py", shared_out, "--max-sparsity", NUMBERS),
        ("sparsify.py", (*surgery, "--sparsity", "0.5"), "--modules", ["(", "[", "x" * 100_000, "zzz"]),
        ("prunekit.distributions", (model, "--out", out), "--sparsity", NUMBERS),
        ("prunekit.distributions", (model, "--out", out), "--threshold", NUMBERS),
        ("prunekit.distributions", (model, "--out", out), "--pattern", [*NUMBERS, "2:2", "0:4"]),
        ("prunekit.distributions", (model, "--out", out), "--modules", ["(", "zzz"]),
        ("deploy.py", measured, "--limit", NUMBERS),
        ("deploy.py", measured, "--length", NUMBERS),
        ("deploy.py", measured, "--batches", NUMBERS),
        ("deploy.py", measured, "--seconds", NUMBERS),
        ("deploy.py", measured, "--rounds", NUMBERS),
        ("deploy.py", measured, "--threads", NUMBERS),
        ("deploy.py", measured, "--device", ["nonsense", "", "cuda:99"]),
        ("prunekit.ner", measured, "--limit", NUMBERS),
        ("prunekit.ner", measured, "--min-f1", NUMBERS),
        ("prunekit.ner", measured, "--require", ["f1", "f1>=nan", "f1>0", "accuracy>=0.5", ""]),
        ("deploy.py", measured, "--require", ["f1", "f1>=nan", "f1>0", "loss<=3", ""]),
        ("ner_run.py", trained, "--temperature", NUMBERS),
        ("ner_run.py", trained, "--hard-share", [v for v in NUMBERS if v != "0"]),
        ("ner_run.py", trained, "--hidden-weight", [v for v in NUMBERS if v != "0"]),
        ("ner_run.py", trained, "--max-length", NUMBERS),
        ("ner_run.py", trained, "--lora-rank", NUMBERS),
        ("ner_run.py", (*trained, "--lora-rank", "4"), "--lora-alpha", NUMBERS),
        ("ner_run.py", trained, "--learning_rate", [v for v in NUMBERS if v != "0"]),
        ("ner_run.py", trained, "--num_train_epochs", ["nan", "inf", "1e400", "abc"]),
        ("ner_run.py", trained, "--per_device_train_batch_size", ["0", "-1", "nan", "abc"]),
        ("ner_run.py", trained, "--gradient_accumulation_steps", ["0", "-1", "nan"]),
        ("ner_run.py", trained, "--lr_scheduler_type", ["nonsense"]),
        ("ner_run.py", trained, "--optim", ["nonsense"]),
        ("ner_run.py", trained, "--deepspeed", ["gone.json"]),
        ("ner_run.py", trained, "--weight_decay", ["nan", "abc"]),
        ("prunekit.quantise", (*surgery, "--out", out, "--method", "int4"), "--group", NUMBERS),
        *(("prunekit.plan", ("--model", model, "--ranking", ranking), flag, NUMBERS)
          for flag in ("--target-params", "--target-kv", "--target-bytes", "--most")),
        ("prunekit.training.cycles", ("plan", "--model", model), "--sparsity", NUMBERS),
        ("prunekit.training.cycles", ("plan", "--model", model, "--sparsity", "0.5"), "--start", NUMBERS),
        ("prunekit.training.cycles", ("plan", "--model", model, "--sparsity", "0.5"), "--cycles", NUMBERS),
        ("prunekit.training.cycles", ("plan", "--model", model, "--sparsity", "0.5"), "--worse", NUMBERS),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(flags(*[""] * 5))))
def test_flags_that_are_no_good_are_refused(number, tagger, linked, tmp_path, tries):
    put(tmp_path / "ranking.json", RANKING)
    rows = write_rows(tmp_path / "rows.jsonl")
    given = (tagger("bert"), linked("llama"), tmp_path / "ranking.json", rows, tmp_path / "out")
    name, good, flag, values = flags(*given)[number]
    for value in values:
        tries.refused(f"{flag} {value[:20]}", name, *good, f"{flag}={value}")
    tries.check()
