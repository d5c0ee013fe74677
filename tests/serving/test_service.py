"""The example of a service: it says when it can, tags what it is sent, refuses the rest, and logs what to watch."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from helpers.paths import ROOT

from prunekit.errors import PruneKitError
from prunekit.serving.tag import Tagger, Text
from prunekit.serving.watch import read_log

APP = ROOT / "examples/tagger_service/app.py"


@pytest.fixture
def service():
    spec = spec_from_file_location("tagger_service", APP)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def client(service, tagger, tmp_path):
    from fastapi.testclient import TestClient

    return TestClient(service.make_app(Tagger(tagger("bert")), tmp_path / "log"))


def test_a_port_that_is_none_is_refused_before_the_model_is_loaded(service, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["app.py", "--model", "nowhere", "--port", "70000"])
    with pytest.raises(PruneKitError, match="--port 70000: the last one is 65535"):
        service.main()


def test_it_answers_as_the_tagger_does_and_logs_each_text(client, tagger, tmp_path):
    texts = ["Ana lives in Nice", "", "bo"]
    answer = client.post("/tag", json={"texts": texts})
    assert answer.status_code == 200
    wanted = [each.entities for each in Tagger(tagger("bert")).tag([Text.of(text) for text in texts])]
    assert answer.json()["entities"] == [
        [{**entity, "score": pytest.approx(entity["score"])} for entity in entities] for entities in wanted
    ]
    records = read_log(tmp_path / "log")
    assert [(record["words"], record["together"]) for record in records] == [(4, 3), (0, 3), (1, 3)]
    assert client.get("/health").json() == {"status": "ok", "model": "bert"}


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"{}", b'{"texts": []}', b'{"texts": "a"}', b'{"texts": [1]}', rb'{"texts": ["\ud800"]}',
     json.dumps({"texts": ["a"] * 65}).encode(), json.dumps({"texts": ["a" * 20_001]}).encode()],
    ids=lambda body: body[:20],
)  # fmt: skip
def test_what_is_no_list_of_texts_is_refused_and_not_logged(client, tmp_path, body):
    answer = client.post("/tag", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and answer.json()["detail"][0]["msg"]
    assert not (tmp_path / "log").exists()


@pytest.mark.slow
@pytest.mark.ci
def test_a_real_server_is_healthy_tags_logs_and_ends(tagger, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, APP, "--model", tagger("bert"), "--port", port, "--log", tmp_path / "log"]
    process = subprocess.Popen(list(map(str, command)), env=os.environ | {"PYTHONPATH": str(ROOT)})

    def ask(path, body=None):
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    try:
        deadline, health = time.monotonic() + 200, None
        while health is None and process.poll() is None:
            assert time.monotonic() < deadline
            try:
                health = ask("/health")
            except urllib.error.URLError:
                time.sleep(0.1)
        assert health == {"status": "ok", "model": "bert"}
        found = ask("/tag", json.dumps({"texts": ["Ana lives in Nice"]}).encode())
        (expected,) = Tagger(tagger("bert")).tag([Text.of("Ana lives in Nice")])
        assert [entity["text"] for entity in found["entities"][0]] == [each["text"] for each in expected.entities]
        assert [record["words"] for record in read_log(tmp_path / "log")] == [4]
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    assert code in (0, -signal.SIGTERM)
