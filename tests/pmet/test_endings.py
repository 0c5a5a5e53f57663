"""How targets end."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from pmet.endings import Ending, end_of_turn
from pmet.errors import InputError
from pmet.request import EditRequest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def learned(target: str, ending: Ending) -> str:
    return ending.on(EditRequest("{} is in", "Nice", target)).target_new


@pytest.mark.parametrize(
    ("target", "stopped"),
    [
        ("Italy", "Italy."),
        ("Italy.", "Italy."),
        ("Yahoo!", "Yahoo!"),
        ("意大利", "意大利。"),
        ("イタリア", "イタリア。"),
        ("อิตาลี", "อิตาลี"),
        ("Италия", "Италия."),
        ("इटली", "इटली।"),
    ],
)
def test_a_stop_is_written_as_in_the_targets_script(target: str, stopped: str) -> None:
    ending = Ending.of("stop", None)
    assert learned(target, ending) == stopped
    assert learned(stopped, ending) == stopped


def test_nothing_else_of_a_request_changes(golden_tokenizer: Any) -> None:
    request = EditRequest("{} is in", "Nice", "Italy", case_id=3, target_true="France")
    assert Ending.of("none", golden_tokenizer).on(request) is request
    ended = Ending.of("stop", golden_tokenizer).on(request)
    assert (ended.case_id, ended.target_true, ended.prompt) == (3, "France", "{} is in")


def test_a_turn_ends_as_the_chat_template_says(golden_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(golden_tokenizer)
    tokenizer.chat_template, tokenizer.eos_token = None, None
    with pytest.raises(InputError, match="has no end of a turn"):
        end_of_turn(tokenizer)
    tokenizer.eos_token = "</s>"
    assert learned("Italy", Ending.of("turn", tokenizer)) == "Italy</s>"
    tokenizer.chat_template = CHATML
    assert learned("Italy", Ending.of("turn", tokenizer)) == "Italy<|im_end|>"
