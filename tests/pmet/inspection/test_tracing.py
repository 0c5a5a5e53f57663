"""Causal traces: the batched form against one fact, one noise sample, one state at a time."""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pmet.hparams import PMETHyperParams
from pmet.inspection import (
    State,
    Statement,
    Trace,
    embedding_deviation,
    optimise_and_compare,
    states_to_trace,
    trace,
    tracing,
)
from pmet.inspection.tracing import noise_for
from pmet.model import resolve, share_out
from pmet.request import EditRequest
from tests import simulated
from tests.conftest import Golden, load_golden
from tests.parity.test_families import VARIANTS, build
from tests.pmet.inspection.conftest import with_true_objects

DEVIATION = 0.4
SAMPLES = 2
FACTS = slice(7, 11)
"""Some are known to each of the models, and not all to any."""


class Plain:
    """A pass at a time, with the modules that the hyper-parameters name, and hooks on them."""

    def __init__(self, golden: Golden) -> None:
        self.model, self.tokenizer = golden.model, golden.tokenizer
        names = golden.hparams
        self.templates = {
            "hidden": str(names.layer_module_tmp),
            "ffn": str(names.down_projection_template),
            "attention": str(names.attn_module_tmp),
        }

    def module(self, part: str, layer: int) -> nn.Module:
        return self.model.get_submodule(self.templates[part].format(layer))

    def tokens(self, request: EditRequest) -> tuple[list[int], int, int, list[int]]:
        """Ids with the answer but for its last token, the subject's first and last, the answer."""
        said = f"{request.text} {request.target_true}"
        encoded = self.tokenizer(said, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        start, stop = request.subject_span
        subject = [i for i, (a, b) in enumerate(spans) if a < stop and b > start and b > a]
        answer = [i for i, (_, b) in enumerate(spans) if b > len(request.text)]
        return ids[:-1], subject[0], subject[-1], [ids[i] for i in answer]

    def probability(self, ids: list[int], answer: list[int]) -> tuple[float, bool]:
        with torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0, -len(answer) :].double()
        log = logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
        return log.mean().exp().item(), logits.argmax(-1).tolist() == answer

    def traced(self, request: EditRequest, states: list[State], noise_STD: Tensor) -> Trace:
        ids, first, last, answer = self.tokens(request)
        sites = {(state.part, layer) for state in states for layer in state.layers}
        clean: dict[Any, Tensor] = {}
        with ExitStack() as stack:
            for site in sites:

                def keep(_module: Any, _args: Any, output: Any, site: Any = site) -> None:
                    hidden = output[0] if isinstance(output, tuple) else output
                    clean[site] = hidden.view(len(ids), -1)[last].clone()

                stack.callback(self.module(*site).register_forward_hook(keep).remove)
            before, known = self.probability(ids, answer)
        if not known:
            return Trace(False, before)

        def mean(restored: list[Any]) -> float:
            return sum(
                self.with_noise(ids, first, answer, noise_TD, restored, clean, last)
                for noise_TD in noise_STD
            ) / len(noise_STD)

        by_state = [mean([(s.part, layer) for layer in s.layers]) for s in states]
        return Trace(True, before, mean([]), tuple(by_state))

    def with_noise(
        self,
        ids: list[int],
        first: int,
        answer: list[int],
        noise_TD: Tensor,
        restored: list[Any],
        clean: dict[Any, Tensor],
        last: int,
    ) -> float:
        def corrupt(_module: Any, _args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[0, first : first + len(noise_TD)] += DEVIATION * noise_TD
            return output

        with ExitStack() as stack:
            embeddings = self.model.get_input_embeddings()
            stack.callback(embeddings.register_forward_hook(corrupt).remove)
            for site in restored:

                def restore(_module: Any, _args: Any, output: Any, site: Any = site) -> Any:
                    hidden = output[0] if isinstance(output, tuple) else output
                    changed = hidden.clone()
                    changed.view(len(ids), -1)[last] = clean[site]
                    return (changed, *output[1:]) if isinstance(output, tuple) else changed

                stack.callback(self.module(*site).register_forward_hook(restore).remove)
            return self.probability(ids, answer)[0]


def statements_of(golden: Golden) -> list[Statement]:
    return [
        Statement.of(golden.tokenizer, request, str(request.target_true))
        for request in with_true_objects(golden)[FACTS]
    ]


def traced(golden: Golden, batch_tokens: int = 2048) -> tuple[list[State], list[Trace]]:
    layout = resolve(golden.model, golden.hparams)
    states = states_to_trace(golden.model, layout, 3)
    options = {"deviation": DEVIATION, "samples": SAMPLES, "batch_tokens": batch_tokens}
    return states, trace(golden.model, layout, statements_of(golden), states, **options)


def numbers(traces: list[Trace]) -> Tensor:
    rows = [[t.clean, t.corrupted, *t.restored] for t in traces if t.known]
    return torch.tensor(rows, dtype=torch.float64)


def test_it_equals_the_plain_form(golden: Golden) -> None:
    states, found = traced(golden)
    plain = Plain(golden)
    width = golden.model.get_input_embeddings().weight.shape[1]
    expected = [
        plain.traced(request, states, noise_for(statement, width, samples=SAMPLES, seed=0))
        for request, statement in zip(
            with_true_objects(golden)[FACTS], statements_of(golden), strict=True
        )
    ]
    assert [t.known for t in found] == [t.known for t in expected]
    assert any(t.known for t in found)
    torch.testing.assert_close(numbers(found), numbers(expected), rtol=0, atol=1e-5)
    # The noise does something, and so does what is restored.
    known = numbers(found)
    assert (known[:, 0] - known[:, 1]).abs().max() > 1e-3
    assert known[:, 1:].std(1).max() > 1e-4


@settings(max_examples=4, deadline=None)
@given(st.integers(20, 600))
def test_what_runs_side_by_side_does_not_matter(batch_tokens: int) -> None:
    golden = load_golden("gpt2")
    _, together = traced(golden)
    _, apart = traced(golden, batch_tokens)
    assert [t.known for t in apart] == [t.known for t in together]
    torch.testing.assert_close(numbers(apart), numbers(together), rtol=0, atol=1e-6)


def test_a_model_whose_passes_cannot_start_in_the_middle_is_run_whole(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = traced(golden)
    monkeypatch.setattr(tracing, "why_whole", lambda *_: "it keeps a state")
    monkeypatch.setattr(tracing, "replaced", lambda *_: pytest.fail("a layer was passed by"))
    _, found = traced(golden)
    torch.testing.assert_close(numbers(found), numbers(expected), rtol=0, atol=1e-5)


def test_the_last_layer_cannot_bring_back_what_later_tokens_have_read() -> None:
    states, found = traced(load_golden("gpt2"))
    above = [n for n, state in enumerate(states) if state.layers == (4,)]
    for one in (t for t in found if t.known):
        for n in above:
            assert one.restored[n] == pytest.approx(one.corrupted, abs=1e-6)


def test_embeddings_may_be_narrower_than_the_model(golden_tokenizer: Any) -> None:
    model = build(next(v for v in VARIANTS if v.name == "opt-projected"))
    layout = resolve(model, PMETHyperParams(layers=(1,)))
    states = states_to_trace(model, layout, 1)
    request = EditRequest("{} works as", "Sur Bavov", "a baker")
    ids = golden_tokenizer(request.text)["input_ids"]
    with torch.no_grad():
        said = model(torch.tensor([ids])).logits[0, -1].argmax().item()
    statement = replace(Statement.of(golden_tokenizer, request, "a"), answer=(said,))
    (found,) = trace(model, layout, [statement], states, deviation=DEVIATION)
    assert found.known
    assert len(set(found.restored)) > 4


def test_a_model_on_several_devices_does_the_same() -> None:
    golden = load_golden("llama")
    hparams = golden.hparams.model_copy(update={"v_num_grad_steps": 2})
    states = [State("ffn", (0, 1, 2)), State("attention", (3,)), State("hidden", (2,))]
    layout = resolve(golden.model, golden.hparams)
    options = {"deviation": DEVIATION, "samples": 1}

    def outcome(model: nn.Module) -> tuple[Tensor, Tensor]:
        traces = trace(model, layout, statements_of(golden), states, **options)
        compared = optimise_and_compare(
            model, golden.tokenizer, golden.requests[7:9], hparams, context_templates=[["{}"]]
        )
        moved = [[*own.reached.values(), *own.moved.values()] for own in compared]
        return numbers(traces), torch.tensor(moved)

    expected = outcome(golden.model)
    with simulated.devices(2) as devices:
        found = outcome(share_out(deepcopy(golden.model), devices))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_states_are_single_parts_and_windows(golden: Golden) -> None:
    states = states_to_trace(golden.model, resolve(golden.model, golden.hparams), 2)
    single = [State(part, (i,)) for part in ("hidden", "ffn", "attention") for i in range(5)]
    windows = [State(part, (i, i + 1)) for part in ("ffn", "attention") for i in range(4)]
    assert set(states) == {*single, *windows}
    assert len(states) == len(single) + len(windows)


def test_noise_is_that_of_the_fact_and_the_seed() -> None:
    first, second = statements_of(load_golden("gpt2"))[:2]

    def drawn(statement: Statement, seed: int) -> Tensor:
        return noise_for(statement, 8, samples=2, seed=seed)

    assert drawn(first, 0).shape == (2, len(first.subject), 8)
    assert torch.equal(drawn(first, 0), drawn(first, 0))
    assert not torch.equal(drawn(first, 0), drawn(first, 1))
    assert drawn(first, 0)[0, 0].tolist() != drawn(second, 0)[0, 0].tolist()


def test_the_deviation_is_that_of_the_embeddings() -> None:
    model = load_golden("llama").model
    weight = model.get_input_embeddings().weight.detach()
    assert embedding_deviation(model, [5, 9, 9]) == pytest.approx(weight[[5, 9, 9]].std().item())


def test_a_subject_s_tokens_are_all_of_its_own() -> None:
    golden = load_golden("gpt2")
    request = EditRequest("The trade of {} is", "Drum Zeabril", "a baker")
    statement = Statement.of(golden.tokenizer, request, "a composer")
    said = golden.tokenizer.decode(statement.subject)
    assert said.strip() == "Drum Zeabril"
    whole = golden.tokenizer("The trade of Drum Zeabril is a composer")["input_ids"]
    assert (*statement.ids, statement.answer[-1]) == tuple(whole)
