"""What ms-swift learns from Prune-Kit: GPT-2, the image tokens of any tokenizer, and plugins that a user names."""

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


def load_plugins(plugins: Iterable[str | Path] = ()) -> None:
    """Import ms-swift in this process with all of the above, and plugins as its --external_plugins does.

    PruneKitError names a plugin that can't be imported.
    """
    from swift.utils import import_external_file

    register_gpt2()
    take_image_tokens_from_tokenizers()
    for plugin in plugins:
        try:
            import_external_file(str(plugin))
        except Exception as error:
            raise PruneKitError(f"plugin {plugin} can't be loaded: {type(error).__name__} ({error})") from error
