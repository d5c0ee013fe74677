"""What the plugins give ms-swift: each on a trainer that is only what the plugin asks for."""

from types import SimpleNamespace

import peft
import pytest
import torch
from helpers.cuts import cut_width
from helpers.parrot import save_parrot
from helpers.paths import EMBEDDED, ROOT
from helpers.tiny_models import load

from prunekit.data.answers import load_engine
from prunekit.errors import PruneKitError
from prunekit.msswift.extend import load_plugins

pytestmark = pytest.mark.usefixtures("plain_trainer")
PLUGINS = sorted((ROOT / "plugins").glob("*.py"))


@pytest.fixture(scope="module")
def swift():
    """ms-swift with all of our plugins, and its registries."""
    from swift import callbacks, optimizers
    from swift.template.templates.qwen import Qwen2VLTemplate

    load_plugins(PLUGINS)
    return SimpleNamespace(
        callbacks=callbacks.callbacks_map, optimizers=optimizers.optimizers_map, qwen_vl=Qwen2VLTemplate
    )


def trainer_of(folder, model=None, **settings):
    model = load(folder) if model is None else model
    return SimpleNamespace(model=model, model_info=SimpleNamespace(model_dir=str(folder)), **settings)


# --- head_rates -------------------------------------------------------------------------------------------------------


@pytest.fixture
def optimizer_of(swift, tiny, tmp_path, monkeypatch):
    """optimizer_of(name, ...): what the plugin makes of plain SGD for a model of which half of the heads are masked."""
    from transformers import Trainer

    cut_width(tiny("llama"), tmp_path / "masked", head_share=0.5, mask=True)
    monkeypatch.setattr(
        Trainer,
        "create_optimizer",
        lambda self, model=None: torch.optim.SGD((p for p in self.model.parameters() if p.requires_grad), lr=0.1),
    )

    def make(name, tuner="full", deepspeed=False, fsdp=False):
        trainer = trainer_of(tmp_path / "masked", is_deepspeed_enabled=deepspeed, is_fsdp_enabled=fsdp)
        args = SimpleNamespace(optimizer=name, tuner_type=tuner)
        return trainer.model, swift.optimizers[name](args, trainer).create_optimizer()

    return make


def moved(model, optimizer):
    """Of each head of the first layer, how far a step on a gradient of ones moves its rows of q_proj; and up_proj."""
    layer = model.model.layers[0]
    watched = [layer.self_attn.q_proj.weight, layer.mlp.up_proj.weight]
    before = [weight.detach().clone() for weight in watched]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    q, up = [(old - new.detach()) for old, new in zip(before, watched)]
    return q.view(4, -1).mean(1).tolist(), float(up.mean())


def test_pruned_heads_rest_and_weak_ones_learn_at_the_rate_of_the_environment(optimizer_of, monkeypatch):
    monkeypatch.setenv("HEAD_RATES", "weak=0.3 weak_share=0.5")
    of_heads, other = moved(*optimizer_of("head_rates"))
    assert sorted(of_heads) == pytest.approx([0, 0, 0.03, 0.1], abs=1e-6) and other == pytest.approx(0.1)


def test_weak_heads_are_those_of_the_cuts_scores(optimizer_of, monkeypatch, tmp_path):
    """Not of the weights' norms, which say another order where the scores of the history were turned round."""
    import json

    from prunekit.checkpoint import HISTORY

    monkeypatch.setenv("HEAD_RATES", "weak=0 weak_share=0.5")
    weak = []
    for scores in (1, -1):
        model, optimizer = optimizer_of("head_rates")
        weak.append([head for head, way in enumerate(moved(model, optimizer)[0]) if way > 0.05])
        file = tmp_path / "masked" / HISTORY
        told = json.loads(file.read_text())
        told["history"][-1]["head_scores"] = [
            [scores * -score for score in row] for row in told["history"][-1]["head_scores"]
        ]
        file.write_text(json.dumps(told))
    assert len(weak[0]) == len(weak[1]) == 1 and weak[0] != weak[1]


