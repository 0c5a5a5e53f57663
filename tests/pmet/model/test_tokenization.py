"""The subject's last token and the target's tokens, with tokenizers of every kind.

The tokenizers are trained here on a few sentences. What is asserted never looks at character
offsets: the tokens up to and including the subject's last one must decode to all of the text up
to the subject's end, and without that token they must not.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from pmet.errors import InputError, RequestError
from pmet.model.tokenization import encode, tokenize_prompt, tokenize_target
from pmet.request import EditRequest

BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"
SPECIAL = [UNKNOWN, BOS, EOS]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

REQUESTS = {
    "start": EditRequest("{} works as", "Sur Bavov", "a glass blower"),
    "middle": EditRequest("The mother tongue of {} is", "Danielle Darrieux", "French"),
    "end": EditRequest("They all came to see {}", "Chloë Moretz", "in New York"),
    "one character": EditRequest("{} is the letter before", "A", "B"),
    "twice, wanted first": EditRequest("{} and the brother of Sur Bavov like", "Sur Bavov", "tea"),
    "twice, wanted last": EditRequest("Of all Bavov firms, {} makes", "Bavov", "ink"),
    "inside a word": EditRequest("The un{}ed one is", "read", "here"),
    "possessive": EditRequest("{}'s trade is that of", "Drum Zeabril", "a smith"),
    "comma": EditRequest("The city of {}, which lies in", "São Paulo", "Brasília"),
    "quoted": EditRequest('In "{}" the hero is', "Les Misérables", "Zoë"),
    "punctuated": EditRequest("{}'s owner is", "Yahoo!", "Apollo"),
    "abbreviated": EditRequest("{}. It was made by", "Apple Inc", "Xerox"),
    "hyphen": EditRequest("The {}-class ship is", "Nimitz", "large"),
    "number": EditRequest("Windows {} was made by", "95", "IBM"),
    "Chinese": EditRequest("{}是一座城市，位于", "東京", "大阪"),
    "Chinese after text": EditRequest("在这里，{}的首都是", "日本国", "京都"),
    "Chinese and a space": EditRequest("The capital of {} is", "日本", "東京"),
    "Cyrillic": EditRequest("Родной язык {} —", "Лев Толстой", "французский"),
    "emoji": EditRequest("The sign {} means", "😀", "joy"),
    "emoji, joined": EditRequest("{}'s icon means", "Team 👍🏽", "good 😀"),
    "emoji, then text": EditRequest("A {}ing cat is", "🐈", "rare"),
    "composed": EditRequest("The song of {} is", unicodedata.normalize("NFC", "Beyoncé"), "Halo"),
    "decomposed": EditRequest("The song of {} is", unicodedata.normalize("NFD", "Beyoncé"), "Halo"),
    "braces": EditRequest("In {a}, the set {0} of {} } is {", "Sur {Bavov", "{b}"),
    "spaces within": EditRequest("The place  of {}  is", "Sur  Bavov", "Zaiter"),
}
TEMPLATES = {
    "bare": "{}",
    "sentence": "The cat sat. {}",
    "with the subject in it": (
        "Sur Bavov, Bavov, 東京, 日本 and 😀, A, read, Yahoo! met Beyoncé. {}"
    ),
    "with braces": "The set {0} {a}. {}",
}
TEXTS = [
    *(request.text for request in REQUESTS.values()),
    *(f"{request.text} {request.target_new}" for request in REQUESTS.values()),
    *(template.replace("{}", "The cat") for template in TEMPLATES.values()),
]
ASCII_TEXTS = [text for text in TEXTS if text.isascii()]


def as_is(text: str) -> str:
    """Compare texts except for the space that some tokenizers put in front."""
    return text.removeprefix(" ")


def composed(text: str) -> str:
    """Compare composed forms, for tokenizers that compose characters first."""
    return unicodedata.normalize("NFC", as_is(text))


def bare(text: str) -> str:
    """Compare as BERT's normalizer does, without spaces, accents, case and invisible characters."""
    decomposed = unicodedata.normalize("NFD", text.lower())
    return "".join(c for c in decomposed if unicodedata.category(c) not in ("Mn", "Cf", "Zs"))


@dataclass(frozen=True)
class Kind:
    """A tokenizer, and the form in which its decoded text equals the original."""

    tokenizer: Tokenizer
    form: Callable[[str], str] = as_is

    @property
    def wrapped(self) -> Any:
        return PreTrainedTokenizerFast(tokenizer_object=self.tokenizer)


def surrounded(
    tokenizer: Tokenizer, *, front: str | None = BOS, end: str | None = None
) -> Tokenizer:
    """Put special tokens around every text, as a post-processor does."""
    names = [name for name in (front, end) if name]
    single = " ".join([*([front] if front else []), "$A", *([end] if end else [])])
    tokens = [(name, tokenizer.token_to_id(name)) for name in names]
    template = processors.TemplateProcessing(single=single, special_tokens=tokens)
    before = tokenizer.post_processor
    tokenizer.post_processor = processors.Sequence([before, template]) if before else template
    return tokenizer


