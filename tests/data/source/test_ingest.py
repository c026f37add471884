import json
import logging
import os
import re
import shutil
from collections import defaultdict
from pathlib import Path

import pytest

from next.benchmark.card import Benchmark, Counts, load_card
from next.data.source.ingest import ScanOptions, prepare, scan

ROOT = Path(__file__).resolve().parents[3]
STRICT = {"kind": "folders", "missing": "error"}
SKIP = ScanOptions(on_bad="skip")


def uncounted(card: Benchmark) -> Benchmark:
    """A real benchmark's card for a source of a few images without captions."""
    return card.model_copy(update={"counts": Counts(), "captions": None})


def by_name(samples):
    return {one.sample_id: one for one in samples}


def test_samples_carry_what_their_names_say(source, make_card):
    found = scan(make_card(), source.root)
    assert {split: len(samples) for split, samples in found.samples.items()} == {
        "train": 12,
        "gallery": 4,
    }
    one = by_name(found.samples["train"])["000007_cam2_0_01"]
    assert (one.pid, one.camera, one.scene) == (7, 2, -1)
    assert one.files == tuple(f"train_171/{m}/000007_cam2_0_01.jpg" for m in ("RGB", "NI", "TI"))


def test_modalities_and_captions_are_joined_by_name_though_a_file_is_missing(source, make_card):
    source.path("000003_cam1_0_00.jpg", "NI").unlink()
    samples = by_name(scan(make_card(), source.root).samples["train"])
    assert samples["000003_cam1_0_00"].files[1] is None
    assert samples["000003_cam1_0_00"].sentences[1] is None
    for name, one in samples.items():
        for path, sentences in zip(one.files, one.sentences, strict=True):
            assert path is None or Path(path).stem == name
            assert sentences is None or sentences[1] == f"{name}.jpg is seen, (e.g., here)."


def test_a_missing_modality_is_reported_by_name(source, make_card, caplog):
    source.path("000003_cam1_0_00.jpg", "NI").unlink()
    scan(make_card(), source.root)
    assert "train: 1 sample without NI: 000003_cam1_0_00" in caplog.text
    assert "text/train_NI.json: 1 caption without an image" in caplog.text


def test_a_missing_modality_is_an_error_where_the_card_says_so(source, make_card):
    source.path("000003_cam1_0_00.jpg", "NI").unlink()
    message = r"2 files .*train_171/RGB/000003_cam1_0_00.jpg has no NI beside it .*missing = \"keep"
    with pytest.raises(ValueError, match=message):
        scan(make_card(storage=STRICT), source.root)


def test_a_sample_without_a_modality_is_skipped_and_listed_if_asked_for(source, make_card):
    source.path("000003_cam1_0_00.jpg", "NI").unlink()
    found = scan(make_card(storage=STRICT), source.root, SKIP)
    assert "000003_cam1_0_00" not in by_name(found.samples["train"])
    assert [item.file for item in found.findings.skipped] == [
        "train_171/RGB/000003_cam1_0_00.jpg",
        "train_171/TI/000003_cam1_0_00.jpg",
    ]


def test_a_folder_in_which_nothing_matches_is_refused(source, make_card):
    card = make_card(grammar={"pattern": r"(?P<pid>\d+)_c(?P<camera>\d+)\.png"})
    message = r"train_171/RGB: none of its 12 files matches .*grammar.pattern = .* and 7 more; give"
    with pytest.raises(ValueError, match=message):
        scan(card, source.root)
    with pytest.raises(ValueError, match=message):
        scan(card, source.root, SKIP)


def test_one_modality_in_which_nothing_matches_is_refused(source, make_card):
    for path in (source.root / "test" / "NI").iterdir():
        path.rename(path.with_suffix(".jpeg"))
    with pytest.raises(ValueError, match=r"test/NI: none of its 4 files matches .*_00\.jpeg"):
        scan(make_card(), source.root, SKIP)


def test_files_that_do_not_match_are_named(source, make_card):
    for modality in ("RGB", "TI"):
        source.add("copy of 000003.jpg", modality)
    message = (
        r"2 files in .*source do not fit the card of tiny: "
        r"train_171/RGB/copy of 000003\.jpg does not match grammar\.pattern"
    )
    with pytest.raises(ValueError, match=message):
        scan(make_card(), source.root)


