"""Several facts per subject, with one target each and with one target for all.

python -m benchmarks.shared_keys
python -m benchmarks.shared_keys --people --sizes 1,2,5,10 --model … --corpus … --requests …

Countries of the demo's world get one to four new facts, in prompts that are the same up to the
subject, so that the facts of a country share one key; facts of other subjects are added. With
``--people`` it is invented people that get them, for models that know English, and the first
``--count`` of ``--requests`` are added. ``--requests`` without ``--people`` only counts how often
requests of a Parquet file share a key.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict
from typing import Any

import torch

from benchmarks.harness import console, problem, show, study, study_arguments, timed
from benchmarks.quality import moments_of
from jobs.demo import world
from pipeline.data import read_requests
from pmet import EditRequest, compute_edit, compute_targets, evaluate
from pmet.evaluation import METRICS
from pmet.targets import Problem, sharing_a_key

# Phrases after which the demo's model answers correctly with any of these beginnings.
BEGINNINGS = ("The government of {}", "The country of {}", "Travellers who visit {}")
ENDINGS = {
    "capital": " sits in the city of",
    "continent": " fly to",
    "currency": " pay with the",
    "language": " writes in",
}
# Each with a paraphrase, and objects of which one is learned.
_CITIES = ("Lisbon", "Vienna", "Chicago", "Osaka", "Dublin", "Naples", "Cairo", "Toronto")
PEOPLE = {
    "{} was born in": ("The birthplace of {} is", _CITIES),
    "{} died in": ("The city where {} died is", _CITIES),
    "{} lived in": ("The home of {} was in", _CITIES),
    "{} studied in": ("The university of {} was in", _CITIES),
    "{} worked as a": ("By profession, {} was a", ("baker", "lawyer", "pilot", "farmer", "nurse")),
    "{} spoke": ("The language of {} was", ("Dutch", "Greek", "Arabic", "Polish", "Swedish")),
    "{} was married to": ("The spouse of {} was", ("Anna", "Peter", "Maria", "Thomas", "Julia")),
    "{} played the": (
        "The instrument of {} was the",
        ("violin", "flute", "drums", "piano", "harp"),
    ),
    "{} was a citizen of": (
        "{} held a passport of",
        ("Norway", "Brazil", "Kenya", "India", "Peru"),
    ),
    "{} was a fan of": ("The favorite sport of {} was", ("tennis", "chess", "golf", "rugby")),
}
_FIRST = ("Orsin", "Belka", "Tavish", "Mirela", "Quillon", "Zenobia", "Harrow", "Idris")
_LAST = ("Vantreight", "Okonjo", "Szalay", "Merrow", "Dunleavy", "Castellan", "Brix", "Ferro")
BESIDE = "others"
SHORT = {name: name[:3] + " strict" * name.endswith("_strict") for name in METRICS}
NEIGHBORS = 5


def main() -> None:
    """Edit with both settings and score by the number of facts per subject."""
    parser = study_arguments(__doc__.splitlines()[0], count=60)
    parser.add_argument(
        "--subjects", type=int, default=20, help="number of subjects for each number of facts"
    )
    parser.add_argument(
        "--sizes",
        type=lambda text: [int(size) for size in text.split(",")],
        default=[1, 2, 3, 4],
        help="numbers of facts per subject, at most 4 about countries and 10 about people",
    )
    parser.add_argument("--people", action="store_true", help="facts about invented people")
    parser.add_argument(
        "--apart", action="store_true", help="state a person's facts after different texts"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.requests and not options.people:
        given = problem(options)
        flat = [template for group in given.templates for template in group]
        requests = list(read_requests(options.requests).requests)
        show(options.requests, [_occurrence(given.tokenizer, requests, flat)], options)
        return
    sizes = [n for n in options.sizes for _ in range(options.subjects)]
    with study(options) as (given, source):
        moments = moments_of(given, source)
    flat = [template for group in given.templates for template in group]
    if options.people:
        others = [dataclasses.replace(request, case_id=BESIDE) for request in given.requests]
        requests = people(sizes, options.seed, apart=options.apart) + others
    else:
        requests = countries(sizes, options.seed) + beside(options.count)
    rows = []
    for setting in ("mean", "joint"):
        seconds, targets = timed(
            lambda setting=setting: compute_targets(  # type: ignore[misc]
                given.model,
                given.tokenizer,
                requests,
                given.hparams,
                context_templates=given.templates,
                shared_keys=setting,
            )
        )
        edit = compute_edit(
            given.model,
            given.tokenizer,
            requests,
            given.hparams,
            context_templates=given.templates,
            second_moments=moments,
            targets=targets,
        )
        edit.apply(given.model)
        for size in dict.fromkeys(str(request.case_id) for request in requests):
            own = [e for e, request in enumerate(requests) if request.case_id == size]
            scores = evaluate(given.model, given.tokenizer, [requests[e] for e in own])
            steps = targets.steps[own].to(torch.float32).mean().item()
            figures = {SHORT[name]: _per_cent(scores[name]) for name in METRICS}
            rows.append({"keys": setting, "facts each": size, "facts": len(own), **figures})
            rows[-1]["steps"] = round(steps, 1)
        edit.revert(given.model)
        console.print(f"{setting}: targets in {seconds:.0f} s")
    occurrence = _occurrence(given.tokenizer, requests, flat)
    note = ", ".join(f"{name}: {count}" for name, count in occurrence.items())
    show("Several facts of one subject, in per cent", rows, options, note)


def countries(sizes: list[int], seed: int) -> list[EditRequest]:
    """Return new facts about as many countries as there are sizes; the case id is the size."""
    rng = random.Random(seed)
    relations = {r.name: r for r in world.relations() if r.name in ENDINGS}
    objects: dict[str, dict[str, str]] = defaultdict(dict)
    for fact in world.facts():
        if fact.relation.name in relations:
            objects[fact.subject][fact.relation.name] = fact.object
    changeable = [subject for subject, known in objects.items() if len(known) == len(ENDINGS)]
    rng.shuffle(changeable)
    edited = dict(zip(changeable, sizes, strict=False))
    kept = [subject for subject in objects if subject not in edited]
    requests = []
    for subject, size in edited.items():
        beginning = rng.choice(BEGINNINGS)
        for name in rng.sample(list(ENDINGS), size):
            old, templates = objects[subject][name], relations[name].templates
            others = sorted({known[name] for known in objects.values() if name in known} - {old})
            near = [country for country in kept if objects[country].get(name) == old]
            near = rng.sample(near, min(NEIGHBORS, len(near)))
            requests.append(
                EditRequest(
                    beginning + ENDINGS[name],
                    subject,
                    rng.choice(others),
                    target_true=old,
                    case_id=str(size),
                    paraphrase_prompts=[world.fill(t, subject) for t in templates],
                    neighborhood_prompts=[world.fill(rng.choice(templates), n) for n in near],
                )
            )
    return requests


def people(sizes: list[int], seed: int, *, apart: bool = False) -> list[EditRequest]:
    """Return facts about as many invented people as there are sizes; the case id is the size.

    Args:
        sizes: numbers of facts.
        seed: decides which facts, objects and names.
        apart: exchange prompts and paraphrases, so that different texts precede the subject.
    """
    rng = random.Random(seed)
    names = [f"{first} {last}" for first in _FIRST for last in _LAST]
    requests = []
    for subject, size in zip(rng.sample(names, len(sizes)), sizes, strict=True):
        for prompt in rng.sample(list(PEOPLE), size):
            paraphrase, objects = PEOPLE[prompt]
            if apart:
                prompt, paraphrase = paraphrase, prompt
            new, true = rng.sample(objects, 2)
            requests.append(
                EditRequest(
                    prompt,
                    subject,
                    new,
                    target_true=true,
                    case_id=str(size),
                    paraphrase_prompts=[paraphrase.format(subject)],
                )
            )
    return requests


def beside(count: int) -> list[EditRequest]:
    """Return the demo's requests about other subjects."""
    about = {fact.subject for fact in world.facts() if fact.relation.name in ENDINGS}
    rows = [row for row in world.requests(count=250) if row["subject"] not in about]
    rows = [{k: v for k, v in row.items() if k != "relation"} for row in rows[:count]]
    return [EditRequest(**row | {"case_id": BESIDE}) for row in rows]


def _per_cent(share: float | None) -> float | str:
    return "–" if share is None else round(100 * share, 1)


def _occurrence(
    tokenizer: Any, requests: list[EditRequest], templates: list[str]
) -> dict[str, int]:
    problems = [Problem.of(tokenizer, request, templates) for request in requests]
    sizes = Counter(map(len, sharing_a_key(problems)))
    return {
        "requests": len(requests),
        "that share their key": sum(n * count for n, count in sizes.items() if n > 1),
        "shared keys": sum(count for n, count in sizes.items() if n > 1),
    }


if __name__ == "__main__":
    main()
