"""Tiny models and samples, as evaluation has them."""

from tests.evaluation.conftest import (  # noqa: F401 - fixtures
    _settings_stay_as_they_were,
    config,
    drawn,
    make_model,
    samples,
)
