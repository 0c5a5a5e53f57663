"""Facts that share a key."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from jobs.facts.sharing import Keys, of_requests
from jobs.facts.templates import parse_templates
from pmet import EditRequest

PROMPTS = {"born": "{} was born in", "died": "{} died in", "age": "Ask {} for", "of": "Ask {} of"}
FACTS = st.lists(
    st.tuples(st.sampled_from(["Ada", "Bo", "Zoë", "x"]), st.sampled_from(list(PROMPTS))),
    max_size=12,
)


def expected(facts: list[tuple[str, str]]) -> list[list[int]]:
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, (subject, relation) in enumerate(facts):
        groups[subject, PROMPTS[relation].split("{}")[0]].append(row)
    return sorted(group for group in groups.values() if len(group) > 1)


@given(FACTS, st.integers(0, 12))
def test_facts_share_a_key_if_subject_and_the_text_before_it_agree(
    facts: list[tuple[str, str]], split: int
) -> None:
    templates = parse_templates({name: {"prompt": text} for name, text in PROMPTS.items()}, "t")
    keys = Keys(len(facts), templates)
    for rows in (range(len(facts))[:split], range(len(facts))[split:]):
        if len(rows):
            columns = {
                "subject": pa.array([facts[row][0] for row in rows]),
                "relation": pa.array([facts[row][1] for row in rows]),
                "row": pa.array(list(rows), pa.int64()),
            }
            keys.add(pa.table(columns))
    groups = [group.tolist() for group in keys.groups(np.arange(len(facts)))]
    assert sorted(groups) == expected(facts)
    assert sorted(map(len, groups), reverse=True) == [len(group) for group in groups]

    requests = [EditRequest(PROMPTS[relation], subject, "tea") for subject, relation in facts]
    assert sorted(of_requests(requests)) == expected(facts)
