"""Names that a line may give: those of ms-swift and of plugins, which are read and not run."""

import importlib

import pytest
from helpers.paths import ROOT
from helpers.swift_lines import check

from prunekit.errors import PruneKitError
from prunekit.msswift.names import check_names, check_rewards
from prunekit.msswift.source import set_in

PLUGINS = ROOT / "plugins"


def test_names_of_models_templates_and_tuners_are_those_that_swift_registers():
    from swift.arguments.base_args.base_args import get_supported_tuners
    from swift.model import MODEL_MAPPING
    from swift.template import TEMPLATE_MAPPING
    from swift.tuner_plugin import tuners_map

    plugins = [PLUGINS / "gpt2_model.py"]
    for name in MODEL_MAPPING:
        check_names(name, None, plugins)
    for name in TEMPLATE_MAPPING:
        check_names(None, name, plugins)
    tuners = set_in("arguments/base_args/base_args.py", "get_supported_tuners")
    assert tuners | tuners_map.keys() == get_supported_tuners()


@pytest.mark.parametrize(
    ("flag", "module", "registry"),
    [
        ("--optimizer", "swift.optimizers", "optimizers_map"),
        ("--callbacks", "swift.callbacks", "callbacks_map"),
        ("--eval_metric", "swift.metrics", "eval_metrics_map"),
        ("--loss_type", "swift.loss", "loss_map"),
        ("--report_to", "transformers.integrations.integration_utils", "INTEGRATION_TO_CALLBACK"),
    ],
)
def test_what_swift_registers_is_taken_and_listed(flag, module, registry):
    names = [name for name in getattr(importlib.import_module(module), registry) if not name.startswith("ow")]
    for name in names:
        check("sft", flag, name)
    with pytest.raises(PruneKitError) as error:
        check("sft", flag, "nonesuch")
    for name in names:
        assert name in str(error.value)


def test_names_of_plugins_are_known():
    check("sft", "--callbacks", "keep_zeros", "--external_plugins", PLUGINS / "sparsity.py")
    check("sft", "--optimizer", "active_heads", "--external_plugins", PLUGINS / "head_rates.py")
    check("sft", "--model_type", "gpt2", "--external_plugins", PLUGINS / "gpt2_model.py")


@pytest.mark.parametrize(
    ("registry", "flag"),
    [
        ("callbacks_map", "--callbacks"),
        ("optimizers_map", "--optimizer"),
        ("loss_map", "--loss_type"),
        ("eval_metrics_map", "--eval_metric"),
        ("tuners_map", "--tuner_type"),
    ],
)
def test_a_plugin_registers_for_its_own_flag_alone(tmp_path, registry, flag):
    plugin = tmp_path / "mine.py"
    plugin.write_text(f"raise SystemExit('it ran')\n{registry}['mine'] = Mine\n")
    check("sft", flag, "mine", "--external_plugins", plugin)
    plugin.write_text("orms['mine'] = Mine\n")
    with pytest.raises(PruneKitError, match="unknown .* mine"):
        check("sft", flag, "mine", "--external_plugins", plugin)


# --- rewards -------------------------------------------------------------------------------------------------


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
