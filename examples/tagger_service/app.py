"""A tagger behind HTTP: POST /tag gives entities, GET /health says that it can, and a log is kept for what to watch.

    pip install -e '.[deploy,serve]'
    python examples/tagger_service/app.py --model serve/int8 --log tagged.log
    curl localhost:8000/health
    curl localhost:8000/tag -H 'Content-Type: application/json' -d '{"texts": ["Ana lives in Nice"]}'
    python -m prunekit.ner watch tagged.log

The log has no texts in it. Only this machine is served unless --host says otherwise: there is no login here, so put
what has one in front.
"""

import threading
import time
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from prunekit.arguments import Parser, device, new_file, positive_int
from prunekit.errors import run_script
from prunekit.serving.tag import Tagger, Text, log_line

MOST_TEXTS, MOST_CHARACTERS = 64, 20_000  # of a request, of each text


class Texts(BaseModel):
    texts: list[Annotated[str, Field(max_length=MOST_CHARACTERS)]] = Field(min_length=1, max_length=MOST_TEXTS)


class Entity(BaseModel):
    label: str
    text: str
    start: int
    end: int
    score: float


class Entities(BaseModel):
    entities: list[list[Entity]]


def make_app(tagger: Tagger, log: Path | None = None) -> FastAPI:
    """The service of a tagger; `log` gets a line for each text."""
    app, writing = FastAPI(title="prunekit tagger"), threading.Lock()

    @app.exception_handler(RequestValidationError)
    def refuse(_: Request, error: RequestValidationError) -> JSONResponse:
        """What is wrong, without the text that it is of: that may be half a character, which no answer can hold."""
        problems = [{"loc": each["loc"], "msg": each["msg"]} for each in error.errors()]
        return JSONResponse({"detail": problems}, 422)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok", "model": tagger.folder.name}

    @app.post("/tag")
    def tag(body: Texts) -> Entities:  # no coroutine: FastAPI runs it in a thread, and health is answered meanwhile
        began = time.perf_counter()
        found = tagger.tag([Text.of(text) for text in body.texts])
        seconds = time.perf_counter() - began
        if log:
            lines = "".join(log_line(tagger.folder, each, seconds, len(found)) for each in found)
            with writing, log.open("a", encoding="utf-8") as file:
                file.write(lines)
        return Entities(entities=[[Entity(**entity) for entity in each.entities] for each in found])

    return app


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="a checkpoint, or a folder of deploy.py's")
    parser.add_argument("--host", default="127.0.0.1", help="to listen on (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=positive_int, default=8000, help="(default: 8000)")
    parser.add_argument("--log", type=new_file, help="append a line for each text, for prunekit.ner watch")
    parser.add_argument("--threads", type=positive_int, help="of the model (default: all cores)")
    parser.add_argument("--device", type=device, default="cpu", help="of what torch runs (default: cpu)")
    args = parser.parse_args()
    if args.port > 65535:
        parser.error(f"--port {args.port}: the last one is 65535")
    tagger = Tagger(args.model, args.threads, args.device)
    tagger.tag([Text.of("a first text, which takes longest")])
    uvicorn.run(make_app(tagger, args.log), host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    run_script(main)
