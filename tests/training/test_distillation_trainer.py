"""Our loss inside ms-swift's GKD trainer: that it is what runs, and what it says of a bad start."""

import contextlib
import json
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from helpers.distillation import bucketed, pair, reference
from helpers.paths import EMBEDDED, ROOT

from prunekit.training.teacher_cache import Settings, TeacherCache

ROWS = [
    {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]} for text in ("ab", "Qikv9")
]


@pytest.fixture(scope="module")
def trainer_module():
    import prunekit.training.distillation_trainer as module

    return module


def trainer(**settings) -> SimpleNamespace:
    return SimpleNamespace(gkd_logits_topk=None, beta=1.0, temperature=1.0, **settings)


def frames(labels: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(student logits, teacher logits), (2, 12, vocabulary), and labels of which the given ones count."""
    student, teacher = (logits.unflatten(0, (2, 12)) for logits in pair())
    whole = torch.full((2, 12), -100)
    for row, places in zip(whole, labels):
        row[places] = 1
    return student, teacher, whole


def test_the_position_before_each_label_is_what_counts(trainer_module):
    from swift.rlhf_trainers.gkd_loss import TeacherOutput

    student, teacher, labels = frames([[3, 4], [11]])
    output = TeacherOutput(full_logits=teacher, labels=labels)
    found = trainer_module.DistillationTrainer._compute_jsd_loss(trainer(), student, output, labels)
    places = [(0, 2), (0, 3), (1, 10)]
    wanted = reference(
        torch.stack([student[place] for place in places]).log_softmax(-1),
        torch.stack([teacher[place] for place in places]).log_softmax(-1),
        1.0,
    )
    assert found.item() == pytest.approx(wanted.item() / 3, rel=1e-5)


def test_a_servers_top_k_counts_with_its_tail_and_without_positions_that_it_left_out(trainer_module):
    from swift.rlhf_trainers.gkd_loss import TeacherOutput

    student, teacher, labels = frames([[3, 4], [11]])
    top = teacher.log_softmax(-1).topk(8)
    log_probs = top.values.clone()
    log_probs[0, 3] = -torch.inf
    output = TeacherOutput(topk_logprobs=log_probs, topk_indices=top.indices, labels=labels)
    found = trainer_module.DistillationTrainer._compute_jsd_loss(trainer(), student, output, labels)
    wanted = sum(
        reference(bucketed(student[place], top.indices[place]), bucketed(teacher[place], top.indices[place]), 1.0)
        for place in ((0, 2), (1, 10))
    )
    assert found.item() == pytest.approx(wanted.item() / 2, rel=1e-4)


def test_a_longer_padded_vocabulary_is_left_out(trainer_module):
    from swift.rlhf_trainers.gkd_loss import TeacherOutput

    student, teacher, labels = frames([[3, 4], [11]])
    longer = torch.cat([teacher, torch.full((2, 12, 7), 50.0)], -1)
    losses = [
        trainer_module.DistillationTrainer._compute_jsd_loss(
            trainer() if k is None else SimpleNamespace(gkd_logits_topk=k, beta=1.0, temperature=1.0),
            student,
            TeacherOutput(full_logits=each, labels=labels),
            labels,
        )
        for each in (teacher, longer)
        for k in (None, 8)
    ]
    assert losses[:2] == losses[2:]


@pytest.mark.parametrize("k", [None, 8])
def test_a_longer_head_of_the_students_counts(trainer_module, k):
    from swift.rlhf_trainers.gkd_loss import TeacherOutput

    student, teacher, labels = frames([[3, 4], [11]])
    losses = []
    for high in (-1e4, 50.0):
        longer = torch.cat([student, torch.full((2, 12, 7), high)], -1)
        output = TeacherOutput(full_logits=teacher, labels=labels)
        settings = SimpleNamespace(gkd_logits_topk=k, beta=1.0, temperature=1.0)
        losses.append(trainer_module.DistillationTrainer._compute_jsd_loss(settings, longer, output, labels).item())
    assert losses[1] > losses[0] + 0.5


def test_of_a_teachers_top_k_tokens_that_the_student_has_not_are_left_out(trainer_module):
    from swift.rlhf_trainers.gkd_loss import TeacherOutput

    from prunekit.training.distillation_loss import top_k

    student, teacher, labels = frames([[3, 4], [11]])
    longer = torch.cat([teacher, torch.full((2, 12, 7), 50.0)], -1)  # of a head that is padded to more rows
    losses = []
    for logits, k in ((teacher, 1), (longer, 8)):
        cached = top_k(logits.flatten(0, 1), torch.tensor([2, 3, 22]), k)
        output = TeacherOutput(topk_logprobs=cached, topk_indices=cached.indices, labels=labels)
        losses.append(trainer_module.DistillationTrainer._compute_jsd_loss(trainer(), student, output, labels).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_teacher_is_not_asked_of_tokens_that_its_embedding_has_not(trainer_module, monkeypatch):
    inputs = {"input_ids": torch.tensor([[5, 299, 300]])}
    batches = [{"model_inputs": inputs, "teacher_model_inputs": dict(inputs)}]
    monkeypatch.setattr(trainer_module.GKDTrainer, "_prepare_batch_inputs", lambda *_: batches)
    monkeypatch.setattr(trainer_module.GKDTrainer, "split_by_mini_batches", lambda *_: [["row"]])
    one = trainer_module.DistillationTrainer.__new__(trainer_module.DistillationTrainer)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=300))
    one.teacher_model = SimpleNamespace(config=config)
    one.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    one.template = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    [batch] = one._prepare_batch_inputs(["row"])
    assert batch["teacher_model_inputs"]["input_ids"].tolist() == [[5, 299, 0]]
    assert batch["model_inputs"]["input_ids"].tolist() == [[5, 299, 300]]


def test_another_ms_swift_is_refused(trainer_module, monkeypatch):
    def renamed(self, student_logits, teacher_output, labels, chunk_size):
        pass

    monkeypatch.setattr(trainer_module.GKDTrainer, "_compute_jsd_loss", renamed)
    with pytest.raises(trainer_module.PruneKitError, match="install ms-swift 4.6"):
        trainer_module._check_hook()


def test_an_ms_swift_that_does_not_call_it_is_refused(trainer_module, monkeypatch):
    monkeypatch.setattr(trainer_module.GKDTrainer, "compute_loss", lambda self, model, inputs: None)
    with pytest.raises(trainer_module.PruneKitError, match="install ms-swift 4.6"):
        trainer_module._check_hook()


def test_a_caches_folder_for_a_server_makes_a_trainer_without_a_teacher(trainer_module, tmp_path):
    TeacherCache(tmp_path / "cache", Settings("0" * 16, 300, 8, 1.0))
    for server, name in [(str(tmp_path / "cache"), "CachedTeacherTrainer"), ("http://host", "DistillationTrainer")]:
        cls = trainer_module.DistillationTrainer
        assert type(cls.__new__(cls, teacher_model_server=server)).__name__ == name


def test_a_cache_of_another_temperature_is_refused(trainer_module, tmp_path):
    cls = trainer_module.CachedTeacherTrainer
    one = cls.__new__(cls)
    one.cache, one.temperature = TeacherCache(tmp_path / "cache", Settings("0" * 16, 300, 8, 0.9)), 1.0
    with pytest.raises(trainer_module.PruneKitError, match="the cache is of temperature 0.9"):
        one._check_temperature()


@pytest.fixture
def filler(trainer_module, tmp_path, monkeypatch):
    """filler(rows): a CacheFiller to which these are the encoded rows of any batch, on one of two processes."""

    def make(rows):
        monkeypatch.setattr(trainer_module, "_encode", lambda *_: rows)
        one = trainer_module.CacheFiller.__new__(trainer_module.CacheFiller)
        one.cache = TeacherCache(tmp_path / "cache", Settings("0" * 16, 300, 8, 1.0))
        one.accelerator = SimpleNamespace(device="cpu", gather=lambda counts: torch.cat([counts, torch.tensor([1])]))
        one.template = SimpleNamespace(
            truncation_strategy="raise", max_length=5,
            data_collator=lambda given: {k: torch.tensor([row[k] for row in given]) for k in ("input_ids", "labels")},
        )  # fmt: skip
        for name in ("to_samples", "prepare_logits_to_keep"):
            monkeypatch.setattr(one, name, lambda given: given, raising=False)
        monkeypatch.setattr(one, "compute_loss_context_manager", contextlib.nullcontext, raising=False)
        return one

    return make


@pytest.mark.parametrize(
    ("lengths", "asked", "kept"), [((9, 3), [1], [1]), ((9, 9), [0], []), ((3, 3), [0, 1], [0, 1])]
)
def test_a_process_answers_with_the_others_though_its_rows_are_too_long(trainer_module, filler, lengths, asked, kept):
    rows = [{"input_ids": [row] * n, "labels": [-100] + [row] * (n - 1), "length": n} for row, n in enumerate(lengths)]
    shown = []

    def model(input_ids):
        shown.extend(input_ids[:, 0].tolist())
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 300))

    one = filler(rows)
    one.prediction_step(model, None)
    assert shown == asked
    assert [number for number, row in enumerate(rows) if trainer_module.row_key(row) in one.cache] == kept


def test_nan_of_a_teacher_is_kept_in_no_cache_and_its_row_is_named(trainer_module, filler, tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "args.json").write_text(json.dumps({"dataset": [str(tmp_path / "data.jsonl")], "val_dataset": []}))
    one = filler([{"input_ids": [row] * 3, "labels": [-100, row, row], "length": 3} for row in range(2)])
    one.args = SimpleNamespace(output_dir=str(tmp_path))

    def model(input_ids):
        logits = torch.zeros(*input_ids.shape, 300)
        logits[1, 1, 7] = torch.nan
        return SimpleNamespace(logits=logits)

    with pytest.raises(trainer_module.PruneKitError, match="NaN of the teacher, in dataset .*data.jsonl line 2:"):
        one.prediction_step(model, [SimpleNamespace(messages=row["messages"]) for row in QUESTIONS])
    assert len(one.cache) == 1


@pytest.fixture
def logged(trainer_module, monkeypatch):
    """logged(loss, earlier): log a loss as a trainer does, after `earlier` ones."""
    module = trainer_module
    monkeypatch.setattr(module.GKDTrainer, "log", lambda self, logs, *_: self.state.log_history.append(logs))

    def log(loss: float, earlier: tuple[float, ...] = ()) -> None:
        one = module.DistillationTrainer.__new__(module.DistillationTrainer)
        one.accelerator = SimpleNamespace(is_main_process=True)
        one.state = SimpleNamespace(log_history=[{"loss": each} for each in earlier])
        one.log({"loss": loss})

    return log


def test_a_first_loss_over_the_limit_warns(logged, capsys):
    logged(0.93)
    assert "starts at a loss of 0.93" in capsys.readouterr().err


@pytest.mark.parametrize("loss, earlier", [(0.7, ()), (0.93, (0.7,))])
def test_a_good_start_and_later_losses_do_not_warn(logged, capsys, loss, earlier):
    logged(loss, earlier)
    assert capsys.readouterr().err == ""


def test_the_warning_is_in_wandb(logged, monkeypatch):
    import wandb

    said = SimpleNamespace(summary={}, alerts=[])
    said.alert = lambda title, text, level: said.alerts.append(text)
    monkeypatch.setattr(wandb, "run", said)
    logged(0.93)
    assert "0.93" in said.summary["warning"] and said.alerts == [said.summary["warning"]]


# --- a loss that isn't finite -----------------------------------------------------------------------------------------


@pytest.fixture
def blaming(trainer_module, tmp_path):
    """A trainer on ROWS, whose first row comes second in its batch."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "args.json").write_text(json.dumps({"dataset": [str(tmp_path / "data.jsonl")], "val_dataset": []}))
    one = trainer_module.DistillationTrainer.__new__(trainer_module.DistillationTrainer)
    one.args, one.state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=6)
    one.gkd_logits_topk, one.beta, one.temperature = None, 1.0, 1.0
    one._samples = [SimpleNamespace(messages=row["messages"]) for row in reversed(QUESTIONS)]
    return one


