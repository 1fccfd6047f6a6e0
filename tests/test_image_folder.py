"""Listing folders: what is found, in which order, under which label, and what is said when nothing is."""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from dino_lightning.data import IMAGE_EXTENSIONS, ImageFolder, UnreadableImage, find_splits

LINKS = pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")


def fill(root, *names):
    """Empty files below root: a listing opens none of them."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def listed(folder):
    return [Path(folder.path(i)).relative_to(folder.root).as_posix() for i in range(len(folder))]


# What is found


def test_flat_folder_has_no_classes(tmp_path):
    folder = ImageFolder(fill(tmp_path, "b.jpg", "a.png", "c.tif"))
    assert len(folder) == 3
    assert listed(folder) == ["a.png", "b.jpg", "c.tif"]
    assert folder.classes is None and folder.labels is None


def test_order_is_by_the_relative_path_as_a_string(tmp_path):
    names = ["a/z.jpg", "a-b/x.jpg", "a.jpg", "B.jpg", "b/10.jpg", "b/9.jpg", "é.jpg", "z.jpg"]
    assert listed(ImageFolder(fill(tmp_path, *reversed(names)))) == sorted(names)
    assert sorted(names)[:4] == ["B.jpg", "a-b/x.jpg", "a.jpg", "a/z.jpg"]


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    fill(tmp_path, "a/1.jpg", "a/2.jpg", "b/c/3.jpg", "b/4.jpg")
    expected = listed(ImageFolder(tmp_path))
    scandir = os.scandir

    class Reversed:
        def __init__(self, path):
            self.entries = list(scandir(path))[::-1]

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Reversed)
    assert listed(ImageFolder(tmp_path)) == expected == ["a/1.jpg", "a/2.jpg", "b/4.jpg", "b/c/3.jpg"]


def test_extensions_in_any_case_and_no_others(tmp_path):
    images = {f"{i}{extension}" for i, extension in enumerate(sorted(IMAGE_EXTENSIONS))}
    images |= {"UPPER.JPG", "Mixed.JpEg", "two.dots.png"}
    fill(tmp_path, *images, "notes.txt", "noextension", "jpg", "a.jpg.part", "movie.mp4")
    assert set(listed(ImageFolder(tmp_path))) == images
    assert IMAGE_EXTENSIONS == {
        ".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".jp2",
        ".npy",
    }  # fmt: skip


def test_hidden_files_and_folders_are_skipped(tmp_path):
    fill(tmp_path, "a.jpg", "._a.jpg", ".hidden.png", ".cache/b.jpg", "x/.git/c.jpg", "x/d.jpg")
    assert listed(ImageFolder(tmp_path)) == ["a.jpg", "x/d.jpg"]


def test_a_hidden_folder_is_listed_when_it_is_the_root(tmp_path):
    assert listed(ImageFolder(fill(tmp_path / ".data", "a.jpg"))) == ["a.jpg"]


def test_a_folder_by_the_name_of_an_image_is_a_folder(tmp_path):
    assert listed(ImageFolder(fill(tmp_path, "scan.tif/a.jpg"))) == ["scan.tif/a.jpg"]


@LINKS
def test_linked_files_and_folders_are_followed(tmp_path):
    fill(tmp_path / "elsewhere", "a.jpg", "deep/b.jpg")
    root = fill(tmp_path / "root", "own/c.jpg")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(tmp_path / "elsewhere")
    (root / "own/d.jpg").symlink_to(tmp_path / "elsewhere/a.jpg")
    folder = ImageFolder(root)
    assert listed(folder) == [
        "again/a.jpg", "again/deep/b.jpg", "linked/a.jpg", "linked/deep/b.jpg", "own/c.jpg", "own/d.jpg",
    ]  # fmt: skip
    assert folder.classes == ["again", "linked", "own"]


@LINKS
def test_linked_loops_end(tmp_path):
    root = fill(tmp_path / "root", "a/1.jpg", "b/2.jpg")
    (root / "a/up").symlink_to(root)
    (root / "a/self").symlink_to(root / "a")
    (root / "b/knot").symlink_to(root / "b/knot")
    outside = fill(tmp_path / "outside", "3.jpg")
    (root / "out").symlink_to(outside)
    (outside / "back").symlink_to(root)
    assert listed(ImageFolder(root)) == ["a/1.jpg", "b/2.jpg", "out/3.jpg"]


@LINKS
def test_a_broken_link_is_listed_and_unreadable(tmp_path):
    (tmp_path / "a.jpg").symlink_to(tmp_path / "gone.jpg")
    folder = ImageFolder(tmp_path)
    with pytest.raises(UnreadableImage, match=r"a\.jpg"):
        folder[0]


@LINKS
def test_unusual_names(tmp_path):
    names = ["with space.jpg", "line\nbreak.png", "日本 é.jpg", "tab\t.png", "folder ü/x y.jpg", "quote'\".png"]
    folder = ImageFolder(fill(tmp_path, *names))
    assert listed(folder) == sorted(names)
    assert all(os.path.exists(folder.path(i)) for i in range(len(folder)))


@pytest.mark.skipif(sys.platform != "linux", reason="only there a name is any bytes")
def test_a_name_that_is_not_utf8(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff\xe9.png"
    with open(name, "wb") as file:
        Image.new("RGB", (4, 3)).save(file, "PNG")
    folder = ImageFolder(tmp_path)
    assert os.fsencode(folder.path(0)) == name
    assert folder[0][0].shape == (3, 4, 3)


# Labels


def test_first_level_folders_are_the_classes(tmp_path):
    folder = ImageFolder(fill(tmp_path, "dog/1.jpg", "cat/2.jpg", "cat/x/y/3.jpg", "bird/.hidden.jpg", "empty/a.txt"))
    assert folder.classes == ["cat", "dog"]
    assert listed(folder) == ["cat/2.jpg", "cat/x/y/3.jpg", "dog/1.jpg"]
    assert isinstance(folder.labels, np.ndarray) and folder.labels.dtype == np.int64
    assert folder.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("names", [("a.jpg", "cat/1.jpg", "dog/2.jpg"), ("only/1.jpg", "only/x/2.jpg", "only/y/3.jpg")])
def test_images_at_the_root_or_in_a_single_folder_have_no_classes(tmp_path, names):
    folder = ImageFolder(fill(tmp_path, *names))
    assert len(folder) == 3
    assert folder.classes is None and folder.labels is None


def test_given_classes_are_the_mapping(tmp_path):
    folder = ImageFolder(fill(tmp_path, "dog/1.jpg", "cat/2.jpg"), classes=("fish", "dog", "bird", "cat"))
    assert folder.classes == ["fish", "dog", "bird", "cat"]
    assert folder.labels.tolist() == [3, 1]
    single = ImageFolder(fill(tmp_path / "single", "dog/1.jpg"), classes=["cat", "dog"])
    assert single.labels.tolist() == [1]


def test_a_folder_that_is_no_given_class_is_named(tmp_path):
    fill(tmp_path, "dog/1.jpg", "wolf/2.jpg")
    with pytest.raises(ValueError, match="(?s)'wolf'.*cat, dog") as caught:
        ImageFolder(tmp_path, classes=["cat", "dog"])
    assert str(tmp_path) in str(caught.value)


def test_images_outside_of_given_classes_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="outside of the class folders.*cat, dog"):
        ImageFolder(fill(tmp_path, "dog/1.jpg", "2.jpg"), classes=["cat", "dog"])


# Items


@pytest.fixture
def two_classes(tmp_path):
    """Three flat-coloured images, whose red value tells them apart."""
    for name, red in (("cat/1.png", 10), ("cat/2.png", 20), ("dog/3.png", 30)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (5, 4), (red, 0, 0)).save(tmp_path / name)
    return tmp_path


def test_items_are_arrays_and_labels(two_classes):
    folder = ImageFolder(two_classes)
    items = list(folder)
    assert [(image.shape, image.dtype, int(image[0, 0, 0]), label) for image, label in items] == [
        ((4, 5, 3), np.uint8, 10, 0), ((4, 5, 3), np.uint8, 20, 0), ((4, 5, 3), np.uint8, 30, 1),
    ]  # fmt: skip
    assert all(type(label) is int for _, label in items)
    assert ImageFolder(two_classes / "cat")[0][1] == -1
    assert ImageFolder(two_classes, in_chans=1)[0][0].shape == (4, 5, 1)


def test_indices_like_those_of_a_list(two_classes):
    folder = ImageFolder(two_classes)
    assert folder.path(-1) == folder.path(2) == str(two_classes / "dog/3.png")
    assert folder[-1][1] == 1 and folder[-1][0][0, 0, 0] == 30
    assert folder[np.int64(1)][0][0, 0, 0] == 20
    for index in (3, -4):
        with pytest.raises(IndexError):
            folder.path(index)
        with pytest.raises(IndexError):
            folder[index]


def test_an_unreadable_item_names_its_path(tmp_path):
    with pytest.raises(UnreadableImage) as caught:
        ImageFolder(fill(tmp_path, "empty.jpg"))[0]
    assert caught.value.source == str(tmp_path / "empty.jpg")


def test_paths_are_absolute_for_a_relative_root(two_classes, monkeypatch):
    monkeypatch.chdir(two_classes.parent)
    folder = ImageFolder(two_classes.name)
    monkeypatch.chdir("/")
    assert folder.path(0) == str(two_classes / "cat/1.png")
    assert folder[0][1] == 0


def test_a_pickled_folder_is_the_same(two_classes):
    folder = ImageFolder(two_classes)
    copy = pickle.loads(pickle.dumps(folder))
    assert listed(copy) == listed(folder)
    assert copy.labels.tolist() == folder.labels.tolist()


def test_items_cross_worker_processes(two_classes):
    loader = DataLoader(ImageFolder(two_classes), batch_size=None, num_workers=2)
    assert [(int(image[0, 0, 0]), label) for image, label in loader] == [(10, 0), (20, 0), (30, 1)]


# Nothing to list


def test_missing_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        ImageFolder("missing")
    assert str(tmp_path / "missing") in str(caught.value)


def test_root_is_a_file(tmp_path):
    with pytest.raises(NotADirectoryError, match="is a file: pass the folder") as caught:
        ImageFolder(fill(tmp_path, "a.jpg") / "a.jpg")
    assert str(tmp_path / "a.jpg") in str(caught.value)


def test_empty_root(tmp_path):
    with pytest.raises(FileNotFoundError, match="found 0 folders and 0 other files. Files count") as caught:
        ImageFolder(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_root_without_images_tells_what_is_there(tmp_path):
    fill(tmp_path, *[f"a/{i}.dcm" for i in range(5)], *[f"b/c/{i}.TXT" for i in range(3)])
    fill(tmp_path, "LICENSE", "README", "one.zip", ".hidden.jpg")
    with pytest.raises(FileNotFoundError) as caught:
        ImageFolder(tmp_path)
    message = str(caught.value)
    assert "3 folders and 11 other files" in message
    assert ".dcm (5), .txt (3), no extension (2)" in message
    assert ".zip" not in message
    assert all(extension in message for extension in IMAGE_EXTENSIONS)
    assert "Convert" in message


# Splits


def test_without_train_the_root_is_the_training_folder(tmp_path):
    fill(tmp_path, "val/1.jpg", "train")  # a file by that name
    assert find_splits(str(tmp_path)) == (tmp_path, [])
    assert find_splits(tmp_path / "missing") == (tmp_path / "missing", [])


@pytest.mark.parametrize(
    "present, query",
    [
        ((), []),
        (("test",), ["test"]),
        (("test", "validation"), ["validation", "test"]),
        (("test", "validation", "val"), ["val", "validation", "test"]),
        (("other", "val"), ["val"]),
        ((".cache",), []),
    ],
)
def test_train_is_the_training_folder_beside_queries_or_alone(tmp_path, present, query):
    fill(tmp_path, "train/1.jpg", *[f"{name}/1.jpg" for name in present])
    assert find_splits(str(tmp_path)) == (tmp_path / "train", [tmp_path / name for name in query])


def test_train_among_other_folders_is_one_of_them(tmp_path):
    fill(tmp_path, "train/1.jpg", "car/1.jpg")
    assert find_splits(tmp_path) == (tmp_path, [])
