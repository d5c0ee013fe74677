"""Prefill and decoding of real tiny models, timed; the arithmetic of memory; the lines that serve a folder."""

import shlex

import pytest
from helpers.tiny_taggers import save_tokenizer

from prunekit.checkpoint import open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.serving import lines, memory, speed
from prunekit.serving.speed import Pace, choose_pace, measure, measure_speed


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_vl", "qwen3_moe", "gemma3_text"])
def test_a_model_reads_and_decodes_as_many_tokens_as_asked(family, tiny, monkeypatch):
    calls, timed = [], speed.time_model

    def watched(model, ids, tokens):
        class Watched:
            device = model.device

            def __call__(self, **inputs):
                out = model(**inputs)
                calls.append((tuple(inputs["input_ids"].shape), out.past_key_values.get_seq_length()))
                return out

        return timed(Watched(), ids, tokens)

    monkeypatch.setattr(speed, "time_model", watched)
    found = measure(
        {"folder": str(tiny(family)), "device": "cpu", "dtype": None, "prompt": 6, "tokens": 2, "sizes": [3]}
    )
    assert calls[:3] == [((3, 6), 6), ((3, 1), 7), ((3, 1), 8)]
    assert len(calls) == 3 * (speed.REPEATS + 1)
    assert all(value > 0 for value in (*found["batches"]["3"].values(), found["peak_memory"], found["load_seconds"]))


@pytest.mark.parametrize("family", ["gpt2", "qwen3_vl", "qwen3_moe"])
def test_the_time_is_shared_out_among_the_parts(family, tiny):
    job = {"folder": str(tiny(family)), "device": "cpu", "dtype": None, "prompt": 6, "tokens": 2, "sizes": [3, 1]}
    found = measure(job | {"parts": True})["parts"]
    for shares in found.values():
        assert set(shares) == {"attention", "mlp", "layers", "head", "rest"}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-6) and min(shares.values()) > 0
    assert "parts" not in measure(job)


def test_random_words_are_none_that_a_config_or_its_family_names(tiny):
    config = open_checkpoint(tiny("qwen3_vl")).config
    config |= {"vision_config": config["vision_config"] | {"pad_token_id": 9}, "stop_token_ids": [7, [8]]}
    ids = {config[key] for key in config if key.endswith("_token_id")} | {7, 8, 9}
    assert not ids & set(speed._words(config, 50, 50).ravel().tolist())
    config = open_checkpoint(tiny("llama")).config
    config.pop("bos_token_id", None)  # transformers takes 1
    assert 1 not in speed._words(config, 50, 50)


def test_models_are_measured_by_turns_and_the_best_turn_counts(monkeypatch):
    asked = []

    def once(job, module):
        assert job["dtype"] == ("d" if asked else None)  # the base's, of all
        asked.append(job["folder"])
        times = {"prefill": 2.0 / len(asked), "decode": 0.5}
        return {"machine": "m", "dtype": "d", "load_seconds": 1, "peak_memory": len(asked), "batches": {"4": times}}

    monkeypatch.setattr("prunekit.serving.measure.measure_once", once)
    base, cut = measure_speed(["base", "cut"], Pace(10, 2), quiet=True)
    assert asked == ["base", "cut"] * 2
    assert (base["batches"]["4"]["prefill"], cut["batches"]["4"]["prefill"]) == (2 / 3, 0.5)
    assert (cut["batches"]["4"]["prefill_rate"], cut["batches"]["4"]["decode_rate"], cut["peak_memory"]) == (80, 8, 4)


def test_what_cannot_be_measured_says_so_and_the_rest_is_measured(monkeypatch):
    def once(job, module):
        if job["folder"] == "base":
            raise PruneKitError("out of memory")
        return {"machine": "m", "dtype": "d", "load_seconds": 1, "peak_memory": 1, "batches": {}}

    monkeypatch.setattr("prunekit.serving.measure.measure_once", once)
    base, cut = measure_speed(["base", "cut"], Pace(10, 2), quiet=True)
    assert base == {"error": "out of memory"} and cut["peak_memory"] == 1


def test_a_pace_is_within_the_models_positions(tiny):
    models = [open_checkpoint(tiny(family)) for family in ("llama", "gpt2")]  # 128 and 64 positions
    pace = choose_pace(models, None, None)
    assert (pace.prompt, pace.tokens) == (48, 16)
    assert choose_pace(models, 60, None).tokens == 4  # what a prompt of the user's leaves
    with pytest.raises(PruneKitError, match="--prompt-tokens 60 .*64 positions"):
        choose_pace(models, 60, 8)


# --- memory


def test_what_fits_is_what_weights_leave_over_the_cache():
    found = memory.fits(parameters=8 * 10**9, kv_bytes_per_token=147_456, positions=262_144)
    room = (0.9 * 24 * 10**9 - 16 * 10**9) / 147_456
    assert found["24"] == {"context": int(room), "limit": "memory", "batch": int(room / 4096)}
    assert found["80"]["context"] == 262_144 and found["80"]["limit"] == "positions"


def test_where_the_weights_alone_do_not_fit_nothing_does():
    assert memory.fits(20 * 10**9, 1, 4096)["24"] == {"context": 0, "limit": "memory", "batch": 0}


def test_a_batch_that_fits_has_rows_no_longer_than_the_model_takes():
    assert memory.fits(10**9, 1000, 1000)["24"]["batch"] == (0.9 * 24 - 2) * 10**9 / 10**6


# --- lines


@pytest.fixture
def spoken(own):
    folder = own("qwen3_vl")
    save_tokenizer(folder)
    return folder


def engines(folder, run=False):
    return {each["engine"]: each for each in lines.serving_lines(open_checkpoint(folder), run)}


def test_lines_name_the_folder_quoted_and_the_models_length(spoken, tmp_path):
    odd = spoken.rename(tmp_path / "it's $(odd)")
    for engine in engines(odd).values():
        assert str(odd) in [word for line in engine["lines"] for word in shlex.split(line)]
    assert "--max-model-len 128" in engines(odd)["vLLM"]["lines"][0]


def test_pictures_need_a_projector_and_texts_none(tiny, spoken):
    assert "--mmproj" in engines(spoken)["llama.cpp"]["lines"][-1]
    assert not any("mm" in line for engine in engines(tiny("llama")).values() for line in engine["lines"])


def test_files_that_engines_need_and_the_folder_lacks_are_named(spoken):
    assert engines(spoken)["vLLM"]["missing"] == ["preprocessor_config.json", "chat_template.jinja"]
    for name in engines(spoken)["vLLM"]["missing"]:
        (spoken / name).write_text("{}")
    assert engines(spoken)["llama.cpp"]["missing"] == []


def test_what_is_not_installed_was_not_run(spoken, monkeypatch):
    monkeypatch.setattr(lines.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(spoken))
    assert all(engine["checked"].startswith("not run: ") for engine in engines(spoken, run=True).values())


@pytest.mark.parametrize(("code", "said"), [(0, "ran here"), (3, "failed here: llama-completion ended with code 3")])
def test_what_is_installed_is_run_if_one_asks_for_it(spoken, tmp_path, monkeypatch, code, said):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / lines.CONVERT).write_text("import sys; open(sys.argv[sys.argv.index('--outfile') + 1], 'w')")
    (programs / lines.RUN).write_text(f"#!/bin/sh\ntest -f $2 && exit {code}\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    assert engines(spoken)["llama.cpp"]["checked"] == "not run: --check-serving does it"
    assert engines(spoken, run=True)["llama.cpp"]["checked"].startswith(said)
