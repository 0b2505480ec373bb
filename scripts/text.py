"""A small transformer on 180 made-up sentences: which of them taught it a fact?

Every fact (where somebody lives, works as, keeps) is said in three ways to the model, which learns to complete it; the
tests ask for it in a fourth way.

python scripts/train.py text
influence-pipeline run scripts/text.toml
python scripts/text.py              # the same, then the sentences themselves
influence-pipeline report scripts/text.toml     # the same as a page
"""

import random
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from train import trained

import influence_pipeline as ip

LENGTH = 9

NAMES = "anna ben clara david emma felix greta henry ida jonas karla leon mia noah olga paul rosa simon tilda umar"
RELATIONS = {
    "paris rome oslo cairo lima tokyo delhi berlin madrid vienna": (
        "{} lives in {}",
        "the home of {} is {}",
        "{} has a house in {}",
        "you will meet {} in {}",
    ),
    "baker doctor pilot farmer painter teacher lawyer nurse cook singer": (
        "{} works as a {}",
        "the job of {} is {}",
        "{} earns money as a {}",
        "they hired {} as their {}",
    ),
    "dog cat horse parrot rabbit goat snake turtle hamster fish": (
        "{} keeps a {}",
        "the pet of {} is a {}",
        "{} goes out with the {}",
        "everybody saw {} and the {}",
    ),
}


class Sentence(NamedTuple):
    """A sentence, and the fact that it says: about whom, and what of him or her."""

    text: str
    fact: tuple[str, int]


def sentences(seed: int = 0) -> tuple[list[Sentence], list[Sentence]]:
    """Make up 180 training sentences, three for each fact, and 60 that ask for one."""
    draw = random.Random(seed)
    train, test = [], []
    for name in NAMES.split():
        for relation, (values, ways) in enumerate(RELATIONS.items()):
            fact, value = (name, relation), draw.choice(values.split())
            *told, asked = draw.sample(ways, len(ways))
            train += [Sentence(way.format(name, value), fact) for way in told]
            test.append(Sentence(asked.format(name, value), fact))
    draw.shuffle(train)
    return train, test


WORDS = ["", *sorted({word for part in sentences() for sentence in part for word in sentence.text.split()})]


class Tokens(Dataset):
    """Sentences as words' numbers, zeros at the end; their last word, which completes the fact, is all that counts."""

    def __init__(self, of: list[Sentence]) -> None:
        self.sentences = of

    def __len__(self) -> int:
        """Count the sentences."""
        return len(self.sentences)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        """Return the words of one and what counts of them, (LENGTH,) each."""
        words = self.sentences[position].text.split()
        ids, weights = torch.zeros(LENGTH, dtype=torch.long), torch.zeros(LENGTH)
        ids[: len(words)] = torch.tensor([WORDS.index(word) for word in words])
        weights[len(words) - 1] = 1
        return {"input_ids": ids, "token_weights": weights}


class Block(nn.Module):
    """Attention to the words before, and two layers for each word."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, S, width)."""
        parts = self.attend(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.narrow(functional.gelu(self.widen(self.norm2(x))))


class Transformer(nn.Module):
    """Words (B, S) to logits (B, S, vocabulary), as GPT-2: the table of words is also the last layer."""

    def __init__(self, words: int, width: int = 32, heads: int = 2, blocks: int = 2) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight
        nn.init.normal_(self.words.weight, std=0.05)
        nn.init.normal_(self.positions.weight, std=0.05)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits of each next word."""
        x = self.words(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        return self.head(self.norm(self.blocks(x)))


class Completion(ip.LanguageModel):
    """The loss of the word that counts; its label is that word, as a number."""

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the word to be said, (B,)."""
        return batch["input_ids"].gather(1, batch["token_weights"].argmax(1)[:, None])[:, 0]

    def predictions(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Return the word that the network says, (B,)."""
        before = batch["token_weights"].argmax(1) - 1
        return outputs[torch.arange(len(outputs), device=outputs.device), before].argmax(1)


TASK = Completion(l2=3e-3)


def network() -> nn.Module:
    """Make the network, untrained: 28,128 parameters."""
    return Transformer(len(WORDS))


def data() -> tuple[Dataset, Dataset]:
    """Load the training sentences, and those that ask for a fact."""
    train, test = sentences()
    return Tokens(train), Tokens(test)


def sentence(sample: dict[str, Tensor]) -> str:
    """Return what a page shows of a sample."""
    return " ".join(WORDS[word] for word in sample["input_ids"] if word)


def experiment() -> ip.Experiment:
    """Put together what the pipeline needs."""
    train, test = data()
    return ip.Experiment(trained("text", network()), TASK, train, {"facts": test}, show=sentence, label_names=WORDS)


def show(influences: ip.Influences) -> None:
    """Print what taught some facts, and count how often that is what was said about them."""
    train, test = sentences()
    helpful, scores = influences.helpful(k=3)
    said = np.array([
        [train[i].fact == sentence.fact for i in ids] for ids, sentence in zip(helpful, test, strict=True)
    ])
    for t in range(0, len(test), 8):
        print(f"\n{test[t].text}")
        for i, score, same in zip(helpful[t], scores[t], said[t], strict=True):
            print(f"{score:>+12.4f}   {train[i].text:<34}{'the fact' if same else ''}")
    print(
        f"\nthe most helpful sentence of {len(train)} says the fact in {said[:, 0].sum()} of {len(test)} tests "
        f"(by chance {3 * len(test) / len(train):.1f});\n"
        f"of the three that say it, {said.sum(1).mean():.1f} are among the first three on average"
    )


if __name__ == "__main__":
    try:
        show(ip.Pipeline.from_toml(Path(__file__).with_suffix(".toml")).run("facts")["facts"])
    except ip.InfluenceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
