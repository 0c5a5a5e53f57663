"""What stands between a prompt and its target, by script, and the tokens that follow from it.

No tokenizer of a published model comes with the tests, so one is trained as those of GPT-2, Llama 3
and Qwen are: byte-level BPE, split into words by GPT-2's rule.
"""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pmet.errors import RequestError
from pmet.evaluation.prompts import Prompts
from pmet.model.tokenization import tokenize_continuation, tokenize_prompt, tokenize_target
from pmet.request import EditRequest
from pmet.separator import separator

# As a native writer joins them.
JOINED = {
    "Chinese": ("中国的首都是", "纽约"),
    "Chinese, with a colon": ("中国的首都：", "纽约"),
    "Chinese, with an ASCII colon": ("中国的首都:", "纽约"),
    "Chinese, a sentence": ("我爱中国。", "首都是北京"),
    "Chinese, in quotation marks": ("他说：“", "你好"),
    "Chinese, after a title": ("《红楼梦》", "的作者是曹雪芹"),
    "Chinese, then Latin": ("中国的首都是", "New York"),
    "Chinese, then a number": ("他出生于", "1990年"),
    "Chinese, after a number": ("他出生于1990", "年"),
    "Chinese, after Latin without a space": ("Apple公司的CEO", "是库克"),
    "Japanese": ("日本の首都は", "ニューヨーク"),
    "Japanese, hiragana": ("これはりんごと", "みかん"),
    "Japanese, katakana": ("フランスのスター", "パリ"),
    "Japanese, half-width": ("ﾌﾗﾝｽ", "パリ"),
    "Japanese, an iteration mark": ("佐々", "木"),
    "Japanese, in brackets": ("彼は「", "はい」と言った"),
    "Thai": ("เมืองหลวงของไทยคือ", "กรุงเทพ"),
    "Thai, a mark above": ("เขาอยู่ที่", "บ้าน"),
    "Lao": ("ນະຄອນຫຼວງຂອງລາວແມ່ນ", "ວຽງຈັນ"),
    "Khmer": ("រាជធានីនៃកម្ពុជាគឺ", "ភ្នំពេញ"),
    "Myanmar": ("မြန်မာနိုင်ငံ၏မြို့တော်သည်", "နေပြည်တော်"),
    "Tibetan": ("བོད་ཀྱི་", "ལྷ་ས"),
    "a bracket": ("The city (", "Paris)"),
    "English quotation marks": ("She said “", "no”"),
    "English, straight quotation marks": ('She said "', 'no"'),
    "English, quotation in brackets": ('It is (or "', 'was")'),
    "German quotation marks": ("Sie sagte „", "nein“"),
    "German, the other ones": ("Sie sagte »", "nein«"),
    "French quotation marks": ("Elle a dit «", "non »"),
    "French, second ones": ("Elle a dit « oui », puis «", "non »"),
    "Spanish": ("Dijo: ¿", "cuándo?"),
    "a line break": ("Q: Who?\nA:\n", "Ann"),
}
SPACED = {
    "English": ("The capital of China is", "New York"),
    "English, then Chinese": ("The capital of China is", "北京"),
    "English, after a Chinese name": ("The mayor of 東京", "is Koike"),
    "English, a digit": ("It was founded in 1990", "by Ann"),
    "English, a digit, then Chinese": ("He was born in 1990", "年"),
    "English, a closing quotation mark": ('The hero of "Emma"', "is Emma"),
    "English, a closing curly one": ("The hero of “Emma”", "is Emma"),
    "English, a plural's apostrophe": ("The dogs'", "home"),
    "German, a closing quotation mark": ("Der Held von „Faust“", "ist Faust"),
    "German, the other one": ("Der Held von »Faust!«", "ist Faust"),
    "Chinese with spaces around Latin": ("iPhone 的发明者是", "Steve Jobs"),
    "Chinese with spaces, after a number": ("他出生于 1990", "年"),
    "Chinese that ends in Latin, then Latin": ("中国的GDP", "is large"),
    "Arabic": ("عاصمة الصين هي", "نيويورك"),
    "Hebrew": ("בירת סין היא", "ניו יורק"),
    "Hindi": ("चीन की राजधानी", "न्यूयॉर्क है"),
    "Russian": ("Столица Китая —", "Нью-Йорк"),
    "Greek": ("Η πρωτεύουσα είναι", "η Αθήνα"),
    "Korean": ("중국의 수도는", "뉴욕"),
    "Korean, in brackets": ("「훈민정음」", "은 한글"),
    "Vietnamese": ("Thủ đô của Trung Quốc là", "New York"),
    "Amharic": ("የቻይና ዋና ከተማ", "ኒው ዮርክ"),
}
SENTENCES = [
    *("中国的首都是北京", "法国的首都是巴黎", "美国最大的城市是纽约", "纽约", "巴黎"),
    *("日本の首都は東京", "アメリカの都市はニューヨーク", "ニューヨーク", "東京です"),
    *("เมืองหลวงของไทยคือกรุงเทพ", "กรุงเทพ", "เมืองหลวงคือปารีส"),
    *("عاصمة الصين هي بكين", "أكبر مدينة هي نيويورك"),
    *("चीन की राजधानी बीजिंग है", "न्यूयॉर्क है"),
    *("Столица Китая — Пекин", "Нью-Йорк — большой город"),
    *("중국의 수도는 베이징", "뉴욕"),
    *("The capital of China is New York", "Paris"),
] * 3
SIDES = {
    "Chinese": ("{}的首都是", "中国", "纽约", ""),
    "Japanese": ("{}の首都は", "日本", "ニューヨーク", ""),
    "Thai": ("เมืองหลวงของ{}คือ", "ไทย", "กรุงเทพ", ""),
    "Arabic": ("عاصمة {} هي", "الصين", "نيويورك", " "),
    "Hindi": ("{} की राजधानी", "चीन", "न्यूयॉर्क है", " "),
    "Russian": ("Столица {} —", "Китая", "Нью-Йорк", " "),
    "Korean": ("{}의 수도는", "중국", "뉴욕", " "),
}


