"""The power is cut after any operation of any protocol, and what is then on the disk comes up whole.

In the manner of SQLite's crash tests (sqlite.org/testing.html#crash_testing) and of ALICE (Pillai et al.,
OSDI 2014): each protocol runs once, on a disk that logs its operations (simulated_disk.py); from the log a
model makes what a power cut may leave (platter.py); real recovery runs on each such state (explorer.py), and
the result is compared to the last byte (small_model.py).

What a power cut may leave, after any prefix of the operations:

- A file's bytes since its last fdatasync: lost, kept, or so sector by sector (32 bytes here, as small as the
  files), a lost sector being old, zeros or garbage; its length is the old, the new or one in between.
- A directory's entries since its last fsync: each change (create, rename, link, unlink, mkdir, rmdir) has
  arrived or not, in any subset, whatever their order: more than any journalling file system would do.
- fdatasync of a file says nothing of its name, fsync of a directory nothing of its files' bytes, nor of the
  directory's own name in its parent.
- A rename is atomic. In one directory, the target changes and the source goes together. From one directory to
  another, the target may have arrived and the source still be there (both names), never the other way round;
  so a flush of the source's directory is one of the target as well.
- A file's time and permission bits are those of its last write (they are in the inode, as is the length, and
  fdatasync flushes that where the length has changed). In one state of thirteen every file has another time:
  weights, optimizer state and history must not depend on it.
- What is there at the start is flushed, but in a model that was just downloaded: there the shards may be lost
  like anything else until the first commit has returned, which then speaks of them.
- What was flushed stays. The disk does not lie about a flush, no flush fails, and flushed bytes do not rot.

A killed process is not a power cut: the next one sees all that it has done, flushed or not. So each protocol
is also killed before each operation, another process recovers, and the power is cut in that.

What must hold: the directory is the version before or the version after, all of it (shards, applied_seq,
optimizer state, history, verify); once the protocol has returned, the version after, for a mere reader too;
what a finished recovery has left never goes back; nothing is left over, and the next recovery has nothing to
do. Some states are brought up by the next sync, by loading or by attaching instead, and in some the power is
cut again in the recovery.
"""

from __future__ import annotations

import random

import pytest
from explorer import Explorer
from scenarios import SCENARIOS, record, record_killed

PROTOCOLS = list(dict.fromkeys(scenario.protocol for scenario in SCENARIOS))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_power_cut_leaves_a_torn_checkpoint(protocol, work_dir, record_property, pytestconfig):
    """`--crash-states`: how many; `--crash-seed`: which, each commit others. `make test-all` tries most."""
    seed, num_wanted = pytestconfig.option.crash_seed, pytestconfig.option.crash_states
    rng = random.Random(seed)
    scenarios = [scenario for scenario in SCENARIOS if scenario.protocol == protocol]
    explorer = Explorer(work_dir, scenarios[0].truth, rng)
    undisturbed = [record(scenario, work_dir) for scenario in scenarios]
    recordings = list(undisturbed)
    for scenario, recorded in zip(scenarios, undisturbed, strict=True):
        recordings += record_killed(scenario, recorded, work_dir, rng)
    problems, limit = [], 16  # states after each operation: more until there are enough different ones
    while explorer.num_states < num_wanted and not problems and limit < 10_000:
        for recorded in recordings:
            if recorded.start:
                problems += explorer.problems(recorded, start=recorded.start, limit=limit // 8)
            else:
                problems += explorer.problems(recorded, limit=limit, num_nested=2)
        limit *= 2
    record_property("num_states", explorer.num_states)
    print(f"{protocol}: {explorer.num_states} different states, {len(problems)} wrong, --crash-seed={seed}")
    assert problems == []
    assert explorer.num_states >= num_wanted
