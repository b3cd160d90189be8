"""`apollo-ipc curate judge | score | moments | show | approve | reject | review`: what of the flagged moments
is worth learning."""

from __future__ import annotations

import getpass
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from apollo_curation.cli.curate_flag import open_moments
from apollo_curation.cli.curate_train import stop_by_signal
from apollo_curation.settings import CurationConfig, load_curation_config
from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import console, print_error, print_json, say
from apollo_ipc.errors import ApolloError, UserError

if TYPE_CHECKING:
    from apollo_curation.moments.moments import Moment, Moments

TEXT_SHOWN = 60  # characters of an answer in a list
EXIT_NOT_THERE = 69  # as errors.NotReady

Ids = Annotated[
    list[str],
    typer.Argument(metavar="MOMENT_ID...", help="The beginning of an id is enough where it fits one."),
]
Auto = Annotated[bool, typer.Option("--auto", help="Approve what is as sure as curation.auto_confidence.")]


def judge(
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many, the oldest first.")] = None,
    auto: Auto = False,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Let the judge look at flagged moments that it has not seen: learn or skip, and a better answer.

    Exit status 69 where the judge was away: what it did not judge stays flagged.
    """
    from apollo_curation.chat_client import judging as judge_model
    from apollo_curation.moments import judge as judging

    config = load_curation_config(config_file)
    if not config.judge.enabled:
        raise UserError("the judge is switched off; set `enabled = true` in [judge]", field="judge.enabled")
    with open_moments(config) as (_, moments), stop_by_signal() as stop:
        model = judge_model(config, stop)
        try:
            which = judging.unjudged(moments)[:limit]
            counts = judging.judge(moments, model, config.judge, which=which, stop=stop)
        finally:
            model.close()
        approved = _approve_confident(moments, config) if auto else []
    if as_json:
        print_json({"counts": counts, "approved": [moment.moment_id for moment in approved]})
    else:
        print(
            f"{counts.num_judged} judged: {counts.num_to_learn} to learn, {counts.num_to_skip} to skip; "
            f"{counts.num_answers} better answers, {counts.num_answers_refused} refused; "
            f"{counts.num_dropped} dropped, since two answers did not parse"
        )
        for num, words in (
            (counts.num_refused, "the judge's server would not read"),
            (counts.num_decided_meanwhile, "were decided meanwhile"),
            (counts.num_away, "stay flagged: the judge is away"),
        ):
            if num:
                say(f"{num} {words}{f' ({counts.problem})' if counts.problem else ''}")
        if auto:
            print(f"{len(approved)} approved by themselves")
    if counts.num_away:
        raise typer.Exit(EXIT_NOT_THERE)


def score(
    again: Annotated[bool, typer.Option("--again", help="Also what has a score already.")] = False,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Measure how surprising each answer is for the served model without its instructions.

    Exit status 69 where the model was away.
    """
    from apollo_curation.chat_client import learner
    from apollo_curation.moments import surprise

    config = load_curation_config(config_file)
    with open_moments(config) as (_, moments), stop_by_signal() as stop:
        model = learner(config, stop)
        try:
            counts = surprise.score(moments, model, surprise.unscored(moments, again=again))
        finally:
            model.close()
    if as_json:
        print_json(counts)
    else:
        print(f"{counts.num_scored} scored")
        if counts.num_refused:
            say(f"{counts.num_refused} cannot be scored ({counts.problem})")
        if counts.num_away:
            say(f"{counts.num_away} left: {counts.problem}")
    if counts.num_away:
        raise typer.Exit(EXIT_NOT_THERE)


def list_moments(
    states: Annotated[
        list[str] | None, typer.Option("--state", help="Only these states; may be given several times.")
    ] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="Only this kind.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the oldest first.")] = 100,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """List moments, the oldest first."""
    from typing import get_args

    from apollo_curation.moments.moments import Kind, State
    from apollo_ipc.errors import nearest

    for name, given, known in (
        ("--state", states or [], get_args(State)),
        ("--kind", [kind] if kind else [], get_args(Kind)),
    ):
        for one in given:
            if one not in known:
                raise UserError(f"there is no {one!r}; {nearest(one, known)}", field=name)
    with open_moments(load_curation_config(config_file)) as (_, table):
        found = [one for one in table.list(*_as_states(states)) if kind in (None, one.kind)]
    if as_json:
        print_json(found[:limit])
        return
    console().print(moments_table(found[:limit]) if found else "no moments")
    if len(found) > limit:
        say(f"{len(found) - limit} more; --limit shows them")


def show(
    moment_id: Annotated[str, typer.Argument(metavar="MOMENT_ID")],
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """One moment, whole: context, what was said and what would be learned, reason, what followed."""
    from apollo_curation.moments.review_view import print_view

    with open_moments(load_curation_config(config_file)) as (_, table):
        moment = table.get(moment_id)
    if as_json:
        print_json(moment)
    else:
        print_view(console(), moment, whole=True)


def approve(
    moment_ids: Ids,
    reason: Annotated[str, typer.Option("--reason", help="Kept with the decision.")] = "",
    config_file: ConfigFile = None,
) -> None:
    """Approve moments by id: they are trained when their tier's schedule says so."""
    from apollo_curation.moments import review as reviewing

    with open_moments(load_curation_config(config_file)) as (_, table):
        _each(moment_ids, lambda one: reviewing.approve(table, table.get(one), reason=reason))


def reject(
    moment_ids: Ids,
    reason: Annotated[str, typer.Option("--reason", help="Kept with the decision.")] = "",
    config_file: ConfigFile = None,
) -> None:
    """Reject moments by id: they are never trained."""
    from apollo_curation.moments import review as reviewing

    with open_moments(load_curation_config(config_file)) as (_, table):
        _each(moment_ids, lambda one: reviewing.reject(table, table.get(one), reason))


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
            with review_screen.Keys(sys.stdin) as keys:
                review_screen.run(session, console(), keys)
        finally:
            done = ", ".join(f"{num} {what}" for what, num in session.decided.items())
            print(f"{done or 'nothing decided'}; {len(table.list('flagged'))} flagged are left")


def moments_table(found: list[Moment]) -> Table:
    whole = ("moment", "state", "kind", "sure", "surprise", "source")
    table = Table(*(Column(name, no_wrap=True) for name in whole), "to be learned", box=None, pad_edge=False)
    from apollo_curation.moments.review_view import as_text, printable

    for moment in found:
        text = " ".join(printable(as_text(moment.answer)).split()) or "(no answer yet)"
        table.add_row(
            moment.moment_id,
            moment.state,
            moment.kind,
            f"{moment.confidence:.2f}",
            "" if moment.surprise is None else f"{moment.surprise:.2f}",
            printable(str(moment.source)),
            text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 3] + "...",
        )
    return table


def _approve_confident(table: Moments, config: CurationConfig) -> list[Moment]:
    from apollo_curation.moments.judge import approve_confident

    return approve_confident(table, config.curation.auto_confidence, only_judged=config.judge.enabled)


def _as_states(states: list[str] | None) -> list[Any]:
    return list(states or [])


def _each(moment_ids: list[str], decide: Any) -> None:
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
