"""Checkpoints that we cut, in programs that others wrote: vLLM and mergekit, from an environment of their own."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers as hf
from helpers.calibration import write_texts
from helpers.cuts import first_experts
from helpers.paths import EMBEDDED, ROOT, TINY_VL
from helpers.tiny_models import TEXT
from helpers.tiny_ocr import save_tiny_ocr_with_wide_heads, tiny_ocr
from helpers.tiny_taggers import save_tagger
from PIL import Image

from prunekit.checkpoint import open_checkpoint, statistics
from prunekit.surgery.cut import write_cut

pytestmark = [pytest.mark.clients, pytest.mark.slow]

# Two of what vLLM asks on CPUs: heads of 32 or more, and no mixture of sliding and full attention
WIDE = TEXT | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "initializer_range": 0.2}
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WORDS = tiny_ocr._words("test", 0, frozenset())


@pytest.fixture(scope="session")
def cut_folders(tmp_path_factory):
    """{(family, cut): folder} for models with fewer layers, these with one KV head, and some that are cut otherwise."""
    root = tmp_path_factory.mktemp("cut")
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE)).save_pretrained(root / "llama")
    hf.Qwen3ForCausalLM(hf.Qwen3Config(**WIDE)).save_pretrained(root / "qwen3")
    save_tiny_ocr_with_wide_heads(root / "qwen3_vl")
    folders = {}
    for family, layers in {"llama": [1, 3], "qwen3": [0, 2], "qwen3_vl": [6, "--vision", 3]}.items():
        fewer, mqa = folders[family, "layers"], folders[family, "mqa"] = (
            root / f"{family}-1",
            root / f"{family}-2",
        )
        drop = ["manual_select.py", "--model", root / family, "--out", fewer, "--text", *layers]
        merge = ["kv_cut.py", "--model", fewer, "--out", mqa, "--kv-heads", 1]
        if family == "qwen3_vl":  # the one that has a tokenizer
            merge += ["--calib", write_texts(root / "texts.jsonl"), "--refine", 4]
        commands = [drop, merge]
        if family != "qwen3":  # qwen3_vl has its attention
            narrow = folders[family, "narrow"] = root / f"{family}-3"
            shares = ["--head-share", 0.5, "--neuron-share", 0.5]
            commands += [["width_cut.py", "--model", root / family, "--out", narrow, *shares]]
        for command in commands:
            subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, capture_output=True)
    folders["qwen3_moe", "experts"], folders["tiny_vl", "vocabulary"] = root / "experts", root / "vocabulary"
    hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**WIDE, **MIXTURE)).save_pretrained(root / "qwen3_moe")
    write_cut(first_experts(root / "qwen3_moe", 5), root / "experts")
    script, words = ROOT / "vocab_cut.py", ["--out", root / "vocabulary", "--keep-share", "0.5"]
    command = [sys.executable, script, "--model", TINY_VL, *words, "--calib", write_texts(root / "words.jsonl")]
    subprocess.run(command, check=True, capture_output=True)
    return folders


@pytest.fixture(scope="session")
def quantised(cut_folders, tmp_path_factory):
    """{method: folder} of the cut model that reads pictures, as quantise.sh writes it without data."""
    root = tmp_path_factory.mktemp("quantised")
    done = subprocess.run(["bash", "lib/llm_compressor.sh"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:  # no package index here, say
        return {}
    for method in ("fp8", "int8"):
        env = {"MODEL": str(cut_folders["qwen3_vl", "layers"]), "OUTPUT": str(root / method), "METHOD": method}
        command = ["bash", "quantise.sh"]
        subprocess.run(command, cwd=ROOT, env=os.environ | env | {"GPUS": ""}, check=True, capture_output=True)
    return {method: root / method for method in ("fp8", "int8")}


def need(quantised):
    if not quantised:
        pytest.skip("llm-compressor can't be installed here: bash lib/llm_compressor.sh says why")


@pytest.fixture(scope="session")
def prompts(cut_folders, tmp_path_factory):
    """{family: what vLLM is asked}: random tokens for text models, pictures of words to read for Qwen3-VL."""
    generator = torch.Generator().manual_seed(0)
    text = [{"prompt_token_ids": torch.randint(5, 100, (n,), generator=generator).tolist()} for n in (3, 10, 40)]
    spoken = hf.AutoTokenizer.from_pretrained(cut_folders["tiny_vl", "vocabulary"])
    said = [
        [{"role": "user", "content": asked}] for asked in ("What is 58 + 83?", "Repeat: a Schöner Häuser, жёлтый 你好")
    ]
    words = [{"prompt": spoken.apply_chat_template(row, tokenize=False, add_generation_prompt=True)} for row in said]
    processor = hf.AutoProcessor.from_pretrained(EMBEDDED)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": tiny_ocr.PROMPT}]}]
    prompt = processor.apply_chat_template(message, add_generation_prompt=True)
    folder, images = tmp_path_factory.mktemp("pictures"), []
    for number, picture in enumerate(tiny_ocr.pictures("test", WORDS, 0, 0)[:8]):
        Image.fromarray(picture).save(folder / f"{number}.png")
        images.append({"prompt": prompt, "image": str(folder / f"{number}.png")})
    return {"llama": text, "qwen3": text, "qwen3_moe": text, "qwen3_vl": images, "tiny_vl": words}


@pytest.fixture(scope="session")
def from_vllm(clients, cut_folders, quantised, prompts, tmp_path_factory):
    """{(family, cut) or method of quantising: tokens that vLLM generates for each prompt}, all by one process."""
    root = tmp_path_factory.mktemp("vllm")
    requests = {str(folder): prompts[family] for (family, _), folder in cut_folders.items()}
    requests |= {str(folder): prompts["qwen3_vl"] for folder in quantised.values()}
    (root / "requests.json").write_text(json.dumps(requests))
    command = [
        clients / "python",
        ROOT / "tests/helpers/vllm_generate.py",
        root / "requests.json",
        root / "answers.json",
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    answers = json.loads((root / "answers.json").read_text())
    return {key: answers[str(folder)] for key, folder in (cut_folders | quantised).items()}


def by_transformers(folder, prompts):
    """The tokens that transformers generates greedily for each prompt."""
    auto = hf.AutoModelForImageTextToText if "prompt" in prompts[0] else hf.AutoModelForCausalLM
    model, answers = auto.from_pretrained(folder, dtype=torch.float32).eval(), []
    for prompt in prompts:
        if "image" in prompt:
            processor = hf.AutoProcessor.from_pretrained(folder)
            inputs = processor(text=prompt["prompt"], images=Image.open(prompt["image"]), return_tensors="pt")
        elif "prompt" in prompt:
            inputs = hf.AutoTokenizer.from_pretrained(folder)(prompt["prompt"], return_tensors="pt")
        else:
            inputs = {"input_ids": torch.tensor([prompt["prompt_token_ids"]])}
        out = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        answers.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


@pytest.mark.parametrize(
    "family, cut",
    [(family, cut) for family in ("llama", "qwen3", "qwen3_vl") for cut in ("layers", "mqa")]
    + [("llama", "narrow"), ("qwen3_vl", "narrow"), ("qwen3_moe", "experts"), ("tiny_vl", "vocabulary")],
)
def test_vllm_generates_what_transformers_does(family, cut, cut_folders, prompts, from_vllm):
    assert from_vllm[family, cut] == by_transformers(cut_folders[family, cut], prompts[family])


def test_vllm_reads_pictures_with_fewer_layers(cut_folders, from_vllm):
    tokenizer = hf.AutoTokenizer.from_pretrained(EMBEDDED)
    read = [text.partition("<|im_end|>")[0] for text in tokenizer.batch_decode(from_vllm["qwen3_vl", "layers"])]
    assert sum(text == word for text, word in zip(read, WORDS)) >= 4


@pytest.mark.parametrize("method", ["fp8", "int8"])
def test_vllm_reads_pictures_with_quantised_weights(method, quantised, from_vllm):
    need(quantised)
    tokenizer = hf.AutoTokenizer.from_pretrained(EMBEDDED)
    assert isinstance(from_vllm[method], list), from_vllm[method]
    read = [text.partition("<|im_end|>")[0] for text in tokenizer.batch_decode(from_vllm[method])]
    assert sum(text == word for text, word in zip(read, WORDS)) >= 3


def test_mergekit_cuts_layers_into_the_same_checkpoint(clients, tiny, tmp_path):
    slices = [{"sources": [{"model": str(tiny("llama")), "layer_range": [n, n + 1]}]} for n in (0, 2, 4)]
    (tmp_path / "merge.yml").write_text(json.dumps({"slices": slices, "merge_method": "passthrough"}))
    merge = [clients / "mergekit-yaml", "merge.yml", "theirs", "--no-copy-tokenizer", "--no-write-model-card"]
    subprocess.run(merge, cwd=tmp_path, check=True, capture_output=True)
    drop = [ROOT / "manual_select.py", "--model", tiny("llama"), "--out", "ours", "--text", "1", "3"]
    subprocess.run([sys.executable, *drop], cwd=tmp_path, check=True, capture_output=True)
    ours, theirs = open_checkpoint(tmp_path / "ours"), open_checkpoint(tmp_path / "theirs")
    assert ours.tensors.keys() == theirs.tensors.keys() and statistics(ours) == statistics(theirs)
    assert all(ours.read_bytes(name) == theirs.read_bytes(name) for name in ours.tensors)


def test_int8_of_torchao_is_near_and_loads_in_plain_transformers(clients, tmp_path, script, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(clients.parent / "torchao"))
    source = save_tagger("camembert", tmp_path / "source")
    done = script("deploy.py", "--model", source, "--out", tmp_path / "out", "--format", "torchao-int8")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    code = """
