"""What tests of the fine-tuning API ask of it."""

from __future__ import annotations

import json

LINE = {"messages": [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]}


def jsonl(*lines) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def add_file(client, *lines) -> str:
    return client.files.create(file=("train.jsonl", jsonl(*lines)), purpose="fine-tune").id


def create(client, **more):
    return client.fine_tuning.jobs.create(model="m", training_file=add_file(client, LINE, LINE), **more)


def sentence(raised) -> str:
    return raised.value.body["message"]
