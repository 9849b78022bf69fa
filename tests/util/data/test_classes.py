"""Lists of images, chosen and renamed classes, and what is said about a data set."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from util.data.classes import ClassChoice, read_class_names
from util.data.images import ImageDataset, ImageFiles, ImageFolder, open_images, write_image_archive
from util.errors import UserError


def write(root: Path, *names: str) -> Path:
    """One-coloured 8×8 pictures, each of another grey."""
    for grey, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (grey, grey, grey)).save(root / name)
    return root


def greys(images: ImageDataset) -> list[tuple[int, str]]:
    """What is in the pictures, and the name of their class."""
    return [(int(images[i][0][0, 0, 0]), images.classes[images[i][1]]) for i in range(len(images))]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write(tmp_path / "photos", "n1/0.png", "n2/1.png", "n2/2.png", "n3/3.png")


def test_a_list_of_images_has_the_labels_that_stand_in_it(tmp_path: Path) -> None:
    write(tmp_path, "a/0.png", "1.png", "with blank.png")
    lists = {
        "header.csv": "image,label,width\na/0.png,dog,8\n1.png,cat,8\nwith blank.png,dog,8\n",
        "plain.csv": '1.png,cat\n\n"a/0.png",dog\nwith blank.png,dog\n',
        "tabs.tsv": "filename\tclass\nwith blank.png\tdog\na/0.png\tdog\n1.png\tcat\n",
        "blanks.txt": "with blank.png dog\n1.png   cat\na/0.png dog\n",
    }
    fingerprints = set()
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        images = open_images(tmp_path / name, 8)
        assert greys(images) == [(1, "cat"), (0, "dog"), (2, "dog")], name
        fingerprints.add(images.fingerprint())
    assert len(fingerprints) == 1
    (tmp_path / "plain.csv").write_text("1.png,dog\na/0.png,cat\nwith blank.png,dog\n")
    assert open_images(tmp_path / "plain.csv", 8).fingerprint() not in fingerprints


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.png,cat\n1.png\n", "line 2 of .* is '1.png'; expected an image's path and its class"),
        ("0.png,cat\nnotes.md,cat\n", "line 2"),
        ("0.png,cat\n0.png,dog\n", "lists 0.png twice"),
        ("image,class\n", "lists no images"),
        ("0.png,cat\nnone.png,cat\n", "1 files that do not exist, such as .*none.png"),
    ],
)
def test_lists_that_are_wrong_are_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, "0.png")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        open_images(tmp_path / "list.csv", 8)
    with pytest.raises(UserError, match=r"missing\.csv does not exist"):
        open_images(tmp_path / "missing.csv", 8)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"0.png," + b"c" * 200_000, None])
def test_lists_that_are_none_are_refused(tmp_path: Path, content: bytes | None) -> None:
    """Guards against a traceback of the CSV module, and against waiting for a pipe."""
    path = write(tmp_path, "0.png") / "list.csv"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"list\.csv"):
        open_images(path, 8)


def test_classes_are_chosen_and_renamed(photos: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("n1 tench, Tinca tinca\nn2 shark\nn9 unused\n")
    all_named = open_images(photos, 8, choice=ClassChoice(class_names=names))
    assert all_named.classes == ["tench, Tinca tinca", "shark", "n3"]
    assert all_named.fingerprint() == open_images(photos, 8).fingerprint()
    for wanted in (("n3", "n2"), ("shark", "n3")):  # by either name, in the order of the labels
        some = open_images(photos, 8, choice=ClassChoice(classes=wanted, class_names=names))
        assert greys(some) == [(1, "shark"), (2, "shark"), (3, "n3")]
        assert some.labels.tolist() == [0, 0, 1]
        assert isinstance(some, ImageFiles)
        assert some.paths == ["n2/1.png", "n2/2.png", "n3/3.png"]
        assert some.fingerprint() != all_named.fingerprint()


def test_classes_of_archives_and_lists_are_chosen(photos: Path, tmp_path: Path) -> None:
    folder = ImageFolder(photos, 8)
    files = [(photos / path).read_bytes() for path in folder.paths]
    write_image_archive(tmp_path / "a.npz", files, folder.labels.tolist(), folder.classes, [0, 1, 0, 0])
    lines = [
        f"{photos / path},{folder.classes[label]}" for path, label in zip(folder.paths, folder.labels, strict=True)
    ]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    choice = ClassChoice(classes=("n3", "n2"))
    assert greys(open_images(tmp_path / "a.csv", 8, choice=choice)) == [(1, "n2"), (2, "n2"), (3, "n3")]
    assert greys(open_images(f"{tmp_path / 'a.npz'}:train", 8, choice=choice)) == [(2, "n2"), (3, "n3")]


def test_choices_that_fit_nothing_are_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no classes cat, dog; it has n1, n2, n3"):
        open_images(photos, 8, choice=ClassChoice(classes=("dog", "n1", "cat")))
    names = tmp_path / "names.csv"
    for text, message in (
        ("a,cat\n", "names none of the classes"),
        ("n1,cat\nn2,cat\n", "the same name: cat"),
        ("n1\n", "a line 'FOLDER NAME'"),
    ):
        names.write_text(text)
        with pytest.raises(UserError, match=message):
            open_images(photos, 8, choice=ClassChoice(class_names=names))
    with pytest.raises(UserError, match="does not exist"):
        open_images(photos, 8, choice=ClassChoice(class_names=tmp_path / "none.txt"))
    names.with_suffix(".json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"names\.json is truncated or damaged"):
        read_class_names(names.with_suffix(".json"))
    names.with_suffix(".json").write_text('{"n1": "cat"}')
    assert read_class_names(names.with_suffix(".json")) == {"n1": "cat"}


@pytest.mark.parametrize(
    ("files", "warning"),
    [
        (("cat/0.png", "dog/1.png"), None),
        (("cat/0.png", "dog/summer/1.png", "dog/2.png"), None),
        (("train/cat/0.png", "train/dog/1.png", "val/cat/2.png"), "train, val, which look like parts of a data set"),
        (("photos/cat/0.png", "photos/dog/1.png"), "has one class only, photos"),
        (("photos/cat/0.png", "photos/dog/1.png"), "in its subfolders only, cat, dog"),
        (("wild/cat/0.png", "wild/fox/1.png", "tame/dog/2.png", "tame/cow/3.png"), "subfolders only, cow, dog"),
    ],
)
def test_what_was_found_is_said_and_doubted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, files: tuple[str, ...], warning: str | None
) -> None:
    caplog.set_level(logging.INFO)
    images = open_images(write(tmp_path, *files), 8)
    found, *warnings = caplog.messages
    assert found == f"{tmp_path}: {len(files)} images in {len(images.classes)} classes: {', '.join(images.classes)}"
    assert warnings == [] if warning is None else any(warning in message for message in warnings)


def test_the_folder_of_one_class_is_not_taken_for_a_data_set(photos: Path) -> None:
    with pytest.raises(UserError, match="n1 has no class folders but images; name the folder above it"):
        open_images(photos / "n1", 8)


def test_hidden_folders_and_those_of_archivers_are_no_classes(tmp_path: Path) -> None:
    write(tmp_path, "a/0.png", "__MACOSX/1.png", ".cache/2.png", "a/.thumbs/3.png", "a/__MACOSX/4.png", "b/c/5.png")
    folder = ImageFolder(tmp_path, 8)
    assert (folder.classes, folder.paths) == (["a", "b"], ["a/0.png", "b/c/5.png"])
    assert np.array_equal(folder.labels, [0, 1])
