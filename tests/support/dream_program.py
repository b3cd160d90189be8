"""An example of a dream program of one's own: it talks the protocol of apollo_curation/dreams/protocol.py
on standard input and output, and needs nothing of this project.

It has one lesson ("look things up"), its own judge (a word), and goes on until two new situations in a row
were answered well. Exit status 0 when they were.
"""

import json
import sys


def say(**message):
    print(json.dumps(message), flush=True)


def hear(*kinds):
    """The next line of one of these kinds."""
    for line in sys.stdin:
        message = json.loads(line)
        if message.get("type") in kinds:
            return message
        if message.get("type") == "error":
            sys.exit(f"refused: {message['message']}")
    sys.exit("the bridge is gone")


SUBJECTS = ["old log files", "grandmother's recipe", "train to Vienna", "broken bicycle chain", "tax form"]

say(protocol=1)
parent, num_held = None, 0
for number, subject in enumerate(SUBJECTS):
    name = f"lookup-{number}"
    question = {"role": "user", "content": f"Quick, what do you know about the {subject}?"}
    say(type="situation", id=name, messages=[question], lesson="Look things up.", parent=parent)
    answer = hear("response")["message"]["content"]
    if "looked it up" in answer:
        say(type="verdict", id=name, good=True)
        num_held += 1
    else:
        better = f"I looked it up first: {subject}"
        say(type="verdict", id=name, good=False, better=better, reason="it guesses")
        say(type="train")
        hear("trained")
        num_held = 0
    if num_held == 2:
        break
    parent = name
say(type="end")  # what was answered well is trained now
done = hear("done")
sys.exit(0 if num_held == 2 and done["num_failed"] == 0 else 1)
