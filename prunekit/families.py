"""Where each architecture keeps its layers, heads, norms and taps: a table, not code.

To add a family: add a row to `FAMILIES` and a tiny model to tests/helpers/tiny_models.py.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from prunekit.errors import PruneKitError
from prunekit.rules import COUNT, FACTOR, FLAG, NAMES, NUMBER, NUMBERS, OBJECT, TEXT, Keys, Values, broken, short

# What may stand before a tensor's name, depending on release and on whether the model was saved with its head
NAME_PREFIX = r"^(?:(?:model|language_model|transformer|bert|roberta|distilbert)\.)+"

# Config keys whose numbers are tokens, in transformers' configs of models, generation and processors
TOKEN_IDS = re.compile(r".*_token_(?:ids?|index)|(?:begin_)?suppress_tokens|bad_words_ids|stop_token_ids")

_EXPERT = re.compile(r"(.+)\.experts\.(?:(\d+)\.)?(\w+?)(?:\.(weight|bias))?")
# What Mixtral's checkpoints call a mixture and its projections, and transformers does in memory
_MIXTRAL = re.compile(r"(^|\.)block_sparse_moe\.")
_EXPERTS_OWN = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class Spot(NamedTuple):
    """What a parameter of a module is, by its name."""

    name: str  # of the module in memory; of experts the name that a plain MLP's would have
    kind: str  # weight or bias
    experts: bool = False  # it is an expert's, or all of theirs in one
    expert: int | None = None  # whose; None: no expert's, or those of all in one tensor

    @property
    def stacked(self) -> bool:
        return self.experts and self.expert is None

    @property
    def last(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def module(self) -> str:
        """Where it is in memory, where experts are stacked."""
        return f"{self.name.rpartition('.')[0]}.experts" if self.experts else self.name


def spot_of(name: str) -> Spot:
    """name: from the model on, or relative to a layer."""
    name = _MIXTRAL.sub(r"\1mlp.", name)
    if expert := _EXPERT.fullmatch(name):
        block, number, linear, kind = expert.groups()
        linear = _EXPERTS_OWN.get(linear, linear)
        return Spot(f"{block}.{linear}", kind or "weight", True, int(number) if number else None)
    module, _, kind = name.rpartition(".")
    return Spot(module, kind)


@dataclass(frozen=True)
class Stack:
    """One list of alike layers. Names of projections and norms are relative to a layer."""

    prefix: str  # regex: what stands before the layer's number in tensor names; spellings of all releases
    count: str = "num_hidden_layers"  # config key that counts the layers
    config: str = ""  # sub-config with the keys; configs that lack it keep them at the top
    per_layer: tuple[str, ...] = ("layer_types",)  # config lists with one item per layer
    numbers: tuple[str, ...] = ()  # config lists of layer numbers: they name layers with some property
    threshold: str | None = None  # config key: layers below this number are of another kind
    sparse_step: str | None = None  # config key: every n-th layer is a mixture of experts
    pattern: tuple[str, ...] = ()  # config keys, by precedence: every n-th layer attends fully
    others: str = "sliding_attention"  # what the other layers of such a pattern do
    defaults: dict[str, Any] = field(default_factory=dict)  # what transformers takes where such a key is missing
    fixed_if: str | None = None  # config flag that ties a layer's computation to its number
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"  # of each head, before RoPE; only some families' layers have them
    k_norm: str = "self_attn.k_norm"
    qkv: str | None = None  # where q, k and v are one projection (then q, k and v are the same name)
    gated: bool = False  # q_proj gives each head's query and, behind it, a gate of what the head hands to o_proj
    # Projections of linear attention, in layers that have it in the place of q, k, v and o; the last one writes
    linear: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # the last one writes the output
    experts: str | None = None  # config key: width of each expert, where layers can be mixtures
    experts_count: tuple[str, ...] = ("num_experts", "num_local_experts", "n_routed_experts")  # config keys: of a layer
    experts_chosen: str = "num_experts_per_tok"  # config key: experts that a token goes to
    router: str = "mlp.gate"  # of a mixture: has a row for each expert
    shared: str | None = None  # the MLP that a mixture adds to its experts for every token
    width: str = "intermediate_size"  # config key: neurons of an MLP
    inputs_first: bool = False  # weights are (inputs, outputs), as in transformers' Conv1D
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    plain_residual: bool = True  # attention and MLP write into the residual stream with no norm between

    @property
    def projections(self) -> list[str]:
        """The last names of attention's and the MLP's projections, each once."""
        names = (self.q, self.k, self.v, self.o, *self.linear, *self.mlp)
        return list(dict.fromkeys(name.rpartition(".")[2] for name in names))

    @property
    def mixers(self) -> tuple[str, ...]:
        """The projections that write what a layer takes from other tokens: of each layer one."""
        return (self.o, *self.linear[-1:])

    def beside_experts(self, linear: str) -> str | None:
        """Of the MLP's projections' names that of the shared expert's."""
        return f"{self.shared}.{linear.rpartition('.')[2]}" if self.shared and linear in self.mlp else None

    def within(self, name: str) -> tuple[int, str] | None:
        """(layer, name relative to it) of a checkpoint's tensor; None if it is none of this stack's layers'."""
        match = re.match(rf"{self.prefix}(\d+)\.(.+)", name)
        return (int(match[1]), match[2]) if match else None

    def tensors_of(self, names: Iterable[str], layer: int, module: str) -> dict[str, str]:
        """Of a checkpoint's names those of a layer's projection (all experts', too) or norm: each weight or bias."""
        found = {name: spot_of(within[1]) for name in names if (within := self.within(name)) and within[0] == layer}
        return {name: spot.kind for name, spot in found.items() if spot.name in (module, self.beside_experts(module))}


