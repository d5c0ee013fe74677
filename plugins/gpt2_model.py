"""Let ms-swift load GPT-2, which it has no entry for. Every launcher loads this through `--external_plugins`.

Its chat template is ms-swift's `default` (### Human, ### Assistant), since GPT-2 has none; TEMPLATE= says otherwise.
"""

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
    meta = ModelMeta("gpt2", groups, GPT2Loader, template="default", architectures=["GPT2LMHeadModel"])
    register_model(meta)
