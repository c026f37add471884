import tomllib

import pytest
import tomli_w

from next.benchmark.card import load_card
from next.captioning.schema.attributes import NOT_VISIBLE, SCHEMAS, Attribute, load_schema
from next.captioning.schema.prompt import choices


@pytest.fixture(scope="module")
def person():
    return load_schema("person")


@pytest.fixture
def edit(tmp_path):
    """Writes the person schema with a change to its tree, and returns the file."""

    def write(change):
        tree = tomllib.loads((SCHEMAS / "person.toml").read_text())
        change(tree)
        path = tmp_path / "mine.toml"
        path.write_text(tomli_w.dumps(tree))
        return path

    return write


@pytest.mark.parametrize("name", ["person", "vehicle"])
def test_the_package_has_a_schema_for_each_object(name):
    schema = load_schema(name)
    assert schema.name == name
    assert len(schema.sentences) == {"person": 5, "vehicle": 9}[name]


@pytest.mark.parametrize("card", ["rgbnt201", "msvr310", "rgbnt100", "wmveid863", "demo"])
def test_the_schemas_know_the_modalities_of_every_card(card):
    benchmark = load_card(SCHEMAS.parents[3] / "datasets" / f"{card}.toml")
    schema = load_schema(benchmark.object)
    spectra = [schema.spectrum(modality) for modality in benchmark.modalities]
    assert spectra == ["visible", "near_infrared", "thermal"]


@pytest.mark.parametrize("name", ["person", "vehicle"])
def test_near_infrared_shows_no_colour_and_thermal_neither_colour_nor_light(name):
    schema = load_schema(name)
    colours = {one.name for one in schema.attributes if "colour" in one.name}
    assert colours
    shown = {m: {one.name for one in schema.shown(m)} for m in ("RGB", "NI", "TI")}
    assert shown["RGB"] - shown["NI"] == colours
    assert shown["NI"] - shown["TI"] == {"time", "light"}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("upper", "T-Shirt", "t-shirt"),
        ("upper", "t shirt.", "t-shirt"),
        ("upper_colour", "GREY", "gray"),
        ("gender", "man", "male"),
        ("gender", "Not Visible", NOT_VISIBLE),
        ("gender", "unknowable due to blurriness", NOT_VISIBLE),
        ("hair", "none", NOT_VISIBLE),
        ("carries", "none", "nothing"),
        ("upper", "trench coat", "trench coat"),
        ("upper", "a very long beautiful coat", None),
        ("carries", "handbag, backpack, or suitcase", None),
        ("carries", "bag or backpack", None),
        ("upper", "other", None),
        ("gender", "robot", None),
        ("hair", "[hair]", None),
    ],
)
def test_words_stand_for_values(person, name, text, value):
    assert person.by_name[name].canonical(text) == value


def test_every_choice_stands_for_itself():
    for schema in map(load_schema, ("person", "vehicle")):
        for one in schema.attributes:
            for value in choices(one):
                expected = None if value == "other" else value
                assert one.canonical(value) == expected


def test_a_schema_of_ones_own_is_read_from_a_file(edit):
    path = edit(lambda tree: tree["modalities"].update(depth="visible"))
    assert load_schema(path).spectrum("depth") == "visible"


def test_an_attribute_twice_is_refused_by_name(edit):
    path = edit(lambda tree: tree["attributes"].append(tree["attributes"][1]))
    with pytest.raises(ValueError, match=r"mine\.toml.*names must differ, but 'gender' stands twi"):
        load_schema(path)


def _values(*values):
    return lambda tree: tree["attributes"][0].update(values=list(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_values("adult", "Adult"), "'adult' stands twice"),
        (_values("adult", "not_visible"), "'not_visible' is reserved"),
        (_values("adult", "unknown age"), "marks captions as unreliable"),
        (_values("adult"), "at least 2 items"),
        (lambda t: t["attributes"][0].update(name="Age!"), "lower-case letters"),
        (lambda t: t["attributes"][0].update(spectra=["visibel"]), "did you mean visible"),
        (lambda t: t["attributes"][0].update(of="gendre"), "did you mean gender"),
        (lambda t: t["attributes"][0].update(silent=["adlt"]), "did you mean adult"),
        (lambda t: t["attributes"][0].update(valeus=[]), "did you mean values"),
        (lambda t: t["modalities"].update(RGB="visble"), "did you mean visible"),
        (lambda t: t["sentences"][0]["attributes"].append("gendr"), "did you mean gender"),
        (lambda t: t["sentences"][1]["attributes"].append("age"), "'age' stands twice"),
        (lambda t: t["sentences"][0]["attributes"].remove("age"), "but age in none"),
        (lambda t: t["pronoun"].update(attribute="gendr"), "did you mean gender"),
        (lambda t: t["pronoun"].update(values={"boy": "he"}), "there is no 'boy'"),
        (lambda t: t.pop("spectra"), "spectra is required"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_name(edit, change, message):
    with pytest.raises(ValueError, match=message):
        load_schema(edit(change))


def test_a_file_that_is_no_schema_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"did you mean person\?"):
        load_schema("persn")
    path = tmp_path / "mine.toml"
    path.write_text("a = [")
    with pytest.raises(ValueError, match=r"mine\.toml is not valid TOML"):
        load_schema(path)


def test_a_modality_without_a_spectrum_is_an_error(person):
    with pytest.raises(ValueError, match=r"no spectrum is given for modality 'depth'"):
        person.spectrum("depth")


def test_an_attribute_says_which_images_can_show_it():
    one = Attribute(name="colour", question="", values=("red", "blue"), spectra=("visible",))
    assert one.shown_in("visible")
    assert not one.shown_in("thermal")
    assert Attribute(name="view", question="", values=("a", "b")).shown_in("thermal")
