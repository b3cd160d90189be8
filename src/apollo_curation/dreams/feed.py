"""The bridge for a dream program of somebody else's: lines in, answers out (see dream_protocol)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import BinaryIO, Literal

from apollo_curation.chat_client import Refused
from apollo_curation.dreams import protocol
from apollo_curation.dreams.bridge import Bridge, TrainingStopped
from apollo_curation.dreams.intake import Intake, Strip
from apollo_curation.dreams.judge import NoAnswer
from apollo_curation.dreams.protocol import Done, Error, OurVerdict, Out, Response, Trained
from apollo_curation.dreams.seeds import bounded_lines
from apollo_curation.dreams.table import Dream, Judged
from apollo_curation.logs.conversation import Source
from apollo_curation.moments.moments import Moment
from apollo_curation.training.batch_table import Batch
from apollo_ipc.errors import NotReady, UserError
from apollo_ipc.wire.requests import Message


class Feed:
    """One stream. answer: gets every line that goes out.

    path: how the stream is called as a source. has_dialogue: the program reads responses before it gives
    verdicts.
    """

    def __init__(
        self,
        bridge: Bridge,
        strip: Strip,
        answer: Callable[[Out], None],
        *,
        path: str,
        has_dialogue: bool,
    ):
        self.done = Done()
        self._bridge = dataclasses.replace(bridge, train=self._train)
        self._train_batch = bridge.train
        self._intake = Intake(bridge, strip, path)
        self._answer = answer
        self._path = path
        self._has_dialogue = has_dialogue
        self._batches: dict[str, Batch] = {}
        self._unjudged: dict[str, None] = {}  # names, in their order
        self._to_train: dict[str, None] = {}

    def run(self, file: BinaryIO) -> Done:
        """Reads to the end of the input, then settles. What goes wrong with a line is answered.

        Learner, judge or trainer away, and training that was stopped, end it before (Done.ended_by). Raises
        UserError where the first line is not the protocol's, and Refused where a server refuses all
        requests.
        """
        self._answer(protocol.Hello())
        self._to_train = {dream.name: None for dream in self._bridge.dreams.fed_untrained() if dream.name}
        try:
            self._read(file)
            self._judge_the_rest()
            self._flush()
        except NotReady as error:
            self._cut("away", error.message)
        except TrainingStopped as error:
            self._cut("stopped", f"training was stopped: {error}")
        except UserError as error:
            self.done.ended, self.done.ended_by = error.message, "refused"
            self._answer(self.done)
            raise
        self._answer(self.done)
        return self.done

    def _read(self, file: BinaryIO) -> None:
        has_begun = False
        max_bytes = self._bridge.config.curation.max_record_bytes
        for number, offset, line in bounded_lines(file, max_bytes):
            if line is not None and not line.strip():
                continue
            name = None
            try:
                if line is None:
                    raise UserError(f"the line has more than {max_bytes} bytes")
                if not has_begun:
                    protocol.parse_hello(line)
                    has_begun = True
                    continue
                data = protocol.parse_line(line)
                name = given if isinstance(given := data.get("id"), str) else None
                message = protocol.as_message(data)
                if isinstance(message, protocol.End):
                    return
                self._take(message, Source(self._path, number, offset))
            except Refused:
                raise
            except UserError as error:
                self._error(error.message, line=number, name=name, field=error.field)
                if not has_begun:
                    raise UserError(error.message, field=f"line {number}") from None
            if len(self._to_train) >= self._bridge.config.tier_dream.max_examples:
                self._flush()

    def _take(self, message: protocol.In, source: Source) -> None:
        match message:
            case protocol.Situation():
                self._take_situation(message, source)
            case protocol.Verdict():
                self._take_verdict(message)
            case protocol.Sample():
                self._take_sample(message, source)
            case protocol.TrainNow():
                self._flush()

    def _take_situation(self, message: protocol.Situation, source: Source) -> None:
        self.done.num_situations += 1
        dream = self._intake.situation(message, source)
        try:
            if dream.response is None:
                dream = self._bridge.respond(dream, asked=message.messages)
        except NoAnswer as error:
            self._drop(dream, error.reason)
            return
        assert dream.response is not None
        self._answer(Response(message.id, dream.response))
        if message.judge:
            self._judge(dream)
        elif dream.verdict is None:
            self._unjudged[message.id] = None
        else:
            self._go_on(dream)

    def _take_verdict(self, message: protocol.Verdict) -> None:
        if not self._has_dialogue:
            raise UserError(
                "a file cannot have seen the response; leave the verdict to the judge, or send a sample",
                field="type",
            )
        dream = self._bridge.find(message.id)
        if dream.response is None:
            raise UserError("there is no response to judge", field="id")
        if dream.verdict is not None and dream.verdict.good != message.good:
            raise UserError(f"it was judged {'good' if dream.verdict.good else 'bad'} before", field="good")
        if message.good and message.better is not None:
            raise UserError("goes with a response that is not good", field="better")
        if message.good and not dream.response.content.strip():
            raise UserError("the response is empty: nothing to learn; send a better one", field="good")
        if message.good and dream.is_cut_off:
            reason = "the response was cut off at dream.max_tokens: not to be learned; send a better one"
            raise UserError(reason, field="good")
        if not message.good and message.better is None and not self._bridge.config.judge.enabled:
            raise UserError("is needed: no judge is there to write it (judge.enabled)", field="better")
        self._unjudged.pop(message.id, None)
        if dream.verdict is None:
            dream = self._bridge.keep_verdict(dream, Judged(message.good, message.reason, message.confidence))
            self._count(dream)
        if dream.state == "open" and dream.better is None and message.better is not None:
            dream = self._bridge.dreams.change(dream, better=Message("assistant", message.better))
        self._go_on(dream)

    def _take_sample(self, message: protocol.Sample, source: Source) -> None:
        self.done.num_samples += 1
        self._go_on(self._intake.sample(message, source))

    def _judge(self, dream: Dream) -> None:
        """By our judge, where nobody has judged it yet."""
        try:
            if dream.verdict is None:
                if not self._bridge.config.judge.enabled:
                    self.done.num_unjudged += 1
                    reason = "nobody judged it: the judge is switched off (judge.enabled)"
                    self._error(reason, name=dream.name)
                    return
                dream = self._bridge.judge(dream)
                self._count(dream)
            if dream.state == "open" and dream.better is None:
                dream = self._bridge.improve(dream)
        except NoAnswer as error:
            self._drop(dream, error.reason)
            return
        name, verdict = dream.name, dream.verdict
        assert name is not None
        assert verdict is not None
        better = dream.better.content if dream.better else None
        self._answer(OurVerdict(name, verdict.good, verdict.reason, verdict.confidence, better))
        self._go_on(dream)

    def _go_on(self, dream: Dream) -> None:
        """With a dream that was judged, now or by an earlier run."""
        if dream.state == "open" and dream.better is None:
            try:
                dream = self._bridge.improve(dream)
            except NoAnswer as error:
                self._drop(dream, error.reason)
                return
        if dream.state in ("open", "good"):
            assert dream.name is not None
            self._to_train[dream.name] = None
        else:
            self._say_end(dream)

    def _judge_the_rest(self) -> None:
        for name in list(self._unjudged):
            self._judge(self._bridge.find(name))
        self._unjudged.clear()

    def _flush(self) -> None:
        """Trains what was collected."""
        names = list(self._to_train)
        self._to_train.clear()
        try:
            self._bridge.learn([self._bridge.find(name) for name in names])
        finally:
            for name in names:
                dream = self._bridge.find(name)
                if dream.state in ("trained", "failed"):
                    self.done.num_trained += dream.state == "trained"
                    self.done.num_failed += dream.state == "failed"
                    self._say_end(dream)

    def _train(self, moments: list[Moment]) -> Batch:
        batch = self._train_batch(moments)
        self._batches[batch.batch_id] = batch
        return batch

    def _say_end(self, dream: Dream) -> None:
        assert dream.name is not None
        if dream.state != "trained":
            self._error(f"{dream.state}: {dream.reason}", name=dream.name)
            return
        batch = self._batches.get(dream.batch_id or "")
        job_id, version = (batch.job_id, batch.weight_version) if batch else (None, None)
        self._answer(Trained(dream.name, dream.batch_id, job_id, version))

    def _count(self, dream: Dream) -> None:
        good = dream.state == "good"
        self.done.num_good += good
        self.done.num_bad += not good

    def _drop(self, dream: Dream, reason: str) -> None:
        self.done.num_dropped += 1
        self._bridge.drop(dream, reason)
        self._error(f"dropped: {reason}", name=dream.name)

    def _error(
        self, message: str, *, line: int | None = None, name: str | None = None, field: str | None = None
    ) -> None:
        self.done.num_errors += 1
        self._answer(Error(message, line, name, field))

    def _cut(self, by: Literal["away", "stopped"], reason: str) -> None:
        self.done.ended, self.done.ended_by = reason, by
        self._error(reason)
