"""`apollo-ipc curate judge | review | approve | reject`: what of the flagged moments is worth learning."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apollo_curation.cli.common import open_moments, stop_by_signal
from apollo_curation.settings import CurationConfig, load_curation_config
from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import console, print_error, print_json
from apollo_ipc.errors import ApolloError, NotReady, UserError
from apollo_ipc.process.progress import progress
from apollo_ipc.process.say import say

if TYPE_CHECKING:
    from apollo_curation.moments.judge import JudgeCounts
    from apollo_curation.moments.moments import Moment, Moments
    from apollo_curation.moments.surprise import ScoreCounts

Ids = Annotated[
    list[str],
    typer.Argument(metavar="MOMENT_ID...", help="The beginning of an id is enough where it fits one."),
]
Auto = Annotated[bool, typer.Option("--auto", help="Approve what is as sure as curation.auto_confidence.")]
Reason = Annotated[str, typer.Option("--reason", help="Kept with the decision.")]


def judge(
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many, the oldest first.")] = None,
    auto: Auto = False,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Ask the served model what the next message says of each candidate (hindsight), let the judge look at
    flagged moments that it has not seen (learn or skip, and a better answer), and measure how surprising each
    answer is for the served model without its instructions.

    Exit status 69 where judge or model was away: what it did not see stays flagged, or without a measure.
    """
    from apollo_curation.chat_client import judging as judge_model
    from apollo_curation.chat_client import learner
    from apollo_curation.moments import judge as judging
    from apollo_curation.moments import surprise
    from apollo_curation.moments.hindsight.better import check_better
    from apollo_curation.moments.hindsight.score import look_back

    config = load_curation_config(config_file)
    if not config.judge.enabled:
        raise UserError("the judge is switched off; set `enabled = true` in [judge]", field="judge.enabled")
    with (
        open_moments(config) as (store, moments),
        stop_by_signal() as stop,
        progress("asking what each next message says") as doing,
    ):
        with closing(learner(config, stop)) as model:
            looked = look_back(store, model, stop=stop)
        with closing(judge_model(config, stop)) as model:
            which = judging.unjudged(moments)[:limit]
            doing(f"the judge reads {len(which)} moments")
            counts = judging.judge(moments, model, config.judge, which=which, stop=stop)
        with closing(learner(config, stop)) as model:
            doing("measuring how surprising each answer is")
            check_better(store, model, stop)
            scored = surprise.score(moments, model)
        approved = _approve_confident(moments, config) if auto else []
    if as_json:
        ids = [moment.moment_id for moment in approved]
        print_json({"counts": counts, "scored": scored, "approved": ids, "hindsight": looked})
    else:
        told = ", ".join(f"{value} {name}" for name, value in looked.facts.items())
        print(f"hindsight: {looked.num_scored} scored{f' ({told})' if told else ''}")
        _print_judged(counts, scored)
        if auto:
            print(f"{len(approved)} approved by themselves")
    if counts.num_away or scored.num_away or looked.num_away:
        raise typer.Exit(NotReady.exit_code)


def calibrate(
    samples: Annotated[
        Path | None,
        typer.Option(
            "--samples", help="Labelled ones of your own, in the form of docs/curation.md.", exists=True
        ),
    ] = None,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Measure on labelled samples what hindsight's differences mean for the served model, and whether it can
    tell at all. A night does so by itself once for each model name; do it again when the model has become
    another one."""
    from apollo_curation.chat_client import learner
    from apollo_curation.moments.hindsight import calibration as calibrating
    from apollo_curation.moments.hindsight.samples import calibrating_samples

    config = load_curation_config(config_file)
    found = calibrating_samples(samples)
    with (
        open_moments(config) as (store, _),
        stop_by_signal() as stop,
        closing(learner(config, stop)) as model,
        progress("scoring the samples") as doing,
    ):
        made = calibrating.calibrate(model, found, lambda done, of: doing(f"{done} of {of} samples scored"))
        calibrating.Calibrations(store).keep(made)
    if as_json:
        print_json(made)
    else:
        print(calibrating.describe(made))


def review(
    auto: Auto = False,
    reviewer: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Whose place is kept [default: the user].")
    ] = None,
    config_file: ConfigFile = None,
) -> None:
    """Decide on flagged moments, one at a time; with --auto on the confident ones at once, without a screen.

    Keys: a approve, e edit the answer in $EDITOR and approve it, r reject, s skip, b back, m more, q quit.
    Without a terminal each line of the input is a key, and after r the reason. Decisions are kept at once.
    """
    from apollo_curation.moments import review_screen
    from apollo_curation.moments.review import Review

    config = load_curation_config(config_file)
    with open_moments(config) as (store, table):
        if auto:
            print(f"{len(_approve_confident(table, config))} approved by themselves")
            return
        session = Review(store, table, reviewer or getpass.getuser())
        if session.current is None:
            print("nothing is flagged")
            return
        try:
            review_screen.run(session, console(), sys.stdin)
        finally:
            done = ", ".join(f"{num} {what}" for what, num in session.decided.items())
            print(f"{done or 'nothing decided'}; {len(table.list('flagged'))} flagged are left")


def approve(moment_ids: Ids, reason: Reason = "", config_file: ConfigFile = None) -> None:
    """Approve moments by id: they are trained when their tier's schedule says so."""
    from apollo_curation.moments import review as reviewing

    with open_moments(load_curation_config(config_file)) as (_, table):
        _each(moment_ids, lambda one: reviewing.approve(table, table.get(one), reason=reason))


def reject(moment_ids: Ids, reason: Reason = "", config_file: ConfigFile = None) -> None:
    """Reject moments by id: they are never trained."""
    from apollo_curation.moments import review as reviewing

    with open_moments(load_curation_config(config_file)) as (_, table):
        _each(moment_ids, lambda one: reviewing.reject(table, table.get(one), reason))


def _print_judged(counts: JudgeCounts, scored: ScoreCounts) -> None:
    print(
        f"{counts.num_judged} judged: {counts.num_to_learn} to learn, {counts.num_to_skip} to skip; "
        f"{counts.num_answers} better answers, {counts.num_answers_refused} refused; "
        f"{counts.num_dropped} dropped, since two answers did not parse; {scored.num_scored} scored"
    )
    for num, words, problem in (
        (counts.num_refused, "the judge's server would not read", counts.problem),
        (counts.num_decided_meanwhile, "were decided meanwhile", None),
        (counts.num_away, "stay flagged: the judge is away", counts.problem),
        (scored.num_refused, "cannot be scored", scored.problem),
        (scored.num_away, "are not scored: the model is away", scored.problem),
    ):
        if num:
            say(f"{num} {words}{f' ({problem})' if problem else ''}")


def _approve_confident(table: Moments, config: CurationConfig) -> list[Moment]:
    from apollo_curation.moments.judge import approve_confident

    return approve_confident(table, config.curation.auto_confidence, only_judged=config.judge.enabled)


def _each(moment_ids: list[str], decide: Callable[[str], Moment]) -> None:
    """Decides on all that it can; exit status 2 where one was refused."""
    num_refused = 0
    for moment_id in moment_ids:
        try:
            moment = decide(moment_id)
        except ApolloError as error:
            print_error(error)
            num_refused += 1
        else:
            print(f"{moment.moment_id}: {moment.state}")
    if num_refused:
        raise typer.Exit(UserError.exit_code)
