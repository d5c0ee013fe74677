"""Bad rows are refused by all that read them."""

import pytest
from helpers.bad_input import BAD, RAW, put


def test_bad_rows_are_refused_by_all_that_read_them(tagger, tmp_path, tries):
    pytest.importorskip("seqeval")
    row = {"tokens": ["ana", "oslo"], "ner_tags": ["B-PER", "B-LOC"]}
    contents = [(content[:20], content) for content in RAW]
    contents += [(value, {"tokens": value, "ner_tags": value}) for value in BAD]
    contents += [(value, row | {"tokens": value}) for value in BAD] + [(v, row | {"ner_tags": v}) for v in BAD]
    contents += [(v, row | {"tokens": ["ana", v]}) for v in BAD if v != "5"]
    contents += [("other", row | {"ner_tags": ["B-X", "O"]}), ("short", row | {"ner_tags": ["O"]})]
    for name, argv in {
        "ner_run.py": ("--model", tagger("bert"), "--out", tmp_path / "out", "--dataset"),
        "prunekit.ner": ("--model", tagger("bert"), "--dataset"),
        "deploy.py": ("--model", tagger("bert"), "--dataset"),
    }.items():
        for suffix in (".jsonl", ".txt"):
            for what, content in contents:
                if suffix == ".txt" and not isinstance(content, bytes):
                    continue
                put(tmp_path / f"rows{suffix}", content)
                tries.refused(what, name, *argv, tmp_path / f"rows{suffix}")
    tries.check()
