"""Masks that are called like their images but for an ending, as ``a_mask.png`` for ``a.jpg``."""

from pathlib import Path

from dfn_fast.errors import DataError
from dfn_fast.media.listing import Found

ENDINGS = ("_mask", "_masks", "_label", "_labels", "_gt", "_seg", "_segmentation", "_labelIds")
IMAGE_SUFFIX = "the suffix of their image"


def without_ending(images: Found, masks: Found, folder: Path) -> tuple[Found, list[str]]:
    """The masks of ``folder`` by the stems of their images, and a note if these differ by an ending from their own.

    A folder has one ending, and none if any mask has the stem of an image. Raises :class:`DataError` if masks pair by
    two endings.
    """
    if images.files.keys() & masks.files.keys():
        return masks, []
    found: dict[str, dict[str, str]] = {}  # by ending, the stems of images by those of masks
    for ending in (*ENDINGS, IMAGE_SUFFIX):
        expected = {
            stem + (path.suffix if ending == IMAGE_SUFFIX else ending): stem for stem, path in images.files.items()
        }
        if pairs := {stem: expected[stem] for stem in sorted(masks.files) if stem in expected}:
            found[ending] = pairs
    endings = [f"{ending}, as {masks.files[next(iter(pairs))].name}" for ending, pairs in found.items()]
    if len(found) > 1:
        raise DataError(
            f"{folder}: masks end in {', and in '.join(endings)}: which belong to the images is not clear; keep those "
            "of one ending, or give masks the names of their images"
        )
    for pairs in found.values():
        files = {pairs.get(stem, stem): path for stem, path in masks.files.items()}
        return masks._replace(files=files), [f"masks end in {endings[0]}"]
    return masks, []
