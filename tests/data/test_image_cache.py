import errno
import io
import json
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as Images
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile, PngInfo
from transformers import AutoImageProcessor

from lit_llm.data import image_cache
from lit_llm.data.image_cache import ImageCache, build_image_cache, read_image
from lit_llm.data.image_processor import ImageProcessor
from tests.images import noise, truncated


def table(files: list[Path]) -> Dataset:
    return Dataset.from_dict({"image": [str(file) for file in files]}, Features({"image": Images(decode=False)}))


def saved(folder: Path, images: list[Image.Image]) -> list[Path]:
    files = [folder / f"{number}.png" for number in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    return files


def test_images_of_one_size_are_kept_as_they_are(tmp_path: Path) -> None:
    splits = {"train": [noise(n, 5, 7) for n in range(3)], "test": [noise(n, 5, 7) for n in range(8, 10)]}
    for name in splits:
        (tmp_path / name).mkdir()
    tables = {name: table(saved(tmp_path / name, images)) for name, images in splits.items()}
    cache = build_image_cache(tmp_path / "cache", tables, None, None)
    assert cache.shape == (1, 5, 7)
    for name, images in splits.items():
        for place, image in zip(cache.places(name), images, strict=True):
            assert np.array_equal(cache.pixels[place, 0], np.asarray(image))
    assert not cache.pixels.flags.writeable
    assert ImageCache.open(tmp_path / "cache").manifest == cache.manifest
    assert len(set(cache.contents.tolist())) == 5


def test_several_processes_make_what_one_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = saved(tmp_path, [noise(n) for n in range(9)])
    (tmp_path / "4.png").write_bytes(b"no image")
    one = build_image_cache(tmp_path / "one", {"train": table(files)}, None, None)
    monkeypatch.setattr(image_cache, "ALONE", 1)
    monkeypatch.setattr(image_cache, "CHUNK", 2)
    monkeypatch.setattr(image_cache.os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    several = build_image_cache(tmp_path / "several", {"train": table(files)}, None, None)
    for name in ("pixels", "contents", "sums"):
        assert np.array_equal(getattr(one, name), getattr(several, name))
    assert [one.manifest["broken"][0][:2]] == [several.manifest["broken"][0][:2]] == [["train", 4]]


def test_tables_do_not_come_with_every_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    class Measured(ProcessPoolExecutor):
        def submit(self, *work: Any) -> Any:
            sizes.append(len(pickle.dumps(work)))
            return super().submit(*work)

    many = table(saved(tmp_path, [noise(0)]) * 100)
    monkeypatch.setattr(image_cache, "ProcessPoolExecutor", Measured)
    monkeypatch.setattr(image_cache, "ALONE", 1)
    monkeypatch.setattr(image_cache, "CHUNK", 25)
    monkeypatch.setattr(image_cache.os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    assert build_image_cache(tmp_path / "cache", {"train": many}, None, None).shape == (1, 6, 6)
    assert len(sizes) == 8  # 4 to inspect, 4 to decode
    assert max(sizes) < 1000 < len(pickle.dumps(many))


@pytest.mark.parametrize(("sizes", "shape"), [([(5, 5), (5, 5)], (5, 5)), ([(5, 5), (5, 6)], (224, 224))])
def test_the_size_is_that_of_all_or_else_the_usual_one(tmp_path: Path, sizes: Any, shape: Any) -> None:
    files = saved(tmp_path, [noise(n, *size) for n, size in enumerate(sizes)])
    assert build_image_cache(tmp_path / "cache", {"train": table(files)}, None, None).shape == (1, *shape)


@pytest.mark.parametrize("odd", ["RGB", "RGBA", "P", "CMYK"])
def test_one_image_of_another_mode_gives_all_colours(tmp_path: Path, odd: str) -> None:
    images = [noise(0), noise(1).convert("RGB").convert(odd)]
    files = [tmp_path / "0.png", tmp_path / f"1.{'tif' if odd == 'CMYK' else 'png'}"]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    cache = build_image_cache(tmp_path / "cache", {"train": table(files)}, None, None)
    assert cache.shape == (3, 6, 6)
    assert np.array_equal(cache.pixels[0], np.repeat(np.asarray(images[0])[None], 3, axis=0))
    grey = build_image_cache(tmp_path / "grey", {"train": table(files)}, None, 1)
    assert grey.shape == (1, 6, 6)


def test_lab_is_read_in_colour_and_in_grey(tmp_path: Path) -> None:
    lab = Image.fromarray(np.asarray(noise(0, mode="RGB")), "LAB")
    lab.save(tmp_path / "0.tif")
    file, seen = {"bytes": None, "path": str(tmp_path / "0.tif")}, lab.convert("RGB")
    assert np.array_equal(read_image(file, 3, 6, 6), np.asarray(seen).transpose(2, 0, 1))
    assert np.array_equal(read_image(file, 1, 6, 6)[0], np.asarray(seen.convert("L")))


def test_grey_of_other_modes_stays_grey(tmp_path: Path) -> None:
    deep = Image.fromarray((np.asarray(noise(0)).astype(np.uint16) << 8) + 77)
    files = saved(tmp_path, [deep, noise(1).convert("LA"), noise(2).convert("1")])
    cache = build_image_cache(tmp_path / "cache", {"train": table(files)}, None, None)
    assert cache.shape[0] == 1
    assert np.array_equal(cache.pixels[0, 0], np.asarray(noise(0)))
    assert np.array_equal(cache.pixels[1, 0], np.asarray(noise(1)))


def test_a_pgm_of_16_bits_is_grey_as_a_png_is(tmp_path: Path) -> None:
    deep = Image.fromarray((np.asarray(noise(0)).astype(np.uint16) << 8) + 77)
    found = []
    for suffix in ("pgm", "png"):
        deep.save(tmp_path / f"x.{suffix}")
        found.append(read_image({"bytes": None, "path": str(tmp_path / f"x.{suffix}")}, 1, 6, 6))
    assert np.array_equal(*found)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_grey_of_which_nothing_says_what_is_white_is_refused(tmp_path: Path, kind: Any) -> None:
    Image.fromarray(np.asarray(noise(0)).astype(kind)).save(tmp_path / "x.tif")
    with pytest.raises(
        ValueError, match=r"^an image must have 8 or 16 bits a channel, but is of mode [FI]; convert it$"
    ):
        read_image({"bytes": None, "path": str(tmp_path / "x.tif")}, 1, 6, 6)


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (17, 50), (9, 9)])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_sizes_are_read_as_transformers_reads_them(tmp_path: Path, size: Any, channels: int) -> None:
    image = noise(0, *size, mode="L" if channels == 1 else "RGB")
    image.save(tmp_path / "x.png")
    ours = read_image({"bytes": None, "path": str(tmp_path / "x.png")}, channels, 12, 12)
    processor = ImageProcessor((channels, 12, 12), [0.3] * channels, [0.2] * channels)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor.to_hf()))
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose((ours / 255 - 0.3) / 0.2, theirs, atol=1e-5)


