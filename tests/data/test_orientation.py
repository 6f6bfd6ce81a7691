"""EXIF orientations of images and labels: both are read turned, and one that may not fit is refused by name."""

import numpy as np
import pytest
from PIL import Image

from dfn_fast.data.check import check
from dfn_fast.data.registry import build_dataset
from dfn_fast.errors import DataError


@pytest.fixture
def sample(tmp_path):
    """``sample(6, 1, size=(4, 6))``: a pair with these orientations, the image of ``size`` as stored, then read."""

    def sample(of_image, of_label, label_size, size=(4, 6), suffix="jpg"):
        for kind, way, shape in (("images", of_image, (*size, 3)), ("masks", of_label, label_size)):
            exif = Image.Exif()
            if way:
                exif[0x0112] = way
            (tmp_path / "train" / kind).mkdir(parents=True, exist_ok=True)
            pixels = np.zeros(shape, np.uint8)
            pixels[0, 0] = 1
            path = tmp_path / "train" / kind / f"a.{suffix if kind == 'images' else 'png'}"
            Image.fromarray(pixels).save(path, **({"exif": exif} if way else {}))
        return build_dataset("folder", tmp_path, "train", num_classes=2)[0]

    return sample


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("way", [5, 6, 7, 8])
def test_a_label_of_the_turned_image_fits(sample, way, suffix):
    assert sample(way, None, (6, 4), suffix=suffix).label.shape == (6, 4)


@pytest.mark.parametrize("way", [None, 1, 3, 6])
def test_the_same_orientation_fits(sample, way):
    read = sample(way, way, (4, 6))
    assert read.image.shape[:2] == read.label.shape == ((6, 4) if way == 6 else (4, 6))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize(
    ("of_image", "of_label", "label_size", "size"),
    [
        (6, None, (4, 6), (4, 6)),  # drawn on the image as stored
        (6, None, (6, 6), (6, 6)),  # square: either way
        (3, None, (4, 6), (4, 6)),  # upside down: either way
        (2, 1, (4, 6), (4, 6)),  # mirrored: either way
        (None, 3, (4, 6), (4, 6)),
        (1, 6, (6, 4), (4, 6)),
        (6, 8, (4, 6), (4, 6)),
    ],
)
def test_what_may_not_fit_is_refused(sample, tmp_path, of_image, of_label, label_size, size, suffix):
    images, masks = tmp_path / "train/images/a", tmp_path / "train/masks/a.png"
    message = rf"{images}\.{suffix} has EXIF orientation {of_image or 1}, its label {masks} has {of_label or 1} "
    with pytest.raises(DataError, match=message):
        sample(of_image, of_label, label_size, size, suffix)


def test_check_tells(sample, tmp_path):
    sample(6, None, (6, 4))
    report = check("folder", tmp_path, ["train"], num_classes=2)
    assert "train: 1 images are turned as their EXIF orientation says" in report.all_notes()
    with pytest.raises(DataError):
        sample(3, None, (4, 6))
    assert "has EXIF orientation 3" in check("folder", tmp_path, ["train"], num_classes=2).all_problems()[0]
