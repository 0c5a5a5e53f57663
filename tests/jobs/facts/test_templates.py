import pytest

from jobs.facts.templates import RelationTemplates, load_templates
from pipeline.errors import FactDumpError
from tests.conftest import ROOT

GOOD = """
capital:
  prompt: The capital of {} is
  paraphrases: ["{}'s capital city is", " What is the capital of {}? It is "]
  neighborhood:
  - "The seat of government of {} is"
on: {prompt: "{} is on", target: "the {}"}
"12": {prompt: "{} has", neighborhood: []}
"""


def load(tmp_path, text):
    path = tmp_path / "t.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_templates(str(path))


def test_relations_are_put_into_words(tmp_path):
    found = load(tmp_path, GOOD)
    assert found["capital"] == RelationTemplates(
        prompt="The capital of {} is",
        paraphrases=("{}'s capital city is", "What is the capital of {}? It is"),
        neighborhood=("The seat of government of {} is",),
    )
    assert (found["on"].target, found["on"].paraphrases) == ("the {}", ())
    assert [found[name].neighbors for name in found] == [
        ("The seat of government of {} is",),
        ("{} is on",),
        (),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there are no relations"),
        ("- a", "there are no relations"),
        (
            "a: text",
            "a is not a mapping; a relation has prompt, paraphrases, question, neighborhood,",
        ),
        ("a: {}", "a.prompt is missing; write the prompt with {} for the subject"),
        ("a: {prompt: no place}", "a.prompt holds 0 places; write exactly one {}"),
        ('a: {prompt: "{} {}"}', "a.prompt holds 2 places; write exactly one {}"),
        ("a: {prompt: 1}", "a.prompt is not text; write it in quotes"),
        ('a: {prompt: "{}", promt: x}', "unknown key a.promt; a relation has prompt"),
        ('a: {prompt: "{}", paraphrases: "{} x"}', "a.paraphrases is not a list; write each"),
        ('a: {prompt: "{}", paraphrases: [x]}', "a.paraphrases.0 holds 0 places"),
        ('a: {prompt: "{}", target: the}', "a.target holds 0 places"),
        ('" a": {prompt: "{}"}\na: {prompt: "{}"}', "or two differ only in white space"),
        ('a: {prompt: "{}"}\na: {prompt: "{}"}', "line 2: key 'a' is already given on line 1"),
        ("a: !!python/name:os.system x", "could not determine a constructor"),
        ("a: &x [1]\nb: *x", "aliases"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, text, message):
    with pytest.raises(FactDumpError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/t.yaml: ")


def test_the_documented_templates_can_be_read(tmp_path):
    text = (ROOT / "docs" / "facts.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    found = load(tmp_path, text)
    assert list(found) == ["country", "currency"]
    assert found["currency"].target == "the {}"


def test_each_problem_has_a_line(tmp_path):
    with pytest.raises(FactDumpError) as caught:
        load(tmp_path, "a: {}\nb: {prompt: x}")
    assert len(str(caught.value).splitlines()) == 2


def test_a_missing_file_and_a_huge_one_are_refused(tmp_path):
    with pytest.raises(FactDumpError, match=r"templates: cannot read .*none.yaml"):
        load_templates(str(tmp_path / "none.yaml"))
    with pytest.raises(FactDumpError, match="at most 4 MiB"):
        load(tmp_path, '"a": {prompt: "{}"} #' + "x" * 2**22)


def test_a_template_of_several_lines_keeps_its_last_line_break(tmp_path):
    text = """
chat:
  prompt: |
    <|user|>
    {} lies in?
    <|assistant|>
  paraphrases: ["Q: {}?\\nA:\\n", " {} is in\\n"]
  target: "the {}\\n"
line:
  prompt: >
    {} lies
    in
"""
    found = load(tmp_path, text)
    assert found["chat"].prompt == "<|user|>\n{} lies in?\n<|assistant|>\n"
    assert found["chat"].paraphrases == ("Q: {}?\nA:\n", "{} is in")
    assert found["chat"].target == "the {}"
    assert found["line"].prompt == "{} lies in"
