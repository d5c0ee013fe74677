"""Run by .venv-rehearsal's Python: what vLLM generates greedily from each folder, for each of its prompts.

    .venv-rehearsal/bin/python tests/helpers/vllm_generate.py REQUESTS.json ANSWERS.json

Requests: {folder: [{"prompt_token_ids": [...]} or {"prompt": text}, with or without {"image": file}, ...]}. Answers:
{folder: [tokens, ...]}, or {folder: error} where vLLM failed.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

from PIL import Image
from vllm import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def generate(folder, prompts):
    """The tokens for each prompt. The engine ends with this function: two at once fail."""
    for prompt in prompts:
        if "image" in prompt:
            prompt["multi_modal_data"] = {"image": Image.open(prompt.pop("image"))}
    bare = not (Path(folder) / "tokenizer.json").exists()
    quantised = "quantization_config" in json.loads((Path(folder) / "config.json").read_text())
    dtype = "bfloat16" if quantised else "float32"  # its INT8 kernel for AMX takes no float32
    engine = LLM(folder, dtype=dtype, enforce_eager=True, max_model_len=128, skip_tokenizer_init=bare)
    return [list(output.outputs[0].token_ids) for output in engine.generate(prompts, GREEDY, use_tqdm=False)]


answers = {}
for folder, prompts in json.loads(Path(sys.argv[1]).read_text()).items():
    try:
        answers[folder] = generate(folder, prompts)
    except Exception as error:  # whatever it is, the other folders shall be tried
        answers[folder] = repr(error)
Path(sys.argv[2]).write_text(json.dumps(answers))
