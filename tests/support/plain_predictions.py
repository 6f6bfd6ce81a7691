"""Predictions by definition: plain loops over scales, windows and mirror images, in float64 NumPy."""

import cv2
import numpy as np
import torch
from torch import nn

from dfn_fast.network.reference import ReferenceDFN

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
K = 3


def random_model():
    """A small network with random batch norm statistics, whose scores differ from pixel to pixel by about one."""
    torch.manual_seed(0)
    model = ReferenceDFN(K, backbone="resnet18", stem="conv7", channels=8, border_channels=4)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.normal_(layer.running_mean, std=0.2)
            nn.init.normal_(layer.bias, std=0.2)
    model.eval()
    with torch.no_grad():
        for score, head in zip(
            model.scores(torch.randn(1, 3, 64, 64)), (model.smooth_heads, model.border_heads), strict=True
        ):
            head[3].conv.weight /= score[-1].std()
    return model


def resized(maps, size):
    """``[..., h, w]`` -> ``[..., *size]``, bilinear with aligned corners, from the definition."""
    for axis, length in ((-2, size[0]), (-1, size[1])):
        have = maps.shape[axis]
        matrix = np.zeros((length, have))
        for j in range(length):
            place = j * (have - 1) / (length - 1)
            i = min(int(place), max(have - 2, 0))
            matrix[j, i] += 1 - (place - i)
            if have > 1:
                matrix[j, i + 1] += place - i
        maps = np.moveaxis(np.moveaxis(maps, axis, -1) @ matrix.T, -1, axis)
    return maps


def normalised(image):
    return (image / 255 - MEAN) / STD


def small_scores(model, x, heads="smooth_heads"):
    """The stride-4 scores ``[K, h, w]`` of a normalised image ``[H, W, 3]``, from the last head's convolution."""
    kept = []
    hook = getattr(model, heads)[3].conv.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        model.scores(torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1)))[None])
    hook.remove()
    return kept[0][0].numpy()


def softmax(scores):
    powers = np.exp(scores - scores.max(0))
    return powers / powers.sum(0)


def scaled(image, scale):
    height, width = image.shape[:2]
    size = (round(width * scale), round(height * scale))
    return cv2.resize(image.astype(np.float64), size, interpolation=cv2.INTER_LINEAR)


def starts(length, window, stride):
    """Where the windows start: every ``stride``, with the last window flush with the end."""
    places = [0]
    while places[-1] + window < length:
        places.append(min(places[-1] + stride, length - window))
    return places


def gaussian(length):
    """A Gaussian centred on a side, with a deviation of an eighth of its length."""
    return np.exp(-0.5 * ((np.arange(length) - (length - 1) / 2) / (length / 8)) ** 2)
