"""Publish what a training run wrote as a clean checkpoint: weights, config, tokenizer, history, and nothing else.

    python -m prunekit.training.publish --run runs/sft --base checkpoints/pruned --out checkpoints/recovered \\
        --stage full_run

--run is an ms-swift output folder with its checkpoint-N folders, or one checkpoint folder; --weights, if what is to be
published lies elsewhere (as `swift export` writes it). A LoRA's adapter is published as an adapter folder. If --run
holds a made_from.json (prunekit.checkpoint.provenance), the base must be the model that is in it. With --find-resume
nothing is written: the checkpoint that an interrupted run can resume from is printed, if there is one; or "ended", if
its training has ended.
"""

import copy
import math
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from prunekit.arguments import Parser
from prunekit.checkpoint import (
    BUFFERS,
    TORCH_DTYPES,
    Checkpoint,
    Tensor,
    check_out,
    fingerprint,
    float_bytes,
    history,
    history_entry,
    is_tied,
    new_folder,
    open_checkpoint,
    read_header,
    read_json,
    statistics,
    write_checkpoint,
    write_records,
)
from prunekit.checkpoint.provenance import ADAPTER_FILES, run_record
from prunekit.checkpoint.records import COMMAND, LOG, ZEROS
from prunekit.checkpoint.training_run import (
    final_metrics,
    find_checkpoint,
    has_ended,
    log_until,
    read_log,
    training_settings,
    whole_checkpoints,
)
from prunekit.errors import PruneKitError, run_script
from prunekit.families import NAME_PREFIX
from prunekit.surgery.drafts import draft_tensors, drop_drafts


def _by_plain_name(checkpoint: Checkpoint) -> dict[str, str]:
    """Full name by name without the prefixes in which base models and models with a head differ."""
    return {re.sub(NAME_PREFIX, "", name): name for name in checkpoint.tensors if not BUFFERS.match(name)}


def _check_same_tensors(source: Checkpoint, base: Checkpoint, layers_only: bool) -> None:
    names = re.compile(base.family.text.prefix if layers_only else "")
    ours, theirs = (
        {plain: name for plain, name in _by_plain_name(each).items() if names.match(name)} for each in (source, base)
    )
    may_lack = [*([base.family.tied] if is_tied(base) else []), *([base.family.drafts] if base.family.drafts else [])]
    optional = re.compile("|".join(may_lack) or r"(?!)")
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            if not optional.fullmatch(name):
                has, lacks = (base, source) if name in theirs else (source, base)
                raise PruneKitError(f"{lacks.path}: has no {name}, which {has.path} has; is --base the model trained?")
        elif (mine := source.tensors[ours[name]].shape) != (shape := base.tensors[theirs[name]].shape):
            raise PruneKitError(
                f"{source.path}: {name} is {list(mine)}, in {base.path} {list(shape)}; is --base the model trained?"
            )


def _cast(source: Checkpoint, name: str, dtype: str) -> memoryview:
    return float_bytes(source.read_array(name), dtype, name)


def _masked(source: Checkpoint, name: str, base: Checkpoint, twin: str, dtype: str) -> memoryview:
    values = source.read_array(name)
    values[base.read_array(twin) == 0] = 0
    return float_bytes(values, dtype, name)


def _with_dtypes(
    source: Checkpoint, base: Checkpoint, dtype: str | None, keep_zeros: bool = False
) -> tuple[dict[str, Tensor], str]:
    """The source's tensors in the dtypes of the base (or all floating ones in `dtype`), and the commonest dtype.

    keep_zeros: where a matrix of the base is zero, they are, too; not in embeddings.
    """
    names = {torch_name: name for name, torch_name in TORCH_DTYPES.items()}
    if dtype is not None and dtype not in names:
        raise PruneKitError(f"dtype {dtype!r}: choose one of {', '.join(names)}")
    theirs = _by_plain_name(base)
    counts = Counter(tensor.dtype for tensor in base.tensors.values() if tensor.dtype in TORCH_DTYPES)
    common = names[dtype] if dtype else counts.most_common(1)[0][0]
    tensors = {}
    for name, tensor in source.tensors.items():
        twin = theirs.get(re.sub(NAME_PREFIX, "", name))
        wanted = base.tensors[twin].dtype if twin and not dtype else common
        floating = {tensor.dtype, wanted} <= TORCH_DTYPES.keys()
        if keep_zeros and floating and twin and len(tensor.shape) > 1 and not re.match(base.family.embedding, twin):
            tensor = replace(tensor, dtype=wanted, compute=partial(_masked, source, name, base, twin, wanted))
        elif tensor.dtype != wanted and floating:
            tensor = replace(tensor, dtype=wanted, compute=partial(_cast, source, name, wanted))
        tensors[name] = tensor
    return tensors, TORCH_DTYPES[common]


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    config[key] = dtype
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype


def publish(
    source_folder: str | Path,
    out: str | Path,
    base: str | Path,
    stage: str,
    metrics: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    dtype: str | None = None,
    extra_files: Iterable[str | Path] = (),
    overwrite: bool = False,
    new_head: dict[str, Any] | None = None,
    keep_zeros: bool = False,
) -> dict[str, Any]:
    """Turn a training output folder into a clean checkpoint OUT, atomically; returns the new history entry.

    Weights come from `source_folder`, in the dtypes that `base` has (or all floating ones in `dtype`, a torch name).
    config.json comes from `base`: a trainer's own has its traces (use_cache off, another dtype). Side files come from
    `source_folder`, and from `base` where they are missing there; `extra_files` are copied too. History is that of
    `base` plus an entry for `stage`. `new_head` is what config.json shall say of a head that the base hasn't. With
    `keep_zeros` matrices are zero where the base's are: an adapter that learned so was merged into it. Raises
    PruneKitError unless the source has exactly the tensors of the base (copies of tied weights may be there or not;
    with a new head: exactly its layers), and as `write_checkpoint` does.
    """
    origin, source = open_checkpoint(base), open_checkpoint(source_folder)
    check_out(out, source.path, origin.path, overwrite=overwrite)
    _check_same_tensors(source, origin, layers_only=new_head is not None)
    tensors, common = _with_dtypes(source, origin, dtype, keep_zeros)
    config = copy.deepcopy(origin.config) | {"architectures": source.config.get("architectures")}
    config |= new_head or {}
    if not draft_tensors(source):
        drop_drafts(origin, config, {})
    _set_dtype(config, common)
    result = replace(source, config=config, tensors=tensors)
    entry = history_entry(stage, origin.path, statistics(origin), statistics(result), None, metrics, settings)
    write_checkpoint(result, out, entry, overwrite, None, map(Path, extra_files), fallback=origin.path)
    return entry


def publish_adapter(
    source_folder: Path,
    out: str | Path,
    base: str | Path,
    stage: str,
    metrics: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    extra_files: Iterable[Path] = (),
    overwrite: bool = False,
) -> None:
    """Copy an adapter (adapter_config.json, adapter_model.safetensors) to OUT, atomically, with a history and a card.

    The history is the base's, and an entry that says by its `input_fingerprint` which model alone the adapter fits.
    """
    weights = read_header(source_folder / "adapter_model.safetensors")  # raises PruneKitError if torn
    origin = open_checkpoint(base)
    numbers, need = statistics(origin), sum(tensor.nbytes for tensor in weights.values())
    size = {
        "adapter_parameters": sum(math.prod(tensor.shape) for tensor in weights.values()),
        "adapter_bytes": need,
    }
    entry = history_entry(stage, origin.path, numbers, numbers | size, None, metrics, settings)
    with new_folder(out, overwrite, need) as folder:
        for file in [*(source_folder / name for name in ADAPTER_FILES), *extra_files]:
            shutil.copyfile(file, folder / file.name)
        lora = read_json(folder / "adapter_config.json")
        write_records(folder, origin.config, numbers, [*history(origin.path), entry], adapter=lora)


def _adapters_keep_zeros(base: str, made_from: dict[str, Any]) -> bool:
    """Whether an adapter that was merged has learned with its base's zeros kept. Warns if it hasn't, and there are."""
    adapters = [history(record["path"]) for record in made_from.get("adapters", ())]
    if any("keep_zeros" in ((entries or [{}])[-1].get("settings") or {}).get("callbacks", ()) for entries in adapters):
        return True
    if adapters and any(entry.get("sparsity") for entry in history(base)):
        print(
            f"warning: the adapter learned without keep_zeros, so merging it fills zeros of {base}: see docs/zeros.md",
            file=sys.stderr,
        )
    return False


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--run", required=True, type=Path, help="ms-swift run folder, or a checkpoint folder")
    parser.add_argument("--weights", type=Path, help="folder with the weights (default: what --run holds)")
    parser.add_argument("--base", help="checkpoint that was trained")
    parser.add_argument("--out", help="checkpoint folder to write")
    parser.add_argument("--stage", help="name for the history")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--dtype", choices=tuple(TORCH_DTYPES.values()), help="of the weights (default: the base's)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at OUT")
    parser.add_argument("--find-resume", action="store_true", help="print where to resume, and stop")
    arguments = parser.parse_args()
    run = arguments.run
    if arguments.find_resume:
        whole = whole_checkpoints(run)
        print("" if not whole else "ended" if has_ended(run, whole[max(whole)]) else whole[max(whole)])
        return
    if not (arguments.base and arguments.out and arguments.stage):
        parser.error("--base, --out and --stage are needed to publish")
    origin = run_record(run) or {}
    if "model" in origin and [record["fingerprint"] for record in origin["model"]] != [
        fingerprint(open_checkpoint(arguments.base))
    ]:
        raise PruneKitError(
            f"{arguments.base} has changed since {run} began, so that it isn't what was trained: put that back, or set "
            "RESTART=1 to train what is there now"
        )
    folder, why = find_checkpoint(arguments.weights or run, arguments.checkpoint)
    records = [run / name for name in (LOG, COMMAND, ZEROS) if (run / name).is_file()]
    settings = {"checkpoint": folder.name, "chosen": why} | training_settings(folder)
    settings |= {name: found for name, found in origin.items() if name != "model"}
    metrics = final_metrics(log_until(read_log(run), folder)) or None
    if (folder / "adapter_config.json").is_file():
        publish_adapter(
            folder,
            arguments.out,
            arguments.base,
            arguments.stage,
            metrics,
            settings,
            records,
            arguments.overwrite,
        )
        print(f"published the adapter {folder} as {arguments.out}")
        return
    keep_zeros = _adapters_keep_zeros(arguments.base, origin)
    entry = publish(
        folder,
        arguments.out,
        arguments.base,
        arguments.stage,
        metrics=metrics,
        settings=settings | ({"keep_zeros": True} if keep_zeros else {}),
        dtype=arguments.dtype,
        extra_files=records,
        overwrite=arguments.overwrite,
        keep_zeros=keep_zeros,
    )
    print(f"published {folder} as {arguments.out} ({entry['parameters']:,} parameters)")


if __name__ == "__main__":
    run_script(main)