@pytest.mark.parametrize(("name", "ways"), [("active_heads", [0, 0, 0.1, 0.1]), ("important_heads", [0, 0, 0, 0.1])])
def test_active_or_important_heads_alone_are_trained_at_the_full_rate(name, ways, optimizer_of):
    of_heads, other = moved(*optimizer_of(name))
    assert sorted(of_heads) == pytest.approx(ways, abs=1e-6) and other == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"deepspeed": True}, "works with plain DDP only"),
        ({"fsdp": True}, "works with plain DDP only"),
        ({"tuner": "lora"}, "works with --tuner_type full only"),
    ],
)
def test_what_would_undo_rates_of_heads_is_refused(settings, message, optimizer_of):
    with pytest.raises(PruneKitError, match=f"--optimizer head_rates: {message}"):
        optimizer_of("head_rates", **settings)


# --- knockout_layers --------------------------------------------------------------------------------------------------


def knock_out(swift, trainer, monkeypatch, wish):
    monkeypatch.setenv("PRUNEKIT_REMOVE", wish)
    swift.callbacks["knockout_layers"](None, trainer).on_init_end(None, None, None)


def counts(model):
    return len(model.model.language_model.layers), len(model.model.visual.blocks)


def test_layers_of_both_stacks_are_cut_from_the_model_in_memory(swift, tiny, monkeypatch):
    trainer = trainer_of(tiny("qwen3_vl"))
    kept = [trainer.model.model.language_model.layers[number] for number in (0, 3, 4)]
    knock_out(swift, trainer, monkeypatch, "text:1-2 vision:0,5")
    assert counts(trainer.model) == (3, 4)
    assert list(trainer.model.model.language_model.layers) == kept


def test_layers_under_a_lora_are_cut(swift, tiny, monkeypatch):
    model = peft.get_peft_model(load(tiny("qwen3_vl")), peft.LoraConfig(target_modules=["q_proj"]))
    trainer = trainer_of(tiny("qwen3_vl"), model)
    knock_out(swift, trainer, monkeypatch, "text:2")
    assert counts(model.get_base_model()) == (4, 6)


def test_a_model_that_another_tuner_wraps_is_refused(swift, tiny, monkeypatch):
    trainer = trainer_of(tiny("qwen3_vl"), torch.nn.Sequential(load(tiny("qwen3_vl"))))
    with pytest.raises(PruneKitError, match="knock layers out with --tuner_type full or lora"):
        knock_out(swift, trainer, monkeypatch, "text:2")


@pytest.mark.parametrize("wish", ["text", "text:", "3", "audio:1", "text:1 text:2", "text,1"])
def test_a_wish_that_names_no_layers_is_refused(wish, swift, tiny, monkeypatch):
    trainer = trainer_of(tiny("qwen3_vl"))
    with pytest.raises(PruneKitError, match="^PRUNEKIT_REMOVE: .* names no layers"):
        knock_out(swift, trainer, monkeypatch, wish)
    assert counts(trainer.model) == (5, 6)


# --- sparsity, and what lets ms-swift load a model --------------------------------------------------------------------


def test_callbacks_of_sparsity_have_the_environments_settings_and_the_trainer(swift, monkeypatch):
    monkeypatch.setenv("PRUNEKIT_GRADUAL", "sparsity=0.7 events=5")
    monkeypatch.setenv("PRUNEKIT_DYNAMIC", "interval=7 share=0.2")
    trainer = object()
    gradual, dynamic = (swift.callbacks[name](None, trainer) for name in ("gradual_pruning", "dynamic_sparsity"))
    assert (gradual.settings.sparsity, gradual.settings.events, gradual.trainer) == (0.7, 5, trainer)
    assert (dynamic.settings.interval, dynamic.settings.share, dynamic.trainer) == (7, 0.2, trainer)


def test_settings_of_sparsity_that_are_wrong_name_their_variable(swift, monkeypatch):
    monkeypatch.setenv("PRUNEKIT_GRADUAL", "sparsity=2")
    with pytest.raises(PruneKitError, match="^PRUNEKIT_GRADUAL: "):
        swift.callbacks["gradual_pruning"](None, None)