@dataclass(frozen=True)
class Taps:
    """Vision blocks whose output a merger of its own carries into the first text layers (DeepStack)."""

    key: str = "deepstack_visual_indexes"  # in the vision config
    default: tuple[int, ...] = (8, 16, 24)
    mergers: str = r"(?:model\.)?visual\.deepstack_merger_list\."


@dataclass(frozen=True)
class Family:
    """One architecture, named by the `model_type` of its config."""

    model_type: str
    text: Stack
    vision: Stack | None = None
    vision_prefix: str | None = None  # regex: every tensor of the vision tower
    taps: Taps | None = None
    drafts: str | None = None  # regex: tensors that only predict further tokens (MTP): transformers leaves them out
    draft_count: str | None = None  # config key of the text stack: how many layers they have
    embedding: str = r"(?:.*\.)?embed_tokens\.|lm_head\."  # regex: token embeddings and output head
    tables: dict[str, str] = field(  # regex of an embedding table's name -> config key that counts its rows
        default_factory=lambda: {r"(?:.*\.)?embed_tokens\.weight": "vocab_size"}
    )
    vocabulary: str = r"(?:.*\.)?embed_tokens\.weight|lm_head\.(?:weight|bias)"  # regex: tensors with a row a token
    token_ids: dict[str, int] = field(default_factory=dict)  # what transformers takes where a config has no such key
    tied: str = r"lm_head\.weight"  # regex: tensors that are a second copy when embeddings are tied
    tied_by_default: bool = False
    hidden: str = "hidden_size"
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"  # None: no form with shared KV heads
    head_dim: str | None = "head_dim"  # None: always hidden / heads
    head_dim_default: int | None = None  # None: hidden / heads
    # Head counts that transformers and vLLM load: any, divisors of hidden, or none: head_dim isn't read
    removable_heads: str = "any"
    causal: bool = True  # False: encoders, which have no KV cache
    positions: str = "max_position_embeddings"  # config key: tokens of a row
    first_position: int = 0  # rows of the table of position embeddings that are for no token (RoBERTa: padding's)
    positions_scaled: bool = False  # a scaled RoPE's positions are all counted in the config, as vLLM reads it
    one_template: bool = False  # ms-swift has the one that all write by: it needn't be imported (seconds) to find it
    stacks: dict[str, Stack] = field(init=False)

    def __post_init__(self):
        stacks = {"text": self.text} | ({"vision": self.vision} if self.vision else {})
        object.__setattr__(self, "stacks", stacks)

    @property
    def learned_positions(self) -> bool:
        """Whether positions are a table of embeddings, behind which no token has a place; rotary ones go on."""
        return self.positions in self.tables.values()

    @property
    def lora_targets(self) -> list[str]:
        """What ms-swift's --target_modules must say for all projections: all-linear passes over Conv1D."""
        return self.text.projections if self.text.inputs_first else ["all-linear"]


