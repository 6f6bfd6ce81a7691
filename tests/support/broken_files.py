"""Broken files for ``test_fuzz.py``. ``mutated(kind, number)`` depends only on its arguments: cases are reproducible::

    python tests/support/broken_files.py png 1234     one case, with its traceback
    python tests/support/broken_files.py all 0:100000 many, of all kinds: prints failures, then JSON totals

A case must succeed or raise a :class:`UserError` with a short text that names the file. It may take ``CASE_SECONDS``,
and the process may use ``MEMORY`` bytes more than when it began.
"""

import faulthandler
import io
import json
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from dfn_fast.checkpoint.weights import load_weights
from dfn_fast.config import TrainConfig, load_config
from dfn_fast.data.registry import build_dataset
from dfn_fast.errors import UserError
from dfn_fast.inference.loading import load_model
from dfn_fast.media.images import read_image, read_label
from dfn_fast.media.mp4 import set_times, shown_frames
from dfn_fast.media.video import VideoWriter
from dfn_fast.network.reference import ReferenceDFN
from dfn_fast.predict.jobs import listed_sources

CASE_SECONDS = 60  # generous, as the machine may be busy; a hang never ends
MEMORY = 1 << 30
LONGEST_TEXT = 5000  # characters of an error
EXTREMES = (0, 1, 2, 127, 128, 255, 256, 32767, 65535, 60000, 2**31 - 1, 2**31, 2**32 - 1)


class Kind(NamedTuple):
    """One kind of file: how to make a broken one from a random generator, and how to read it."""

    suffix: str
    make: Callable[[np.random.Generator], bytes]
    read: Callable[[Path], Any]


def mutated(kind: str, number: int) -> bytes:
    """The bytes of a case's file."""
    rng = np.random.default_rng([*kind.encode(), number])
    return KINDS[kind].make(rng)


def pick(rng: np.random.Generator, choices):
    return choices[int(rng.integers(len(choices)))]


# Bytes


def garbled(data: bytes, rng: np.random.Generator) -> bytes:
    """``data`` after one to four random changes."""
    content = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        length = len(content)
        if not length:
            break
        at, size = int(rng.integers(length)), int(rng.integers(1, max(2, min(64, length))))
        change = rng.integers(8)
        if change <= 1:
            content[at] ^= 1 << int(rng.integers(8))
        elif change == 2:
            content[at] = int(rng.integers(256))
        elif change == 3:
            del content[at:]
        elif change == 4:
            del content[at : at + size]
        elif change == 5:
            content[at:at] = bytes([pick(rng, (0, 255))]) * size
        elif change == 6:
            content[at:at] = content[at : at + size]
        else:
            number = struct.pack(pick(rng, (">I", "<I", ">Q", "<Q")), pick(rng, EXTREMES))
            content[at : at + len(number)] = number
    return bytes(content)


def maybe_garbled(data: bytes, rng: np.random.Generator, share: float = 0.3) -> bytes:
    return garbled(data, rng) if rng.random() < share else data


# Images


