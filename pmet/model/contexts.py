"""Context templates: the text that precedes a prompt while it is learned.

A list of groups, as published: first the bare ``[["{}"], …]``, then groups of generated prefixes
``"… . {}"``. They are generated once per run from the seed and recorded; sampling them in each
process would give every worker a different problem.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from pmet.errors import ContextTemplateError
from pmet.model.tokenization import encode
from pmet.model.tracing import cache_name, frozen

ContextTemplates = Sequence[Sequence[str]]

Contexts = Literal["completion", "chat", "both"]
CHAT_TURNS = ("{}", "Complete the sentence: {}")
"""A user's turns, with the place of the prompt."""
STARTS = ("The", "Therefore", "Because", "I", "You")
"""First words of the generated prefixes (MEMIT, section "context templates")."""
GENERATED_TOKENS = 10
TOP_K = 5


def check(templates: Any) -> list[list[str]]:
    """Return ``templates`` as lists.

    Raises:
        ContextTemplateError: not groups of strings with one ``{}`` each, or the first group is not
            just the bare template.
    """
    if not isinstance(templates, Sequence) or isinstance(templates, str) or not templates:
        raise ContextTemplateError('context templates must be groups: [["{}"], ["The … . {}"]]')
    for group in templates:
        if not isinstance(group, Sequence) or isinstance(group, str) or not group:
            raise ContextTemplateError(f"context templates: {group!r} is not a list of templates")
        for template in group:
            if not isinstance(template, str) or template.count("{}") != 1:
                raise ContextTemplateError(
                    f"context template {template!r} must hold exactly one {{}}, the prompt's place"
                )
            if any("\ud800" <= character <= "\udfff" for character in template):
                raise ContextTemplateError(
                    f"context template {template!r} holds a lone surrogate; write valid Unicode"
                )
    if list(templates[0]) != ["{}"]:
        raise ContextTemplateError(
            f'the first group of context templates is {templates[0]!r}; it must be ["{{}}"], '
            "the bare prompt"
        )
    return [list(group) for group in templates]


def parse(text: str, *, source: str) -> list[list[str]]:
    """Read context templates from JSON text; ``source`` names the file in messages.

    Raises:
        ContextTemplateError: not JSON, or not context templates.
    """
    try:
        return check(json.loads(text))
    except ContextTemplateError as error:
        raise ContextTemplateError(f"{source}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ContextTemplateError(f"{source} is not JSON ({error}); fix its syntax") from None


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def as_turn(tokenizer: Any, text: str) -> str:
    """A text as a user's turn of the chat template, up to where the answer begins."""
    turns = [{"role": "user", "content": text}]
    put: str = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return put


def in_chat(tokenizer: Any) -> list[str]:
    """Context templates in the form of a chat model: the prompt as a user's turn.

    The answer follows where the assistant's turn begins. In one of them the user asks for the rest
    of the sentence.

    Raises:
        ContextTemplateError: the tokenizer has no chat template, or one that cannot be used.
    """
    if not has_chat_template(tokenizer):
        raise ContextTemplateError(
            "the model's tokenizer has no chat template; use contexts: completion, or a model "
            "that was trained for chat"
        )
    templates = []
    for turn in CHAT_TURNS:
        text = as_turn(tokenizer, turn)
        bos = tokenizer.bos_token
        if bos and text.startswith(bos) and encode(tokenizer, "a")[0] == tokenizer.bos_token_id:
            # It is put in front of every text anyway.
            text = text.removeprefix(bos)
        if text.count("{}") != 1:
            raise ContextTemplateError(
                f"the chat template makes {text!r} of a turn, with {text.count('{}')} places for "
                "the prompt; use contexts: completion"
            )
        templates.append(text)
    return templates


def combined(templates: ContextTemplates, chat: Sequence[str], kind: Contexts) -> list[list[str]]:
    """Context templates of a kind.

    Args:
        templates: groups of templates for completions.
        chat: templates in the form of chat.
        kind: ``completion``: the former; ``chat``: of these only the bare prompt, and the latter as
            a group; ``both``: all of them, or the former alone if some are in the form of chat.
    """
    groups = [list(group) for group in templates]
    match kind:
        case "completion":
            return groups
        case "chat":
            return [groups[0], list(chat)]
        case "both":
            # A refresh keeps the templates of its first run, which have the group already.
            known = any(template in chat for group in groups for template in group)
            return groups if known else [*groups, list(chat)]


def generate(model: nn.Module, tokenizer: Any, *, seed: int = 0) -> list[list[str]]:
    """Generate five short prefixes with the model, by top-5 sampling from ``seed``.

    The caller's random state is not changed.
    """
    generator = torch.Generator().manual_seed(seed)
    prefixes = []
    for start in STARTS:
        (text,) = _sample(
            model, tokenizer, start, 1, GENERATED_TOKENS, generator=generator, top_k=TOP_K
        )
        # A template is one line with a single {}: braces in the text would be taken for more.
        prefixes.append(" ".join(text.replace("{", " ").replace("}", " ").split()) + ". {}")
    return [["{}"], prefixes]


def write_texts(
    model: nn.Module, tokenizer: Any, *, count: int, seed: int = 0, tokens: int = 32
) -> list[str]:
    """Generate about ``count`` texts of ``tokens`` tokens with the model, by plain sampling."""
    generator = torch.Generator().manual_seed(seed)
    each = -(-count // len(STARTS))
    return [
        text
        for start in STARTS
        for text in _sample(model, tokenizer, start, each, tokens, generator=generator)
    ]


@torch.no_grad()
def _sample(
    model: nn.Module,
    tokenizer: Any,
    start: str,
    count: int,
    tokens: int,
    *,
    generator: torch.Generator,
    top_k: int | None = None,
) -> list[str]:
    """Continue ``start`` ``count`` times; special tokens are never sampled."""
    device = next(model.parameters()).device
    banned = sorted({int(i) for i in tokenizer.all_special_ids})
    step = torch.tensor([list(encode(tokenizer, start))] * count, device=device)
    ids, cache, held = step, None, cache_name(model)
    with frozen(model):
        for _ in range(tokens):
            output = model(input_ids=step, use_cache=True, **{held: cache})
            cache = getattr(output, held, None)
            logits = output.logits[:, -1].float().cpu()
            logits[:, banned] = -torch.inf
            allowed = logits.shape[1] - len(banned)
            top = logits.topk(min(top_k or allowed, allowed))
            choice = torch.multinomial(top.values.softmax(-1), 1, generator=generator)
            step = top.indices.gather(1, choice).to(device)
            ids = torch.cat([ids, step], dim=1)
            if cache is None:  # a model that keeps nothing of earlier tokens
                step = ids
    return [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
