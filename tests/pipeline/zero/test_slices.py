"""Partitioned weights behave like whole ones; the reference is the same unpartitioned model."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from pipeline.cluster.rank_group import RankGroup
from pipeline.zero.collectives import in_lockstep, padded_steps, raise_together
from pipeline.zero.loading import load_partitioned, zero_config
from pipeline.zero.slices import (
    WeightSlice,
    add_block,
    full_shape,
    gathered,
    init_rank,
    own_squares,
    own_values,
    owned_slice,
)
from pmet.errors import NumericalError, PMETError

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
DOWN_PROJECTIONS = {
    "gpt2": "transformer.h.2.mlp.c_proj",
    "gptj": "transformer.h.2.mlp.fc_out",
    "llama": "model.layers.2.mlp.down_proj",
}
FAMILIES = list(DOWN_PROJECTIONS)
INPUT_IDS = torch.arange(3, 15).view(2, 6)


def run_forward(engine, **inputs):
    """Run the module without gradients; all ranks must do so together."""
    # Not through the engine: it expects a step of an optimizer to follow.
    with torch.no_grad():
        return engine.module(**inputs)


class Rank:
    """Runs the functions under test in one rank and returns their results."""

    def __init__(self, rendezvous):
        self.rank = rendezvous.rank
        init_rank(*rendezvous, device="cpu", timeout_s=60.0)

    def load(self, path, dtype, offload="none"):
        self.module, self.engine = load_partitioned(path, dtype=dtype, offload=offload)

    def logits(self, input_ids):
        return run_forward(self.engine, input_ids=input_ids).logits

    def body_runs(self, input_ids, times):
        """Run the model without its head, as if only hidden states were needed."""
        body = getattr(self.module, self.module.base_model_prefix)
        with torch.no_grad():
            return [body(input_ids=input_ids).last_hidden_state for _ in range(times)]

    def seen_by_hook(self, input_ids, name):
        seen = []
        hook = self.module.get_submodule(name).register_forward_pre_hook(
            lambda module, args: seen.append(args[0].detach().clone())
        )
        run_forward(self.engine, input_ids=input_ids)
        hook.remove()
        return seen

    def slices(self):
        return {
            name: (owned_slice(parameter), full_shape(parameter))
            for name, parameter in self.module.named_parameters()
        }

    def whole(self, name):
        with gathered(self.module.get_parameter(name)) as value:
            return value

    def add(self, name, delta, how="whole"):
        parameter = self.module.get_parameter(name)
        if how == "gathered before":
            parameter.all_gather()
        blocks = [(0, 0, delta)]
        if how == "rows":
            blocks = [(at, 0, delta[at : at + 27]) for at in range(0, len(delta), 27)]
        if how == "columns":
            blocks = [
                (0, left, delta[:, left : left + 27]) for left in range(0, delta.shape[1], 27)
            ]
        kept = own_values(self.engine, parameter).clone().double()
        squares = [add_block(self.engine, parameter, block, *at) for *at, block in blocks]
        after = own_values(self.engine, parameter).double()
        start, stop = owned_slice(parameter)
        change = delta.flatten()[start:stop]
        expected = [part.square().sum() for part in (change, kept, after - kept - change)]
        expected.append((kept + change).abs().max())
        *sums, largest = torch.tensor(squares, dtype=torch.float64).T
        found = [*(column.sum() for column in sums), largest.max()]
        return torch.stack(found), torch.stack(expected)

    def refusal(self, method, *args):
        """Return the error that a method raises; the ranks of the group continue after it."""
        try:
            getattr(self, method)(*args)
        except (PMETError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing was refused"

    def add_while_gathered(self, name, delta):
        parameter = self.module.get_parameter(name)
        with gathered(parameter):
            add_block(self.engine, parameter, delta)

    def write_to_gathered(self, name):
        parameter = self.module.get_parameter(name)
        with gathered(parameter) as value:
            value.zero_()
            return parameter.detach().clone()

    def odd_slices(self, shape):
        """Return the slice of a parameter that may not divide evenly, and its stored values."""
        import deepspeed

        with deepspeed.zero.Init(config_dict_or_path=zero_config(torch.float32)):
            holder = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(shape))])
        parameter = holder[0]
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(torch.arange(parameter.numel()).view(shape))
        start, stop = owned_slice(parameter)
        kept = parameter.ds_tensor[: stop - start].clone()
        with gathered(parameter) as value:
            return owned_slice(parameter), kept, full_shape(parameter), value

    def fail_together(self, failing):
        raise_together(NumericalError(f"rank {self.rank}") if self.rank in failing else None)

    def unequal_work(self, inputs):
        """Run one forward pass per input of this rank, plus fillers."""
        batches = inputs[: self.rank]
        steps = padded_steps(len(batches))
        kept = []
        for batch, real in in_lockstep(batches, inputs[-1]):
            logits = run_forward(self.engine, input_ids=batch).logits
            if real:
                kept.append(logits)
        return steps, kept


@pytest.fixture(scope="module")
def group(local_ray):
    """Three ranks, over which weights do not divide evenly."""
    with RankGroup(Rank, ranks=3, threads=1, deadline_s=120.0) as made:
        yield made


@pytest.fixture(autouse=True)
def one_thread():
    """Use as many threads as the ranks do: the number of threads affects how sums are split."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_path(family):
    return str(GOLDEN / family / "model")