def test_files_that_do_not_match_are_skipped_and_listed_if_asked_for(source, make_card, caplog):
    source.add("copy of 000003.jpg", "TI")
    found = scan(make_card(), source.root, SKIP)
    assert [item.file for item in found.findings.skipped] == ["train_171/TI/copy of 000003.jpg"]
    assert len(found.samples["train"]) == 12
    assert "left out 1 file: train_171/TI/copy of 000003.jpg" in caplog.text


def test_an_image_deeper_than_the_card_says_does_not_match(source, make_card):
    source.add("more/000003_cam1_0_09.jpg")
    with pytest.raises(ValueError, match=r"RGB/more/000003_cam1_0_09\.jpg does not match"):
        scan(make_card(), source.root)


def test_hidden_files_and_folders_of_other_modalities_are_passed_over(source, make_card):
    source.path(".DS_Store").write_bytes(b"")
    source.path("Thumbs.db").write_bytes(b"")
    source.add("a.npy", "masks")
    assert len(scan(make_card(), source.root).samples["train"]) == 12


def test_a_folder_name_that_looks_like_a_sample_changes_nothing(source, make_card):
    odd = source.root.rename(source.root.parent / "000999_cam9_train_2024_c1")
    pids = {one.pid for one in scan(make_card(), odd).samples["train"]}
    assert pids == {3, 5, 7, 12}


def test_a_missing_modality_folder_is_named_with_the_near_match(source, make_card):
    (source.root / "train_171" / "NI").rename(source.root / "train_171" / "NIR")
    message = r"train_171/NI: there is no such folder .*modality NI lies there; did you mean NIR\?"
    with pytest.raises(FileNotFoundError, match=message):
        scan(make_card(), source.root)


def test_a_missing_split_folder_is_named_with_the_near_match(source, make_card):
    (source.root / "train_171").rename(source.root / "train_141")
    with pytest.raises(FileNotFoundError, match=r"train_171: .*did you mean train_141\?"):
        scan(make_card(), source.root)


def test_a_source_that_does_not_exist_is_named(tmp_path, make_card):
    with pytest.raises(FileNotFoundError, match=r"nowhere/train_171: there is no such folder"):
        scan(make_card(), tmp_path / "nowhere")


def test_two_files_that_claim_one_sample_are_refused(source, make_card):
    card = make_card(grammar={"pattern": r"(?P<pid>\d+)_cam(?P<camera>\d)_\d_\d+\.(jpg|png)"})
    source.add("000003_cam1_0_00.png")
    with pytest.raises(
        ValueError, match=r"00\.jpg and .*00\.png both claim the sample 000003_cam1"
    ):
        scan(card, source.root)


def test_counts_that_differ_are_listed_with_what_was_expected_and_found(source, make_card):
    card = make_card(
        counts={"train": {"identities": 171, "samples": 12}, "gallery": {"samples": 5}}
    )
    message = (
        r"counts.train.identities: the card of tiny says 171, but the source has 4\n"
        r"counts.gallery.samples: .* says 5, but the source has 4\n.*--allow-count-mismatch"
    )
    with pytest.raises(ValueError, match=message):
        scan(card, source.root)


def test_counts_may_differ_if_asked_for(source, make_card, caplog):
    card = make_card(counts={"train": {"identities": 171}})
    scan(card, source.root, ScanOptions(allow_count_mismatch=True))
    assert "counts.train.identities" in caplog.text


@pytest.fixture
def leaky(source):
    for modality in ("RGB", "NI", "TI"):
        source.add("000005_cam1_0_77.jpg", modality, "test")
    return source


def test_identities_in_train_and_test_are_a_loud_warning(leaky, make_card, caplog):
    found = scan(make_card(), leaky.root)
    assert found.findings.leaked_identities == (5,)
    assert re.search(r"WARNING .*LEAK: 1 identity stands in train and .*: 5; kept", caplog.text)
    assert 5 in {one.pid for one in found.samples["train"]}


