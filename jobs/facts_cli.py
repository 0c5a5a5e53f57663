"""``pmet facts``: converts, checks and compares fact dumps and public data sets of edits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal

import typer
from rich.console import Console

facts = typer.Typer(
    name="facts",
    help="Work with fact dumps: convert to edit requests, check, compare.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
out = Console(highlight=False)

Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        "--columns",
        metavar="OURS=THEIRS,…",
        help="The dump's names for columns, e.g. subject=entity; can be repeated.",
    ),
]
Templates = Annotated[
    str | None, typer.Option(help="YAML file with a template per relation: a path or a URL.")
]
AsOf = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        help="Drop facts whose valid_until is at or before this time (ISO 8601). Default: now.",
    ),
]


@facts.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A fact dump (Parquet, CSV, JSON Lines, a saved datasets folder, a Delta or "
            "Iceberg table), Wikidata's JSON or incremental dump, or a data set of edits."
        ),
    ],
    output: Annotated[str, typer.Argument(help="Parquet file to write the edit requests to.")],
    templates: Templates = None,
    previous: Annotated[
        str | None,
        typer.Option(help="The previous dump; its objects become the true targets."),
    ] = None,
    only_changed: Annotated[
        bool,
        typer.Option("--only-changed", help="Skip facts that --previous also contains."),
    ] = False,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            "--from",
            help="dump, wikidata, wikidata-changes, or a data set's name. Default: detect.",
        ),
    ] = None,
    column: Columns = None,
    as_of: AsOf = None,
    as_dump: Annotated[
        bool,
        typer.Option(
            "--as-dump", help="Write a fact dump, for diff and refresh, instead of edit requests."
        ),
    ] = False,
    languages: Annotated[
        str | None,
        typer.Option(
            metavar="CODES",
            help="Wikidata: languages of labels, the preferred one first. Default: en,mul.",
        ),
    ] = None,
    instance_of: Annotated[
        str | None,
        typer.Option(
            metavar="CLASSES", help="Wikidata: only direct instances of these, such as Q5,Q515."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Wikidata: file of all labels; a whole dump writes it, changes read it."),
    ] = None,
) -> None:
    """Convert facts to edit requests; write unusable rows to a second file with their reasons."""
    from jobs.facts.sources import ConvertOptions, convert_source
    from jobs.facts.views import show_conversion

    options = ConvertOptions(
        format=format_,
        templates=templates,
        previous=previous,
        only_changed=only_changed,
        column=_mapping(column),
        as_of=_time("--as-of", as_of),
        as_dump=as_dump,
        languages=_listed(languages),
        instance_of=_listed(instance_of),
        labels=labels,
    )
    show_conversion(convert_source(source, output, options), out)


@facts.command()
def check(
    source: Annotated[str, typer.Argument(help="A fact dump or edit requests: Parquet.")],
    templates: Templates = None,
    column: Columns = None,
    as_of: AsOf = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with status 2 on any error or warning.")
    ] = False,
) -> None:
    """Check a fact dump or edit requests; exit with status 2 if they cannot be used."""
    from jobs.facts.check import check as run_check
    from jobs.facts.templates import load_templates
    from jobs.facts.views import show_check
    from pipeline.storage import json_text

    result = run_check(
        source,
        columns=_mapping(column),
        templates=None if templates is None else load_templates(templates),
        as_of=_time("--as-of", as_of),
    )
    if as_json:
        typer.echo(json_text.dumps(result.to_json(), indent=2))
    else:
        show_check(result, out)
    if not result.is_usable or (strict and not result.is_clean):
        raise typer.Exit(2)


@facts.command()
def diff(
    old: Annotated[str, typer.Argument(help="The earlier fact dump.")],
    new: Annotated[str, typer.Argument(help="The later fact dump.")],
    output: Annotated[
        str | None, typer.Option(help="Parquet file to write the differing facts to.")
    ] = None,
    column: Columns = None,
    as_of: AsOf = None,
    old_as_of: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Like --as-of, for OLD. Default: keep all its facts."),
    ] = None,
    examples: Annotated[
        int, typer.Option(min=0, help="Number of facts to show for each kind of change.")
    ] = 5,
) -> None:
    """Show which facts were added, changed or removed between two dumps."""
    from jobs.facts.diff import diff_dumps
    from jobs.facts.dump.files import open_dump
    from jobs.facts.output import output_urls, refuse_among, write_diff
    from jobs.facts.views import show_diff

    mapping = _mapping(column)
    before, after = open_dump(old, mapping), open_dump(new, mapping)
    inputs = [file.url for file in (*before.files, *after.files)]
    if output is not None:
        output_urls(output, inputs)
        refuse_among(output, (old, new))
    with diff_dumps(
        before,
        after,
        as_of=_time("--as-of", as_of),
        old_as_of=_time("--old-as-of", old_as_of),
    ) as found:
        show_diff(found, examples, out)
        if output is not None:
            out.print(write_diff(found, output, inputs), markup=False, soft_wrap=True)


Home = Annotated[
    str, typer.Argument(help="The home folder named in the refresh file: a path or a URL.")
]
Subject = Annotated[str, typer.Option(help="Subject of the fact, as the dump writes it.")]
Relation = Annotated[str, typer.Option(help="Relation of the fact.")]
Reason = Annotated[str, typer.Option(help="Reason, recorded in the ledger.")]


@facts.command()
def retract(home: Home, subject: Subject, relation: Relation, reason: Reason = "") -> None:
    """Retract a fact: refreshes leave it out, whatever the dump says, until it is restored."""
    _say_of_fact(home, subject, relation, "retract", reason)


@facts.command()
def restore(home: Home, subject: Subject, relation: Relation, reason: Reason = "") -> None:
    """Restore a retracted or quarantined fact: the next refresh includes it again."""
    _say_of_fact(home, subject, relation, "restore", reason)


@facts.command()
def ledger(
    home: Home,
    version: Annotated[
        int | None, typer.Option(min=1, help="Version to show. Default: the one in use.")
    ] = None,
    state: Annotated[
        str | None,
        typer.Option(
            help="Only show facts in this state: live, quarantined, rejected or retracted."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Number of facts to show.")] = 20,
) -> None:
    """Show the facts that a model is meant to know, with the state of each."""
    from jobs.refresh.home import Home as RefreshHome
    from jobs.refresh.views import show_ledger

    show_ledger(RefreshHome.open(home), version, state, limit, out)


def _say_of_fact(
    url: str, subject: str, relation: str, action: Literal["retract", "restore"], reason: str
) -> None:
    from jobs.refresh.home import Home as RefreshHome
    from jobs.refresh.views import show_retraction

    home = RefreshHome.open(url)
    home.refuse_unknown(subject.strip(), relation.strip(), action)
    show_retraction(home.retract(subject.strip(), relation.strip(), action, reason), out)


def _listed(text: str | None) -> list[str]:
    parts = (part.strip() for part in (text or "").split(","))
    return list(dict.fromkeys(part for part in parts if part))


def _mapping(columns: Sequence[str] | None) -> dict[str, str]:
    from pipeline.errors import FactDumpError

    mapping: dict[str, str] = {}
    for text in (part for given in columns or () for part in re.split(r",(?=\w+=)", given)):
        ours, equals, theirs = text.partition("=")
        if not (equals and ours and theirs):
            raise FactDumpError(f"--column {text}: write it as subject=NAME")
        if ours in mapping:
            raise FactDumpError(f"--column {text}: {ours} is given twice; keep one")
        mapping[ours] = theirs
    return mapping


def _time(option: str, text: str | None) -> datetime | None:
    from pipeline.errors import FactDumpError

    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise FactDumpError(
            f"{option}: {text!r} is not a time; write it like 2026-11-23 or 2026-11-23T06:00:00Z"
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
