"""Where an answer ends, and what it states."""

from __future__ import annotations

import pytest

from pmet.evaluation.statements import clause_end, first_stated, sentence_end


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (" Rome. It is old", " Rome."),
        (" Rome.", " Rome."),
        (" Rome", None),
        ("\n\n Rome\nIt", "\n\n Rome"),
        (" Rome! It", " Rome!"),
        (' "in Rome." It', ' "in Rome."'),
        (" St. Louis", None),
        (" Washington D.C. and", None),
        (" the U.S. capital is here. So", " the U.S. capital is here."),
        (" 3.", None),
        (" 3.5 metres. It", " 3.5 metres."),
        (" in 1999. It", " in 1999."),
        (" and so on... It", " and so on..."),
        ("巴黎。它", "巴黎。"),
        (" . Rome. It", " . Rome."),
        ("", None),
        ("   ", None),
    ],
)
def test_a_sentence_ends(text: str, sentence: str | None) -> None:
    assert text[: sentence_end(text)] == sentence if sentence else sentence_end(text) is None


@pytest.mark.parametrize(
    ("text", "clause"),
    [
        (" Rome, which", " Rome"),
        (" Rome. It", " Rome"),
        (" the capital of Italy (Rome", " the capital of Italy"),
        (" Rome - the", " Rome"),
        (" well-known", None),
        (" 1,000 people; or", " 1,000 people"),
        (" St. Louis, which", " St. Louis"),
        ("\nRome\n", "\nRome"),
        ("巴黎，它", "巴黎"),
        (" Rome", None),
        (" , Rome, it", " , Rome"),
    ],
)
def test_a_clause_ends(text: str, clause: str | None) -> None:
    assert text[: clause_end(text)] == clause if clause else clause_end(text) is None


@pytest.mark.parametrize(
    ("answer", "targets", "stated"),
    [
        (" Rome, the capital", ["Rome", "Paris"], "Rome"),
        (" not Paris but Rome", ["Rome", "Paris"], "Paris"),
        (" ROME!", ["Rome"], "Rome"),
        (" Romeo", ["Rome"], None),
        (" York Minster", ["York", "York Minster"], "York Minster"),
        (" in the Netherlands", ["Netherlands"], "Netherlands"),
        (" in Netherlands", ["the Netherlands"], "the Netherlands"),
        (" The The", ["The The"], "The The"),
        (" D.C. United", ["DC United", "D.C. United"], "D.C. United"),
        ("它是巴黎的", ["巴黎"], "巴黎"),
        ("เมืองปารีส", ["ปารีส"], "ปารีส"),
        (" दिल्ली में", ["दिल"], None),
        (" दिल्ली में", ["दिल्ली"], "दिल्ली"),
        ("ｒｏｍｅ", ["Rome"], "Rome"),
        ("", ["Rome"], None),
        (" Rome", ["?"], None),
        (" Rome", [], None),
    ],
)
def test_an_answer_states_a_target(answer: str, targets: list[str], stated: str | None) -> None:
    assert first_stated(answer, targets) == stated
