"""Whatever is drawn from is drawn or refused in one line."""

import shutil

from helpers.bad_input import contents, put


def test_any_record_of_sparsity_is_drawn_or_refused(pruned, tries):
    event = {"sparsity": 0.5, "before": {"loss": 1.0}, "after": {"loss": 2.0}, "retrained": {"loss": 1.5}, "step": 1}
    document = {"metric": "loss", "events": [event]}
    for what, content in contents(document):
        put(pruned / "sparsity.json", content)
        tries.survived(what, "prunekit.report.__main__", pruned)
        (pruned / "quality.png").unlink(missing_ok=True)
    tries.check()


def test_any_evaluation_is_taken_or_refused(tiny, tmp_path, tries):
    model = tiny("llama")
    results = [{"model": str(model), "parameters": 5, "datasets": {"test": {"token_acc": 0.5, "exact_match": 0.5}}}]
    (tmp_path / "seconds").mkdir()
    put(tmp_path / "seconds" / "base", "5\n")
    argv = ("--stages", f"base={model}", "--evaluation", tmp_path / "e.json", "--seconds", tmp_path / "seconds",
            "--out", tmp_path / "out")  # fmt: skip
    for what, content in contents(results):
        put(tmp_path / "e.json", content)
        tries.survived(what, "prunekit.summary", *argv)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    put(tmp_path / "e.json", results)
    for seconds in ("", "x", "nan", b"\xff", "9" * 5000):
        put(tmp_path / "seconds" / "base", seconds)
        tries.refused(seconds, "prunekit.summary", *argv)
    for stages in (["base"], ["=x"], [f"base={tmp_path}"], ["base="]):
        tries.refused(stages, "prunekit.summary", "--stages", *stages, *argv[2:])
    tries.check()
