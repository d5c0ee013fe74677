"""W&B without a key is offline, and says so."""

import os

import pytest

from prunekit.training.tracking import setup_wandb

WANDB_AI = "machine api.wandb.ai\n  login user\n  password k\n"


@pytest.mark.parametrize(
    ("env", "netrc", "mode"),
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": "k"}, "", None),
        ({"WANDB_MODE": "online"}, "", "online"),
        ({}, WANDB_AI, None),
        ({}, "machine github.com login a password b\n", "offline"),
        ({"WANDB_BASE_URL": "https://wandb.firm:8080"}, "machine wandb.firm\n  login user\n  password k\n", None),
        ({"WANDB_BASE_URL": "https://wandb.firm:8080"}, WANDB_AI, "offline"),
    ],
    ids=["no key", "key", "mode", "netrc", "netrc of others", "own server", "key of another server"],
)
def test_without_a_key_runs_are_kept_offline_beside_out(env, netrc, mode, tmp_path, monkeypatch, capsys):
    (tmp_path / "netrc").write_text(netrc)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in {"WANDB_DIR": "", "NETRC": str(tmp_path / "netrc"), **env}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_DIR")
    setup_wandb(tmp_path / "out")
    assert os.environ.get("WANDB_MODE") == mode
    said = capsys.readouterr().out
    assert said.count(f"kept offline in {tmp_path}/wandb") == (mode == "offline") == said.count("\n")
