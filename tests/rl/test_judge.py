"""The judge reward against servers of this test: scores, concurrency, repetitions, deadlines, the kept answers, the hidden key."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from r1mega.config.errors import UserError
from r1mega.rl.reward.judge import JudgeReward, NoScore
from r1mega.rl.reward.runner import RewardRunner
from r1mega.testing.contracts import check_reward

KEY = "sk-very-secret"


class Server(ThreadingHTTPServer):
    """Answers by ``self.answer(handler, body) -> (status, object or bytes, headers)``; keeps what it was asked."""

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.asked, self.now, self.most, self.lock = answer, [], 0, 0, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/score"

    def handle_error(self, request, client_address) -> None:
        """A client that went away is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.asked.append((self.path, body, dict(self.headers)))
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            status, answer, headers = server.answer(self, body)
        finally:
            with server.lock:
                server.now -= 1
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def serve() -> Iterator:
    servers = []

    def start(answer) -> Server:
        server = Server(answer)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def problem(question="2 + 2?", answer="4"):
    return SimpleNamespace(id="p", question=question, answer=answer, source="s", metadata={"level": 1}, solution=None)


def chat(text: str) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def test_chat(serve) -> None:
    server = serve(lambda handler, body: (200, chat("Score: 3 is too low for this.\nScore: 7.5"), {}))
    reward = JudgeReward(url=server.url, model="m", max_tokens=9).build()
    assert reward(problem(), "four {answer} {question}") == 0.75
    path, body, headers = server.asked[0]
    text = body.pop("messages")[0]["content"]
    assert path == "/score" and body == {"model": "m", "temperature": 0, "max_tokens": 9} and "Authorization" not in headers
    assert "2 + 2?" in text and "four {answer} {question}" in text and "from 0 (useless) to 10 (perfect)" in text
    assert reward(problem(), "four {answer} {question}") == 0.75 and len(server.asked) == 1, "kept"


def test_classify_and_json(serve) -> None:
    server = serve(lambda handler, body: (200, {"embedding": [1.0], "deep": [{"er": 3}]}, {}))
    classify = JudgeReward(url=server.url, api="classify", lowest=-3, highest=3).build()
    assert classify(problem(), "four") == pytest.approx(4 / 6) and server.asked[-1][1] == {"text": "2 + 2?\n\nfour"}
    scored = JudgeReward(url=server.url, api="json", score_path="deep.0.er", highest=2, prompt="{question}={response}?").build()
    assert scored(problem(), "four") == 1.0, "cut to the range"
    asked = server.asked[-1][1]
    assert asked == {"question": "2 + 2?", "response": "four", "answer": "4", "prompt": "2 + 2?=four?", "metadata": {"level": 1}}


def test_many_side_by_side_and_equal_ones_once(serve) -> None:
    def answer(handler, body):
        time.sleep(0.05)
        return 200, {"score": float(body["response"])}, {}

    server = serve(answer)
    judge = JudgeReward(url=server.url, api="json", highest=100, concurrency=16).build()
    values = judge.many([(problem(), str(idx % 40)) for idx in range(80)])
    assert values == [idx % 40 / 100 for idx in range(80)] and len(server.asked) == 40 and 4 <= server.most <= 16
    few = JudgeReward(url=server.url, api="json", highest=100, cached=10).build()
    few.many([(problem(), str(idx)) for idx in range(20)])
    assert len(few.cache) == 10


def test_refused_for_now_is_asked_again(serve) -> None:
    states = iter([(503, b"busy", {}), (429, b"", {"Retry-After": "0"}), (200, {"score": 1}, {})])
    server = serve(lambda handler, body: next(states))
    assert JudgeReward(url=server.url, api="json", highest=2).build()(problem(), "x") == 0.5 and len(server.asked) == 3


@pytest.mark.parametrize("status, answer, says", [
    (400, b"no such model", "status 400: no such model"),
    (200, b"<html>", "the answer is no JSON"),
    (200, {"score": None}, "no score: nothing at score"),
    (200, {"score": "nan"}, "no score: it is nan"),
    (200, {"other": 1}, "no score: nothing at score"),
    (200, [1], "no score: nothing at score"),
    (500, f"your key {KEY} is bad".encode(), "status 500: your key KEY is bad (2 times)"),
    (302, b"", "status 302"),
])  # fmt: skip
def test_no_score_is_a_failure_that_says_why(serve, monkeypatch, status, answer, says) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    server = serve(lambda handler, body: (status, answer, {"Location": "http://127.0.0.1:1/"} if status == 302 else {}))
    reward = JudgeReward(url=server.url, api="json", retries=1, api_key_env="MY_KEY").build()
    with pytest.raises(NoScore) as raised:
        reward(problem(), "x")
    assert says in str(raised.value) and KEY not in str(raised.value)
    assert server.asked[0][2]["Authorization"] == f"Bearer {KEY}"


