"""Cards and images, as the data plane's tests have them."""

from tests.data.conftest import _own_home, make_card, make_jpeg, source  # noqa: F401 - fixtures