def photograph(file: Path) -> Path:
    """A photograph stored sideways, with its orientation in EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(0, 8, 24).save(file, exif=exif, quality=100)
    return file


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_photograph_is_turned_upright(tmp_path: Path, suffix: str) -> None:
    file = photograph(tmp_path / f"0.{suffix}")
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file.read_bytes()))))
    cache = build_image_cache(tmp_path / "cache", {"train": table([file])}, None, None)
    assert cache.shape == (1, 24, 8)
    assert np.array_equal(cache.pixels[0, 0], upright)


def chunks(png: bytes) -> list[bytes]:
    """The signature and the chunks of a PNG file."""
    found, place = [png[:8]], 8
    while place < len(png):
        end = place + 12 + int.from_bytes(png[place : place + 4], "big")
        found.append(png[place:end])
        place = end
    return found


@pytest.mark.parametrize("said", ["exif", "Raw profile type exif", "xmp"])
def test_an_orientation_is_found_after_the_pixels_of_a_png(tmp_path: Path, said: str) -> None:
    file, told = photograph(tmp_path / "0.png"), PngInfo()
    parts = chunks(file.read_bytes())
    exif = next(part for part in parts if part[4:8] == b"eXIf")
    if said != "exif":
        if said == "xmp":
            told.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
        else:
            told.add_text(said, f"\nexif\n{len(exif) - 12}\n{exif[8:-4].hex()}\n", zip=True)
        noise(0, 8, 24).save(tmp_path / "1.png", pnginfo=told)
        exif = next(part for part in chunks((tmp_path / "1.png").read_bytes()) if part[4:8] in (b"zTXt", b"iTXt"))
    parts = [part for part in parts if part[4:8] != b"eXIf"]
    file.write_bytes(b"".join([*parts[:-1], exif, parts[-1]]))
    cache = build_image_cache(tmp_path / "cache", {"train": table([file])}, None, None)
    assert cache.shape == (1, 24, 8)
    assert np.array_equal(cache.pixels[0, 0], np.rot90(np.asarray(noise(0, 8, 24)), -1))


def test_no_png_that_says_no_orientation_is_decoded_to_look_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = PngInfo()
    told.add_text("Title", "a")
    noise(0, 8, 24).save(tmp_path / "0.png", pnginfo=told)
    monkeypatch.setattr(PngImageFile, "load", lambda image: pytest.fail("decoded"))
    [look] = image_cache._look({"train": table([tmp_path / "0.png"])}, ("train", 0, 0))
    assert look == (8, 24, True)


def test_broken_images_are_noted_with_why(tmp_path: Path) -> None:
    files = saved(tmp_path, [noise(n, 40, 40) for n in range(3)])
    truncated(files[1])
    (tmp_path / "text.png").write_text("no image")
    cache = build_image_cache(tmp_path / "cache", {"train": table([*files, tmp_path / "text.png"])}, None, None)
    (_, first, why), (_, second, _) = cache.manifest["broken"]
    assert (first, second) == (1, 3)
    assert "truncated" in why
    assert cache.shape == (1, 40, 40)


def test_moments_are_numpys_and_exact_over_some_of_the_images(tmp_path: Path) -> None:
    files = saved(tmp_path, [noise(n, mode="RGB") for n in range(5)])
    cache = build_image_cache(tmp_path / "cache", {"train": table(files)}, None, None)
    some = np.array([0, 2, 3])
    mean, std = cache.moments(some)
    pixels = cache.pixels[some] / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 2, 3)), rtol=1e-12)


def test_a_channel_that_never_changes_is_divided_by_one(tmp_path: Path) -> None:
    [file] = saved(tmp_path, [Image.new("L", (4, 4), 51)])
    cache = build_image_cache(tmp_path / "cache", {"train": table([file])}, None, None)
    assert cache.moments(np.array([0])) == ([0.2], [1.0])


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    [file] = saved(tmp_path, [noise(0)])
    monkeypatch.setattr(image_cache, "_reserve", full)
    with pytest.raises(OSError, match="No space left"):
        build_image_cache(tmp_path / "caches" / "x", {"train": table([file])}, None, None)
    assert list((tmp_path / "caches").iterdir()) == []
