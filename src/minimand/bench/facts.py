"""Pairs of answers to plain questions of fact, as a careful and brief assistant would prefer them."""

from __future__ import annotations

import csv
import functools
import importlib.resources
from typing import Any

import numpy as np

_QUESTIONS = {
    "capital": ("What is the capital of {0}?", "The capital of {0} is {1}."),
    "symbol": ("What is the chemical symbol of {0}?", "The chemical symbol of {0} is {1}."),
    "opposite": ('What is the opposite of the word "{0}"?', 'The opposite of "{0}" is "{1}".'),
    "plural": ('What is the plural of the word "{0}"?', 'The plural of "{0}" is "{1}".'),
    "past": ('What is the past tense of the verb "{0}"?', 'The past tense of "{0}" is "{1}".'),
}
_FILLERS = ("Great question! Happy to help:", "Thank you so much for asking!", "I am so glad you asked!")


@functools.lru_cache(maxsize=1)
def facts() -> tuple[tuple[str, str, str], ...]:
    """Return facts as (relation, subject, answer)."""
    text = importlib.resources.files(__package__).joinpath("facts.tsv").read_text(encoding="utf-8")
    return tuple(
        (row["relation"], row["subject"], row["answer"]) for row in csv.DictReader(text.splitlines(), delimiter="\t")
    )


def fact_pairs(*, noise: float = 0.1, seed: int = 0) -> list[dict[str, Any]]:
    """Make one pair of answers a fact: the right one is preferred, and of two right ones the brief one.

    Three pairs in five differ in what is said, the wrong answer being right for another question of its kind; one in
    five only in the phrases around it; in one of five the right answer has the phrases and the wrong one is brief.

    Args:
        noise: Share of pairs labelled the wrong way. The column ``clean`` says which answer is better.
        seed: Decides wrong answers, phrases and noise.
    """
    random = np.random.default_rng(seed)
    answers: dict[str, list[str]] = {}
    for relation, _, answer in facts():
        answers.setdefault(relation, []).append(answer)
    rows = []
    for relation, subject, answer in facts():
        question, sentence = _QUESTIONS[relation]
        others = [other for other in answers[relation] if other != answer]
        right = sentence.format(subject, answer)
        wrong = sentence.format(subject, others[random.integers(len(others))])
        filler = _FILLERS[random.integers(len(_FILLERS))]
        kind = random.choice(3, p=(0.6, 0.2, 0.2))
        better, worse = ((right, wrong), (right, f"{filler} {right}"), (f"{filler} {right}", wrong))[kind]
        flipped = bool(random.random() < noise)
        chosen, rejected = (worse, better) if flipped else (better, worse)
        prompt = f"Question: {question.format(subject)}\nAnswer:"
        rows.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}", "clean": not flipped})
    return rows
