"""Promotion: a version becomes the champion if it meets conditions that are stated."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from operator import ge, gt, le, lt
from typing import Any, NamedTuple

from next.addresses import tracking_uri
from next.tracking.delivery.client import connect
from next.tracking.registry.versions import (
    CANDIDATE,
    CARD,
    CHAMPION,
    ModelCard,
    Version,
    aliased,
    find_version,
    registry_errors,
)

_OPERATORS: dict[str, Callable[[float, float], bool]] = {">=": ge, ">": gt, "<=": le, "<": lt}
_CONDITION = re.compile(
    r"\s*(?P<metric>[\w/.-]+)\s*(?P<op>>=|<=|>|<)\s*"
    r"(?:(?P<champion>champion)\s*(?P<margin>[+-]\s*\d+(?:\.\d+)?)?|(?P<value>-?\d+(?:\.\d+)?))\s*"
)


class Promotion(NamedTuple):
    """What :func:`promote` found."""

    promoted: bool
    version: Version
    champion: Version | None
    """The one that was in use before; None: there was none."""
    findings: list[str]
    """Each condition with the values that it was asked of."""


def promote(
    uri: str,
    name: str,
    conditions: Sequence[str],
    *,
    alias: str = CANDIDATE,
    dry_run: bool = False,
) -> Promotion:
    """Make a version the champion if it meets conditions that are stated, and recorded with it.

    Args:
        uri: of the server.
        name: of the registered model.
        conditions: such as ``test/mAP >= 80`` or ``test/mAP > champion + 0.5``; one that names the
            champion holds where there is none yet.
        alias: or number of the version.
        dry_run: say what would come of it, and promote nothing.

    Raises:
        ValueError: no condition or one that cannot be read, no such version, a score that a card
            does not have, or a champion that was measured on other data.
        ConnectionError: the server cannot be reached.
    """
    if not conditions:
        raise ValueError(
            "a promotion needs a condition, such as --when 'test/mAP > champion + 0.5'"
        )
    parsed = [_parse(text) for text in conditions]
    with registry_errors(uri):
        client = connect(tracking_uri(uri))
        separator = "/" if alias.isdecimal() else "@"
        version = find_version(client, f"models:/{name}{separator}{alias}")
        champion = aliased(client, name, CHAMPION)
        card = _card(client, version)
        old = None if champion is None else _card(client, champion)
        if old is not None and old.data_digest != card.data_digest:
            raise ValueError(
                f"{version.uri} was measured on data {card.data_digest[:16]}, but the champion "
                f"{old.data_digest[:16]} (version {champion.version if champion else 0}); measure "
                f"both on the same data"
            )
        judged = [_judge(condition, card, old, version) for condition in parsed]
        passed = all(holds for holds, _ in judged)
        findings = [text for _, text in judged]
        if passed and not dry_run:
            tag = "; ".join(findings)
            client.set_model_version_tag(name, str(version.version), "next.promoted_when", tag)
            client.set_registered_model_alias(name, CHAMPION, str(version.version))
    return Promotion(passed, version, champion, findings)


def _parse(text: str) -> re.Match[str]:
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise ValueError(
            f"a condition must be METRIC OPERATOR VALUE, such as 'test/mAP >= 80' or "
            f"'test/mAP > champion + 0.5', but got {text!r}"
        )
    return match


def _judge(
    condition: re.Match[str], card: ModelCard, old: ModelCard | None, version: Version
) -> tuple[bool, str]:
    """Whether a condition holds, and the sentence that says so with both values."""
    metric, operator = condition["metric"], condition["op"]
    stated = condition[0].strip()
    score = _score(card, metric, version.uri)
    if condition["value"] is not None:
        bound = float(condition["value"])
    elif old is None:
        return True, f"{stated}: {score:.2f}, and there is no champion yet"
    else:
        margin = float((condition["margin"] or "0").replace(" ", ""))
        bound = _score(old, metric, "the champion") + margin
    holds = _OPERATORS[operator](score, bound)
    return holds, f"{stated}: {score:.2f} against {bound:.2f}, {'met' if holds else 'not met'}"


def _score(card: ModelCard, metric: str, whose: str) -> float:
    if metric not in card.scores:
        raise ValueError(
            f"the card of {whose} has no {metric}; it has {', '.join(sorted(card.scores))}"
        )
    return card.scores[metric]


def _card(client: Any, version: Version) -> ModelCard:
    tags = client.get_model_version(version.name, str(version.version)).tags
    if CARD not in tags:
        raise ValueError(f"{version.uri} has no card, so it was not registered by this package")
    return ModelCard(**json.loads(tags[CARD]))
