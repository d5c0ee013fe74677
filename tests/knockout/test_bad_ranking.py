"""Whatever ranking.json says, its readers take it or refuse it in one line."""

import pytest
from helpers.bad_input import RANKING, RAW, changed, contents, put

from prunekit.checkpoint import fingerprint, open_checkpoint


def ranking_readers(model, ranking) -> dict[str, tuple]:
    select = ("--model", model, "--from-ranking", ranking, "--max-fraction", "1", "--dry-run")
    return {
        "manual_select.py": select,
        "manual_select.py independent": (*select, "--independent"),
        "sparsify.py": ("--model", model, "--sparsity", "0.5", "--scope", "layer", "--layer-importance", "knockout",
                        "--ranking", ranking, "--dry-run"),
    }  # fmt: skip


@pytest.mark.parametrize("reader", ranking_readers("", ""))
def test_any_ranking_is_taken_or_refused(reader, linked, tmp_path, tries):
    file, folder = tmp_path / "ranking.json", linked("llama")
    ranking = RANKING | {"fingerprint": fingerprint(open_checkpoint(folder))}
    for what, content in contents(ranking):
        put(file, content)
        tries.survived(what, reader.split()[0], *ranking_readers(folder, file)[reader])
    for content in RAW:
        put(file, content)
        tries.refused(content[:20], reader.split()[0], *ranking_readers(folder, file)[reader])
    put(file, changed(ranking, ("removals", 0, "stack"), "vision") | {"greedy": None})
    tries.refused("vision on text", reader.split()[0], *ranking_readers(folder, file)[reader])
    tries.check()


@pytest.mark.parametrize(
    "path",
    [5, "x", [], {}, [5], [{}], [{"removed": 5, "relative": 1.0}], [{"removed": ["text"], "relative": 1.0}],
     [{"removed": ["text-x"], "relative": 1.0}], [{"removed": ["text-03"], "relative": "1"}],
     [{"removed": [["text-03"]], "relative": 1}]],
)  # fmt: skip
def test_a_greedy_path_of_the_wrong_shape_is_refused(path, linked, tmp_path, tries):
    file, folder = tmp_path / "ranking.json", linked("llama")
    ranking = RANKING | {"fingerprint": fingerprint(open_checkpoint(folder))}
    for greedy in ({"healed": False, "path": path}, path or 5):
        put(file, ranking | {"greedy": greedy})
        tries.refused(greedy, "manual_select.py", *ranking_readers(folder, file)["manual_select.py"])
    tries.check()
