"""`make demo`: a model is served, learns a handful of facts while it answers others, and is saved.

model -> apollo-ipc serve -> ask -> POST /teach (a tiny model: POST /train, in rounds) -> ask again
  -> POST /checkpoint -> reload with transformers -> ask
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from apollo_ipc.demo.real_model import NoRealModel
from apollo_ipc.demo.report import Answer, Report, TaughtAnswer
from apollo_ipc.demo.served import ANSWER_TOKENS, ServedModel, chat, quieten_libraries, say, user
from apollo_ipc.demo.stream import CompletionStream
from apollo_ipc.demo.subject import Subject, real_subject, tiny_subject
from apollo_ipc.process.serving import ServerFailed
from apollo_ipc.teaching.store import ENDED_PHASES

ROUNDS_AT_MOST = 10
ROUNDS_AT_LEAST = 3  # they make enough latencies to compare
PAUSE_S = 12.0  # before a lesson and after it, for latencies without training
LESSON_AT_MOST_S = 2400.0  # two slow cores without bf16 took 870


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="apollo-ipc demo", description=(__doc__ or "").split("\n")[0])
    tiny = "a tiny random model, hybrid, dense or of experts, instead of the real one"
    parser.add_argument("--arch", choices=("qwen3.5", "qwen3", "qwen3_moe"), help=tiny)
    ranks = "serve with that many processes, each with a part of every weight"
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help=ranks)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to FILE as JSON")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the model and the logs there")
    options = parser.parse_args(arguments)
    quieten_libraries()
    with tempfile.TemporaryDirectory(prefix="apollo-demo-") as scratch:
        directory = (options.keep or Path(scratch)).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        subject = choose(options.arch)
        report = Report(arch=subject.arch, model=subject.name)
        started = time.monotonic()
        try:
            run(directory, subject, report, num_ranks=options.tensor_parallel_size)
        except (ServerFailed, httpx.HTTPError) as error:
            report.problems.append(f"{type(error).__name__}: {error}")
        report.duration_s = time.monotonic() - started
        report.problems += report.find_problems()
    report.print(Console())
    if options.json:
        report.write_json(options.json)
    return 1 if report.problems else 0


def choose(arch: str | None) -> Subject:
    if arch is not None:
        return tiny_subject(arch)
    try:
        return real_subject()
    except NoRealModel as error:
        say("No real language model: %s. A tiny random one takes its place", error.message)
        return tiny_subject("qwen3.5")


def run(directory: Path, subject: Subject, report: Report, num_ranks: int = 1) -> None:
    say("Making ready: %s", subject.name)
    model_dir = subject.make(directory / "model")
    facts = subject.facts
    report.answers = [TaughtAnswer(fact.question, fact.key, taught=fact.answer) for fact in facts]
    report.answers_paraphrased = [Answer(fact.paraphrase, fact.key) for fact in facts if fact.paraphrase]
    report.answers_backwards = [Answer(fact.backwards, fact.about) for fact in facts if fact.backwards]
    report.answers_near = [Answer(fact.near, fact.key) for fact in facts if fact.near]
    report.answers_general = [Answer(*general) for general in subject.general]
    flags = ["--tensor-parallel-size", str(num_ranks)] if num_ranks > 1 else []
    with ServedModel(model_dir, directory, flags=flags) as served:
        say("Served at %s; asking before it is taught", served.url)
        everything = report.all_answers()
        questions = [answer.question for answer in everything]
        for answer, said in zip(everything, served.ask_all(questions), strict=True):
            answer.before = said
            say("  %s  %r", answer.question, answer.before)
        with CompletionStream(served.url, served.model) as stream:
            if subject.options is None:
                teach(served, stream, subject, report)
            else:
                train(served, stream, subject, report)
        report.take_latencies(stream)
        for answer, said in zip(everything, served.ask_all(questions), strict=True):
            answer.after = said
        status = served.get("/train/status")
        report.parameters = status["num_parameters"]
        report.parameters_mapped = status["num_parameters_mapped"]
        report.weight_version = status["weight_version"]
        say("Writing the checkpoint")
        report.bytes_synced = served.post("/checkpoint", {})["bytes_written"]
    say("Stopped. Loading the directory with transformers and asking once more")
    ask_from_disk(model_dir, report)


def teach(served: ServedModel, stream: CompletionStream, subject: Subject, report: Report) -> None:
    """One lesson by POST /teach, with a pause on either side."""
    stream.label("before")
    time.sleep(PAUSE_S)
    stream.label(None)
    facts = [{"question": fact.question, "answer": fact.answer} for fact in subject.facts]
    # A model of this size writes no forms of use: it is not asked first whether it does.
    lesson, phase = served.post("/teach", {"facts": facts, "options": {"writer": "rules"}}), ""
    deadline = time.monotonic() + LESSON_AT_MOST_S
    while lesson["status"] not in ENDED_PHASES:
        if time.monotonic() > deadline:
            raise ServerFailed(f"the lesson is still {lesson['status']} after {LESSON_AT_MOST_S:.0f} s")
        if lesson["status"] != phase:
            phase = lesson["status"]
            stream.label("during" if phase == "training" else "asking")
            say("  %s", phase)
        time.sleep(0.2)
        lesson = served.get(f"/teach/jobs/{lesson['teach_id']}")
    stream.label("before")
    time.sleep(PAUSE_S)
    if lesson["status"] != "applied":
        report.problems.append(f"the lesson is {lesson['status']}: {lesson.get('error')}")
    examined: dict[str, Any] = lesson.get("report") or {"jobs": []}
    report.known, report.hits, report.rise = (examined.get(name) for name in ("known", "hits", "rise"))
    for job in (served.get(f"/train/jobs/{job_id}") for job_id in examined["jobs"]):
        report.steps += job["steps_done"]
        report.loss_first = job["loss_history"][0] if report.loss_first is None else report.loss_first
        report.loss_last = job["loss_history"][-1]


def train(served: ServedModel, stream: CompletionStream, subject: Subject, report: Report) -> None:
    """Rounds of training with pauses as long between them, so that both latencies are of one run."""
    examples = [chat(fact.question, fact.answer) for fact in subject.facts]
    pause_s = 6.0
    for number in range(1, ROUNDS_AT_MOST + 1):
        stream.label("before")
        time.sleep(pause_s)
        stream.label("during")
        began = time.monotonic()
        job = served.post("/train?wait=true", {"examples": examples, "options": subject.options})
        stream.label(None)
        pause_s = min(30.0, max(2.0, time.monotonic() - began))
        report.steps += job["steps_done"]
        report.loss_first = job["loss_history"][0] if report.loss_first is None else report.loss_first
        report.loss_last = job["loss_history"][-1]
        for answer in report.answers:
            answer.after = served.ask(answer.question)
        num_known = sum(answer.is_right for answer in report.answers)
        say(
            "Round %d: %d steps, loss %.3f -> %.3f; %d of %d facts known; %d completions served beside it",
            *(number, job["steps_done"], job["loss_history"][0], job["loss_history"][-1]),
            *(num_known, len(report.answers), stream.num_served_by_label["during"]),
        )
        if num_known == len(report.answers) and number >= ROUNDS_AT_LEAST:
            return


def ask_from_disk(model_dir: Path, report: Report) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").eval()
    for answer in report.all_answers():
        ids = tokenizer.apply_chat_template(
            user(answer.question), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        answer.after_reload = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    sys.exit(main())
