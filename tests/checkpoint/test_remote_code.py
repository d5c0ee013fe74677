"""Code that checkpoints bring."""

import json

import pytest

from prunekit.checkpoint.remote_code import check_no_remote_code
from prunekit.errors import PruneKitError


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
