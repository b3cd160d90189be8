"""From logs to moments: curation.sources and traffic.directory are looked through, curation.bootstrap is
followed."""

from __future__ import annotations

from pathlib import Path

import msgspec

from apollo_curation.logs.follow import Follower
from apollo_curation.moments.behaviour import follow_behaviour
from apollo_curation.moments.moments import Moments
from apollo_curation.moments.signals import flag_stripped
from apollo_curation.moments.signals.intake import Taken, take_new
from apollo_curation.settings import CurationConfig
from apollo_curation.store import Store
from apollo_ipc.errors import ConfigError


class TakenFromLogs(msgspec.Struct, frozen=True):
    flagged: Taken
    followed: Taken


def notice(config: CurationConfig, store: Store) -> TakenFromLogs:
    """Moments of all that is new, each record once, also across a crash.

    Raises ConfigError where a path is in both; Conflict where another process reads them at the same time.
    """
    own = config.curation
    recorded = [config.traffic.directory] if config.traffic.directory else []
    named = ([*own.sources, *recorded], own.bootstrap)
    sources, followed = (list(dict.fromkeys(Path(path).resolve() for path in paths)) for paths in named)
    for path in followed:
        both = (one for one in sources if one == path or one in path.parents or path in one.parents)
        if (other := next(both, None)) is not None:
            raise ConfigError(
                f"{path} is also read as one of curation.sources ({other}): a log is either followed or "
                "looked through",
                field="curation.bootstrap",
            )
    taken = []
    for paths, find in ((sources, flag_stripped), (followed, follow_behaviour)):
        follower = Follower(store, paths, own)
        taken.append(take_new(store, Moments(store), follower, own, find=find))
    return TakenFromLogs(*taken)