def reference(family, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(model_path(family), dtype=dtype).eval()


def logits_of(model, input_ids=INPUT_IDS):
    with torch.no_grad():
        return model(input_ids=input_ids).logits


def random_delta(weight):
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    return noise.double() * 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_whole_model(group, family, dtype):
    group.call_all("load", model_path(family), dtype)
    expected = logits_of(reference(family, dtype))
    assert expected.dtype == dtype
    for _ in range(2):
        for logits in group.call_all("logits", INPUT_IDS):
            assert logits.dtype == dtype
            assert torch.equal(logits, expected)


def test_slices_may_wait_in_main_memory(group):
    """On a CPU they always are; this can only show that the option changes nothing."""
    group.call_all("load", model_path("llama"), torch.float32, "cpu")
    model = reference("llama")
    name = DOWN_PROJECTIONS["llama"] + ".weight"
    delta = random_delta(model.get_parameter(name))
    group.call_all("add", name, delta)
    with torch.no_grad():
        weight = model.get_parameter(name)
        weight.copy_((weight.double() + delta).to(weight.dtype))
    for logits in group.call_all("logits", INPUT_IDS):
        assert torch.equal(logits, logits_of(model))


def test_experts_that_transformers_fuses_are_loaded_by_it(group, tmp_path):
    """Models whose files store weights in another form than the model's."""
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    group.call_all("load", str(tmp_path), torch.float32)
    for logits in group.call_all("logits", INPUT_IDS):
        assert torch.equal(logits, logits_of(model))
    # It does not affect models that are opened later.
    group.call_all("load", model_path("llama"), torch.float32)
    assert torch.equal(group.call_all("logits", INPUT_IDS)[0], logits_of(reference("llama")))


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_see_whole_inputs(group, family):
    name = DOWN_PROJECTIONS[family]
    group.call_all("load", model_path(family), torch.float32)
    model, expected = reference(family), []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: expected.append(args[0]))
    logits_of(model)
    for seen in group.call_all("seen_by_hook", INPUT_IDS, name):
        assert len(seen) == 1
        assert torch.equal(seen[0], expected[0])


def test_slices_tile_every_parameter(group):
    group.call_all("load", model_path("gpt2"), torch.float32)
    by_rank = group.call_all("slices")
    shapes = {name: p.shape for name, p in reference("gpt2").named_parameters()}
    assert by_rank[0].keys() == shapes.keys()
    for name, shape in shapes.items():
        assert {full for _, full in (slices[name] for slices in by_rank)} == {shape}
        bounds = [slices[name][0] for slices in by_rank]
        assert bounds[0].start == 0
        assert bounds[-1].stop == shape.numel()
        assert all(a.stop == b.start for a, b in pairwise(bounds))


