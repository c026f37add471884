"""What can be measured on a query set before anything is trained: queries and standard error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from next.config import RunConfig
from next.data.holdout import split_train, valid_queries
from next.data.labels import Labels
from next.data.shards.reader import Manifest
from next.evaluation.ranking.metrics import check_rule

SPREAD = 30.0
"""Standard deviation of average precision between identities, mAP. Assumed: that of numbers spread
evenly over 0 to 100 is 29."""
PAIRED_SPREAD = 10.0
"""The same of the difference of two settings on the same queries, where what makes an identity hard
for both cancels. Assumed: a third of the above."""
FEW = 20
"""Identities below which a warning is given: differences of 4 mAP cannot be told apart there."""

HELD_OUT, TEST = "held-out identities", "test split"
"""Names of the two query sets of a run."""


class QuerySet(NamedTuple):
    """What a query set and its gallery can measure.

    An identity's queries succeed and fail together, so a score is as sure as the number of its
    identities makes it. With ``n_i`` queries of identity i and a standard deviation s between
    identities::

        standard error of mAP = s sqrt(sum_i n_i^2) / sum_i n_i = s / sqrt(effective)

    This takes the queries of an identity as one, which errs towards too large a number.
    """

    queries: int
    """Queries with a match under the card's rule; the others are not counted in any score."""
    identities: int
    """Identities of these."""
    distractors: int
    """Identities of the gallery without such a query."""
    gallery: int
    """Samples of the gallery."""
    effective: float
    """Identities of equal size that would be as sure: ``(sum n_i)^2 / sum n_i^2``."""

    @property
    def score_error(self) -> float:
        """Standard error of a score, mAP; infinite without a query."""
        return SPREAD / self.effective**0.5 if self.queries else np.inf

    @property
    def difference_error(self) -> float:
        """Standard error of the difference of two settings on these queries, mAP."""
        return PAIRED_SPREAD / self.effective**0.5 if self.queries else np.inf

    @property
    def least_difference(self) -> float:
        """Differences below this cannot be told from none with 95 % confidence, mAP."""
        return 1.96 * self.difference_error

    def as_json(self) -> dict[str, float | None]:
        """Counts and standard errors; null where nothing can be measured."""
        errors = {
            "score_error": self.score_error,
            "difference_error": self.difference_error,
            "least_difference": self.least_difference,
        }
        told = {name: float(one) if self.queries else None for name, one in errors.items()}
        return {**self._asdict(), **told}

    def __str__(self) -> str:
        words = f"{self.identities} identities with {self.queries} queries"
        if self.distractors:
            words += f", {self.distractors} distractors"
        if not self.queries:
            return words
        return (
            f"{words}; standard error about {self.score_error:.1f} mAP, of a difference "
            f"{self.difference_error:.1f}"
        )

    def warning(self) -> str:
        """What to think of few identities; empty: they are enough, or there are none."""
        return few_identities(self.identities, self.effective) if self.queries else ""


def few_identities(identities: int, effective: float) -> str:
    """What to think of differences on so many identities; empty: they are enough.

    Args:
        identities: that have queries.
        effective: identities of equal size that would be as sure.
    """
    if effective >= FEW:
        return ""
    least = 1.96 * PAIRED_SPREAD / effective**0.5
    return (
        f"few: settings that differ by less than {least:.1f} mAP cannot be told apart on "
        f"{identities} identities"
    )


def query_set(query: Labels, gallery: Labels, rule: str) -> QuerySet:
    """What can be measured; pass one object twice where the queries are the gallery itself.

    Raises:
        ValueError: a row has no label that the rule reads.
    """
    check_rule(rule, query, gallery)
    valid = valid_queries(query, gallery, rule)
    _, sizes = np.unique(query.pid[valid], return_counts=True)
    identities = len(np.unique(gallery.pid))
    return QuerySet(
        queries=int(valid.sum()),
        identities=len(sizes),
        distractors=identities - len(sizes),
        gallery=len(gallery.pid),
        effective=float(sizes.sum() ** 2 / max(1, (sizes**2).sum())),
    )


def queries_held_out(config: RunConfig, manifest: Manifest) -> QuerySet | None:
    """What the held-out identities can measure; None: ``selection.split = test``.

    Raises:
        ValueError: there are too few identities to hold out, or the rule does not fit the labels.
    """
    if config.selection.split == "test":
        return None
    labels, rule = manifest.labels("train"), manifest.benchmark.rule
    check_rule(rule, labels, labels)
    held_out = labels.take(split_train(config, labels, rule).held_out)
    return query_set(held_out, held_out, rule)


def queries_of_test(manifest: Manifest) -> QuerySet:
    """What the test split can measure.

    Raises:
        ValueError: the rule does not fit the labels.
    """
    gallery = manifest.labels("gallery")
    same = manifest.resolve("query") == manifest.resolve("gallery")
    return query_set(
        gallery if same else manifest.labels("query"), gallery, manifest.benchmark.rule
    )


def queries_of_splits(splits: Mapping[str, Labels], rule: str) -> dict[str, QuerySet]:
    """What each stored split, and the test split that they make, can measure.

    Args:
        splits: labels of the splits that have samples of their own: train, and gallery, query or
            both, each of which stands for the other where that is missing.
        rule: the card's.

    Raises:
        ValueError: the rule does not fit the labels.
    """
    train = splits["train"]
    gallery = splits.get("gallery", splits.get("query", train))
    query = splits.get("query", gallery)
    return {
        "train split": query_set(train, train, rule),
        TEST: query_set(query, gallery, rule),
    }


def measuring(told: Mapping[str, QuerySet]) -> list[str]:
    """What a run is measured on, a line for each query set, with a warning where that is little."""
    lines = []
    for name, found in told.items():
        lines.append(f"measured on {name}: {found}")
        lines += [f"WARNING: {name}: {warning}"] if (warning := found.warning()) else []
    return lines


class Measurable(NamedTuple):
    """What :func:`measurable` found."""

    told: dict[str, QuerySet]
    """Query sets by name, those that could be counted."""
    problems: dict[str, str]
    """Why a run on these data would have nothing to be measured on, by the same names."""


def measurable(config: RunConfig, manifest: Manifest) -> Measurable:
    """Count the queries of every split under the card's rule.

    Args:
        config: settings; reads selection.
        manifest: the data.
    """
    told: dict[str, QuerySet] = {}
    problems: dict[str, str] = {}
    for name, count, mend in (
        (
            HELD_OUT,
            lambda: queries_held_out(config, manifest),
            "set another selection.seed, or selection.draw = evaluable",
        ),
        (
            TEST,
            lambda: queries_of_test(manifest),
            "prepare the data with a card whose rule fits them",
        ),
    ):
        try:
            found = count()
        except ValueError as error:
            problems[name] = str(error)
            continue
        if found is not None:
            told[name] = found
            if not found.queries:
                problems[name] = (
                    f"nothing can be measured on the {name} of {manifest.uri}: no query has a "
                    f"match in the gallery under the card's rule = {manifest.benchmark.rule}; "
                    f"{mend}"
                )
    return Measurable(told, problems)


def check_measurable(config: RunConfig, manifest: Manifest) -> None:
    """Refuse a run that nothing can be measured on, before it starts.

    Raises:
        ValueError: see :attr:`Measurable.problems`.
    """
    problems = measurable(config, manifest).problems
    if problems:
        raise ValueError("\n".join(problems.values()))
