"""Context templates: reproducible with a seed, and refused if unusable."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from pmet import compute_targets
from pmet.errors import ContextTemplateError
from pmet.model import contexts
from pmet.model.tokenization import encode, tokenize_prompt
from pmet.reference import plain_targets
from pmet.targets.problem import Problem
from tests.conftest import Golden

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def chatting(tokenizer: Any, template: str = CHAT) -> Any:
    found = copy.deepcopy(tokenizer)
    found.chat_template = template
    return found


def test_a_chat_models_contexts_are_its_users_turns(golden_tokenizer: Any) -> None:
    tokenizer = chatting(golden_tokenizer)
    first, second = contexts.in_chat(tokenizer)
    assert first.endswith("[user]\n{}\n[assistant]\n")
    assert second.endswith("[user]\nComplete the sentence: {}\n[assistant]\n")
    assert contexts.check([["{}"], [first, second]])


def test_a_bos_token_is_not_doubled(golden: Golden) -> None:
    tokenizer = chatting(golden.tokenizer)
    adds = encode(tokenizer, "a")[0] == tokenizer.bos_token_id
    for template in contexts.in_chat(tokenizer):
        ids = encode(tokenizer, template)
        assert ids.count(tokenizer.bos_token_id) == (1 if adds or tokenizer.bos_token else 0)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template; use contexts: completion"),
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "with 2 places for the"),
        ("Hello", "with 0 places for the prompt"),
    ],
)
def test_unusable_chat_templates_are_refused(
    golden_tokenizer: Any, template: str, message: str
) -> None:
    with pytest.raises(ContextTemplateError, match=message):
        contexts.in_chat(chatting(golden_tokenizer, template))


def test_contexts_are_combined() -> None:
    groups, chat = [["{}"], ["So. {}"]], ["[{}]", "<{}>"]
    assert contexts.combined(groups, chat, "completion") == groups
    assert contexts.combined(groups, chat, "chat") == [["{}"], chat]
    both = contexts.combined(groups, chat, "both")
    assert both == [["{}"], ["So. {}"], chat]
    # Templates that hold some of the chat ones were chosen so.
    chosen = [["{}"], ["So. {}"], chat[:1]]
    assert contexts.combined(chosen, chat, "both") == chosen
    for kind in ("chat", "both"):
        once = contexts.combined(groups, chat, kind)
        assert contexts.combined(once, chat, kind) == once


def test_facts_learned_in_chat_agree_with_the_plain_form(golden: Golden) -> None:
    """The subject is found in the user's turn, and the target begins the assistant's."""
    tokenizer, request = chatting(golden.tokenizer), golden.requests[0]
    templates = contexts.combined(golden.context_templates, contexts.in_chat(tokenizer), "both")
    flat = [template for group in templates for template in group]
    problem = Problem.of(tokenizer, request, flat)
    for template, prompt, answer in zip(flat, problem.contexts, problem.answers, strict=True):
        alone = tokenize_prompt(tokenizer, request, template)
        text = tokenizer.decode([*alone.ids, *answer])
        separator = "" if template.endswith("\n") else " "
        said = template.replace("{}", request.text) + separator + request.target_new
        assert text.replace("<s>", "").strip() == said.replace("<s>", "").strip()
        assert request.subject.endswith(tokenizer.decode([prompt.ids[prompt.subject_last]]).strip())
    hparams = golden.hparams.model_copy(update={"v_num_grad_steps": 5})
    given = (golden.model, tokenizer, golden.requests[:3], hparams)
    fast = compute_targets(*given, context_templates=templates)
    plain = plain_targets(*given, templates)
    assert fast.steps.tolist() == plain.steps.tolist()
    torch.testing.assert_close(fast.values, plain.values, rtol=1e-4, atol=1e-4)


def test_generated_templates_follow_the_seed(golden: Golden) -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = contexts.generate(golden.model, golden.tokenizer, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert contexts.generate(golden.model, golden.tokenizer, seed=3) == first
    assert contexts.generate(golden.model, golden.tokenizer, seed=4) != first
    assert contexts.check(first) == first
    bare, generated = first
    assert bare == ["{}"]
    assert len(generated) == 5
    assert all(t.endswith(". {}") and "\n" not in t for t in generated)
    assert [t.split()[0] for t in generated][:1] == ["The"]


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ([], "must be groups"),
        ("{}", "must be groups"),
        (["{}"], "not a list of templates"),
        ([["{}"], ["no place"]], "'no place' must hold exactly one"),
        ([["{}"], ["{} and {}"]], "exactly one"),
        ([["{}"], [3]], "exactly one"),
        ([["So. {}"], ["{}"]], "the first group"),
        ([["{}"], ["\ud800 {}"]], "holds a lone surrogate; write valid Unicode"),
        ([["{}"], []], "not a list of templates"),
    ],
)
def test_what_could_not_work_is_refused(templates: object, message: str) -> None:
    with pytest.raises(ContextTemplateError, match=message):
        contexts.check(templates)


@pytest.mark.parametrize("text", ["[" * 100_000, "[[" + "9" * 5000 + "]]"])
def test_what_would_harm_a_reader_is_refused(text: str) -> None:
    with pytest.raises(ContextTemplateError, match=r"^t\.json is not JSON"):
        contexts.parse(text, source="t.json")


def test_a_file_is_named_in_the_message() -> None:
    good = [["{}"], ["So it is. {}"]]
    assert contexts.parse(json.dumps(good), source="t.json") == good
    with pytest.raises(ContextTemplateError, match=r"t\.json is not JSON"):
        contexts.parse("[[", source="t.json")
    with pytest.raises(ContextTemplateError, match=r"t\.json: context templates"):
        contexts.parse('{"a": 1}', source="t.json")