import sys, torch
from transformers import AutoModelForTokenClassification as Auto
models = [Auto.from_pretrained(folder).eval() for folder in sys.argv[1:]]
ids = torch.arange(5, 45).view(2, 20)
with torch.inference_mode():
    ours, theirs = (model(input_ids=ids).logits for model in models)
types = {type(module.weight).__name__ for module in models[0].modules() if isinstance(module, torch.nn.Linear)}
print(float((ours - theirs).abs().max() / theirs.abs().max()), *sorted(types))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    difference, *types = done.stdout.split()
    assert 0 < float(difference) < 0.05 and "Int8Tensor" in types


@pytest.mark.parametrize("method", ["fp8", "int8"])
def test_a_quantised_folder_computes_nearly_what_its_source_does(method, quantised, cut_folders):
    need(quantised)
    ids = torch.randint(5, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    logits = []
    for folder in (quantised[method], cut_folders["qwen3_vl", "layers"]):
        model = hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            logits.append(model(input_ids=ids).logits)
    similar = torch.nn.functional.cosine_similarity(*(each.flatten() for each in logits), dim=0)
    assert 0.95 < similar < 0.999999
    source = statistics(open_checkpoint(cut_folders["qwen3_vl", "layers"]))
    assert statistics(open_checkpoint(quantised[method], quantised=True)) | {"bytes": 0} == source | {"bytes": 0}


def test_tasks_of_the_field_land_in_one_table(clients, tmp_path):
    if not (clients / "lm-eval").exists() or not (clients / "evalscope").exists():
        pytest.skip("lm-eval and EvalScope could not be installed here")
    folder = ROOT / "examples/tiny_vl"
    draw = [sys.executable, folder / "tiny_vl.py", "data", "--out", tmp_path / "data", "--share", "0.02"]
    subprocess.run(draw, cwd=ROOT, check=True, capture_output=True)
    lines = []
    for row in list(map(json.loads, (tmp_path / "data/test.jsonl").read_text().splitlines()))[:4]:
        question, answer = (message["content"] for message in row["messages"])
        content = [{"type": "image_url", "image_url": {"url": image}} for image in row.get("images", [])]
        content.append({"type": "text", "text": question.replace("<image>", "")})
        lines.append(json.dumps({"messages": [{"role": "user", "content": content}], "answer": answer}))
    (tmp_path / "vqa").mkdir()
    (tmp_path / "vqa/test.jsonl").write_text("\n".join(lines))
    where = {"general_vqa": {"local_path": str(tmp_path / "vqa"), "subset_list": ["test"]}}
    command = [
        clients / "python", "-m", "prunekit.evaluate", "--model", folder / "model", "--dataset",
        f"{tmp_path}/data/test.jsonl", "--tasks", "niah_single_1", "--metadata", '{"max_seq_lengths": [768]}',
        "--benchmarks", "general_vqa", "--dataset-args", json.dumps(where), "--limit", "4", "--json",
        tmp_path / "found.json", "--device", "cpu",
    ]  # fmt: skip
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [model] = json.loads((tmp_path / "found.json").read_text())
    ours, ruler, vqa = (model["datasets"][name] for name in ("test", "niah_single_1", "general_vqa"))
    assert (ruler["samples"], vqa["samples"]) == (4, 4)
    assert 0 <= ruler["768"] <= 1
    recall = next(
        value for name, value in vqa.items() if name.startswith("rouge") and "recall" in name and '"l"' in name
    )
    assert ours["exact_match"] >= 0.75 and recall >= 0.75  # the same questions