@cache
def images(form: str) -> list[bytes]:
    """Small valid files of one format, in several modes and encodings."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (33, 40, 3), dtype=np.uint8))
    labels = Image.fromarray(rng.integers(0, 5, (33, 40), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    modes = {
        "PNG": [rgb, labels, rgb.convert("P"), rgb.convert("RGBA"), rgb.convert("LA"), rgb.convert("1")],
        "JPEG": [rgb, labels, rgb.convert("CMYK")],
        "TIFF": [rgb, labels, rgb.convert("CMYK"), rgb.convert("F"), rgb.convert("LAB")],
        "GIF": [rgb.convert("P"), labels],
        "BMP": [rgb, labels, rgb.convert("1")],
        "WEBP": [rgb, rgb.convert("RGBA")],
        "PPM": [rgb, labels],
        "JPEG2000": [rgb, labels],
    }
    options: dict[str, list[dict[str, Any]]] = {
        "PNG": [{}, {"exif": turned}],
        "JPEG": [{}, {"progressive": True}, {"exif": turned, "subsampling": 2}],
        "TIFF": [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}],
        "GIF": [{}, {"save_all": True, "append_images": [labels, rgb.convert("P")]}],
        "WEBP": [{"lossless": True}, {"quality": 50}],
    }
    files = []
    for image in modes[form]:
        for settings in options.get(form, [{}]):
            file = io.BytesIO()
            image.save(file, form, **settings)
            files.append(file.getvalue())
    return files


def png(rng: np.random.Generator) -> bytes:
    """A PNG with chunks changed, moved or repeated. Most keep a correct checksum, or readers would ignore them."""
    data = pick(rng, images("PNG"))
    if rng.random() < 0.2:
        return garbled(data, rng)
    chunks, at = [], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + length]])
        at += 12 + length
    for _ in range(rng.integers(1, 4)):
        i, change = int(rng.integers(len(chunks))), rng.integers(7)
        if change <= 1:
            header = list(struct.unpack(">IIBBBBB", chunks[0][1][:13].ljust(13, b"\0")))
            field = int(rng.integers(7))
            header[field] = pick(rng, EXTREMES) if field < 2 else pick(rng, (0, 1, 2, 3, 4, 6, 8, 16, 255))
            chunks[0][1] = struct.pack(">IIBBBBB", *header)
        elif change == 2:
            chunks[i][1] = garbled(chunks[i][1], rng)
        elif change == 3:
            chunks.insert(int(rng.integers(len(chunks) + 1)), list(chunks[i]))
        elif change == 4:
            j = int(rng.integers(len(chunks)))
            chunks[i], chunks[j] = chunks[j], chunks[i]
        elif change == 5:
            name = pick(rng, (b"tRNS", b"PLTE", b"eXIf", b"iCCP", b"acTL", b"fcTL", b"fdAT", b"zTXt", b"iTXt", b"gAMA"))
            chunks.insert(int(rng.integers(1, len(chunks) + 1)), [name, rng.bytes(int(rng.integers(40)))])
        elif len(chunks) > 1:
            del chunks[i]
    result = data[:8]
    for name, content in chunks:
        length = pick(rng, EXTREMES) if rng.random() < 0.02 else len(content)
        result += struct.pack(">I", length) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return result


def jpeg(rng: np.random.Generator) -> bytes:
    """A JPEG with extreme sizes, segments changed, repeated or missing, or noise in the entropy-coded data."""
    data = pick(rng, images("JPEG"))
    if rng.random() < 0.4:
        return garbled(data, rng)
    segments, at = [], 2
    while data[at + 1] != 0xDA:
        (length,) = struct.unpack(">H", data[at + 2 : at + 4])
        segments.append(bytearray(data[at : at + 2 + length]))
        at += 2 + length
    for _ in range(rng.integers(1, 3)):
        i, change = int(rng.integers(len(segments))), rng.integers(4)
        frame = next((s for s in segments if s[1] in (0xC0, 0xC2)), None)
        if change == 0 and frame is not None:
            place = pick(rng, (5, 7))
            frame[place : place + 2] = struct.pack(">H", pick(rng, EXTREMES) & 0xFFFF)
        elif change == 1:
            segments[i][4:] = garbled(bytes(segments[i][4:]), rng)
        elif change == 2:
            segments.insert(i, bytearray(segments[i]))
        elif len(segments) > 1:
            del segments[i]
    return data[:2] + b"".join(segments) + maybe_garbled(data[at:], rng)


def other_image(rng: np.random.Generator) -> bytes:
    data = pick(rng, images(pick(rng, ("TIFF", "GIF", "BMP", "WEBP", "PPM", "JPEG2000"))))
    if rng.random() < 0.5:  # damage only the header
        return garbled(data[:64], rng) + data[64:]
    return garbled(data, rng)


def read_both(path: Path) -> None:
    """Reads the file as an image, then as a label. The first error counts."""
    read_image(path)
    read_label(path)


@cache
def video() -> bytes:
    """A small MP4 as OpenCV writes it: frames, then an index of them."""
    with tempfile.TemporaryDirectory() as name, VideoWriter(Path(name), 10, (32, 32)) as writer:
        for value in range(5):
            writer.write(np.full((32, 32, 3), 40 * value, np.uint8))
        writer.finish(Path(name, "a.mp4"))
        return Path(name, "a.mp4").read_bytes()


def mp4(rng: np.random.Generator) -> bytes:
    """An MP4 whose index, which lies at its end, is damaged."""
    at = video().index(b"moov") - 4
    return video()[:at] + garbled(video()[at:], rng)


def read_index(path: Path) -> None:
    """Reads the index of a video, then writes it. That it is of no use is no error elsewhere."""
    if shown_frames(path) is None or not set_times(path, [0, 1, 2, 4, 5]):
        raise UserError(f"{path}: no index")


# Checkpoints


def tiny_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@cache
def checkpoints() -> list[bytes]:
    torch.manual_seed(0)
    state = tiny_network().state_dict()
    content = {"model": state, "format": 1, "position": {"epoch": 3, "loss_sum": 0.5}, "classes": ["a", "b"]}
    files = []
    for value in (content, dict(state)):
        for is_zip in (True, False):
            file = io.BytesIO()
            torch.save(value, file, _use_new_zipfile_serialization=is_zip)
            files.append(file.getvalue())
    return files


def checkpoint(rng: np.random.Generator) -> bytes:
    """A checkpoint damaged anywhere, in the archive's directory, or in its pickle, which is then repacked."""
    data = pick(rng, checkpoints())
    place = rng.integers(3)
    if not data.startswith(b"PK") or place == 0:
        return garbled(data, rng)
    if place == 1:
        at = data.index(b"PK\x01\x02")
        return data[:at] + garbled(data[at:], rng)
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(packed, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            changed = garbled(content, rng) if name.endswith(".pkl") else maybe_garbled(content, rng, 0.1)
            target.writestr(zipfile.ZipInfo(name), changed)  # whose time is always the same
    return packed.getvalue()


@cache
def safe_tensors() -> bytes:
    torch.manual_seed(0)
    return safetensors.torch.save(tiny_network().state_dict())


def safetensors_file(rng: np.random.Generator) -> bytes:
    """A safetensors file with false numbers in its JSON header, or damaged anywhere."""
    data = safe_tensors()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length]
    if rng.random() < 0.5:
        header = json_text(json.loads(header), rng)
        length = len(header)
    else:
        return garbled(data, rng)
    if rng.random() < 0.1:
        length = pick(rng, EXTREMES)
    return struct.pack("<Q", length) + header + data[8 + len(header) :]


