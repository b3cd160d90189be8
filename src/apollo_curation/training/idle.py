"""Whether nobody is asking the served model: by vLLM's own metrics, looked at now and then."""

from __future__ import annotations

import time
from collections.abc import Callable

from apollo_curation.chat_client import ChatClient


class Idleness:
    """`is_idle()`, asked again and again, is true once nobody has asked the model for `idle_s`.

    Nobody: no request runs or waits, and none has ended between two looks but those of `model`. One of ours
    that is under way counts as somebody, since training would slow it; so does what other processes of ours
    ask, for instance a judge in another terminal. The two counts are read one after the other, so that a
    request of ours that ends just then passes for somebody else's.
    """

    def __init__(
        self,
        model: ChatClient,
        idle_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._model = model
        self._idle_s = idle_s
        self._clock = clock
        self._num_others: int | None = None  # requests of others that had ended at the last look
        self._quiet_since = 0.0

    def is_idle(self) -> bool:
        """One look; the first is always false, since nothing is known of the time before it.

        Raises ModelAway; UserError where the server has no metrics of vLLM.
        """
        before = self._model.num_ended
        load = self._model.load()
        now = self._clock()
        num_others = load.num_ended - before
        is_busy = load.num_running > 0 or load.num_waiting > 0
        if is_busy or num_others != self._num_others:  # fewer: vLLM has restarted
            self._num_others = num_others
            self._quiet_since = now
            return False
        return now - self._quiet_since >= self._idle_s