def test_identities_in_train_and_test_are_dropped_from_train_if_asked_for(leaky, make_card):
    found = scan(make_card(), leaky.root, ScanOptions(drop_leaked=True))
    assert {one.pid for one in found.samples["train"]} == {3, 7, 12}
    assert 5 in {one.pid for one in found.samples["gallery"]}
    assert found.findings.leaked_dropped


def test_images_without_caption_are_counted_and_named(source, make_card, caplog):
    source.edit_captions("train", "TI", lambda items: items[1:])
    found = scan(make_card(), source.root)
    assert "train: 1 image of TI without caption: 000005_cam3_0_02" in caplog.text
    assert by_name(found.samples["train"])["000005_cam3_0_02"].sentences[2] is None
    assert found.counts(make_card())["train"].captions == {"RGB": 12, "NI": 12, "TI": 11}


def test_captions_for_no_image_are_counted_by_file(source, make_card):
    extra = {"item": "000999_cam1_0_00.jpg", "description": "Nobody."}
    source.edit_captions("test", "RGB", lambda items: [*items, extra])
    found = scan(make_card(), source.root)
    assert found.findings.unused_captions == {"text/test_RGB.json": 1}


def test_a_missing_caption_file_is_an_error_unless_captions_are_not_wanted(source, make_card):
    source.captions("train", "NI").unlink()
    with pytest.raises(FileNotFoundError, match=r"text/train_NI\.json: there is no such file"):
        scan(make_card(), source.root)
    found = scan(make_card(), source.root, ScanOptions(captions=False))
    assert all(one.sentences == (None, None, None) for one in found.samples["train"])


def test_a_caption_file_that_is_not_json_is_named(source, make_card):
    source.captions("train", "NI").write_text("[{")
    with pytest.raises(ValueError, match=r"text/train_NI\.json is not JSON"):
        scan(make_card(), source.root)


def test_what_tools_leave_is_passed_over_and_counted(source, make_card, caplog):
    for name in (
        "train_171/RGB/.ipynb_checkpoints/000003_cam1_0_00.jpg",
        "train_171/RGB/@eaDir/000003_cam1_0_00.jpg@SynoEAStream",
        "train_171/@eaDir/RGB/000003_cam1_0_00.jpg",
        "train_171/__MACOSX/RGB/._000003_cam1_0_00.jpg",
        "train_171/NI/thumbs.db",
        "test/NI/THUMBS.DB",
        "test/TI/Desktop.ini",
        "test/TI/.DS_Store",
        "test/TI/._000258_cam1_0_00.jpg",
    ):
        (source.root / name).parent.mkdir(parents=True, exist_ok=True)
        (source.root / name).write_bytes(b"junk")
    caplog.set_level(logging.INFO)
    found = scan(make_card(), source.root)
    assert {split: len(samples) for split, samples in found.samples.items()} == {
        "train": 12,
        "gallery": 4,
    }
    assert found.findings.ignored == {
        ".*": 1, ".ds_store": 1, ".ipynb_checkpoints": 1, "@eadir": 2, "__macosx": 1,
        "desktop.ini": 1, "thumbs.db": 2,
    }  # fmt: skip
    assert "passed over 9 files: 1 of .*, 1 of .ds_store" in caplog.text
    assert prepare(make_card(), source.root, source.root.parent / "out").file.findings.ignored


def test_junk_of_an_identity_folder_is_no_identity(identity_folders, wmveid863):
    junk = identity_folders / "train" / "@eaDir" / "vis" / "0001_v1_n0_s003_000.jpg"
    junk.parent.mkdir(parents=True)
    junk.write_bytes(b"junk")
    assert len(scan(wmveid863, identity_folders).samples["train"]) == 2


COMPOSED, DECOMPOSED = "\u00e9", "e\u0301"
"""One letter in Unicode's two forms; macOS writes the second."""
ACCENTED = {"pattern": r"(?P<pid>\d{6})_cam(?P<camera>\d)_\d_\d{2}_\u00e9?\.jpg"}


@pytest.fixture
def accented(source):
    """The source with an accent in each name, composed in RGB and captions, else decomposed."""
    for split in ("train_171", "test"):
        for modality, accent in (("RGB", COMPOSED), ("NI", DECOMPOSED), ("TI", DECOMPOSED)):
            for path in (source.root / split / modality).iterdir():
                path.rename(path.with_stem(f"{path.stem}_{accent}"))
    for split in ("train", "test"):
        for modality in ("RGB", "NI", "TI"):
            source.edit_captions(
                split,
                modality,
                lambda items: [
                    item | {"item": item["item"].replace(".jpg", f"_{COMPOSED}.jpg")}
                    for item in items
                ],
            )
    return source