QUESTIONS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]}
    for text in ("one", "two")
]


@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize(("place", "line"), [(0, 2), (1, 1)])
def test_nan_names_step_row_and_model(trainer_module, blaming, whose, place, line):
    from swift.rlhf_trainers.gkd_loss import TeacherOutput

    student, teacher, labels = frames([[3, 4], [11]])
    {"student": student, "teacher": teacher}[whose][place] = torch.nan
    with pytest.raises(trainer_module.PruneKitError) as raised:
        blaming._compute_jsd_loss(student, TeacherOutput(full_logits=teacher, labels=labels), labels)
    said = str(raised.value)
    assert f"the loss of step 7 is not finite: NaN of the {whose}" in said
    assert f"data.jsonl line {line}:" in said


def test_nan_where_no_label_is_learnt_is_nobodys_business(trainer_module, blaming):
    from swift.rlhf_trainers.gkd_loss import TeacherOutput

    student, teacher, labels = frames([[3, 4], [11]])
    student[1, 3] = torch.nan
    assert blaming._compute_jsd_loss(student, TeacherOutput(full_logits=teacher, labels=labels), labels).isfinite()


def swift_gkd(student, data, run) -> subprocess.CompletedProcess:
    """Two steps of ms-swift's own command, at a top 8 and temperature 0.9."""
    flags = f"""
        --rlhf_type gkd --teacher_model {EMBEDDED} --teacher_model_type qwen3_vl --model {student}
        --model_type qwen3_vl --lmbda 0 --beta 1 --temperature 0.9 --gkd_logits_topk 8 --max_completion_length 8
        --dataset {data} --split_dataset_ratio 0 --tuner_type full --check_model false --add_version false
        --use_cpu true --torch_dtype float32 --fp16 false --bf16 false --gradient_checkpointing false
        --dataloader_num_workers 0 --gradient_accumulation_steps 1 --per_device_train_batch_size 2
        --max_steps 2 --logging_steps 1 --save_strategy no --report_to none --learning_rate 1e-5
        --output_dir {run}
        --external_plugins {ROOT}/plugins/images_and_answers.py {ROOT}/plugins/distillation.py
    """
    return subprocess.run(
        [shutil.which("swift"), "rlhf", *flags.split()],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_ms_swift_trains_by_our_loss(tmp_path):
    """Its first logged loss is that of the teacher's top 8 and the tail, by the plain formula."""
    from transformers import AutoModelForImageTextToText

    from prunekit.checkpoint import open_checkpoint
    from prunekit.data.encode import encoder_of
    from prunekit.data.rows import Rows
    from prunekit.surgery.cut import write_cut
    from prunekit.surgery.layers import cut_layers, plan_layers

    write_cut(cut_layers(plan_layers(open_checkpoint(EMBEDDED), [0])), tmp_path / "student")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    done = swift_gkd(tmp_path / "student", data, tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    logged = json.loads((tmp_path / "run/logging.jsonl").read_text().splitlines()[0])["loss"]

    models = [
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (tmp_path / "student", EMBEDDED)
    ]
    encoder = encoder_of(open_checkpoint(EMBEDDED), Rows("rows", ROWS), 512)
    encoder.see(models[0])
    batch = dict(encoder.collate([encoder.encode(row) for row in ROWS]))
    counted = batch.pop("labels")[:, 1:] != -100
    with torch.no_grad():
        student, teacher = (model(**batch).logits[:, :-1][counted] / 0.9 for model in models)
    top = teacher.topk(8)
    ours = reference(bucketed(student, top.indices), bucketed(teacher, top.indices), 1.0) / counted.sum()
    blind = reference(student.gather(-1, top.indices).log_softmax(-1), top.values.log_softmax(-1), 1.0) / counted.sum()
    assert abs(ours - blind) > 0.5
    assert logged == pytest.approx(ours.item(), rel=1e-3)
    assert f"starts at a loss of {logged:.2f}" in done.stdout + done.stderr


@pytest.mark.ci
def test_nan_of_one_token_ends_a_run_and_names_the_row_that_has_it(tmp_path):
    from safetensors.torch import load_file, save_file

    from prunekit.checkpoint import open_checkpoint
    from prunekit.data.templates import load_processor

    student = shutil.copytree(EMBEDDED, tmp_path / "student")
    weights = load_file(student / "model.safetensors")
    (token,) = load_processor(open_checkpoint(EMBEDDED)).tokenizer.encode("Q")
    (embedding,) = (name for name in weights if name.endswith("embed_tokens.weight"))
    weights[embedding][token] = torch.nan
    save_file(weights, student / "model.safetensors", {"format": "pt"})
    data = tmp_path / "data.jsonl"
    rows = [{"messages": [{"role": "user", "content": text}, *ROWS[0]["messages"][1:]]} for text in ("abc", "Qabc")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = swift_gkd(student, data, tmp_path / "run")
    assert done.returncode != 0
    assert "the loss of step 1 is not finite: NaN of the student, in dataset" in done.stderr
    assert "data.jsonl line 2:" in done.stderr
