"""Videos to predict, written and read by OpenCV."""

import cv2

from dfn_fast.media.video import VideoReader
from support.predictions import picture


def frames_of(path):
    frames = []
    with VideoReader(str(path)) as video:
        while (frame := video.read()) is not None:
            frames.append(frame)
    return frames


def write_video(path, count, height=40, width=52, code="MJPG"):
    """A bright disc that moves over a random picture. Returns the frames as they are decoded."""
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), 12.5, (width, height))
    assert video.isOpened()
    ground = picture(0, height, width) // 2
    for i in range(count):
        video.write(cv2.circle(ground.copy(), (5 * i % width, height // 2), 9, (250, 90, 40), -1))
    video.release()
    return frames_of(path)