@pytest.mark.parametrize("name", JOINED)
def test_nothing_stands_where_the_script_puts_no_space(name: str) -> None:
    assert separator(*JOINED[name]) == ""


@pytest.mark.parametrize("name", SPACED)
def test_a_space_stands_where_the_script_puts_one(name: str) -> None:
    assert separator(*SPACED[name]) == " "


def test_a_space_stands_in_front_of_a_target_unless_white_space_does() -> None:
    assert [separator(text) for text in ("A is", "A:\n", "A \n ", "")] == [" ", "", "", " "]


def trained(size: int) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False, special_tokens=["<end>"]
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


# Few merges leave characters in several tokens; many make words of them.
@pytest.fixture(scope="module", params=[257, 330, 420])
def byte_level(request: pytest.FixtureRequest) -> Any:
    return trained(request.param)


@pytest.mark.parametrize("name", SIDES)
def test_a_target_gets_the_tokens_of_the_sentence_as_it_is_written(
    byte_level: Any, name: str
) -> None:
    prompt, subject, target, between = SIDES[name]
    request = EditRequest(prompt, subject, target)
    written = f"{request.text}{between}{target}"
    tokens = tokenize_prompt(byte_level, request)
    answer = tokenize_target(byte_level, request, target)
    assert [*tokens.ids, *answer] == byte_level(written)["input_ids"]
    assert byte_level.decode(answer) == f"{between}{target}"
    ((measured, same),) = Prompts(byte_level).continuations([(request.text, target)])
    assert (measured, same) == (tokens.ids, answer)
    # The last token that holds a byte of the subject, however many its last character takes.
    upto = byte_level.decode(tokens.ids[: tokens.subject_last + 1])
    _, stop = request.subject_span
    assert upto.startswith(request.text[:stop])
    assert not byte_level.decode(tokens.ids[: tokens.subject_last]).startswith(request.text[:stop])


def test_a_seam_that_the_tokenizer_would_merge_leaves_the_prompt_as_it_is() -> None:
    tokenizer = trained(2000)
    prompt = "中国的首都是"
    prompt_ids = tuple(tokenizer(prompt)["input_ids"])
    whole = tuple(tokenizer("中国的首都是北京")["input_ids"])
    assert whole[: len(prompt_ids)] != prompt_ids
    answer = tokenize_continuation(tokenizer, prompt, "北京")
    assert tokenizer.decode(answer) == "北京"


def test_a_tokenizer_that_puts_a_space_in_front_puts_none_between() -> None:
    """A merge across the seam in SentencePiece's form, which begins every text with a space."""
    vocabulary = {"▁": 0, "中": 1, "是": 2, "北": 3, "京": 4, "是北": 5, "\n": 6, "<unk>": 7}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("是", "北")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert wrapped("中是北京")["input_ids"] == [0, 1, 5, 4]
    assert tokenize_continuation(wrapped, "中是", "北京") == (3, 4)


@pytest.mark.parametrize("between", ["", " ", ": ", "\n", "　"])
def test_a_request_may_say_what_stands_between(golden_tokenizer: Any, between: str) -> None:
    request = EditRequest("The capital of {} is", "China", "New York", separator=between)
    answer = tokenize_target(golden_tokenizer, request, request.target_new)
    assert golden_tokenizer.decode(answer) == f"{between}New York"
    pair = (request.text, request.target_new, between)
    assert Prompts(golden_tokenizer).continuations([pair])[0][1] == answer


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (3, "separator is int, not a string; give text, which may be empty"),
        ("\ud800", "separator holds a lone surrogate at character 0; write valid Unicode"),
    ],
)
def test_a_separator_is_text(given: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        EditRequest("{} is in", "Nice", "Rome", separator=given)
