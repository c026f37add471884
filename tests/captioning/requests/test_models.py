import pytest

from next.captioning.requests.models import ModelConfig, load_models

MODELS = """
[[models]]
name = "one"
base_url = "http://localhost:8000/v1"

[[models]]
name = "two"
base_url = "https://host.invalid/v1/"
api_key_env = "SOME_KEY"
temperature = 0.5
extra = { top_p = 0.9 }
"""


def test_models_are_read_from_a_file(tmp_path):
    (tmp_path / "models.toml").write_text(MODELS)
    one, two = load_models(tmp_path / "models.toml")
    assert one.settings() == {"max_tokens": 1500, "temperature": 0.0}
    assert two.settings() == {"max_tokens": 1500, "temperature": 0.5, "top_p": 0.9}
    assert two.base_url == "https://host.invalid/v1"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"two"', '"one"', "'one' stands twice"),
        ("temperature", "temprature", "model two: temprature.*did you mean temperature"),
        ("https://", "https://me:pass@", "base_url must hold no user.*that api_key_env names"),
        ("v1/", "v1?key=1", "base_url must hold no user.*that api_key_env names"),
        ("https://", "ftp://", "base_url: must be an http:// or https:// address"),
        ("[[models]]", "[[model]]", "did you mean models|models is required"),
        ('"one"', "one", "is not valid TOML"),
    ],
)
def test_a_file_of_models_that_is_wrong_is_refused(tmp_path, old, new, message):
    (tmp_path / "models.toml").write_text(MODELS.replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_models(tmp_path / "models.toml")
    with pytest.raises(FileNotFoundError, match=r"did you mean models\.toml"):
        load_models(tmp_path / "model.toml")


def test_a_key_in_the_file_of_models_is_refused_and_not_repeated(tmp_path):
    (tmp_path / "models.toml").write_text(MODELS.replace("SOME_KEY", "sk-secret-123"))
    with pytest.raises(ValueError, match="must name an environment variable") as error:
        load_models(tmp_path / "models.toml")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "extra",
    [
        '{ api_key = "secret-123" }',
        '{ extra_body = { Authorization = "secret-123" } }',
        '{ user = "sk-secret-123" }',
        '{ token = "secret-123" }',
        '{ access_token = "secret-123" }',
    ],
)
def test_a_key_among_the_further_fields_is_refused_as_the_ledger_would_hold_it(tmp_path, extra):
    (tmp_path / "models.toml").write_text(MODELS.replace("{ top_p = 0.9 }", extra))
    with pytest.raises(ValueError, match=r"extra\.\S+ must hold no key, since extra") as error:
        load_models(tmp_path / "models.toml")
    assert "secret" not in str(error.value)
    fine = "{ prompt_cache_key = 'a', max_completion_tokens = 9, stop_token_ids = [1] }"
    (tmp_path / "models.toml").write_text(MODELS.replace("{ top_p = 0.9 }", fine))
    assert load_models(tmp_path / "models.toml")[1].settings()["prompt_cache_key"] == "a"


def test_a_price_is_of_a_million_tokens():
    model = ModelConfig(name="m", base_url="http://h/v1", price_in=2.0, price_out=8.0)
    assert model.cost(500_000, 250_000) == (750_000, 3.0)


def test_a_temperature_that_is_not_sent_decides_nothing():
    model = ModelConfig(name="m", base_url="http://h/v1", temperature=None, seed=3)
    assert model.settings() == {"max_tokens": 1500, "seed": 3}