@pytest.mark.parametrize("shape", [(5, 7), (11,), (2,), (1,), (4, 3, 2)])
def test_slices_of_shapes_that_do_not_divide(group, shape):
    numel = torch.Size(shape).numel()
    answers = group.call_all("odd_slices", shape)
    covered = [index for (start, stop), *_ in answers for index in range(start, stop)]
    assert covered == list(range(numel))
    for (start, stop), kept, full, value in answers:
        assert torch.equal(kept, torch.arange(start, stop, dtype=torch.float32))
        assert full == torch.Size(shape)
        assert torch.equal(value, torch.arange(numel, dtype=torch.float32).view(shape))


@pytest.mark.parametrize(
    ("family", "dtype", "how"),
    [
        ("gpt2", torch.float32, "whole"),
        ("gpt2", torch.float32, "columns"),
        ("gptj", torch.float32, "rows"),
        ("llama", torch.float32, "gathered before"),
        ("llama", torch.bfloat16, "whole"),
    ],
)
def test_a_change_lands_to_the_bit_and_is_used(group, family, dtype, how):
    name = DOWN_PROJECTIONS[family] + ".weight"
    group.call_all("load", model_path(family), dtype)
    model = reference(family, dtype)
    weight = model.get_parameter(name)
    assert torch.equal(group.call_all("logits", INPUT_IDS)[0], logits_of(model))
    delta = random_delta(weight)
    for _ in range(2):
        with torch.no_grad():
            weight.copy_((weight.double() + delta).to(dtype))
        for squares, wanted in group.call_all("add", name, delta, how):
            assert torch.allclose(squares, wanted, rtol=1e-9)
        for whole in group.call_all("whole", name):
            assert torch.equal(whole, weight)
        for logits in group.call_all("logits", INPUT_IDS):
            assert torch.equal(logits, logits_of(model))


def test_a_change_after_modules_were_run_by_themselves(group):
    """Parts of the model that are called directly also see the written weights."""
    name = DOWN_PROJECTIONS["gptj"] + ".weight"
    group.call_all("load", model_path("gptj"), torch.float32)
    model = reference("gptj")
    weight = model.get_parameter(name)
    delta = random_delta(weight)
    for times in (1, 3):
        with torch.no_grad():
            expected = model.transformer(input_ids=INPUT_IDS).last_hidden_state
        for states in group.call_all("body_runs", INPUT_IDS, times):
            assert all(torch.equal(state, expected) for state in states)
        group.call_all("add", name, delta)
        with torch.no_grad():
            weight.copy_((weight.double() + delta).to(weight.dtype))
        assert torch.equal(group.call_all("logits", INPUT_IDS)[0], logits_of(model))


def test_ranks_with_unequal_work_do_not_hang(group):
    group.call_all("load", model_path("gptj"), torch.float32)
    model = reference("gptj")
    inputs = [INPUT_IDS, INPUT_IDS + 1, INPUT_IDS[:1, :1]]
    for rank, (steps, kept) in enumerate(group.call_all("unequal_work", inputs)):
        assert steps == group.size - 1
        assert len(kept) == rank
        assert all(torch.equal(a, logits_of(model, b)) for a, b in zip(kept, inputs, strict=False))


def test_a_failure_of_one_rank_is_raised_by_all(group):
    for said in group.call_all("refusal", "fail_together", (1, 2)):
        assert said == "NumericalError: rank 1"
    assert set(group.call_all("refusal", "fail_together", ())) == {"nothing was refused"}


def test_the_gathered_copy_is_read_only(group):
    name = DOWN_PROJECTIONS["gpt2"] + ".weight"
    group.call_all("load", model_path("gpt2"), torch.float32)
    expected = reference("gpt2").get_parameter(name)
    assert all(
        torch.equal(within, expected) for within in group.call_all("write_to_gathered", name)
    )
    assert all(torch.equal(whole, expected) for whole in group.call_all("whole", name))