def test_the_ids_of_images_and_videos_are_those_of_the_models_own_tokenizer(swift):
    template = object.__new__(swift.qwen_vl)
    template.processor = SimpleNamespace(image_token_id=3, video_token_id=4)
    assert (template.image_token_id, template.video_token_id) == (3, 4)


@pytest.fixture
def image_lover(swift):
    """An engine whose model finds the token of an image likelier than all others."""
    from swift.infer_engine import TransformersEngine

    engine = TransformersEngine(str(EMBEDDED), model_type="qwen3_vl", torch_dtype=torch.float32)
    image = engine.template.processor.image_token_id

    def love(module, inputs, logits):
        logits[..., image] += 1e4

    engine.model.lm_head.register_forward_hook(love)
    return engine


def test_no_answer_has_a_token_that_stands_for_an_image(swift, image_lover):
    from swift.infer_engine import InferRequest, RequestConfig

    request = InferRequest([{"role": "user", "content": "Read this."}])
    answers = image_lover.infer([request], RequestConfig(max_tokens=3, temperature=1, return_details=True))
    tokens = answers[0].choices[0].token_ids
    assert tokens and image_lover.template.image_token_id not in tokens


def test_the_image_tokens_of_a_template_are_those_of_its_own_tokenizer(swift):
    found = []
    for start in (3, 30):
        template = object.__new__(swift.qwen_vl)
        ids = {"<|image_pad|>": start, "<|video_pad|>": start + 1}
        tokenizer = SimpleNamespace(convert_tokens_to_ids=ids.get)
        template.processor = SimpleNamespace(image_token_id=start, video_token_id=start + 1, tokenizer=tokenizer)
        template._init_placeholder_tokens()
        found.append(set(template.placeholder_tokens))
    assert found == [{3, 4}, {30, 31}]


def test_vllms_answers_have_none_either(swift):
    from swift.infer_engine.infer_engine import InferEngine

    class Engine(InferEngine):
        infer_async = None

        def _prepare_generation_config(self, request_config):
            return SimpleNamespace(logit_bias=None)

    model = SimpleNamespace(model_dir="", model_name="", max_model_len=9, task_type="causal_lm", config=None)
    template = SimpleNamespace(
        processor=SimpleNamespace(model_info=model, model_meta=None),
        template_meta=SimpleNamespace(template_type="qwen3_vl"),
        placeholder_tokens=[3, 4, 3, None],  # a tokenizer needn't have all
    )
    assert Engine(template)._prepare_generation_config(None).logit_bias == {3: -100, 4: -100}


@pytest.mark.parametrize(
    ("word", "limit", "tokens"),
    [("cat", 9, [*"cat", "[EOS]"]), ("cat", 4, [*"cat", "[EOS]"]), ("cat", 2, [*"ca"]), ("", 9, ["[EOS]"])],
)
def test_an_answer_has_the_token_that_ends_it_where_that_is_the_padding_too(swift, tmp_path, word, limit, tokens):
    from swift.infer_engine import InferRequest, RequestConfig

    engine = load_engine(save_parrot(tmp_path / "parrot", word=word), "cpu")
    engine.tokenizer.pad_token = "[EOS]"
    request = InferRequest([{"role": "user", "content": "what?"}])
    [answer] = engine.infer([request], RequestConfig(max_tokens=limit, temperature=0, return_details=True))
    assert engine.tokenizer.convert_ids_to_tokens(answer.choices[0].token_ids) == tokens


def test_a_plugin_that_cannot_be_imported_is_named(tmp_path):
    from prunekit.msswift.extend import load_plugins

    (tmp_path / "broken.py").write_text("import a_package_that_is_not_there")
    with pytest.raises(PruneKitError, match="plugin .*broken.py can't be loaded: ModuleNotFoundError"):
        load_plugins([tmp_path / "broken.py"])
