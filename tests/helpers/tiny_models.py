"""One tiny real model per family: hidden 32, head_dim different from hidden / heads where the family allows it."""

from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import load_file

VISION_TOKENS = {
    "image_token_id": 120,
    "video_token_id": 121,
    "vision_start_token_id": 122,
    "vision_end_token_id": 123,
}
TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
KV4 = {"num_key_value_heads": 4, "num_attention_heads": 8, "head_dim": 16}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 2,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
HYBRID = {
    "rope_parameters": MROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
    "layer_types": [f"{kind}_attention" for kind in ("linear", "linear", "full", "linear", "full")],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
ENCODER = {k: TEXT[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")} | {
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
VISION3 = {
    "depth": 6,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [1, 3, 4],
}


def _vl(cls, config_cls, text, vision, **kwargs):
    return cls, config_cls(text_config=text, vision_config=vision, **VISION_TOKENS, **kwargs)


def _build(family: str):
    match family:
        case "qwen3_vl":
            text = TEXT | KV4 | {"rope_parameters": MROPE}
            return _vl(hf.Qwen3VLForConditionalGeneration, hf.Qwen3VLConfig, text, VISION3, tie_word_embeddings=True)
        case "qwen3_vl_moe":
            text = TEXT | KV4 | MOE | {"rope_parameters": MROPE}
            return _vl(hf.Qwen3VLMoeForConditionalGeneration, hf.Qwen3VLMoeConfig, text, VISION3)
        case "qwen3_5":
            vision = {key: value for key, value in VISION3.items() if key != "deepstack_visual_indexes"}
            return _vl(hf.Qwen3_5ForConditionalGeneration, hf.Qwen3_5Config, TEXT | KV4 | HYBRID, vision)
        case "qwen3_5_moe":
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
            text = TEXT | KV4 | HYBRID | experts | {"shared_expert_intermediate_size": 24}
            del text["intermediate_size"]
            vision = {key: value for key, value in VISION3.items() if key != "deepstack_visual_indexes"}
            return _vl(hf.Qwen3_5MoeForConditionalGeneration, hf.Qwen3_5MoeConfig, text, vision)
        case "qwen2_5_vl":
            text = TEXT | SLIDING | {"rope_parameters": MROPE | {"mrope_section": [2, 1, 1]}}
            vision = VISION3 | {"fullatt_block_indexes": [1, 4], "window_size": 16}
            del vision["deepstack_visual_indexes"], vision["num_position_embeddings"]
            return _vl(hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLConfig, text, vision)
        case "qwen2_vl":
            text = TEXT | {"rope_parameters": MROPE | {"mrope_section": [2, 1, 1]}}
            vision = {"depth": 4, "embed_dim": 32, "num_heads": 4, "patch_size": 4, "hidden_size": 32}
            return _vl(hf.Qwen2VLForConditionalGeneration, hf.Qwen2VLConfig, text, vision | {"spatial_merge_size": 2})
        case "qwen3":
            return hf.Qwen3ForCausalLM, hf.Qwen3Config(**TEXT | KV4 | SLIDING)
        case "qwen3_moe":
            return hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**TEXT | KV4 | MOE)
        case "qwen2":
            return hf.Qwen2ForCausalLM, hf.Qwen2Config(**TEXT | SLIDING | {"num_key_value_heads": 4})
        case "llama":
            return hf.LlamaForCausalLM, hf.LlamaConfig(**TEXT, head_dim=16, tie_word_embeddings=True)
        case "mistral":
            return hf.MistralForCausalLM, hf.MistralConfig(**TEXT, head_dim=16, sliding_window=4)
        case "mixtral":
            config = hf.MixtralConfig(**TEXT, head_dim=16, num_local_experts=6, num_experts_per_tok=2)
            return hf.MixtralForCausalLM, config
        case "gemma3_text":
            config = hf.Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=4, sliding_window_pattern=3)
            return hf.Gemma3ForCausalLM, config
        case "gpt2":
            return hf.GPT2LMHeadModel, hf.GPT2Config(vocab_size=128, n_embd=32, n_layer=5, n_head=4, n_positions=64)
        case "bert":
            return hf.BertForMaskedLM, hf.BertConfig(**ENCODER)
        case "roberta":
            return hf.RobertaForTokenClassification, hf.RobertaConfig(**ENCODER)
        case "camembert":
            return hf.CamembertForMaskedLM, hf.CamembertConfig(**ENCODER)
        case "distilbert":
            config = hf.DistilBertConfig(
                vocab_size=128, dim=32, hidden_dim=48, n_layers=5, n_heads=4, max_position_embeddings=64
            )
            return hf.DistilBertForMaskedLM, config


FAMILIES = [
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3",
    "qwen3_moe",
    "qwen2",
    "llama",
    "mistral",
    "mixtral",
    "gemma3_text",
    "gpt2",
    "bert",
    "roberta",
    "camembert",
    "distilbert",
]
VISION = FAMILIES[:6]


def build(family: str) -> torch.nn.Module:
    """A tiny model of this family in fp32, eval mode, with weights that are random, seeded and never trivial."""
    torch.manual_seed(0)
    cls, config = _build(family)
    model = cls._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at 0 and norms at 1: those would hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def save(family: str, folder: Path, **kwargs) -> Path:
    """The tiny model of this family as a checkpoint folder."""
    build(family).save_pretrained(folder, **kwargs)
    return folder


def load(folder: Path) -> torch.nn.Module:
    """Load strictly: no missing, unexpected or mismatched tensors."""
    config = hf.AutoConfig.from_pretrained(folder)
    cls = getattr(hf, config.architectures[0])
    model, info = cls.from_pretrained(folder, dtype="auto", attn_implementation="eager", output_loading_info=True)
    problems = {key: value for key, value in info.items() if value}
    assert not problems, problems
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits for one fixed input: 12 tokens, with an 8x16-pixel-patch image before them for vision models."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 100, (1, 12), generator=generator)
    inputs = {}
    vision = getattr(model.config, "vision_config", None)
    if vision is not None:
        grid, merge = (1, 8, 16), vision.spatial_merge_size
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        tokens = grid[1] * grid[2] // merge**2
        ids = torch.cat([ids[:, :2], torch.tensor([[122] + [120] * tokens + [123]]), ids[:, 2:]], dim=1)
        inputs = {
            "pixel_values": torch.randn(grid[1] * grid[2], width, generator=generator),
            "image_grid_thw": torch.tensor([grid]),
            "mm_token_type_ids": (ids == 120).int(),
        }
    with torch.no_grad():
        return model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **inputs,
            **({"use_cache": False} if hasattr(model.config, "use_cache") else {}),
        ).logits


def assert_same(family: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Bit for bit, but where sums go by how weights lie in memory: Qwen3.5-MoE has a gate of one output."""
    torch.testing.assert_close(found, wanted, atol=1e-6 if family == "qwen3_5_moe" else 0, rtol=0)


def text_config(model):
    return model.config.get_text_config()


def head_dim_of(model):
    config = text_config(model)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def tensors_of(folder):
    return load_file(folder / "model.safetensors")
