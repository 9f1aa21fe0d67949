"""A judge behind an OpenAI-compatible endpoint, for trying out how an LLM judge is used: no language model in it.

It reads the judge's requests as a language model would get them and scores the answers of the bundled model's world
with the exact judge: one integer and its log-probability, or one letter where two answers are compared.

    python docs/examples/judge_server.py 8765
    steerwell sweep -c hostility --judge-model exact --judge-url http://127.0.0.1:8765/v1 -o sweep
"""

from __future__ import annotations

import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from steerwell.concepts import concept_names, load_concept
from steerwell.scoring.judges.exact import ExactJudge

CONCEPTS = [load_concept(name, "testbed") for name in concept_names("testbed")]


def sections(text: str) -> dict[str, str]:
    """The parts of a request's last message, by title; every one begins with a line that holds the request's mark."""
    mark = re.search(r"The mark of this request is (\w+)\.", text)[1]
    parts = re.split(rf"^\[{mark} (.+?)\]$", text, flags=re.MULTILINE)
    return {title: part.strip("\n") for title, part in zip(parts[1::2], parts[2::2], strict=True)}


def reply(messages: list[dict[str, str]]) -> str:
    """The integer or the letter that a request asks for."""
    task, shown = messages[0]["content"], sections(messages[-1]["content"])
    concept = next((item for item in CONCEPTS if item.rubric.trait in task), CONCEPTS[0])

    def score(answer: str) -> float:
        verdict = ExactJudge().score(concept.concept, shown["user message"], answer)
        return verdict.trait if concept.rubric.trait in task else verdict.coherence

    if "answer" in shown:
        return str(round(score(shown["answer"])))
    first, second = score(shown["answer A"]), score(shown["answer B"])
    return "C" if first == second else "A" if first > second else "B"


class Handler(BaseHTTPRequestHandler):
    """POST /v1/chat/completions."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = reply(body["messages"])
        token = {"token": said, "logprob": 0.0, "bytes": list(said.encode())}
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": said},
            "finish_reason": "stop",
            "logprobs": {"content": [token | {"top_logprobs": [token]}]} if body.get("logprobs") else None,
        }
        usage = {"prompt_tokens": 0, "completion_tokens": 1, "total_tokens": 1}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        text = json.dumps(answer | {"choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """Takes bursts: a judge asks many questions at once."""

    request_queue_size = 128
    daemon_threads = True


if __name__ == "__main__":
    Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
