"""Train the small model of the demo world: ``python -m jobs.demo.train --output DIR``.

It trains a byte-level BPE tokenizer and a GPT-2-shaped model on nothing but the statements of
:mod:`jobs.demo.world`. These choices make the model a fair subject for fact editing:

- a row always starts with a statement, so a bare prompt at position 0 is familiar;
- most statements are joined by a space, so a prompt after other sentences is familiar too;
- strong weight decay keeps the norms of the layers comparable;
- states of subjects are exchanged after the edited layers (:mod:`jobs.demo.interchange`), so facts
  are read at the subject's last token, as in large models;
- the attention of the last edited layer is kept small, so that the method's attention vector, which
  is discarded in the end, has little to absorb.

Letters: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from jobs.demo import world
from jobs.demo.interchange import Interchange

END = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One training phase with its own learning-rate schedule.

    Attributes:
        steps: number of optimiser steps.
        learning_rate: peak of a schedule with a linear warm-up and a cosine decay.
        weight_decay: weight decay of the matrices; gains, offsets and embeddings have none.
        quiet_weight: weight of the squared norm of the attention's output at layer z.
        pairs: number of pairs of facts whose states are exchanged per step.
        exchange_from: first step with exchanges.
    """

    steps: int
    learning_rate: float
    weight_decay: float
    quiet_weight: float
    pairs: int
    exchange_from: int = 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings that produced the bundled model.

    Attributes:
        vocabulary: number of tokens of the tokenizer.
        width: width of the residual stream.
        layers: number of blocks.
        heads: attention heads per block.
        row_tokens: T, also the maximum context length of the model.
        batch_rows: B, rows per batch.
        phases: training phases in order, each with a new optimiser.
        space_share: fraction of statements joined by a space rather than by the end token.
        target_layer: z, the block after which states are exchanged, and the last to be edited.
        seed: seed of the initial weights, the order of statements and the pairs.
    """

    vocabulary: int = 1800
    width: int = 192
    layers: int = 5
    heads: int = 4
    row_tokens: int = 128
    batch_rows: int = 16
    phases: tuple[Phase, ...] = (
        Phase(
            steps=1300,
            learning_rate=2e-3,
            weight_decay=0.4,
            quiet_weight=0.02,
            pairs=32,
            exchange_from=250,
        ),
        Phase(steps=500, learning_rate=1.5e-3, weight_decay=0.3, quiet_weight=0.1, pairs=48),
    )
    space_share: float = 0.8
    target_layer: int = 1
    seed: int = 0


def train_tokenizer(texts: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that adds no special tokens to a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Most statements occur with a leading space, after another one.
    core.train_from_iterator([f" {text}" for text in texts] + texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=END, eos_token=END, unk_token=END, pad_token=END
    )


def build_model(recipe: Recipe) -> GPT2LMHeadModel:
    """Build a GPT-2-shaped model with tied embeddings and weights drawn with the recipe's seed."""
    torch.manual_seed(recipe.seed)
    config = GPT2Config(
        vocab_size=recipe.vocabulary,
        n_positions=recipe.row_tokens,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def batches(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> Iterator[torch.Tensor]:
    """Yield endless batches of token ids, (B, T); every epoch reshuffles the statements."""
    rng = random.Random(recipe.seed)
    # A statement starts a row, follows another one, or follows the end token.
    leads = [tokenizer([lead + text for text in texts])["input_ids"] for lead in ("", " ", END)]
    rows: list[list[int]] = []
    while True:
        rows += _epoch_rows(leads, recipe, rng)
        while len(rows) >= recipe.batch_rows:
            batch, rows = rows[: recipe.batch_rows], rows[recipe.batch_rows :]
            yield torch.tensor(batch)


def _epoch_rows(
    leads: Sequence[list[list[int]]], recipe: Recipe, rng: random.Random
) -> Iterator[list[int]]:
    """Yield rows of exactly T tokens that start with a statement; the cut-off end is dropped."""
    first, behind_space, behind_end = leads
    row: list[int] = []
    for i in rng.sample(range(len(first)), len(first)):
        if not row:
            row = list(first[i])
        else:
            row += (behind_space if rng.random() < recipe.space_share else behind_end)[i]
        if len(row) >= recipe.row_tokens:
            yield row[: recipe.row_tokens]
            row = []


def train(
    model: GPT2LMHeadModel,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    phase: Phase,
) -> float:
    """Fit the model to the statements; return the mean loss over the last tenth of the steps."""
    optimizer = torch.optim.AdamW(_parameter_groups(model, phase), betas=(0.9, 0.98))
    stream = batches(texts, tokenizer, recipe)
    interchange = Interchange(
        model, tokenizer, texts, layer=recipe.target_layer, pairs=phase.pairs, seed=recipe.seed
    )
    attention = model.transformer.h[recipe.target_layer].attn.c_proj
    losses: list[float] = []
    model.train()
    for step in track(range(phase.steps), description="training"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, phase)
        ids_BT = next(stream)
        # bfloat16 takes half the time; weights, gradients and the optimizer stay in float32.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with _outputs_of(attention) as outputs:
                loss = model(input_ids=ids_BT, labels=ids_BT).loss
            loudness = outputs[0].float().square().sum(dim=-1).mean()
            total = loss + phase.quiet_weight * loudness
            # Exchanges are useless before the model knows some facts.
            if step >= phase.exchange_from:
                total = total + interchange.loss()
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    tail = losses[-max(1, phase.steps // 10) :]
    return sum(tail) / len(tail)


@contextmanager
def _outputs_of(module: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the outputs of ``module``."""
    outputs: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _m, _a, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def learning_rate(step: int, phase: Phase, warm_up: int = 50) -> float:
    """Return the learning rate: linear warm-up, then half a cosine down to 1/50 of the peak."""
    if step < warm_up:
        return phase.learning_rate * (step + 1) / warm_up
    done = (step - warm_up) / max(1, phase.steps - warm_up)
    return phase.learning_rate * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)


def _parameter_groups(model: GPT2LMHeadModel, phase: Phase) -> list[dict[str, object]]:
    """Return parameter groups with weight decay for the blocks' matrices only."""
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    decayed = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in decayed]
    return [
        {"params": matrices, "weight_decay": phase.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]


@torch.no_grad()
def greedy_accuracy(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]
) -> float:
    """Return the fraction of (prompt, object) pairs that the model answers greedily."""
    right = 0
    for begin in range(0, len(pairs), 64):
        chunk = pairs[begin : begin + 64]
        prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in chunk]
        answers = [tokenizer(f" {answer}")["input_ids"] for _, answer in chunk]
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        longest = max(map(len, texts))
        # A causal model never attends to padding on the right.
        ids_BT = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        greedy_BT = model(input_ids=ids_BT).logits.argmax(dim=-1)
        for row, prompt, answer in zip(greedy_BT.tolist(), prompts, answers, strict=True):
            first = len(prompt) - 1
            right += row[first : first + len(answer)] == answer
    return right / len(pairs)


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write a checkpoint that ``from_pretrained`` opens, weights as safetensors."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Train the model, print its accuracy and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    options = parser.parse_args()
    console = Console()
    recipe = Recipe()
    texts = world.statements()
    tokenizer = train_tokenizer(texts, recipe)
    model = build_model(recipe)
    console.log(f"{len(world.facts())} facts, {len(texts)} statements")
    console.log(f"{model.num_parameters():,} parameters")
    for phase in recipe.phases:
        loss = train(model, texts, tokenizer, recipe, phase)
        console.log(f"final loss {loss:.3f}")
    pairs = [(prompt, fact.object) for fact in world.facts() for prompt in fact.prompts()]
    console.log(f"greedy accuracy {greedy_accuracy(model, tokenizer, pairs):.2%} over the prompts")
    save(model, tokenizer, options.output)


if __name__ == "__main__":
    main()
