"""A folder means what it shows: which files are pictures, which split they are in, what is left out and said of it."""

import json
import os
import shutil
import socket
import tarfile
import zipfile

import datasets
import numpy as np
import pytest
from helpers import encoded, noise, parquet, run
from PIL import Image

from hf_vaeplus.data import folders
from hf_vaeplus.data.cache import load_images
from hf_vaeplus.data.sources import BadImage
from hf_vaeplus.data.stream import stream_images


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pics").mkdir()
    return tmp_path / "pics"


def fill(folder, *names):
    """Picture i is noise of seed i."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(noise(number)))


@pytest.fixture
def numbers(tmp_path):
    """Which pictures, by their seeds, are loaded."""
    known = {noise(number).tobytes(): number for number in range(20)}

    def numbers(**options):
        options = dict(cache_dir=tmp_path / "cache", resolution=8, progress=False, **options)
        return [known[image.tobytes()] for image in load_images(**options).images]

    return numbers


# Which files are pictures


@pytest.mark.parametrize(
    "name",
    [".hidden.png", "._0.png", "a/.thumbnails/1.png", "__MACOSX/1.png", "@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg",
     "$RECYCLE.BIN/1.png", "lost+found/1.png", ".ipynb_checkpoints/1.png", "Thumbs.db", "deep/er/.Trash-1000/1.png",
     "#recycle/1.png", "0.png~"],
)  # fmt: skip
def test_hidden_and_system_files_are_no_pictures(name, folder, numbers, caplog):
    fill(folder, "0.png", name)
    assert numbers(train_data_dir=folder) == [0]
    assert "pics: left out 1 f" in caplog.text and "hidden or of the system: " in caplog.text


@pytest.mark.parametrize("parent", [".cache", "__data", "@eaDir"])
def test_a_folder_that_the_user_names_may_have_any_name(parent, tmp_path, numbers, caplog):
    fill(tmp_path / parent, "0.png", "b/1.png")
    assert numbers(train_data_dir=tmp_path / parent) == [0, 1]
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "format"),
    [("a.JPG", "jpeg"), ("a.jpe", "jpeg"), ("a.JFIF", "jpeg"), ("a.Tif", "tiff"), ("a.ppm", "ppm"), ("a.PGM", "ppm"),
     ("a.apng", "png"), ("a.jp2", "jpeg2000"), ("a.avif", "avif"), ("a", "png"), ("a.jpg_large", "jpeg"),
     ("a.webp?w=64", "webp"), ("a.bin", "gif"), ("d41d8cd98f00b204", "bmp")],
)  # fmt: skip
def test_what_the_decoder_reads_is_a_picture(name, format, folder, tmp_path):
    if format.upper() not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {format}")
    flat = np.full((8, 8, 3), 200, np.uint8)
    (folder / name).write_bytes(encoded(flat, format))
    images = load_images(train_data_dir=folder, resolution=8, cache_dir=tmp_path / "cache", progress=False)
    assert len(images) == 1 and np.abs(images.images.astype(int) - 200).max() <= 3


def test_programs_and_texts_are_no_pictures(folder, numbers, caplog):
    fill(folder, "0.png", "1.png")
    (folder / "page.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    (folder / "page.pdf").write_bytes(b"%PDF-1.4\n")
    (folder / "notes.txt").write_text("P6 BMW GIF89a")
    assert numbers(train_data_dir=folder) == [0, 1]
    assert caplog.messages == ["pics: left out 3 files (no pictures: notes.txt, page.eps, page.pdf)"]


def test_everything_left_out_is_one_line(folder, caplog, numbers):
    fill(folder, "0.png", ".git/1.png", ".DS_Store", "test/2.png")
    for number in range(7):
        (folder / f"{number}.json").write_text("{}")
    assert numbers(train_data_dir=folder) == [0]
    (line,) = caplog.messages
    assert line.startswith("pics: left out 10 files and folders (")
    assert "hidden or of the system: .DS_Store, .git/" in line and "of the split test: test/2.png" in line
    assert "no pictures: 0.json, 1.json, 2.json, 3.json, 4.json and 2 more" in line


@pytest.mark.parametrize("odd", ["pipe", "socket", "folder"])
def test_what_is_no_file_is_not_opened(odd, folder, numbers, caplog, monkeypatch):
    fill(folder, "0.png")
    monkeypatch.chdir(folder)
    if odd == "pipe":
        os.mkfifo("x.png")
    elif odd == "socket":
        socket.socket(socket.AF_UNIX).bind("x.png")
    else:
        fill(folder / "x.png", "0.png", "1.png")
    assert numbers(train_data_dir=folder) == ([0, 0, 1] if odd == "folder" else [0])
    told = ["pics: left out 1 file (neither files nor folders: x.png)"]
    assert caplog.messages == ([] if odd == "folder" else told)


# Links


def test_linked_folders_are_entered_and_cycles_are_not(folder, tmp_path, numbers, caplog):
    fill(folder, "0.png")
    fill(tmp_path / "elsewhere", "x.png", "y.png", "z/z.png")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/z/up").symlink_to(tmp_path / "elsewhere")
    (folder / "self").symlink_to(folder)
    (folder / "parent").symlink_to("..")
    assert numbers(train_data_dir=folder) == [0, 0, 1, 2]
    assert caplog.messages == ["pics: left out 3 folders (links that lead back: link/z/up/, parent/, self/)"]


@pytest.mark.parametrize("links", [{"z.png": "0.png"}, {"z": "a"}, {"y.png": "0.png", "z.png": "y.png"}])
def test_a_picture_that_links_reach_twice_counts_once(links, folder, numbers, caplog):
    fill(folder, "0.png", "a/1.png")
    for name, target in links.items():
        (folder / name).symlink_to(target)
    assert numbers(train_data_dir=folder) == [0, 1]
    assert "reached before through a link: " in caplog.text
    shutil.copy(folder / "0.png", folder / "zz.png")  # a copy is a picture of its own
    assert numbers(train_data_dir=folder) == [0, 1, 0]


# Pictures and folders that cannot be read


@pytest.mark.parametrize("target", ["gone.png", "1.png"])
def test_a_link_to_nothing_is_a_picture_that_cannot_be_used(target, folder, numbers, caplog):
    fill(folder, "0.png")
    (folder / "1.png").symlink_to(target)  # or to itself
    for load in (numbers, lambda **options: next(stream_images(resolution=8, **options).in_order(2))):
        with pytest.raises(BadImage, match="1.png is not a readable picture"):
            load(train_data_dir=folder)
    assert numbers(train_data_dir=folder, on_bad_image="skip") == [0]
    assert "left out 1 picture that cannot be used: 1.png" in caplog.text


def test_pictures_and_folders_without_permission(folder, numbers, monkeypatch, caplog):
    fill(folder, "0.png", "1.png", "locked/2.png")

    def denied(real, name):
        def call(path, *arguments, **options):
            if str(path).endswith(name):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *arguments, **options)

        return call

    with monkeypatch.context() as patch:  # the superuser reads everything
        patch.setattr("builtins.open", denied(open, "1.png"))
        patch.setattr("os.scandir", denied(os.scandir, "locked"))
        with pytest.raises(BadImage, match="locked cannot be read .Permission denied.; allow reading it or move it"):
            numbers(train_data_dir=folder)
        assert numbers(train_data_dir=folder, on_bad_image="skip") == [0]
        assert "(not readable: locked/)" in caplog.text and "cannot be used: 1.png" in caplog.text
        shutil.move(folder / "locked", folder.parent)
        with pytest.raises(BadImage, match="1.png is not a readable picture .*Permission denied"):
            numbers(train_data_dir=folder)
    shutil.move(folder.parent / "locked", folder)
    assert numbers(train_data_dir=folder, on_bad_image="skip") == [0, 1, 2]  # it can be read now


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"d\xff/\x80.jpg"])
def test_names_that_are_no_utf8(name, folder, tmp_path, numbers, caplog):
    path = os.path.join(os.fsencode(folder), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(encoded(noise(0)))
    with open(path[:-4] + b".txt", "wb") as file:
        file.write(b"words")
    assert numbers(train_data_dir=folder) == numbers(train_data_dir=folder, on_bad_image="skip") == [0]
    with open(path, "wb") as file:
        file.write(b"no picture")
    fill(folder, "zero.png")
    with pytest.raises(BadImage) as error:
        numbers(train_data_dir=folder)
    assert numbers(train_data_dir=folder, on_bad_image="skip") == [0]
    "\n".join([str(error.value), *caplog.messages]).encode()  # can be written anywhere
    table = os.path.join(os.fsencode(tmp_path), b"\xe9.parquet")
    with open(table, "wb") as file:
        file.write(parquet(image=[encoded(noise(3))]))
    assert numbers(train_data_files=os.fsdecode(table)) == [3]


# Splits


def test_the_words_of_splits_are_those_of_datasets():
    words = {str(split): tuple(words) for split, words in datasets.data_files.SPLIT_KEYWORDS.items()}
    assert folders.SPLIT_WORDS == words
    assert datasets.data_files.NON_WORDS_CHARS == "-._ 0-9"


LAYOUTS = {
    "folders": ["train/0.png", "test/1.png", "validation/2.png"],
    "other words": ["training/0.png", "evaluation/1.png", "dev/2.png"],
    "capitals": ["Train/0.png", "TEST/1.png", "Val/2.png"],
    "parts of words": ["my-train/0.png", "test_2/1.png", "imgs.valid/2.png"],
    "deep": ["data/train/cats/0.png", "data/test/cats/1.png", "data/val/cats/2.png"],
    "the outermost": ["train/test/0.png", "test/train/1.png", "val/test.png"],
    "files": ["train_0.png", "test-1.png", "0 val.png"],
    "no training files named": ["a/cat.png", "test/1.png", "valid/2.png"],
}


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("tables", [False, True])
def test_splits_of_folders_and_file_names(names, tables, folder, numbers):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture = encoded(noise(number))
        if tables:
            (folder / name.replace("png", "parquet")).write_bytes(parquet(image=[picture]))
        else:
            (folder / name).write_bytes(picture)
    for number, split in enumerate(("train", "test", "validation")):
        assert numbers(train_data_dir=folder, split=split) == [number]
    assert numbers(train_data_dir=folder, split="test[:1]") == [1]
    with pytest.raises(ValueError, match=r"no split 'unseen' in .*, which has \['test', 'train', 'validation'\]"):
        numbers(train_data_dir=folder, split="unseen")


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["test/0.png", "test/1.png"], ["test"]),
        (["val_0.png", "eval_1.png"], ["test", "validation"]),
    ],
)
def test_asking_for_training_pictures_never_gives_others(names, splits, folder, numbers):
    fill(folder, *names)
    with pytest.raises(ValueError, match="no split 'train' in train_data_dir=.*, which has ") as error:
        numbers(train_data_dir=folder)
    assert str(splits) in str(error.value)


def test_one_picture_called_train_does_not_hide_the_others(folder, numbers):
    fill(folder, "0.png", "steam train.png", "constrain.png", "contest.png", "test.png")
    assert sorted(numbers(train_data_dir=folder)) == [0, 1, 2, 3]
    assert numbers(train_data_dir=folder, split="test") == [4]


def test_tables_as_the_hub_names_them(folder, numbers):
    names = ["data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-00000-of-00001",
             "data/unsupervised-00000-of-00001", "default/val/0000", "more/photos-1"]  # fmt: skip
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.parquet").write_bytes(parquet(image=[encoded(noise(number))]))
    (folder / "README.md").touch()
    expected = {"train": [0, 1], "test": [2], "unsupervised": [3], "validation": [4], "photos": [5]}
    for split, wanted in expected.items():
        assert numbers(train_data_dir=folder, split=split) == wanted
    for name in names[:5]:
        (folder / f"{name}.parquet").unlink()
    assert numbers(train_data_dir=folder) == [5]  # of a table of no split


def test_captions_in_a_table_beside_pictures(folder, numbers):
    fill(folder, "train/0.png", "test/1.png")
    for split in ("train", "test"):
        (folder / split / "metadata.parquet").write_bytes(parquet(file_name=["0.png"]))
    assert numbers(train_data_dir=folder, split="test") == [1]


# Patterns and paths


@pytest.mark.parametrize("place", ["sets [old]/a", "a*b", "what?", "[ab]"])
def test_an_existing_path_is_no_pattern(place, tmp_path, numbers):
    (tmp_path / place).mkdir(parents=True)
    for number, name in enumerate(("[0].parquet", "0.parquet")):
        (tmp_path / place / name).write_bytes(parquet(image=[encoded(noise(number))]))
    (tmp_path / "axb").mkdir()
    (tmp_path / "axb/2.parquet").write_bytes(parquet(image=[encoded(noise(2))]))
    assert numbers(train_data_files=tmp_path / place / "[0].parquet") == [0]
    assert numbers(train_data_files=f"{tmp_path / place}/?.parquet") == [1]
    assert numbers(train_data_files=str(tmp_path / place / "*.parquet")) == [1, 0]
    fill(tmp_path / place / "pictures", "0.png", "1.png")
    assert numbers(train_data_dir=tmp_path / place / "pictures") == [0, 1]
    with pytest.raises(ValueError, match="train_data_files names the folder '.*'; name it with train_data_dir"):
        numbers(train_data_files=tmp_path / place)


def test_overlapping_patterns_count_a_row_once(tmp_path, numbers, monkeypatch):
    for number in range(3):
        (tmp_path / f"{number}.parquet").write_bytes(parquet(image=[encoded(noise(number))]))
    (tmp_path / "link.parquet").symlink_to("1.parquet")
    monkeypatch.chdir(tmp_path)
    assert numbers(train_data_files=["2.parquet", "*.parquet", "./0.parquet", str(tmp_path / "1*")]) == [2, 0, 1]
    assert numbers(train_data_files=["link.parquet", "**/[12].parquet", "link.*"]) == [1, 2]


def test_a_pattern_gives_no_test_rows_beside_training_rows(tmp_path, numbers, caplog):
    for number, name in enumerate(("train-0", "test-0", "validation-0")):
        (tmp_path / f"{name}.parquet").write_bytes(parquet(image=[encoded(noise(number))]))
    assert numbers(train_data_files=str(tmp_path / "*.parquet")) == [0]
    assert "of the split test: test-0.parquet; of the split validation: validation-0.parquet" in caplog.text
    assert numbers(train_data_files=str(tmp_path / "test-*.parquet")) == [1]  # named, and alone
    assert numbers(train_data_files=[tmp_path / "test-0.parquet", tmp_path / "train-0.parquet"]) == [1, 0]


# Saved data sets and archives


def pictures_of(*seeds):
    return datasets.Dataset.from_dict({"image": [Image.fromarray(noise(seed)) for seed in seeds]})


def test_folders_of_save_to_disk_are_read(folder, numbers):
    saved = datasets.DatasetDict(train=pictures_of(0, 1, 2), test=pictures_of(3), other=pictures_of(4).select([0]))
    saved.save_to_disk(folder / "dict", num_shards={"train": 2, "test": 1, "other": 1})
    for split, wanted in {"train": [0, 1, 2], "test": [3], "other": [4]}.items():
        assert numbers(train_data_dir=folder / "dict", split=split) == wanted
        assert numbers(train_data_dir=folder / "dict" / split) == wanted
    with pytest.raises(ValueError, match=r"no split 'valid' in .*, which has \['train', 'test', 'other'\]"):
        numbers(train_data_dir=folder / "dict", split="valid")
    (folder / "dict/train/cache-1.arrow").write_bytes(b"of datasets.map")
    datasets.load_from_disk(folder / "dict/train").select([2, 0]).save_to_disk(folder / "one")
    assert numbers(train_data_dir=folder / "one", max_samples=1) == [2]
    (batch,) = stream_images(train_data_dir=folder / "one", resolution=8).in_order(4)
    assert len(batch["index"]) == 2
    with pytest.raises(ValueError, match=r"no column 'photo' in one, which has \['image'\]"):
        numbers(train_data_dir=folder / "one", image_column="photo")
    (folder / "one/state.json").write_text(json.dumps({"_split": "test", "_data_files": []}))
    with pytest.raises(ValueError, match=r"no split 'train' in .*, which has \['test'\]"):
        numbers(train_data_dir=folder / "one")


@pytest.mark.parametrize(
    ("file", "content"),
    [("state.json", "{"), ("state.json", "[]"), ("dataset_dict.json", "3"), ("data-00000-of-00001.arrow", "ARROW1")],
)
def test_damaged_folders_of_save_to_disk(file, content, folder, numbers):
    pictures_of(0, 1).save_to_disk(folder)
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match="; save it again|; fetch it again"):
        numbers(train_data_dir=folder)


def archive(path):
    with zipfile.ZipFile(path, "w") if path.suffix == ".zip" else tarfile.open(path, "w:gz") as file:
        add = file.write if path.suffix == ".zip" else file.add
        add(__file__, "0.png")


@pytest.mark.parametrize(
    ("name", "kind"), [("train.zip", "zip"), ("00000.tar", "tar"), ("a.tgz", "tar"), ("a.tar.zst", "zst")]
)
def test_archives_are_named_for_what_they_are(name, kind, folder, numbers):
    if kind == "zst":
        (folder / name).write_bytes(b"\x28\xb5\x2f\xfd")
    else:
        archive(folder / name)
    with pytest.raises(ValueError, match=f"got the {kind} archive '{name}'; unpack it and name its folder"):
        numbers(train_data_dir=folder)
    with pytest.raises(ValueError, match=f"is a {kind} archive, expected a folder; unpack it and name the folder"):
        numbers(train_data_dir=folder / name)
    with pytest.raises(ValueError, match=f"is a {kind} archive, expected a parquet file; unpack it"):
        numbers(train_data_files=folder / name)
    fill(folder, "0.png")  # beside its pictures it is left out
    assert numbers(train_data_dir=folder) == [0]


# Fingerprints


def test_the_fingerprint_ignores_how_the_folder_is_reached(folder, tmp_path, monkeypatch):
    fill(folder, "0.png", "b/1.png")

    def fingerprints(path):
        options = dict(train_data_dir=path, resolution=8)
        cached = load_images(**options, cache_dir=tmp_path / "cache", progress=False)
        assert cached.name == "pics" and stream_images(**options).fingerprint == cached.fingerprint
        return cached.fingerprint

    monkeypatch.setenv("VAEPLUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    first = fingerprints("pics")
    assert {fingerprints(path) for path in ("pics/", "./pics", str(folder), folder, "pics/b/..")[:4]} == {first}
    os.utime(folder / "0.png", (0, 0))
    monkeypatch.chdir(folder)
    assert fingerprints(".") == fingerprints("../pics") == first
    monkeypatch.chdir(tmp_path)
    shutil.move(folder, tmp_path / "moved/pics")
    assert fingerprints("moved/pics") == first
    fill(tmp_path / "moved/pics/b", "9.png", "1.png")  # other content under a known name, and a new name
    assert fingerprints("moved/pics") != first


# Commands


def test_reconstruct_takes_the_same_pictures(working_folder, caplog):
    fill(working_folder / "pics", "a.jfif", "b", ".c.png", "d/e.PNG")
    (working_folder / "pics/up").symlink_to("..")
    (working_folder / "pics/notes.txt").write_text("words")
    code, output, errors = run("reconstruct", "home/pipeline", "pics", "--json")
    assert code == 0, errors
    assert json.loads(output)["num_images"] == 3
    assert any("left out 3 files and folders" in message for message in caplog.messages)
