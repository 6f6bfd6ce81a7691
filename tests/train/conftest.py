"""Runs of a second on a folder of nine training and two validation images, for all files of this folder."""

import shutil

import pytest

from dfn_fast.train.__main__ import main
from dfn_fast.train.folder import RunFolder
from support.networks import narrow_backbones
from support.runs import TINY_RUN, write_blobs


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of nine training and two validation images: bright blobs on dark ground."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    write_blobs(folder, 9, 2, step=3)
    return folder


@pytest.fixture
def own_photos(photos, tmp_path):
    """A copy of the tiny folder that a test may change."""
    shutil.copytree(photos, tmp_path / "photos")
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def narrow():
    with narrow_backbones(resnet18=1):
        yield


@pytest.fixture
def tiny(narrow, photos, tmp_path, monkeypatch):
    """Runs the command line on the tiny folder, without pictures: tiny("run", "--lr", "1") trains into tmp_path/run."""
    monkeypatch.setattr("dfn_fast.train.__main__.draw", lambda *_: None)

    def run(name, *words, code=0):
        folder = tmp_path / name
        options = [] if "--resume" in words else [*TINY_RUN.split(), "--root", str(photos)]
        assert main(["camvid", *options, "--output-dir", str(folder), *words]) == code
        return RunFolder(folder)

    return run
