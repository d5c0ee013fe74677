"""What ms-swift learns from Prune-Kit: GPT-2, image tokens (any tokenizer's), what an answer is, a user's plugins."""

import functools
from collections.abc import Iterable
from pathlib import Path

from prunekit.errors import PruneKitError

MODELS = ("gpt2",)  # model types that ms-swift hasn't


def register_gpt2() -> None:
    """Let ms-swift load GPT-2. Its chat template is ms-swift's `default`, since GPT-2 has none."""
    from swift.model import MODEL_MAPPING, Model, ModelGroup, ModelMeta, register_model
    from swift.model.register import ModelLoader

    class GPT2Loader(ModelLoader):
        def _postprocess_config(self, config):
            width = config.n_embd
            super()._postprocess_config(config)
            config.n_embd = width  # ms-swift finds no hidden_size, and sets its alias to None
            return config

    if "gpt2" not in MODEL_MAPPING:
        groups = [ModelGroup([Model("AI-ModelScope/gpt2", "openai-community/gpt2")])]
        register_model(ModelMeta("gpt2", groups, GPT2Loader, template="default", architectures=["GPT2LMHeadModel"]))


def take_image_tokens_from_tokenizers() -> None:
    """Let ms-swift's Qwen-VL templates take the ids of image and video tokens from the model's own tokenizer.

    ms-swift hard-codes those of Qwen's, and would find no image in the prompt of a model with another vocabulary.
    """
    from swift.template.templates.qwen import Qwen2VLTemplate

    Qwen2VLTemplate.image_token_id = property(lambda template: template.processor.image_token_id)
    Qwen2VLTemplate.video_token_id = property(lambda template: template.processor.video_token_id)


def keep_image_tokens_out_of_answers() -> None:
    """Let no engine of ms-swift's answer with a token that stands for an image, a video or sound.

    A damaged student does, and a training on its own answers then ends where the model looks for the image to it. Of
    what the template says (placeholder_tokens); engines that ask neither transformers nor vLLM stay as they are.
    """
    from swift.infer_engine.infer_engine import InferEngine
    from swift.template import Template

    begin, find = InferEngine.__init__, Template._init_placeholder_tokens
    if hasattr(begin, "__wrapped__"):
        return

    def find_its_own(template):  # ms-swift puts the ids of every model of a process into the class's list
        template.placeholder_tokens = list(template.placeholder_tokens)
        find(template)

    @functools.wraps(begin)
    def begin_without_image_tokens(engine, *args, **kwargs):
        begin(engine, *args, **kwargs)
        prepare = engine._prepare_generation_config
        forbidden = sorted(set(engine.template.placeholder_tokens) - {None})  # what the tokenizer hasn't is None

        def prepare_without_image_tokens(request_config):
            config = prepare(request_config)
            if forbidden and hasattr(config, "suppress_tokens"):  # transformers
                config.suppress_tokens = [*(config.suppress_tokens or ()), *forbidden]
            elif forbidden and hasattr(config, "logit_bias"):  # vLLM, which bears no less than -100
                config.logit_bias = (config.logit_bias or {}) | dict.fromkeys(forbidden, -100.0)
            return config

        engine._prepare_generation_config = prepare_without_image_tokens

    InferEngine.__init__, Template._init_placeholder_tokens = begin_without_image_tokens, find_its_own


def keep_given_words_out_of_answers() -> None:
    """Let an answer be what the model said, and not begin with what its template had said for it.

    To Qwen3 and Qwen3.5 an empty <think> block is given behind the question, and ms-swift writes it before the answer:
    none would be its row's truth, to a reward or an evaluation. What begins a thinking model's answer (<think>) stays.
    """
    from swift.template import Template

    decode = Template.decode_generate_ids
    if hasattr(decode, "__wrapped__"):
        return

    @functools.wraps(decode)
    def decode_without_prefix(template, generate_ids, *, first_token=True, template_inputs=None, **kwargs):
        given = template._get_response_prefix(template_inputs) == template.template_meta.non_thinking_prefix
        first = first_token and not given  # which is what ms-swift writes it before
        return decode(template, generate_ids, first_token=first, template_inputs=template_inputs, **kwargs)

    Template.decode_generate_ids = decode_without_prefix


def keep_ends_of_answers() -> None:
    """Let transformers' answers, as vLLM's, have the token that ended them, where that pads others, too.

    ms-swift drops all padding tokens. Where a text ends by the same (Llama, SmolLM2, GPT-2) a training on a model's own
    answers would never see one end, and ms-swift's GRPO fails on one of no tokens.
    """
    from swift.infer_engine import TransformersEngine

    infer = TransformersEngine._infer_full
    if hasattr(infer, "__wrapped__"):
        return

    @functools.wraps(infer)
    def infer_with_ends(engine, *args, generation_config, **kwargs):
        responses = infer(engine, *args, generation_config=generation_config, **kwargs)
        pad, ends = engine.tokenizer.pad_token_id, generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        words = tuple(getattr(generation_config, "stop_words", None) or ())
        for choice in (choice for response in responses for choice in response.choices):
            ids = choice.token_ids
            if ids is None:
                continue
            ended = choice.finish_reason == "stop" and pad in ends  # it may be by a word or by another token
            if not ids or (ended and ids[-1] not in ends and not engine.tokenizer.decode(ids[-20:]).endswith(words)):
                ids.append(pad)
        return responses

    TransformersEngine._infer_full = infer_with_ends


def understand_images_and_answers() -> None:
    """All of the above for templates and engines: what plugins/images_and_answers.py gives every launcher."""
    take_image_tokens_from_tokenizers()
    keep_image_tokens_out_of_answers()
    keep_given_words_out_of_answers()
    keep_ends_of_answers()


def load_plugins(plugins: Iterable[str | Path] = ()) -> None:
    """Import ms-swift in this process with all of the above, and plugins as its --external_plugins does.

    PruneKitError names a plugin that can't be imported.
    """
    from swift.utils import import_external_file

    register_gpt2()
    understand_images_and_answers()
    for plugin in plugins:
        try:
            import_external_file(str(plugin))
        except Exception as error:
            raise PruneKitError(f"plugin {plugin} can't be loaded: {type(error).__name__} ({error})") from error