class TestRefusals:
    """The errors of each rank; `test_rank_group` tests that they end a group."""

    def test_writing_while_gathered(self, group):
        name = DOWN_PROJECTIONS["llama"] + ".weight"
        group.call_all("load", model_path("llama"), torch.float32)
        delta = torch.zeros(reference("llama").get_parameter(name).shape)
        for said in group.call_all("refusal", "add_while_gathered", name, delta):
            assert "is gathered, and a write to its slice now" in said

    def test_a_change_of_another_size(self, group):
        name = DOWN_PROJECTIONS["gptj"] + ".weight"
        group.call_all("load", model_path("gptj"), torch.float32)
        for said in group.call_all("refusal", "add", name, torch.zeros(1, 7000)):
            assert re.fullmatch(
                r"ValueError: a change of shape \(1, 7000\) at row 0, column 0 is not inside the "
                r"weight of shape \(\d+, \d+\)",
                said,
            )

    def test_no_model(self, group, tmp_path):
        nowhere = str(tmp_path / "nowhere")
        for said in group.call_all("refusal", "load", nowhere, torch.float32):
            assert said == (
                f"ModelError: model {nowhere} has no config.json; give a Hugging Face model folder"
            )


class TestWholeParameter:
    """The same functions on a parameter that is not partitioned."""

    def test_shape_and_slice(self):
        parameter = torch.nn.Parameter(torch.zeros(3, 5))
        assert full_shape(parameter) == (3, 5)
        assert owned_slice(parameter) == WeightSlice(0, 15)

    def test_add_and_gather(self):
        parameter = torch.nn.Parameter(torch.full((3, 5), 0.1))
        delta = random_delta(parameter)
        expected = (parameter.detach().double() + delta).float()
        add_block(None, parameter, delta)
        with gathered(parameter) as value:
            assert torch.equal(value, expected)
            value.zero_()
        assert torch.equal(parameter, expected)

    def test_rows_of_stacked_matrices_count_on(self):
        parameter = torch.nn.Parameter(torch.randn(3, 4, 5))
        before = parameter.detach().clone()
        block = torch.randn(6, 2, dtype=torch.float64)
        add_block(None, parameter, block, top=5, left=3)
        expected = before.double().view(12, 5)
        expected[5:11, 3:] += block
        assert torch.equal(parameter.detach(), expected.float().view(3, 4, 5))
        assert own_squares(None, parameter) == pytest.approx(
            (parameter.detach().double().square().sum().item(), parameter.abs().max().item())
        )

    @pytest.mark.parametrize(
        ("stored", "loses"),
        [(torch.float16, True), (torch.bfloat16, True), (torch.float32, False)],
    )
    def test_what_the_stored_dtype_loses_is_counted(self, stored, loses):
        before = torch.full((3, 5), 0.5)
        parameter = torch.nn.Parameter(before.clone())
        delta = torch.full((3, 5), 2.0**-16, dtype=torch.float64)
        squares = add_block(None, parameter, delta, stored=stored)
        # Ranks continue with their own values, and a file stores what its dtype can represent.
        assert torch.equal(parameter.detach(), before + 2.0**-16)
        assert squares.lost == (squares.delta if loses else 0.0)
        assert squares.largest == 0.5 + 2.0**-16

    @pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
    def test_a_value_that_is_not_finite_is_the_largest(self, odd):
        parameter = torch.nn.Parameter(torch.ones(3, 5))
        delta = torch.zeros(3, 5, dtype=torch.float64)
        delta[1, 2] = odd
        largest = add_block(None, parameter, delta).largest
        assert not torch.tensor(largest).isfinite()

    def test_steps_without_other_ranks(self):
        assert padded_steps(4) == 4
        assert list(in_lockstep("ab", "-")) == [("a", True), ("b", True)]


def test_configurations_that_are_refused():
    with pytest.raises(ValueError, match="offload 'nvme' is not supported; use 'none' or 'cpu'"):
        zero_config(torch.float32, "nvme")
    with pytest.raises(ValueError, match=r"torch\.int8 weights are not supported"):
        zero_config(torch.int8)
