"""A second implementation of DFN's forward pass and loss, from the paper and the published names, with functional
operators on a state dict. It is the oracle of the network's tests and uses nothing from ``dfn_fast``."""

import itertools

import torch
import torch.nn.functional as F


class Transcription:
    """The network whose weights are in ``state``. Parts without names in it are left out, as in ablations."""

    def __init__(self, state, training):
        self.state, self.training = state, training

    def has(self, name):
        return any(key.startswith(f"{name}.") for key in self.state)

    def conv(self, x, name, stride=1):
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    def bn(self, x, name):
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        else:
            mean, var = self.state[f"{name}.running_mean"], self.state[f"{name}.running_var"]
        scale = self.state[f"{name}.weight"] / (var + 1e-5).sqrt()
        return x * scale.view(-1, 1, 1) + (self.state[f"{name}.bias"] - mean * scale).view(-1, 1, 1)

    def resize(self, x, size):
        """Resizes bilinearly with aligned corners, by a matrix product in each direction."""
        rows, columns = (interpolation_matrix(new, old) for new, old in zip(size, x.shape[2:], strict=True))
        return rows @ x @ columns.T

    def stages(self, x):
        if self.has("backbone.conv1.0"):
            x = F.relu(self.bn(self.conv(x, "backbone.conv1.0", 2), "backbone.conv1.1"))
            x = F.relu(self.bn(self.conv(x, "backbone.conv1.3"), "backbone.conv1.4"))
            x = self.conv(x, "backbone.conv1.6")
        else:
            x = self.conv(x, "backbone.conv1", 2)
        x = F.max_pool2d(F.relu(self.bn(x, "backbone.bn1")), 3, 2, 1)
        maps = []
        for layer in ("layer1", "layer2", "layer3", "layer4"):
            for i in itertools.takewhile(lambda i, at=layer: self.has(f"backbone.{at}.{i}"), itertools.count()):
                x = self.block(x, f"backbone.{layer}.{i}", 2 if i == 0 and layer != "layer1" else 1)
            maps.append(x)
        return maps

    def block(self, x, name, stride):
        shortcut = x
        if self.has(f"{name}.downsample"):
            shortcut = self.bn(self.conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
        numbers = (1, 2, 3) if self.has(f"{name}.conv3") else (1, 2)
        strided = 2 if len(numbers) == 3 else 1
        for number in numbers:
            x = self.conv(x, f"{name}.conv{number}", stride if number == strided else 1)
            x = self.bn(x, f"{name}.bn{number}")
            x = F.relu(x if number != numbers[-1] else x + shortcut)
        return x

    def rrb(self, x, name, relu=True):
        x = self.conv(x, f"{name}.conv_1x1")
        t = F.relu(self.bn(self.conv(x, f"{name}.cbr.conv"), f"{name}.cbr.bn"))
        x = self.conv(t, f"{name}.conv_refine") + x
        return F.relu(x) if relu else x

    def cab(self, low, high, name):
        m = torch.cat([low.mean((2, 3)), high.mean((2, 3))], 1)
        hidden = F.relu(m @ self.state[f"{name}.0.weight"].T + self.state[f"{name}.0.bias"])
        gate = torch.sigmoid(hidden @ self.state[f"{name}.2.weight"].T + self.state[f"{name}.2.bias"])
        return low * gate[:, :, None, None] + high

    def head(self, x, name, size):
        return self.resize(self.conv(self.rrb(x, f"{name}.rrb", relu=False), f"{name}.conv"), size)

    def scores(self, image):
        size, maps = image.shape[2:], self.stages(image)
        high = torch.zeros(1, dtype=image.dtype)
        if self.has("global_context"):
            pooled = self.conv(maps[3].mean((2, 3), keepdim=True), "global_context.1.conv")
            high = F.relu(self.bn(pooled, "global_context.1.bn"))
        smooth = {}
        for i, stage in enumerate(maps[::-1]):
            low = self.rrb(stage, f"smooth_pre_rrbs.{i}")
            if i == 0:
                high = high.expand_as(low)
            attends = self.has(f"cabs.{i}")
            x = self.cab(low, high, f"cabs.{i}.channel_attention.fc") if attends else low + high
            x = self.rrb(x, f"smooth_aft_rrbs.{i}")
            if self.has(f"smooth_heads.{i}"):
                smooth[i] = self.head(x, f"smooth_heads.{i}", size)
            if i < 3:
                high = self.resize(x, maps[2 - i].shape[2:])
        return smooth, self.border_scores(maps, size) if self.has("border_pre_rrbs") else {}

    def border_scores(self, maps, size):
        border, acc = {}, self.rrb(maps[0], "border_pre_rrbs.0")
        for i in range(4):
            if i > 0:
                fm = self.resize(self.rrb(maps[i], f"border_pre_rrbs.{i}"), maps[0].shape[2:])
                acc = self.rrb(acc + fm, f"border_aft_rrbs.{i}")
            if self.has(f"border_heads.{i}"):
                border[i] = self.head(acc, f"border_heads.{i}", size)
        return border

    def loss(self, image, labels, borders, weight):
        smooth, border = self.scores(image)
        valid, total = labels != 255, 0
        for score in smooth.values():
            log_p = score - score.logsumexp(1, keepdim=True)
            total = total - log_p.movedim(1, -1)[valid].gather(1, labels[valid][:, None]).mean()
        for score in border.values():
            p, t = torch.sigmoid(score[:, 0][borders != 255]), borders[borders != 255]
            focal = torch.where(t == 1, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())
            total = total + weight * focal.mean()
        return total


def interpolation_matrix(new, old):
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for j in range(new):
        left, rest = divmod(j * (old - 1), new - 1)
        matrix[j, left] = 1 - rest / (new - 1)
        if rest:
            matrix[j, left + 1] = rest / (new - 1)
    return matrix