def configs(config: dict[str, Any], stack: Stack) -> list[dict[str, Any]]:
    """The parts of a config that hold this stack's keys, the one that counts first.

    Some releases write the text keys twice, at the top and in `text_config`: both must change together.
    """
    parts = [config.get(stack.config), config] if stack.config else [config]
    return [part for part in parts if isinstance(part, dict) and stack.count in part]


def say_counts(config: dict[str, Any]) -> None:
    """Write into a config's parts the layer counts that releases of transformers left out where they are defaults."""
    for row in family_of(config).stacks.values():
        part = config.get(row.config)
        if isinstance(part, dict) and part.get(row.count) is None and row.count in row.defaults:
            part[row.count] = row.defaults[row.count]


def family_of(config: dict[str, Any]) -> Family:
    """The row of a config's `model_type`; PruneKitError names the supported ones."""
    row = FAMILIES.get(str(config.get("model_type")))
    if row is None:
        raise PruneKitError(
            f"model_type {config.get('model_type')!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return row


_TEXT = r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\."
_VISUAL = r"(?:model\.)?visual\."

_DECODER = Stack(_TEXT)
_QWEN = Stack(_TEXT, threshold="max_window_layers", defaults={"max_window_layers": 28})
_QWEN_VL = replace(_QWEN, defaults={"max_window_layers": 80}, config="text_config")
_QWEN_MOE = Stack(
    _TEXT,
    numbers=("mlp_only_layers",),
    sparse_step="decoder_sparse_step",
    experts="moe_intermediate_size",
    defaults={"num_experts_per_tok": 8},
)
_QWEN3_5 = Stack(
    _TEXT,
    config="text_config",
    pattern=("full_attention_interval",),
    others="linear_attention",
    defaults={"full_attention_interval": 4},
    gated=True,
    linear=("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj"),
)
_QWEN3_5_MOE = replace(
    _QWEN3_5,
    experts="moe_intermediate_size",
    shared="mlp.shared_expert",
    defaults=_QWEN3_5.defaults | {"num_experts_per_tok": 8},
)
_VISION_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
_ROBERTA_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
_VIT: dict[str, Any] = {
    "prefix": _VISUAL + r"blocks\.",
    "count": "depth",
    "config": "vision_config",
    "per_layer": (),
    **dict.fromkeys(("q", "k", "v", "qkv"), "attn.qkv"),
    "o": "attn.proj",
    "norms": ("norm1", "norm2"),
}
_VIT3 = Stack(**_VIT, mlp=("mlp.linear_fc1", "mlp.linear_fc2"))
_OF_QWEN3_5: dict[str, Any] = {
    "vision": _VIT3,
    "vision_prefix": _VISUAL,
    "drafts": r"mtp\..+",
    "draft_count": "mtp_num_hidden_layers",
    "token_ids": dict(zip(_VISION_IDS, (248056, 248057, 248053, 248054), strict=True)),
    "head_dim_default": 256,
}
_BERT = Stack(
    r"(?:bert\.|roberta\.)?encoder\.layer\.",
    per_layer=(),
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    o="attention.output.dense",
    mlp=("intermediate.dense", "output.dense"),
    plain_residual=False,
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
)
_ENCODER: dict[str, Any] = {
    "kv_heads": None,
    "head_dim": None,
    "removable_heads": "none",
    "causal": False,
    "one_template": True,
    "tied_by_default": True,
    "embedding": r"(?:.*\.)?embeddings\.|(?:cls\.predictions|lm_head)\.(?:decoder|bias)|vocab_projector\.",
    "tables": {
        r"(?:.*\.)?embeddings\.word_embeddings\.weight": "vocab_size",
        r"(?:.*\.)?embeddings\.position_embeddings\.weight": "max_position_embeddings",
    },
    "vocabulary": r"(?:.*\.)?embeddings\.word_embeddings\.weight|(?:cls\.predictions|lm_head)\.(?:decoder\.)?bias"
    r"|(?:cls\.predictions|lm_head)\.decoder\.weight|vocab_projector\.(?:weight|bias)",
    "tied": r"(?:cls\.predictions|lm_head)\.decoder\.(?:weight|bias)|vocab_projector\.weight",
}


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family(
            "qwen3_vl",
            replace(_DECODER, config="text_config"),
            _VIT3,
            vision_prefix=_VISUAL,
            taps=Taps(),
            token_ids=_VISION_IDS,
            head_dim_default=128,
            one_template=True,
        ),
        Family(
            "qwen3_vl_moe",
            replace(_QWEN_MOE, config="text_config", defaults={"num_experts_per_tok": 4}),
            _VIT3,
            vision_prefix=_VISUAL,
            taps=Taps(),
            token_ids=_VISION_IDS,
            one_template=True,
        ),
        Family("qwen3_5", _QWEN3_5, **_OF_QWEN3_5),
        Family("qwen3_5_moe", _QWEN3_5_MOE, **_OF_QWEN3_5),
        Family(
            "qwen2_5_vl",
            _QWEN_VL,
            Stack(
                **_VIT,
                numbers=("fullatt_block_indexes",),
                defaults={"depth": 32, "fullatt_block_indexes": [7, 15, 23, 31]},
            ),
            vision_prefix=_VISUAL,
            token_ids=_VISION_IDS | {"bos_token_id": 151643, "eos_token_id": 151645},
            head_dim=None,
            removable_heads="none",
        ),
        Family(
            "qwen2_vl",
            _QWEN_VL,
            Stack(**_VIT, mlp=("mlp.fc1", "mlp.fc2"), defaults={"depth": 32}),
            vision_prefix=_VISUAL,
            token_ids=_VISION_IDS | {"bos_token_id": 151643, "eos_token_id": 151645},
            head_dim=None,
            removable_heads="none",
        ),
        Family("qwen3", _QWEN, head_dim_default=128),
        Family("qwen3_moe", _QWEN_MOE),
        Family("qwen2", _QWEN, removable_heads="none"),  # vLLM takes hidden / heads
        Family("llama", _DECODER, removable_heads="divisors", token_ids={"bos_token_id": 1, "eos_token_id": 2}),
        Family(
            "mixtral",
            replace(_DECODER, experts="intermediate_size", defaults={"num_experts_per_tok": 2}),
            removable_heads="divisors",
            token_ids={"bos_token_id": 1, "eos_token_id": 2},
        ),
        Family("mistral", _DECODER, token_ids={"bos_token_id": 1, "eos_token_id": 2}),
        Family(
            "gemma3_text",
            Stack(
                _TEXT,
                plain_residual=False,
                pattern=("sliding_window_pattern", "_sliding_window_pattern"),
                defaults={"_sliding_window_pattern": 6},
                norms=(
                    "input_layernorm",
                    "post_attention_layernorm",
                    "pre_feedforward_layernorm",
                    "post_feedforward_layernorm",
                ),
            ),
            token_ids={"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
            head_dim_default=256,
            removable_heads="divisors",
            tied_by_default=True,
            positions_scaled=True,
        ),
        Family(
            "gpt2",
            Stack(
                r"(?:transformer\.)?h\.",
                count="n_layer",
                per_layer=(),
                fixed_if="scale_attn_by_inverse_layer_idx",
                q="attn.c_attn",
                k="attn.c_attn",
                v="attn.c_attn",
                qkv="attn.c_attn",
                o="attn.c_proj",
                mlp=("mlp.c_fc", "mlp.c_proj"),
                width="n_inner",
                norms=("ln_1", "ln_2"),
                inputs_first=True,
            ),
            embedding=r"(?:transformer\.)?w[tp]e\.|lm_head\.",
            vocabulary=r"(?:transformer\.)?wte\.weight|lm_head\.weight",
            token_ids={"bos_token_id": 50256, "eos_token_id": 50256},
            tables={
                r"(?:transformer\.)?wte\.weight": "vocab_size",
                r"(?:transformer\.)?wpe\.weight": "n_positions",
            },
            one_template=True,
            positions="n_positions",
            tied_by_default=True,
            hidden="n_embd",
            heads="n_head",
            kv_heads=None,
            head_dim=None,
            removable_heads="none",
        ),
        Family("bert", _BERT, token_ids={"pad_token_id": 0}, **_ENCODER),
        Family("roberta", _BERT, first_position=2, token_ids=_ROBERTA_IDS, **_ENCODER),
        Family("camembert", _BERT, first_position=2, token_ids=_ROBERTA_IDS, **_ENCODER),
        Family(
            "distilbert",
            Stack(
                r"(?:distilbert\.)?transformer\.layer\.",
                count="n_layers",
                per_layer=(),
                q="attention.q_lin",
                k="attention.k_lin",
                v="attention.v_lin",
                o="attention.out_lin",
                mlp=("ffn.lin1", "ffn.lin2"),
                width="hidden_dim",
                plain_residual=False,
                norms=("sa_layer_norm", "output_layer_norm"),
            ),
            token_ids={"pad_token_id": 0},
            hidden="dim",
            heads="n_heads",
            **_ENCODER,
        ),
    )
}