@pytest.mark.parametrize("form", [COMPOSED, DECOMPOSED])
def test_one_name_in_two_unicode_forms_is_one_sample(accented, make_card, form):
    card = make_card(grammar={"pattern": ACCENTED["pattern"].replace(COMPOSED, form)})
    samples = scan(card, accented.root).samples["train"]
    assert len(samples) == 12
    for one in samples:
        assert one.sample_id.endswith(f"_{COMPOSED}")
        assert all(one.files)
        assert all(one.sentences)


def test_two_files_whose_names_differ_in_form_alone_are_refused(accented, make_card):
    accented.add(f"000003_cam1_0_00_{DECOMPOSED}.jpg", "RGB")
    message = r"both claim the sample 000003_.* differ only in the Unicode form of a letter"
    with pytest.raises(ValueError, match=message):
        scan(make_card(grammar=ACCENTED), accented.root)


def test_folders_are_found_in_either_unicode_form(source, make_card):
    (source.root / "train_171").rename(source.root / f"train_{DECOMPOSED}")
    (source.root / "test" / "NI").rename(source.root / "test" / f"NI_{DECOMPOSED}")
    (source.root / f"train_{DECOMPOSED}" / "NI").rename(
        source.root / f"train_{DECOMPOSED}" / f"NI_{COMPOSED}"
    )
    card = make_card(
        splits={
            "train": {"path": f"train_{COMPOSED}"},
            "gallery": {"path": "test"},
            "query": {"same_as": "gallery"},
        },
        storage={"kind": "folders", "missing": "error", "folders": {"NI": f"NI_{COMPOSED}"}},
    )
    assert len(scan(card, source.root).samples["train"]) == 12


def test_a_name_that_is_not_utf_8_is_named(source, make_card):
    name = bytes(source.root / "train_171" / "RGB") + b"/000003_cam1_0_\xff.jpg"
    Path(os.fsdecode(name)).write_bytes(b"")
    with pytest.raises(ValueError, match=r"RGB/000003_cam1_0_\\xff\.jpg: the name is not UTF-8"):
        scan(make_card(), source.root)


def test_half_a_character_in_a_caption_is_named(source, make_card):
    source.captions("train", "NI").write_text(
        '[{"item": "000003_cam1_0_00.jpg", "description": "An adult \\ud83d walks."}]'
    )
    message = r"train_NI\.json: entry 1 has half of a surrogate pair in its 'description'"
    with pytest.raises(ValueError, match=message):
        scan(make_card(), source.root)


@pytest.fixture
def identity_folders(tmp_path, make_jpeg):
    """WMVeID863's layout: one malformed label, one missing modality, one unknown scene."""
    root = tmp_path / "wm"
    for split, name in (
        ("train", "0001/vis/0001_v1_n0_s003_000.jpg"),
        ("train", "0001/ni/0001_v1_n0_s003_000.jpg"),
        ("train", "0001/th/0001_v1_n0_s003_000.jpg"),
        ("train", "0002/vis/0001_v1_n0_s999_000.jpg"),
        ("train", "0002/th/0001_v1_n0_s999_000.jpg"),
        *(
            (split, f"0003/{modality}/0003_v{view}_n1_s004_001.jpg")
            for split, view in (("test", 2), ("query", 4))
            for modality in ("vis", "ni", "th")
        ),
    ):
        (root / split / name).parent.mkdir(parents=True, exist_ok=True)
        (root / split / name).write_bytes(make_jpeg(name))
    return root


@pytest.fixture
def wmveid863() -> Benchmark:
    return uncounted(load_card(ROOT / "datasets" / "wmveid863.toml"))


