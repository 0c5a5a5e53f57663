"""The questions of requests in parts."""

from __future__ import annotations

from pipeline.stages.asking import LARGEST_PART, TEXTS_TOGETHER, parts_of, parts_of_texts
from pmet.evaluation.generation import Said
from pmet.request import EditRequest


def test_a_prompt_is_asked_once_however_many_requests_have_it() -> None:
    count = 3 * LARGEST_PART
    requests = [
        EditRequest(
            "{} is in",
            f"Place {i}",
            "Rome",
            target_true=f"Land {i % 2}",
            neighborhood_prompts=["Nice is in", f"Place {(i + 1) % count} is in"],
        )
        for i in range(count)
    ]
    parts = parts_of(requests)
    assert len(parts) == 4
    assert max(len(p.prompts) for p in parts) - min(len(p.prompts) for p in parts) <= 1
    asked = [pairs[0][0] for part in parts for pairs in part.prompts]
    assert asked == sorted({"Nice is in", *(request.text for request in requests)})
    nice = next(ps for part in parts for ps in part.prompts if ps[0][0] == "Nice is in")
    assert sorted(target for _, target in nice) == ["Land 0", "Land 1", "Rome"]
    assert not any(part.questions.stated for part in parts)
    assert all(not part.written for part in parts)
    written = [text for part in parts_of(requests, writing=True) for text in part.written]
    assert sorted(written) == sorted(r.text for r in requests)


def test_few_requests_are_enough_work_for_several_workers() -> None:
    def requests(count: int) -> list[EditRequest]:
        return [EditRequest("{} is in", f"Place {i}", "Rome") for i in range(count)]

    # An answer takes 18 tokens and more: forty requests in chat and in completion.
    assert len(parts_of(requests(200), answering=requests(40))) in (2, 4)
    assert len(parts_of(requests(40))) == 1


def test_answers_are_split_evenly_and_drafts_go_with_their_prompts() -> None:
    requests = [
        EditRequest("{} is in", f"Place {i}", "Rome", neighborhood_prompts=[f"Land {i} is in"])
        for i in range(400)
    ]
    draft = Said(" Rome", [1], True)
    drafts = {f"Land {i} is in": draft for i in range(0, 400, 2)}
    parts = parts_of(requests, answering=requests[:300], drafts=drafts)
    assert len(parts) > 1
    sizes = [len(part.questions.stated) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    stated = [text for part in parts for text in part.questions.stated]
    assert sorted(stated) == sorted(request.text for request in requests[:300])
    also = [f"Sea {i} is" for i in range(40)]
    more = parts_of(requests, answering=requests[:300], also=also, drafts={also[3]: draft})
    kept = [text for part in more for text in part.questions.kept]
    assert sorted(kept) == sorted([*also, *(f"Land {i} is in" for i in range(300))])
    assert [part.drafts for part in more if part.drafts] == [{also[3]: draft}]
    for part in parts:
        assert part.drafts == {text: draft for text in part.questions.kept if text in drafts}
    assert sum(len(part.drafts) for part in parts) == 150


def test_workers_share_texts_of_any_length_evenly() -> None:
    texts = ["word " * n for n in range(1, 52)]
    parts = parts_of_texts(texts)
    assert len(parts) == 4
    assert sorted(number for part in parts for number in part) == list(range(51))
    lengths = [sum(len(texts[number]) for number in part) for part in parts]
    assert max(lengths) < 1.4 * min(lengths)
    assert parts_of_texts(["word"]) == [[0]]
    assert parts_of_texts([]) == []
    many = parts_of_texts(["word"] * 300)
    assert max(map(len, many)) <= TEXTS_TOGETHER
    assert len(many) == 16