def text_value(config: dict[str, Any], key: str) -> Any:
    """What a config says under a key of the text stack; None if nothing."""
    return next((part[key] for part in configs(config, family_of(config).text) if key in part), None)


def positions(config: dict[str, Any], unsaid: int = 512) -> int:
    """How many tokens a row may have, special ones included; `unsaid` where the config doesn't say it."""
    family = family_of(config)
    count = text_value(config, family.positions)
    return count - family.first_position if count else unsaid


# --- what a config may say -------------------------------------------------------------------------------------------

ROPE = {"rope_theta": FACTOR, "partial_rotary_factor": FACTOR}
TOP = {"architectures": NAMES, "id2label": Values(TEXT), "tie_word_embeddings": FLAG}


def _rules(family: Family, stack: Stack) -> dict[str, Any]:
    """The rules of one stack's keys."""
    rules: dict[Any, Any] = dict.fromkeys(stack.per_layer, NAMES) | dict.fromkeys(stack.numbers, NUMBERS)
    sizes: tuple[str | None, ...] = (stack.count, *stack.pattern)
    if stack is family.text:
        sizes += (family.heads, family.kv_heads, family.head_dim, family.hidden, stack.width, stack.experts)
        sizes += (family.positions, *family.tables.values())
        if stack.experts:
            sizes += (stack.experts_chosen,)
            rules |= dict.fromkeys(stack.experts_count, NUMBER)
        rope = Keys(ROPE | {"full_attention": Keys(ROPE), "sliding_attention": Keys(ROPE)})
        rules |= ROPE | {"rope_parameters": rope, "rope_scaling": rope, "tie_word_embeddings": FLAG}
    elif family.taps:
        rules[family.taps.key] = NUMBERS
    numbers = (stack.threshold, stack.sparse_step, family.draft_count if stack is family.text else None)
    rules |= dict.fromkeys(numbers, NUMBER) | {stack.fixed_if: FLAG}
    rules |= dict.fromkeys(sizes, COUNT)
    return {key: rule for key, rule in rules.items() if key}


def check_config(config: Any) -> Family:
    """The row of a config whose every key that the row names has the type and range that it must have.

    PruneKitError says which key hasn't, or that the model_type is unknown. Whether tensors agree, `checkpoint` sees.
    """
    if not isinstance(config, dict):
        raise PruneKitError("not a JSON object; download it again")
    family = family_of(config)
    problems = list(broken(config, Keys(TOP)))
    for stack in family.stacks.values():
        if stack.config:
            problems += broken(config, Keys({stack.config: OBJECT}))
        parts = configs(config, stack)
        if not parts:
            problems.append(f"{stack.config}{'.' * bool(stack.config)}{stack.count} is missing")
        for part in parts:
            where = "" if part is config else stack.config
            needed: tuple[str, ...] = (stack.count,)
            if stack is family.text and part is parts[0]:  # the one that counts
                needed += (family.heads, family.hidden)
            problems += broken(part, Keys(_rules(family, stack), needed), where)
            for key in stack.per_layer:
                if isinstance(part.get(key), list) and len(part[key]) != part[stack.count]:
                    problems.append(f"{key} has {len(part[key])} items, {stack.count} is {short(part[stack.count])}")
    if problems:
        raise PruneKitError(f"{problems[0]}; mend config.json or download it again")
    return family
