"""Train the small model of the demo world: ``python -m jobs.demo.train --output DIR``.

A byte-level BPE tokenizer and a GPT-2-shaped model, both from nothing but the statements of
:mod:`jobs.demo.world`. What makes the model a fair place to edit facts in:

- a row always starts with a statement, so a bare prompt at position 0 is familiar;
- most statements are joined by a space, so a prompt behind other sentences is familiar too;
- strong weight decay keeps the norms of the layers comparable;
- the vocabulary holds nearly every word whole and the attention of the edited layers is kept
  small, so a subject has nearly the same key in every phrasing, and what the method's attention
  vector, which is thrown away in the end, could soak up is little;
- dropout and wide feed-forward layers leave room for many changes at once.

Letters: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from jobs.demo import world

END = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the bundled model was made.

    Attributes:
        vocabulary: tokens of the tokenizer.
        width: of the residual stream.
        inner_width: of the feed-forward layers, also the width of a key.
        layers: number of blocks.
        quiet_layers: how many of them, from the first, have their attention kept small.
        quiet_weight: weight of the penalty on the squared norm of their attention's output.
        heads: attention heads of a block.
        row_tokens: T, also the longest text that the model takes.
        batch_rows: B.
        steps: optimiser steps.
        learning_rate: highest of a schedule that warms up and then falls along a cosine.
        dropout: behind attention and feed-forward layers, in training only.
        weight_decay: of the matrices; gains, offsets and embeddings are left alone.
        space_share: how often statements are joined by a space rather than by the end token.
        seed: of initial weights and of the order of statements.
    """

    vocabulary: int = 4000
    width: int = 160
    inner_width: int = 1408
    layers: int = 4
    quiet_layers: int = 2
    quiet_weight: float = 0.05
    heads: int = 4
    row_tokens: int = 128
    batch_rows: int = 16
    steps: int = 1300
    learning_rate: float = 2e-3
    dropout: float = 0.15
    weight_decay: float = 0.3
    space_share: float = 0.8
    seed: int = 0


def train_tokenizer(texts: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that adds no token of its own to a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # A leading space is how most statements are met: behind another one.
    core.train_from_iterator([f" {text}" for text in texts] + texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=END, eos_token=END, unk_token=END, pad_token=END
    )


def build_model(recipe: Recipe) -> GPT2LMHeadModel:
    """A GPT-2-shaped model with tied embeddings and weights drawn under the recipe's seed."""
    torch.manual_seed(recipe.seed)
    config = GPT2Config(
        vocab_size=recipe.vocabulary,
        n_positions=recipe.row_tokens,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        n_inner=recipe.inner_width,
        resid_pdrop=recipe.dropout,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def batches(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> Iterator[torch.Tensor]:
    """Endless batches of token ids, (B, T); every epoch shuffles and joins the statements anew."""
    rng = random.Random(recipe.seed)
    # Each statement begins a row, follows another one, or follows the end token.
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
    """Rows of exactly T tokens that start with a statement; the cut end of a row is dropped."""
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


class QuietAttention:
    """A penalty on the attention outputs of the first layers, gathered while the model runs."""

    def __init__(self, model: GPT2LMHeadModel, recipe: Recipe) -> None:
        self._weight = recipe.quiet_weight
        self._terms: list[torch.Tensor] = []
        self._handles = [
            block.attn.c_proj.register_forward_hook(self._note)
            for block in model.transformer.h[: recipe.quiet_layers]
        ]

    def take(self) -> torch.Tensor:
        """The penalty of the last forward pass."""
        total = self._weight * torch.stack(self._terms).sum()
        self._terms.clear()
        return total

    def remove(self) -> None:
        """Leave the model without a trace."""
        for handle in self._handles:
            handle.remove()

    def _note(self, module: torch.nn.Module, inputs: object, output_BTD: torch.Tensor) -> None:
        self._terms.append(output_BTD.float().square().sum(dim=-1).mean())


def train(
    model: GPT2LMHeadModel,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
) -> float:
    """Fit the model to the statements; returns the mean loss of the last tenth of the steps."""
    optimizer = torch.optim.AdamW(_parameter_groups(model, recipe), betas=(0.9, 0.98))
    stream = batches(texts, tokenizer, recipe)
    losses: list[float] = []
    penalty = QuietAttention(model, recipe)
    model.train()
    for step in track(range(recipe.steps), description="training"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        ids_BT = next(stream)
        # Half the time of float32; weights, gradients and the optimizer stay float32.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids_BT, labels=ids_BT).loss
        optimizer.zero_grad()
        (loss + penalty.take()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    penalty.remove()
    model.eval()
    tail = losses[-max(1, recipe.steps // 10) :]
    return sum(tail) / len(tail)


def learning_rate(step: int, recipe: Recipe, warm_up: int = 50) -> float:
    """A linear rise over ``warm_up`` steps, then half a cosine down to a fiftieth."""
    if step < warm_up:
        return recipe.learning_rate * (step + 1) / warm_up
    done = (step - warm_up) / max(1, recipe.steps - warm_up)
    return recipe.learning_rate * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)


def _parameter_groups(model: GPT2LMHeadModel, recipe: Recipe) -> list[dict[str, object]]:
    """Weight decay for the blocks' matrices only."""
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    decayed = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in decayed]
    return [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]


@torch.no_grad()
def greedy_accuracy(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]
) -> float:
    """Share of (prompt, object) pairs whose object is the greedy answer at all its tokens."""
    right = 0
    for begin in range(0, len(pairs), 64):
        chunk = pairs[begin : begin + 64]
        prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in chunk]
        answers = [tokenizer(f" {answer}")["input_ids"] for _, answer in chunk]
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        longest = max(map(len, texts))
        # Padding on the right is never looked at by a causal model.
        ids_BT = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        greedy_BT = model(input_ids=ids_BT).logits.argmax(dim=-1)
        for row, prompt, answer in zip(greedy_BT.tolist(), prompts, answers, strict=True):
            first = len(prompt) - 1
            right += row[first : first + len(answer)] == answer
    return right / len(pairs)


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write a checkpoint that ``from_pretrained`` opens, weights as safetensors."""
    model.config.resid_pdrop = 0.0
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Train, report how many facts the model knows, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimiser steps")
    options = parser.parse_args()
    console = Console()
    recipe = Recipe(steps=options.steps)
    texts = world.statements()
    tokenizer = train_tokenizer(texts, recipe)
    model = build_model(recipe)
    console.log(f"{len(world.facts())} facts, {len(texts)} statements")
    console.log(f"{model.num_parameters():,} parameters")
    console.log(f"loss at the end {train(model, texts, tokenizer, recipe):.3f}")
    pairs = [(prompt, fact.object) for fact in world.facts() for prompt in fact.prompts()]
    console.log(f"answers {greedy_accuracy(model, tokenizer, pairs):.2%} of the prompts greedily")
    save(model, tokenizer, options.output)


if __name__ == "__main__":
    main()
