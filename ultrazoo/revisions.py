"""Rules that decide what a run computes, and their revisions: a run keeps the revisions that it began with.

When a rule changes, its entry in ``RULES`` gets one more meaning. New runs follow the last one. The state of a
checkpoint and a flight record hold the revision of every rule (``revisions``); a rule that they do not mention is at
revision 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ultrazoo.errors import CheckpointError

Revisions = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule that has changed since the first release."""

    meanings: tuple[str, ...]
    """What each revision does, from revision 1 on; the last one is that of new runs."""
    oldest: int = 1
    """Oldest revision that this version can still follow."""
    matters: Callable[[Mapping[str, Any]], bool] = lambda config: True
    """Takes the complete config of a saved run as plain data; False if every revision does the same there."""

    @property
    def current(self) -> int:
        """The revision of new runs."""
        return len(self.meanings)


RULES = {
    "validation_masks": Rule(
        meanings=(
            "validation masks at training.mlm_probability",
            "validation masks at training.eval_mlm_probability",
        ),
        matters=lambda config: config["training"]["mlm_probability"] != config["training"]["eval_mlm_probability"],
    ),
    "unigram_counts": Rule(
        meanings=("the unigram statistics include the held-out rows", "the unigram statistics exclude held-out rows"),
    ),
    "whole_words": Rule(
        meanings=(
            "a word ends at spaces and signs only, so text without spaces is one word",
            "a word is a letter in scripts without spaces, and has at most 32 characters",
        ),
        matters=lambda config: config["training"]["whole_word_masking"],
    ),
}


def current_revisions() -> dict[str, int]:
    """Return the revisions that a new run follows, by rule."""
    return {name: rule.current for name, rule in RULES.items()}


def saved_revisions(where: object, saved: Revisions, config: Mapping[str, Any]) -> dict[str, int]:
    """Return the revisions by which a saved run continues, by rule.

    A rule that makes no difference in the saved run is at its current revision.

    Args:
        where: The checkpoint or flight record, for the message.
        saved: What it holds under ``revisions``.
        config: Its complete config as plain data.

    Raises:
        CheckpointError: Lists every rule whose saved revision this version cannot follow.
    """
    unknown = [f"rule {name}: got revision {saved[name]}, which is not known here" for name in saved.keys() - RULES]
    revisions, problems = {}, sorted(unknown)
    for name, rule in RULES.items():
        revision = saved.get(name, 1)
        if revision > rule.current:
            problems.append(f"rule {name}: got revision {revision}, which is not known here")
        elif not rule.matters(config):
            revision = rule.current
        elif revision < rule.oldest:
            problems.append(
                f"rule {name}: got revision {revision} ({rule.meanings[revision - 1]}), expected {rule.current} "
                f"({rule.meanings[-1]})"
            )
        revisions[name] = revision
    if problems:
        lines = "\n".join(f"  {line}" for line in problems)
        raise CheckpointError(
            f"{where}: made under rules that this version cannot follow:\n{lines}\n  use the version of ultrazoo that "
            "made it (ultrazoo inspect shows it), or begin a new run with the weights alone: --weights-only"
        )
    return revisions


def notes_on(revisions: Revisions) -> list[str]:
    """Return a line for each rule that a run follows in an older revision than new runs do."""
    older = {name: revision for name, revision in revisions.items() if revision < RULES[name].current}
    return [
        f"rule {name} stays at revision {revision} ({RULES[name].meanings[revision - 1]}); new runs use "
        f"{RULES[name].current} ({RULES[name].meanings[-1]})"
        for name, revision in older.items()
    ]
