"""Tasks that the field knows: lm-eval's, for text, and EvalScope's, for pictures, too; ms-swift's engine answers."""

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunekit.errors import PruneKitError, need_packages
from prunekit.families import positions

LM_EVAL, EVALSCOPE = "--tasks", "--benchmarks"
UNREACHED = {  # what requests, httpx, huggingface_hub and datasets raise
    "ConnectionError", "ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError", "MaxRetryError", "gaierror",
    "LocalEntryNotFoundError", "OfflineModeIsEnabled",
}  # fmt: skip


@dataclass(frozen=True)
class Tasks:
    """What a user asks for."""

    lm_eval: tuple[str, ...] = ()
    evalscope: tuple[str, ...] = ()
    limit: int | None = None  # rows of each
    batch_size: int = 64
    max_new_tokens: int = 64  # of EvalScope's answers; lm-eval's tasks have their own
    chat: bool = False  # lm-eval's prompts in the chat template
    metadata: dict[str, Any] = field(default_factory=dict)  # lm-eval's --metadata
    dataset_args: dict[str, Any] = field(default_factory=dict)  # EvalScope's --dataset-args

    def __bool__(self) -> bool:
        return bool(self.lm_eval or self.evalscope)


def json_object(text: str) -> dict[str, Any]:
    """An argument's JSON object; ValueError if it is none."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"{text[:40]!r} is no JSON object")
    return found


def check_tasks(tasks: Tasks) -> None:
    """PruneKitError for a package that isn't installed, and for tasks that it doesn't know."""
    if tasks.lm_eval:
        need_packages("lm_eval", extra="eval")
        from lm_eval.tasks import TaskManager

        known = set(TaskManager().all_tasks)
        if unknown := [name for name in tasks.lm_eval if name not in known]:
            raise PruneKitError(f"{LM_EVAL} {unknown[0]}: lm-eval knows no such task; lm-eval ls tasks names them")
    if tasks.evalscope:
        need_packages("evalscope", extra="eval")
        from evalscope.api.registry import BENCHMARK_REGISTRY

        if unlisted := [name for name in tasks.evalscope if not BENCHMARK_REGISTRY.get(name)]:
            raise PruneKitError(
                f"{EVALSCOPE} {unlisted[0]}: no benchmark of EvalScope; evalscope benchmark-info --list names them"
            )


def run_tasks(engine, model: Path, config: dict[str, Any], tasks: Tasks) -> dict[str, dict[str, Any]]:
    """By the task's name its metrics, and `samples`; `engine` is `load_engine`'s, `config` the model's."""
    found: dict[str, dict[str, Any]] = {}
    if tasks.lm_eval:
        with _fetching(LM_EVAL, tasks.lm_eval):
            found |= _by_lm_eval(engine, model, config, tasks)
    if tasks.evalscope:
        with _fetching(EVALSCOPE, tasks.evalscope):
            found |= _by_evalscope(engine, model, tasks)
    return found


@contextlib.contextmanager
def _fetching(flag: str, names: tuple[str, ...]) -> Iterator[None]:
    """PruneKitError where what is raised comes from a network that isn't there."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause and not (isinstance(cause, ConnectionError | TimeoutError) or type(cause).__name__ in UNREACHED):
            cause = cause.__cause__ or cause.__context__
        if not cause:
            raise
        said = next(iter(str(error).splitlines()), "")[:200]
        raise PruneKitError(
            f"{flag} {' '.join(names)}: rows that aren't here can't be fetched ({said or type(error).__name__}): ask "
            "where there is a network, which is needed once"
        ) from None


def _by_lm_eval(engine, model: Path, config: dict[str, Any], tasks: Tasks) -> dict[str, dict[str, Any]]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    length = positions(config)
    lm = HFLM(
        engine.model, tokenizer=engine.tokenizer, batch_size=tasks.batch_size, max_length=length, backend="causal"
    )
    # RULER's make their rows with this tokenizer, of these lengths; 128 are for the answer
    metadata = {"pretrained": str(model), "max_seq_lengths": [max(128, min(4096, length - 128))]} | tasks.metadata
    result = simple_evaluate(
        lm,
        tasks=list(tasks.lm_eval),
        limit=tasks.limit,
        metadata=metadata,
        apply_chat_template=tasks.chat,
        log_samples=False,
    )
    return scores_of(result["results"], result["n-samples"])


def scores_of(results: dict[str, dict[str, Any]], counts: dict[str, dict[str, int]]) -> dict[str, dict[str, Any]]:
    """lm-eval's results and numbers of rows as we tell scores: of each task its metrics, and `samples`."""
    found = {}
    for name, values in results.items():
        scores: dict[str, Any] = {}
        for key, value in values.items():
            metric, _, way = key.partition(",")
            # -1 is RULER's mark of a length that wasn't asked for
            if key != "sample_len" and isinstance(value, int | float) and value != -1:
                scores[metric if way in ("", "none") else key] = float(value)
        found[name] = scores | ({"samples": counts[name]["effective"]} if name in counts else {})
    return found


def _by_evalscope(engine, model: Path, tasks: Tasks) -> dict[str, dict[str, Any]]:
    from evalscope.api.model import ModelAPI
    from evalscope.run import TaskConfig, run_task
    from swift.pipelines.eval.utils import EvalModel

    class Loaded(EvalModel):
        """ms-swift's batching model for EvalScope, of an engine that is loaded already."""

        def __init__(self) -> None:
            ModelAPI.__init__(self, model_name=model.absolute().name)
            self.engine = engine

    engine.template.set_mode("transformers")
    engine.max_batch_size = tasks.batch_size
    with tempfile.TemporaryDirectory() as scratch:
        config = TaskConfig(
            model=Loaded(),
            datasets=list(tasks.evalscope),
            dataset_args=tasks.dataset_args,
            limit=tasks.limit,
            eval_batch_size=tasks.batch_size,
            generation_config={"max_tokens": tasks.max_new_tokens, "temperature": 0.0},
            work_dir=scratch,
        )
        reports = run_task(config)
    found = {}
    for name, report in reports.items():
        found[name] = {metric.name: float(metric.score) for metric in report.metrics}
        found[name]["samples"] = max((metric.num for metric in report.metrics), default=0)
    return found
