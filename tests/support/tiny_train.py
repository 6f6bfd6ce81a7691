"""``python -m support.tiny_train ...``: ``dfn_fast.train`` with tiny backbones and without pictures."""

from unittest.mock import patch

from dfn_fast import cli
from dfn_fast.train.__main__ import main
from support.tiny_resnet import tiny_backbones

if __name__ == "__main__":
    with tiny_backbones(), patch("dfn_fast.train.__main__.draw"):
        cli.run(main)
