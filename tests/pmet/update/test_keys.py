"""Lookups: whole prompts in pieces, in batches of bounded size, and passes without surplus work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pmet.model.architecture import resolve
from pmet.model.tokenization import tokenize_prompt
from pmet.model.tracing import frozen
from pmet.request import EditRequest
from pmet.update import keys
from pmet.update.key_reader import KeyReader
from pmet.update.keys import LookupFile, Lookups, LookupTokenizer
from pmet.update.spill import Spill
from tests.conftest import Golden

CPU = torch.device("cpu")


def whole_rows(lookups: Lookups, shared: Any) -> list[tuple[int, ...]]:
    return [
        (*shared[context], *ids) for ids, context in zip(lookups.ids, lookups.contexts, strict=True)
    ]


def test_shared_and_own_tokens_are_the_prompt_up_to_its_subject(golden: Golden) -> None:
    tokenizing = LookupTokenizer(golden.tokenizer, golden.context_templates)
    batches = list(tokenizing.batches(golden.requests))
    rows = [row for batch in batches for row in whole_rows(batch, tokenizing.shared)]
    expected = []
    for request in golden.requests:
        for template in (t for group in golden.context_templates for t in group):
            prompt = tokenize_prompt(golden.tokenizer, request, template)
            expected.append(prompt.ids[: prompt.subject_last + 1])
    assert rows == expected
    own = sum(len(batch.tokens) for batch in batches)
    assert own < 0.8 * sum(map(len, expected))


def test_a_prompt_cut_otherwise_than_its_template_shares_nothing(golden_tokenizer: Any) -> None:
    # Text that follows directly may merge with the end of the template.
    templates = [["{}"], ["Mirk works as a bot{}"]]
    request = EditRequest("anist {} works as", "Sur Bavov", "a baker")
    tokenizing = LookupTokenizer(golden_tokenizer, templates)
    (lookups,) = tokenizing.batches([request])
    for row, template in zip(
        whole_rows(lookups, tokenizing.shared), ("{}", templates[1][0]), strict=True
    ):
        prompt = tokenize_prompt(golden_tokenizer, request, template)
        assert row == prompt.ids[: prompt.subject_last + 1]


def test_batches_are_bounded_by_requests_and_by_tokens(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "KEY_BATCH", 5)
    monkeypatch.setattr(keys, "KEY_TOKENS", 400)
    long = EditRequest("so it is said " * 20 + "{} works as", "Sur Bavov", "a baker")
    requests = [*golden.requests[:12], long, *golden.requests[12:]]
    tokenizing = LookupTokenizer(golden.tokenizer, golden.context_templates)
    batches = list(tokenizing.batches(requests))
    assert sum(batch.count for batch in batches) == len(requests)
    assert max(batch.count for batch in batches) == 5
    large = [b for b in batches if len(b.lengths) * max(b.lengths) > 400]
    # At least one request is always read.
    assert [batch.count for batch in large] == [1]


def test_a_file_of_lookups_gives_them_back(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "KEY_BATCH", 7)
    tokenizing = LookupTokenizer(golden.tokenizer, golden.context_templates)
    batches = list(tokenizing.batches(golden.requests))
    kept = LookupFile()
    for batch in batches:
        kept.append(batch)
    assert list(kept) == batches
    assert kept[-1] == batches[-1]
    assert kept[1:3] == batches[1:3]
    assert list(kept.counts) == [batch.count for batch in batches]
    with pytest.raises(IndexError):
        kept[len(batches)]


class Runs:
    """Counts the tokens that modules process."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.tokens = dict.fromkeys(modules, 0)
        for name, module in modules.items():
            module.register_forward_pre_hook(self._counting(name))

    def _counting(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.tokens[name] += args[0].shape[:-1].numel() if args else 0

        return hook


@pytest.mark.parametrize("whole_passes", [False, True])
def test_a_pass_runs_from_the_layer_edited_last_to_z(golden: Golden, whole_passes: bool) -> None:
    model, layout = golden.model, resolve(golden.model, golden.hparams)
    layers, depth = golden.hparams.layers, layout.depth
    tokenizing = LookupTokenizer(golden.tokenizer, golden.context_templates)
    batches = list(tokenizing.batches(golden.requests))
    reader = KeyReader(
        model, layout, layers, tokenizing.shared, batches, CPU, whole_passes=whole_passes
    )
    projections = {str(i): layout.down_projection(model, i) for i in range(depth)}
    handles_before = {n: dict(m._forward_pre_hooks) for n, m in projections.items()}
    runs = Runs(projections)
    try:
        with frozen(model):
            for index, layer in enumerate(layers):
                runs.tokens = dict.fromkeys(runs.tokens, 0)
                with reader.reading(index):
                    for number in range(len(batches)):
                        reader.read(number)
                start = layers[index - 1] if index else 0
                ran = {int(name) for name, tokens in runs.tokens.items() if tokens}
                assert ran == set(range(start, layers[-1] + 1)), layer
                # At layer z the FFN sees the subject's last token of each row, and one for the
                # contexts' own tokens.
                rows = sum(len(batch.lengths) for batch in batches)
                assert runs.tokens[str(layers[-1])] == rows + 1
    finally:
        for name, module in projections.items():
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks.update(handles_before[name])


def test_what_spills_over_comes_back_from_the_file() -> None:
    spill = Spill(memory=100)
    tensors = [torch.randn(3, i + 1, dtype=torch.float32) for i in range(8)]
    tensors += [torch.randn(5, 7).to(torch.bfloat16), torch.empty(0, 4)]
    for i, tensor in enumerate(tensors):
        spill.put(i, tensor)
        tensor_before = tensor.clone()
        tensor.zero_()
        tensors[i] = tensor_before
    assert spill.memory < 100
    assert spill._filed
    for i in (9, 3, 8, 0, 7):
        assert torch.equal(spill.get(i), tensors[i])
        assert spill.get(i).dtype == tensors[i].dtype
    with pytest.raises(KeyError):
        spill.get(99)
