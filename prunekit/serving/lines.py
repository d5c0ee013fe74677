"""How to serve a checkpoint: command lines of vLLM and llama.cpp, and what was checked of each, where it was."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from prunekit.checkpoint import Checkpoint, quantisation
from prunekit.families import positions

TIMEOUT = 900  # seconds, of one program's check
SHORT = 256  # tokens of context that are enough to see it load
CONVERT, RUN = "convert_hf_to_gguf.py", "llama-completion"

VLLM_CHECK = """import os, sys
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=int(sys.argv[2]))
out = llm.generate({"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=4, ignore_eos=True))
assert len(out[0].outputs[0].token_ids) == 4
"""


def serving_lines(checkpoint: Checkpoint, run: bool = False) -> list[dict[str, Any]]:
    """For each engine: `engine`, `lines`, `missing` (files that it needs and the folder lacks), `checked` (in words).

    With `run` an engine that is installed loads the checkpoint and generates four tokens.
    """
    folder, length = checkpoint.path, positions(checkpoint.config)
    vision, quoted = checkpoint.family.vision is not None, shlex.quote(str(folder))
    vllm = f"vllm serve {quoted} --max-model-len {length}"
    stem = shlex.quote(folder.absolute().name)
    convert = f"python {CONVERT} {quoted} --outtype bf16 --outfile {stem}.gguf"
    server = f"llama-server -m {stem}.gguf"
    lines = [convert]
    if vision:
        vllm += " --limit-mm-per-prompt '{\"image\": 1}'"
        lines.append(f"python {CONVERT} {quoted} --outtype bf16 --mmproj --outfile mmproj-{stem}.gguf")
        server += f" --mmproj mmproj-{stem}.gguf"
    missing = _missing(folder, vision)
    found = [{"engine": "vLLM", "lines": [vllm], "missing": missing, "checked": _vllm(folder, length, run)}]
    if quantisation(checkpoint.config):  # llama.cpp has formats of its own, made of what isn't quantised
        return found
    return [
        *found,
        {
            "engine": "llama.cpp", "lines": [*lines, f"{server} -c {length}"], "missing": missing,
            "checked": _llama(folder, run),
        },
    ]  # fmt: skip


def _missing(folder: Path, vision: bool) -> list[str]:
    """What both engines read beside weights and config."""
    files: list[tuple[str, ...]] = [("tokenizer.json", "tokenizer.model", "vocab.json")]
    if vision:
        files.append(("preprocessor_config.json", "processor_config.json"))
    missing = [names[0] for names in files if not any((folder / name).is_file() for name in names)]
    config = folder / "tokenizer_config.json"
    has_chat = (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file()
    if not has_chat and not (config.is_file() and "chat_template" in config.read_text(errors="replace")):
        missing.append("chat_template.jinja")
    return missing


def _ran(*commands: list[str]) -> str:
    """What came of commands in their order, in words."""
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return f"failed here: {command[0]} was not done in {TIMEOUT} s"
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
            return f"failed here: {Path(command[0]).name} ended with code {done.returncode}: {last}"
    return "ran here: it loads and generates"


def _vllm(folder: Path, length: int, run: bool) -> str:
    if importlib.util.find_spec("vllm") is None:
        return "not run: vLLM isn't installed here"
    if not run:
        return "not run: --check-serving does it"
    return _ran([sys.executable, "-c", VLLM_CHECK, str(folder), str(min(length, SHORT))])


def _llama(folder: Path, run: bool) -> str:
    home = Path(os.environ.get("LLAMA_CPP", "."))
    convert = shutil.which(CONVERT) or (str(home / CONVERT) if (home / CONVERT).is_file() else None)
    program = shutil.which(RUN) or shutil.which(RUN, path=str(home / "build/bin"))
    if not convert or not program:
        return f"not run: {CONVERT if not convert else RUN} isn't on the path, nor in $LLAMA_CPP"
    if not run:
        return "not run: --check-serving does it"
    with tempfile.TemporaryDirectory() as scratch:
        gguf = str(Path(scratch) / "model.gguf")
        return _ran(
            [sys.executable, convert, str(folder), "--outfile", gguf, "--outtype", "bf16"],
            [program, "-m", gguf, "-p", "a", "-n", "4", "-c", str(SHORT), "-no-cnv"],
        )