# Values: for JSON, and for the parts of a checkpoint that are not tensors


def weird_value(rng: np.random.Generator) -> Any:
    deep: Any = 1
    for _ in range(int(rng.integers(1, 40))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    scalars = [
        None,
        True,
        -1,
        0,
        1,
        4,
        255,
        256,
        2**31,
        2**63,
        10**30,
        -(10**30),
        0.5,
        1e308,
        float("inf"),
        float("nan"),
    ]
    texts = ["", "\0", "a" * 3000, "../../x", "/dev/zero", "\ud800", "resnet101"]
    colours = [[1, 2, 3], [[1, 2, 3]] * 4, [[256, -1, 0]] * 4, [["a"]] * 4]
    return pick(rng, [*scalars, *texts, *colours, [], [1], [[]], {}, {"a": 1}, deep, [0] * 500, ["x"] * 500])


def changed_value(value: Any, rng: np.random.Generator) -> Any:
    """``value`` with one of its parts replaced, left out, renamed or added."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return weird_value(rng)
    if isinstance(value, list):
        i = int(rng.integers(len(value)))
        return [*value[:i], changed_value(value[i], rng), *value[i + 1 :]]
    key = pick(rng, list(value))
    change = rng.integers(6)
    if change == 0:
        return {k: v for k, v in value.items() if k != key}
    if change == 1:
        return {**value, pick(rng, [str(key) + "s", "", "\0", "pretrained_model", "a" * 3000]): weird_value(rng)}
    return {**value, key: changed_value(value[key], rng)}


def json_text(value: Any, rng: np.random.Generator) -> bytes:
    """JSON of a changed value. Some is not valid JSON, or is nested deeper than Python's stack."""
    for _ in range(rng.integers(1, 3)):
        value = changed_value(value, rng)
    text = json.dumps(value).encode()
    form = rng.integers(12)
    if form == 0:
        depth = int(rng.integers(900, 200_000))
        return pick(rng, (b"[", b'{"a":')) * depth
    if form == 1:
        return text.replace(b"1", b"1" + b"0" * int(rng.integers(5, 6000)))
    if form == 2:
        return text.decode().encode(pick(rng, ("utf-16", "utf-32", "utf-8-sig")))
    return maybe_garbled(text, rng)


def config(rng: np.random.Generator) -> bytes:
    return json_text(TrainConfig().to_dict(), rng)


# Networks: hand-made contents of undamaged checkpoints


@cache
def network_shapes() -> dict[str, tuple[int, ...]]:
    state = ReferenceDFN(4, backbone="resnet18", channels=8, border_channels=5).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def network(rng: np.random.Generator) -> bytes:
    """A checkpoint of ours with wrong settings, names and colours. Each tensor holds one number, expanded to its shape
    by strides of 0. It must be refused before a network is built."""
    state = {name: torch.zeros(()).expand(shape) for name, shape in network_shapes().items()}
    settings = {"num_classes": 4, "backbone": "resnet18", "stem": "deep", "channels": 8, "border_channels": 5}
    content: dict[str, Any] = {
        "format": 1,
        "model_config": settings,
        "classes": list("abcd"),
        "palette": [[i, i, i] for i in range(4)],
        "dataset": "synthetic",
        "config": {"border_width": 5},
    }
    if rng.random() < 0.8:
        settings[pick(rng, list(settings))] = weird_value(rng)
    else:
        content = changed_value(content, rng)
    if not isinstance(content, dict):
        content = {"model_config": content}
    if rng.random() < 0.5:
        shape = tuple(int(pick(rng, (0, 1, 3, 2**14))) for _ in range(rng.integers(5)))
        state[pick(rng, list(state))] = torch.zeros(()).expand(shape)
    if rng.random() < 0.1:
        content["model"] = content  # contains itself
    else:
        content["model"] = {name: pick(rng, (tensor, tensor, tensor, 1)) for name, tensor in state.items()}
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def code(rng: np.random.Generator) -> bytes:
    """A pickle that names functions. Some are harmless, but all must be refused."""
    name = pick(
        rng, ("os\nsystem", "builtins\neval", "builtins\nexec", "torch\nload", "torch.hub\nload", "numpy\nload")
    )
    call = b"\x80\x02c" + name.encode() + b"\nX\x04\x00\x00\x00true\x85R."
    if rng.random() < 0.3:
        return maybe_garbled(call, rng, 0.7)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as target:
        parts = {"data.pkl": maybe_garbled(call, rng, 0.3), "version": "3\n", "byteorder": "little", "data/0": bytes(8)}
        for name, content in parts.items():
            target.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
    return packed.getvalue()


# Lists


def text_lines(lines: list[str], rng: np.random.Generator) -> bytes:
    """``lines`` with some that are not paths, or that lead where a list must not."""
    strange = [
        "",
        "#",
        "\0",
        "a\0b\ta.png",
        "../../etc/passwd\ta.png",
        "/etc/passwd\t/etc/hostname",
        "/dev/zero\t/dev/zero",
    ]
    strange += [
        "a" * 100_000,
        "a/" * 5000,
        "\t" * 1000,
        " " * 50_000 + "1",
        "a b c d e",
        "~root/x\ta.png",
        "..\t..",
        ".\t.",
    ]
    strange += [
        "a" + " " * 50_000 + "b",
        "x 1 2 " + "9" * 6000,
        "x 1 2 300",
        "x ² ² ²",
        "x ١ ٢ ٣",
        "\u2028",
        "\x85\x1c",
        "é 1",
    ]
    lines = list(lines)
    for _ in range(rng.integers(0, 3)):
        lines.insert(int(rng.integers(len(lines) + 1)), pick(rng, strange))
    return maybe_garbled(pick(rng, ("\n", "\n", "\r\n")).join(lines).encode(), rng, 0.6)


def image_list(rng: np.random.Generator) -> bytes:
    return text_lines(["a.png\ta.png", "my photo.png\tb.png", "sub/../b.png\tb.png"], rng)


def pair_list(rng: np.random.Generator) -> bytes:
    return text_lines(["a.png b.png", "/SegNet/CamVid/train/c.png /SegNet/CamVid/trainannot/c.png"], rng)


def id_list(rng: np.random.Generator) -> bytes:
    return text_lines(["a", "/JPEGImages/b.jpg /SegmentationClass/b.png"], rng)


def class_list(rng: np.random.Generator) -> bytes:
    return text_lines(["road", "traffic light 250 170 30", "sky"], rng)


def prepare(folder: Path) -> None:
    """Writes the files that the lists name."""
    label, picture = images("PNG")[2], images("JPEG")[0]
    names = ["a.png", "b.png", "my photo.png", "train/c.png", "trainannot/c.png"]
    names += ["SegmentationClass/a.png", "SegmentationClass/b.png"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(label)
    (folder / "JPEGImages").mkdir()
    for name in ("a", "b"):
        (folder / "JPEGImages" / f"{name}.jpg").write_bytes(picture)
    (folder / "sub").mkdir()


def read_list(path: Path) -> None:
    dataset = build_dataset("list", path.parent, path.name, num_classes=3)
    assert all(pair.image.resolve().is_relative_to(path.parent.resolve()) for pair in dataset.pairs)


def read_camvid(path: Path) -> None:
    path = path.rename(path.with_name("train.txt"))
    dataset = build_dataset("camvid", path.parent, "train")
    assert all(pair.image.resolve().is_relative_to(path.parent.resolve()) for pair in dataset.pairs)


def read_voc(path: Path) -> None:
    folder = path.parent / "ImageSets" / "Segmentation"
    folder.mkdir(parents=True, exist_ok=True)
    path.rename(folder / "train.txt")
    build_dataset("voc", path.parent, "train")


KINDS = {
    "png": Kind(".png", png, read_both),
    "jpeg": Kind(".jpg", jpeg, read_image),
    "image": Kind(".img", other_image, read_both),
    "mp4": Kind(".mp4", mp4, read_index),
    "checkpoint": Kind(".pth", checkpoint, lambda path: load_weights(tiny_network(), path)),
    "code": Kind(".pth", code, load_model),
    "safetensors": Kind(".safetensors", safetensors_file, lambda path: load_weights(tiny_network(), path)),
    "network": Kind(".pth", network, load_model),
    "config": Kind(".json", config, load_config),
    "list": Kind(".txt", image_list, read_list),
    "camvid": Kind(".txt", pair_list, read_camvid),
    "voc": Kind(".txt", id_list, read_voc),
    "classes": Kind(".txt", class_list, lambda path: build_dataset("list", path.parent, "good", classes=path)),
    "predict": Kind(".txt", image_list, listed_sources),
}
SHARES = {"png": 5, "jpeg": 5, "image": 4, "checkpoint": 4, "config": 5, "safetensors": 3, "list": 2}  # others: 1


def spread(numbers: range) -> list[tuple[str, int]]:
    """The case for each number: kinds take turns, in proportion to their shares."""
    order = [kind for kind in KINDS for _ in range(SHARES.get(kind, 1))]
    return [(order[number % len(order)], number) for number in numbers]


def run_case(kind: str, number: int, folder: Path) -> str | None:
    """Reads the case's file. Returns None if that succeeds, otherwise the text of its :class:`UserError`."""
    path = folder / f"case{KINDS[kind].suffix}"
    path.write_bytes(mutated(kind, number))
    try:
        KINDS[kind].read(path)
    except UserError as error:
        text = str(error)
        names = (path.name, "train.txt")
        if not any(name in text for name in names) or len(text) > LONGEST_TEXT:
            raise AssertionError(
                f"the text of {len(text)} characters is too long, or names no file: {text[:300]}"
            ) from error
        return text
    return None


def limit_memory() -> None:
    """Allows at most ``MEMORY`` more bytes from here on. Linux counts reserved address space."""
    if sys.platform == "linux":
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def peak_memory() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(kind: str, numbers: str) -> int:
    """Runs the cases. Prints each failure when it occurs, and finally the counts by kind as JSON."""
    first, _, end = numbers.partition(":")
    selected = range(int(first), int(end or int(first) + 1))
    cases = spread(selected) if kind == "all" else [(kind, number) for number in selected]
    warnings.simplefilter("ignore")
    counts = {kind: {"read": 0, "refused": 0, "failed": 0} for kind in KINDS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        (folder / "good.txt").write_text("a.png\tb.png\n")
        for kind in KINDS:  # imports and caches are filled before memory is counted
            with_errors_ignored(run_case, kind, 0, folder)
        limit_memory()
        before = peak_memory()
        for kind, number in cases:
            sys.stdout.write(f"{kind} {number}\n")  # after a crash or hang, the last line names the case
            sys.stdout.flush()
            faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
            try:
                outcome = "read" if run_case(kind, number, folder) is None else "refused"
            except BaseException:
                outcome = "failed"
                print(f"FAILED {kind} {number}: {traceback.format_exc()}", flush=True)
            faulthandler.cancel_dump_traceback_later()
            counts[kind][outcome] += 1
    print(json.dumps({"counts": counts, "grown": peak_memory() - before}))
    return 1 if any(count["failed"] for count in counts.values()) else 0


def with_errors_ignored(function: Callable, *arguments: Any) -> None:
    try:
        function(*arguments)
    except Exception:
        traceback.clear_frames(sys.exc_info()[2])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
