"""Lengths of rows, answers and vLLM's engine: one function, by arithmetic."""

import pytest
from helpers.paths import EMBEDDED

from prunekit.checkpoint import open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.msswift.line import parse
from prunekit.training.lengths import Lengths, check_engine, choose_lengths, engine_positions
from prunekit.training.preflight import decide_lengths

GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_positions": 1024}
LLAMA = {"model_type": "llama", "num_hidden_layers": 32, "max_position_embeddings": 4096}
# Qwen/Qwen3-VL-8B-Instruct's config.json, and the sizes of its files
QWEN3_VL_8B = {
    "model_type": "qwen3_vl",
    "text_config": {
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    },
}
WEIGHTS = int(17.5e9)
KV_BYTES = 2 * 36 * 8 * 128 * 2
GPU_80GB = 81559 * 2**20  # as nvidia-smi says of an H100


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (GPT2, 1024),
        (LLAMA, 4096),
        (QWEN3_VL_8B, 262144),
        (LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 8192),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2}}, 8192),
        (
            LLAMA
            | {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 2048,
                }
            },
            8192,
        ),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 4096),
        (LLAMA | {"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, 4096),
        (LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": None}}, 4096),
        (LLAMA | {"rope_scaling": None}, 4096),
        (LLAMA | {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 4096),
        ({"model_type": "llama"}, None),
    ],
)
def test_the_engines_positions_are_vllms(config, positions):
    assert engine_positions(config) == positions


@pytest.mark.parametrize(
    ("config", "max_length", "chosen"),
    [
        (GPT2, 512, None),
        (GPT2, 4096, 1024),
        (GPT2, None, None),
        (LLAMA, 9000, None),
        (QWEN3_VL_8B, 4096, None),
    ],
)
def test_rows_of_a_training_are_kept_within_learned_positions(config, max_length, chosen):
    assert choose_lengths(config, max_length) == Lengths(max_length=chosen)


def test_an_answer_has_room_after_the_longest_prompt():
    assert choose_lengths(GPT2, 4096, 512) == Lengths(max_length=512)
    assert choose_lengths(LLAMA, 4096, 512, vllm=True) == Lengths(max_length=3584, engine=4096)
    assert choose_lengths(LLAMA, 1024, 512, vllm=True) == Lengths(engine=1536)


def test_an_answer_longer_than_half_the_model_is_cut():
    assert choose_lengths(GPT2, 4096, 2048) == Lengths(max_length=512, completion=512)


def test_without_a_max_length_an_engine_isnt_as_long_as_the_model():
    assert choose_lengths(QWEN3_VL_8B, None, 512, vllm=True) == Lengths(max_length=4096, engine=4608)
    assert choose_lengths(QWEN3_VL_8B, None, 512) == Lengths()


def test_an_engines_length_of_the_users_own_counts():
    assert choose_lengths(QWEN3_VL_8B, 4096, 512, vllm=True, engine=16384) == Lengths(engine=16384)
    assert choose_lengths(QWEN3_VL_8B, 4096, 512, vllm=True, engine=2048) == Lengths(max_length=1536, engine=2048)
    with pytest.raises(PruneKitError, match="--vllm_max_model_len 8192: the model has 4096 positions"):
        choose_lengths(LLAMA, 4096, 512, vllm=True, engine=8192)


# --- the launchers' lines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_the_demos_distillation_fits_its_model_of_1024_positions(mode, capsys):
    """`GPUS=0,1 bash demo.sh`: distil.sh's max_length of 4096, and the demo's answers of 16 tokens."""
    checkpoint = open_checkpoint(EMBEDDED)
    line = f"--rlhf_type gkd --lmbda 1 --use_vllm true --vllm_mode {mode} --max_completion_length 512 --max_length 4096"
    args = parse("rlhf", [*line.split(), "--max_completion_length", "16"])
    assert decide_lengths(args, checkpoint) == Lengths(max_length=1008, engine=1024)
    assert "--max_length 1008" in capsys.readouterr().err


def test_a_distillation_on_the_data_sets_own_answers_needs_no_engine():
    checkpoint = open_checkpoint(EMBEDDED)
    args = parse("rlhf", ["--rlhf_type", "gkd", "--lmbda", "0", "--max_length", "4096"])
    assert decide_lengths(args, checkpoint) == Lengths()


# --- memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.4])  # distil.sh's and rl_run.sh's
def test_an_8b_vision_model_starts_colocated_on_80_gb_with_our_length_and_not_with_its_own(share):
    ours = choose_lengths(QWEN3_VL_8B, 4096, 512, vllm=True).engine
    assert ours == 4608
    assert check_engine(WEIGHTS, KV_BYTES, ours, GPU_80GB, share) is None
    with pytest.raises(PruneKitError, match=r"vLLM needs 52\.3 GiB .* one row of 262144 tokens"):
        check_engine(WEIGHTS, KV_BYTES, engine_positions(QWEN3_VL_8B), GPU_80GB, share)


def test_weights_that_dont_fit_are_refused_and_more_gpus_named():
    with pytest.raises(PruneKitError, match=r"give it more memory, or more GPUs .*--vllm_tensor_parallel_size"):
        check_engine(60 * 10**9, KV_BYTES, 4608, GPU_80GB, 0.4)
    assert check_engine(60 * 10**9, KV_BYTES, 4608, GPU_80GB, 0.4, gpus=4) is None


def test_an_engine_that_fits_without_a_margin_is_warned_of():
    warning = check_engine(WEIGHTS, KV_BYTES, 4608, 20 * 2**30, 0.9)
    assert "if it doesn't start, give" in warning


def test_the_length_that_is_named_fits():
    with pytest.raises(PruneKitError, match="give a --max_length that is") as error:
        check_engine(WEIGHTS, KV_BYTES, 262144, GPU_80GB, 0.4)
    shorter = int(str(error.value).split("--max_length that is ")[1].split()[0])
    assert check_engine(WEIGHTS, KV_BYTES, 262144 - shorter, GPU_80GB, 0.4) is None
    assert check_engine(WEIGHTS, KV_BYTES, 262145 - shorter, GPU_80GB, 0.4) is not None