def test_a_reply_without_a_score(serve) -> None:
    server = serve(lambda handler, body: (200, chat("I cannot say"), {}))
    with pytest.raises(NoScore, match="no score: the reply ends in 'I cannot say'"):
        JudgeReward(url=server.url).build()(problem(), "x")


def silent(handler, body):
    time.sleep(3.0)
    return 200, {"score": 1}, {}


def trickle_header(handler, body):
    for _ in range(30):
        handler.wfile.write(b"H")
        handler.wfile.flush()
        time.sleep(0.1)
    return 200, {"score": 1}, {}


def trickle_body(handler, body):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    return trickle_header(handler, body)


def endless(handler, body):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000000\r\n\r\n")
    while True:
        handler.wfile.write(bytes(1 << 16))


def hangs_up(handler, body):
    handler.connection.close()
    raise OSError


@pytest.mark.parametrize("answer", [silent, trickle_header, trickle_body, endless, hangs_up])
def test_a_bad_server_holds_nobody(serve, answer) -> None:
    server = serve(answer)
    judge = JudgeReward(url=server.url, api="json", request_seconds=0.4, deadline_seconds=1.0, retries=1).build()
    threads, start = threading.active_count(), time.monotonic()
    found = judge.many([(problem(), str(idx)) for idx in range(4)])
    assert time.monotonic() - start < 2.5 and all(isinstance(each, NoScore) for each in found)
    serving = [thread for thread in threading.enumerate() if "process_request" in thread.name]
    assert threading.active_count() - len(serving) <= threads, "its own threads have ended"


def test_nobody_listens_and_a_long_wait_is_not_waited_for(serve) -> None:
    found = JudgeReward(url="http://127.0.0.1:1/", api="json", retries=1).build().many([(problem(), "x")])
    assert "ConnectionRefusedError" in str(found[0]) and "(2 times)" in str(found[0])
    server = serve(lambda handler, body: (429, b"", {"Retry-After": "3600"}))
    start = time.monotonic()
    found = JudgeReward(url=server.url, api="json").build().many([(problem(), "x")])
    assert "asks to wait for 3600 s" in str(found[0]) and time.monotonic() - start < 5


def test_in_reward_processes(serve) -> None:
    """Calls are put together, failures stay with their own call, and a deadline above the runner's limit holds."""

    def answer(handler, body):
        time.sleep(0.5 if body["response"] == "2" else 0.0)
        return (400, b"no", {}) if body["response"] == "3" else (200, {"score": float(body["response"])}, {})

    server = serve(answer)
    choice = JudgeReward(url=server.url, api="json")
    with RewardRunner({"format": 1.0, "judge": 1.0}, 0.2, workers=2, rewards={"judge": choice}) as runner:
        records = runner.score([problem()] * 12, [str(idx % 6) for idx in range(12)])
    for idx, record in enumerate(records):
        assert record["format"].value == 0.0 and record["format"].failure == ""
        number = idx % 6
        assert record["judge"].value == (0.0 if number == 3 else number / 10)
        assert record["judge"].failure == ("NoScore: status 400: no" if number == 3 else "")


def test_contract(serve) -> None:
    server = serve(lambda handler, body: (200, chat("Score: 2"), {}))
    check_reward(JudgeReward(url=server.url))


@pytest.mark.parametrize("knobs, says", [
    ({}, "url: an http or https address; got ''"),
    ({"url": "ftp://x"}, "url: an http or https address"),
    ({"url": "http://me:pw@x/"}, "without a password; got one"),
    ({"url": "http://x", "lowest": 5.0, "highest": 5.0}, "highest: above lowest 5; got 5"),
    ({"url": "http://x", "api_key_env": "R1MEGA_NO_SUCH_KEY"}, "api_key_env: a variable that is set; got R1MEGA_NO_SUCH_KEY"),
    ({"url": "http://x", "pattern": "("}, "pattern: a regular expression"),
    ({"url": "http://x", "pattern": "[0-9]+"}, "pattern: has a group around the score"),
])  # fmt: skip
def test_wrong_knobs_are_refused_at_the_start(knobs, says) -> None:
    with pytest.raises(UserError, match="reward.options.judge") as raised:
        RewardRunner({"judge": 1.0}, rewards={"judge": JudgeReward(**knobs)})
    assert says in str(raised.value)