def byte_level(*, prefix_space: bool = False, trim: bool = True, size: int = 400) -> Tokenizer:
    """GPT-2's and RoBERTa's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_level_composed() -> Tokenizer:
    """Qwen's kind: characters are composed first."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def byte_level_split() -> Tokenizer:
    """Llama 3's kind: its own pattern splits the text, and punctuation may start a word."""
    pattern = r"'s|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def sentencepiece_decoder() -> decoders.Decoder:
    return decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )


def with_byte_fallback(tokenizer: Tokenizer) -> Tokenizer:
    """Encode unknown characters as bytes instead of the unknown token."""
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    if isinstance(vocabulary, dict):
        vocabulary |= {byte: len(vocabulary) + i for i, byte in enumerate(BYTES)}
    else:
        vocabulary += [[byte, 0.0] for byte in BYTES]
    state["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(state))


def metaspace_bpe(scheme: str, *, seams: bool = False) -> Tokenizer:
    """SentencePiece's BPE with byte fallback; it learns ASCII only, the rest are bytes.

    With ``seams`` it also learns tokens across the ends of words.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=not seams)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(ASCII_TEXTS, trainer)
    tokenizer = with_byte_fallback(tokenizer)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = sentencepiece_decoder()
    return tokenizer


def legacy_bpe() -> Tokenizer:
    """Llama 2's kind: a normalizer writes the spaces, nothing splits."""
    tokenizer = metaspace_bpe("always")
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def metaspace_unigram(scheme: str, *, byte_fallback: bool = False) -> Tokenizer:
    """SentencePiece's Unigram, which T5 and XLM-R use."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=SPECIAL, unk_token=UNKNOWN, show_progress=False
    )
    tokenizer.train_from_iterator(ASCII_TEXTS if byte_fallback else TEXTS, trainer)
    if byte_fallback:
        tokenizer = with_byte_fallback(tokenizer)
    tokenizer.decoder = sentencepiece_decoder()
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT's kind, which lowers case, drops accents and splits Chinese into characters."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


BUILDERS: dict[str, Callable[[], Kind]] = {
    "byte-level": lambda: Kind(byte_level()),
    "byte-level, prefix space": lambda: Kind(byte_level(prefix_space=True)),
    "byte-level, untrimmed": lambda: Kind(byte_level(prefix_space=True, trim=False)),
    "byte-level, BOS": lambda: Kind(surrounded(byte_level())),
    "byte-level, EOS": lambda: Kind(surrounded(byte_level(), front=None, end=EOS)),
    "byte-level, bytes only": lambda: Kind(byte_level(size=0)),
    "byte-level, composed, BOS": lambda: Kind(surrounded(byte_level_composed()), composed),
    "byte-level, split, BOS": lambda: Kind(surrounded(byte_level_split())),
    "BPE first, BOS": lambda: Kind(surrounded(metaspace_bpe("first"))),
    "BPE always, BOS": lambda: Kind(surrounded(metaspace_bpe("always"))),
    "BPE across words, BOS": lambda: Kind(surrounded(metaspace_bpe("first", seams=True))),
    "BPE legacy, BOS": lambda: Kind(surrounded(legacy_bpe())),
    "Unigram first, BOS": lambda: Kind(surrounded(metaspace_unigram("first"))),
    "Unigram always, BOS, EOS": lambda: Kind(surrounded(metaspace_unigram("always"), end=EOS)),
    "Unigram bytes, BOS": lambda: Kind(surrounded(metaspace_unigram("first", byte_fallback=True))),
    "WordPiece": lambda: Kind(surrounded(word_piece(), end=EOS), bare),
}
LOSSLESS = ["byte-level, prefix space", "byte-level, split, BOS", "BPE first, BOS"]


@cache
def kind_of(name: str) -> Kind:
    return BUILDERS[name]()


@pytest.fixture(scope="module", params=BUILDERS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each tokenizer in turn."""
    return kind_of(request.param)


def decoded(kind: Kind, ids: tuple[int, ...]) -> str:
    """Decode ids into the form used for comparison."""
    tokenizer = kind.tokenizer
    return kind.form(tokenizer.decode(list(ids), skip_special_tokens=True))


def assert_subject_ends_at(kind: Kind, request: EditRequest, template: str) -> None:
    prompt = tokenize_prompt(kind.wrapped, request, template)
    before, _, _ = (template[: template.index("{}")] + request.prompt).partition("{}")
    wanted = kind.form(before + request.subject)
    reached = decoded(kind, prompt.ids[: prompt.subject_last + 1])
    missed = decoded(kind, prompt.ids[: prompt.subject_last])
    assert reached.startswith(wanted), (reached, wanted)
    assert not missed.startswith(wanted), (missed, wanted)


def assert_target_continues(kind: Kind, request: EditRequest) -> None:
    prompt_ids = tokenize_prompt(kind.wrapped, request).ids
    target_ids = tokenize_target(kind.wrapped, request, request.target_new)
    between = request.between(request.text, request.target_new)
    assert decoded(kind, prompt_ids + target_ids) == kind.form(
        f"{request.text}{between}{request.target_new}"
    )
    special = {kind.tokenizer.token_to_id(name) for name in SPECIAL}
    assert target_ids
    assert not special & set(target_ids)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_the_subject_ends_at_its_last_token(kind: Kind, request_: EditRequest, template: str):
    assert_subject_ends_at(kind, request_, template)


def test_a_target_follows_the_last_line_break_of_a_chat_without_a_space(kind: Kind):
    request = EditRequest("User\nThe language of {} is\nAnswer\n", "Ada", "French")
    ids = tokenize_prompt(kind.wrapped, request).ids
    ids += tokenize_target(kind.wrapped, request, request.target_new)
    # Not every tokenizer here knows a line break.
    assert decoded(kind, ids) == decoded(kind, encode(kind.wrapped, f"{request.text}French"))


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_the_target_continues_the_prompt(kind: Kind, request_: EditRequest):
    assert_target_continues(kind, request_)


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_a_bos_token_shifts_the_subject_by_one(request_: EditRequest):
    without, with_bos = kind_of("byte-level").wrapped, kind_of("byte-level, BOS").wrapped
    plain, shifted = tokenize_prompt(without, request_), tokenize_prompt(with_bos, request_)
    assert shifted.ids == (with_bos.convert_tokens_to_ids(BOS), *plain.ids)
    assert shifted.subject_last == plain.subject_last + 1
    target = request_.target_new
    assert tokenize_target(with_bos, request_, target) == tokenize_target(without, request_, target)


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_an_appended_eos_token_changes_nothing(request_: EditRequest):
    without, with_eos = kind_of("byte-level").wrapped, kind_of("byte-level, EOS").wrapped
    assert with_eos(request_.text)["input_ids"][-1] == with_eos.convert_tokens_to_ids(EOS)
    assert tokenize_prompt(with_eos, request_) == tokenize_prompt(without, request_)
    target = request_.target_new
    assert tokenize_target(with_eos, request_, target) == tokenize_target(without, request_, target)


def test_several_tokens_share_one_character():
    """The last byte of the last character is where the subject is complete."""
    kind = kind_of("byte-level, bytes only")
    prompt = tokenize_prompt(kind.wrapped, REQUESTS["emoji"])
    assert prompt.subject_last == len("The sign 😀".encode()) - 1


def test_the_tokenizer_settings_of_the_caller_do_not_matter():
    kind = kind_of("byte-level, BOS")
    tokenizer = kind.wrapped
    expected = tokenize_prompt(tokenizer, REQUESTS["middle"])
    tokenizer.padding_side = "left"
    tokenizer.truncation_side = "left"
    tokenizer.pad_token = EOS
    assert tokenize_prompt(tokenizer, REQUESTS["middle"]) == expected


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(InputError, match=r"ByT5Tokenizer.*offsets.*fast"):
        tokenize_prompt(ByT5Tokenizer(), REQUESTS["middle"])
    with pytest.raises(InputError, match=r"ByT5Tokenizer.*offsets.*fast"):
        tokenize_target(ByT5Tokenizer(), REQUESTS["middle"], "French")


def test_a_subject_that_the_tokenizer_drops_is_refused():
    request = EditRequest("The sign {} means", "\u200d", "joy")
    with pytest.raises(RequestError, match="no token covers the subject"):
        tokenize_prompt(kind_of("WordPiece").wrapped, request)


def test_a_target_that_the_tokenizer_drops_is_refused():
    with pytest.raises(RequestError, match=r"target .* has no tokens"):
        tokenize_target(kind_of("WordPiece").wrapped, REQUESTS["middle"], "\u200d")


# Few characters, so that merges, repetitions and shared bytes are frequent.
LETTERS = st.text(alphabet="abe thFrnco.,'-(\"{}0é東京😀👍🏽\u0301\u200d", max_size=24)


@st.composite
def requests(draw: st.DrawFn) -> EditRequest:
    """Prompts with anything around the subject."""
    subject = draw(LETTERS.filter(lambda text: text.strip()))
    before = draw(LETTERS.filter(lambda text: "{}" not in text + "{"))
    after = draw(LETTERS)
    target = draw(LETTERS.filter(lambda text: text.strip()))
    prompt = f"{before}{{}}{after}".strip()
    if prompt.count("{}") != 1:
        prompt = "{}"
    return EditRequest(prompt, subject, target)


@settings(max_examples=150, deadline=None)
@given(request=requests(), name=st.sampled_from(LOSSLESS), context=LETTERS)
@example(REQUESTS["twice, wanted last"], LOSSLESS[0], "Bavov Bavov.")
def test_any_subject_ends_at_its_last_token(request: EditRequest, name: str, context: str):
    context = "" if "{}" in context + "{" else context.strip()
    assert_subject_ends_at(kind_of(name), request, f"{context} {{}}" if context else "{}")


@settings(max_examples=150, deadline=None)
@given(request=requests(), name=st.sampled_from(LOSSLESS))
def test_any_target_continues_its_prompt(request: EditRequest, name: str):
    assert_target_continues(kind_of(name), request)
