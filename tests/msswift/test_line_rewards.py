"""Rewards of a line: those of ms-swift and of plugins, which are read and not run."""

import pytest
from helpers.paths import ROOT

from prunekit.errors import PruneKitError
from prunekit.msswift.names import check_rewards


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
    plugins = sorted((ROOT / "plugins").glob("*.py"))
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