def test_with_identity_folders_the_folder_is_the_label(identity_folders, wmveid863, caplog):
    found = scan(wmveid863, identity_folders)
    first, second = found.samples["train"]
    assert (first.sample_id, first.pid, first.camera, first.scene) == (
        "0001/0001_v1_n0_s003_000",
        1,
        1,
        3,
    )
    assert (second.pid, second.scene, second.files[1]) == (2, -1, None)
    assert found.findings.other_labels == 1
    assert "1 file name gives another identity than the folder's" in caplog.text


def test_identity_folders_without_one_modality_at_all_are_refused(identity_folders, wmveid863):
    (identity_folders / "train/0001/ni/0001_v1_n0_s003_000.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"train/\*/ni: .*modality NI lies there"):
        scan(wmveid863, identity_folders)


def test_a_folder_that_is_no_identity_is_named(identity_folders, wmveid863, make_jpeg):
    stray = identity_folders / "train/new/vis/0009_v1_n0_s003_000.jpg"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(make_jpeg("stray"))
    with pytest.raises(ValueError, match=r"train/new/vis/.* does not match"):
        scan(wmveid863, identity_folders)


def test_tiles_of_one_image_become_the_modalities(tmp_path, make_jpeg):
    card = uncounted(load_card(ROOT / "datasets" / "rgbnt100.toml"))
    for split, name in (
        ("bounding_box_train", "0001_c0001_001.jpg"),
        ("bounding_box_test", "0400_c0002_001.jpg"),
        ("query", "0400_c0003_001.jpg"),
    ):
        path = tmp_path / "raw" / "rgbir" / split / name
        path.parent.mkdir(parents=True)
        path.write_bytes(make_jpeg(name, size=(48, 8)))
    manifest = prepare(card, tmp_path / "raw", tmp_path / "out")
    assert manifest.splits["query"].images == {"RGB": 1, "NI": 1, "TI": 1}
    [(_, tiles)] = manifest.iter_images("train")
    assert len(set(tiles)) == 3


def test_the_example_of_two_modalities_reads_the_procedural_benchmark(demo_raw, tmp_path):
    manifest = prepare(load_card(ROOT / "datasets" / "rgb_tir.toml"), demo_raw, tmp_path / "out")
    full = scan(load_card(ROOT / "datasets" / "demo.toml"), demo_raw)
    assert list(manifest.splits["train"].images) == ["RGB", "TI"]
    assert manifest.labels("train").sample_id.tolist() == sorted(by_name(full.samples["train"]))
    first = by_name(full.samples["train"])[str(manifest.labels("train").sample_id[0])]
    [taken] = manifest.take("train", [0])
    assert taken.images == [(demo_raw / first.files[index]).read_bytes() for index in (0, 2)]
    assert taken.sentences == [first.sentences[index] for index in (0, 2)]


@pytest.mark.parametrize("card", ["rgbnt201", "msvr310"])
def test_every_name_and_caption_of_the_real_benchmarks_falls_into_place(
    public_captions, card, tmp_path, make_jpeg
):
    """Real names and captions, one image under all of the names, and the counts of the card."""
    benchmark = load_card(ROOT / "datasets" / f"{card}.toml")
    shutil.copytree(public_captions / benchmark.name, tmp_path / "text")
    (tmp_path / "image").write_bytes(make_jpeg("one"))
    scenes = defaultdict(set)
    files = []
    for part, split in (("train", "train"), ("test", "gallery")):
        for modality in benchmark.modalities:
            for item in json.loads((tmp_path / "text" / f"{part}_{modality}.json").read_text()):
                name = item["item"]
                pid = name.split("_")[0]
                between = f"{pid}/" if benchmark.storage.kind == "identity_folders" else ""
                place = f"{between}{benchmark.folder(modality)}/{name}"
                files.append(f"{getattr(benchmark.splits, split).path}/{place}")
                if split == "gallery":
                    scenes[pid].add(name.split("_")[1])
                    if benchmark.splits.query.path:
                        files.append(f"{benchmark.splits.query.path}/{place}")
    for name in files:
        is_query = name.startswith("query3/")
        if is_query and len(scenes[name.split("/")[1]]) < 2:
            continue  # the queries are of those that another scene shows, too
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.hardlink_to(tmp_path / "image")
    found = scan(benchmark, tmp_path)
    assert found.findings.unused_captions == {}
    assert found.findings.leaked_identities == ()
    for samples in found.samples.values():
        assert all(path for one in samples for path in one.files)
        assert all(sentences for one in samples for sentences in one.sentences)


def test_the_original_bytes_and_the_split_sentences_arrive_in_the_shards(source, make_card):
    manifest = prepare(make_card(), source.root, source.root.parent / "out")
    labels = manifest.labels("train")
    assert labels.pid.tolist() == [3] * 3 + [5] * 3 + [7] * 3 + [12] * 3
    for row, images in manifest.iter_images("train"):
        for modality, data in zip(("RGB", "NI", "TI"), images, strict=True):
            assert data == source.path(f"{labels.sample_id[row]}.jpg", modality).read_bytes()
    assert manifest.sentences("train")[1][0] == [
        "An adult in NI.",
        "000003_cam1_0_00.jpg is seen, (e.g., here).",
    ]


def test_a_bad_image_leaves_nothing_behind(source, make_card):
    source.path("000005_cam2_0_01.jpg", "TI").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train_171/TI/000005_cam2_0_01\.jpg is empty"):
        prepare(make_card(), source.root, source.root.parent / "out")
    assert [path.name for path in source.root.parent.iterdir()] == ["source"]


def test_a_bad_image_is_skipped_and_listed_in_the_manifest_if_asked_for(source, make_card):
    source.path("000005_cam2_0_01.jpg", "TI").write_bytes(b"no image")
    manifest = prepare(make_card(), source.root, source.root.parent / "out", SKIP)
    [skipped] = manifest.file.findings.skipped
    assert skipped.file == "train_171/TI/000005_cam2_0_01.jpg"
    assert skipped.reason == "is no image that Pillow can open"
    entry = manifest.splits["train"]
    assert (entry.rows, entry.images["TI"], entry.captions["TI"]) == (12, 11, 11)


def test_what_was_counted_before_is_what_was_written(source, make_card):
    source.path("000003_cam1_0_00.jpg", "NI").unlink()
    card = make_card()
    manifest = prepare(card, source.root, source.root.parent / "out")
    expected = scan(card, source.root).counts(card)
    found = {
        name: entry.model_copy(update={"shards": ()}) for name, entry in manifest.splits.items()
    }
    assert found == expected


def test_progress_counts_every_sample(source, make_card):
    seen = []
    prepare(
        make_card(),
        source.root,
        source.root.parent / "out",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 16) for done in range(1, 17)]


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.INFO)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("12345678901234567890_c1.jpg", r"the pid in .* must be at most 9223372036854775807"),
        ("000003_c12345678901234.jpg", r"the camera in .* must be at most 65535, but is 1234567"),
        ("000003_c1_s99999999999.jpg", r"the scene in .* must be at most 2147483647"),
        (f"{'7' * 200}_c1.jpg", r"but is 7{40}; mend grammar\.pattern in the card, or give"),
    ],
)
def test_a_number_that_is_too_large_is_refused_by_the_file_that_has_it(
    source, make_card, name, message
):
    pattern = r"(?P<pid>\d+)_c(am)?(?P<camera>\d+)(_s(?P<scene>\d+))?(_\d_\d{2})?\.jpg"
    card = make_card(grammar={"pattern": pattern})
    assert scan(card, source.root)
    source.add(name)
    with pytest.raises(ValueError, match=rf"RGB/{name}: .*{message}"):
        scan(card, source.root)


def test_a_number_that_means_unknown_may_be_of_any_size(source, make_card):
    pattern = r"(?P<pid>\d+)_c(am)?(?P<camera>\d+)(_\d_\d{2})?\.jpg"
    card = make_card(grammar={"pattern": pattern, "none": {"camera": 999999}})
    for modality in ("RGB", "NI", "TI"):
        source.add("000003_c999999.jpg", modality)
    samples = by_name(scan(card, source.root).samples["train"])
    assert samples["000003_c999999"].camera == -1


def test_an_identity_folder_of_twenty_digits_is_refused(identity_folders, wmveid863):
    label = "12345678901234567890"
    (identity_folders / "train" / "0001").rename(identity_folders / "train" / label)
    with pytest.raises(ValueError, match=rf"train/{label}/.*: the pid in .* must be at most 92"):
        scan(wmveid863, identity_folders)
