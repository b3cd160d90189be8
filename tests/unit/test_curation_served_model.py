"""The client of the served model against a small server that answers as vLLM does."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from apollo_ipc.curation import served_model
from apollo_ipc.curation.served_model import ModelAway, Refused, ServedModel
from apollo_ipc.errors import UserError
from apollo_ipc.requests import Message

METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 4.0
vllm:request_success_total{engine="0",finished_reason="stop"} 10.0
vllm:request_success_total{engine="0",finished_reason="length"} 5.0
vllm:e2e_request_latency_seconds_count{engine="0"} 15.0
"""


class Vllm(BaseHTTPRequestHandler):
    """A token is a byte. The template is ChatML in capitals; its turns end with `|` and a newline. faults:
    statuses to answer first; thinks: the generation prompt opens a thought, a turn without one has none."""

    disable_nagle_algorithm = True
    faults: list  # these two are of the server that a test starts
    bodies: list
    thinks = False
    content = "Hello."

    def do_GET(self):
        if self.path == "/metrics":
            self.send(200, METRICS)
        else:
            self.send(200, {"data": [{"id": "m"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append((self.path, body))
        if self.faults:
            status = self.faults.pop(0)
            self.send(status, {"error": {"message": "not now", "param": "messages", "code": status}})
        elif self.path == "/tokenize":
            text = "".join(f"{one['role'][0].upper()}:{one['content']}|\n" for one in body["messages"])
            if body["add_generation_prompt"]:
                is_open = self.thinks and body.get("chat_template_kwargs") != {"enable_thinking": False}
                text += "A:" + ("<think>" if is_open else "")
            self.send(200, {"tokens": list(text.encode())})
        elif self.path == "/detokenize":
            self.send(200, {"prompt": bytes(body["tokens"]).decode()})
        elif self.path == "/v1/completions":
            said = [None, *({str(token): {"logprob": -token / 100}} for token in body["prompt"][1:])]
            self.send(200, {"choices": [{"text": "", "prompt_logprobs": said}]})
        else:
            self.send(200, {"choices": [{"message": {"content": self.content}}]})

    def send(self, status, data):
        payload = (data if isinstance(data, str) else json.dumps(data)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_):
        pass


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.setattr(served_model, "RETRY_S", 0.01)
    route = type("Route", (Vllm,), {"faults": [], "bodies": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), route) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        route.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield route
        server.shutdown()


QUESTION = [Message("user", "Q?")]


def test_the_first_model_of_the_list_is_asked_and_weights_of_messages_stay_here(vllm):
    model = ServedModel(f"{vllm.url}/v1/")
    context = [*QUESTION, Message("assistant", "A", weight=0), *QUESTION]
    assert model.chat(context, max_tokens=5).content == "Hello."
    ((path, body),) = vllm.bodies
    assert (path, body["model"]) == ("/v1/chat/completions", "m")
    assert all("weight" not in message for message in body["messages"])
    assert model.num_ended == 1


def test_a_thought_before_the_answer_is_left_out(vllm):
    vllm.content = "Let me see.\n</think>\n\nHello."
    assert ServedModel(vllm.url).chat(QUESTION, max_tokens=5).content == "Hello."


def test_only_the_answer_up_to_its_end_of_turn_is_measured(vllm):
    found = ServedModel(vllm.url).answer_logprobs(QUESTION, Message("assistant", "Yes"))
    assert found == [-token / 100 for token in b"Yes|"]  # not the newline behind it


def test_a_turn_without_a_thought_is_measured_where_the_prompt_would_open_one(vllm):
    vllm.thinks = True
    found = ServedModel(vllm.url).answer_logprobs(QUESTION, Message("assistant", "Yes"))
    assert found == [-token / 100 for token in b"Yes|"]


def test_a_server_that_starts_is_waited_for(vllm):
    vllm.faults = [503, 502, 429]
    assert ServedModel(vllm.url, patience_s=10).chat(QUESTION, max_tokens=5).content == "Hello."
    assert len(vllm.bodies) == 4


def test_a_server_that_stays_away_is_given_up(vllm):
    vllm.faults = [503] * 100
    with pytest.raises(ModelAway, match=r"did not answer for 0.05 s.*503: not now"):
        ServedModel(vllm.url, "m", patience_s=0.05).chat(QUESTION, max_tokens=5)
    with pytest.raises(ModelAway, match="ConnectError"):
        ServedModel("http://127.0.0.1:1", "m", patience_s=0).chat(QUESTION, max_tokens=5)
    vllm.faults = [503] * 100
    with pytest.raises(ModelAway):  # at once, though its patience is long
        ServedModel(vllm.url, "m", patience_s=1000, stop=lambda: True).chat(QUESTION, max_tokens=5)


def test_a_refusal_is_not_tried_again_and_says_what_the_server_said(vllm):
    vllm.faults = [400]
    with pytest.raises(Refused) as raised:
        ServedModel(vllm.url, patience_s=10).chat(QUESTION, max_tokens=5)
    error = raised.value
    assert (error.status, error.said, error.field) == (400, "not now", "messages")
    assert f"{vllm.url}/v1/chat/completions answered 400: not now" in error.message
    assert len(vllm.bodies) == 1


def test_the_load_is_that_of_all_engines(vllm):
    load = ServedModel(vllm.url).load()
    assert (load.num_running, load.num_waiting, load.num_ended) == (3, 4, 15)


def test_a_server_without_vllms_metrics_is_named(vllm, monkeypatch):
    monkeypatch.setattr(f"{__name__}.METRICS", "process_cpu_seconds_total 1.0\n")
    with pytest.raises(UserError, match="is it a vLLM"):
        ServedModel(vllm.url).load()
