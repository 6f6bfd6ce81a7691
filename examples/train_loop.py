"""Trains FastDFN in a plain PyTorch loop, on the synthetic scenes: python examples/train_loop.py [STEPS]"""

import sys

import torch

from dfn_fast import FastDFN
from dfn_fast.data.datasets.synthetic import SyntheticScenes
from dfn_fast.data.loader import TrainLoader
from dfn_fast.data.normalize import normalize
from dfn_fast.data.transforms import TrainTransform


def main(steps: int) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scenes = SyntheticScenes("train", seed=0)
    transform = TrainTransform(crop=(64, 64), scales=(1.0,), flip=True, border_width=3)
    loader = TrainLoader(scenes, transform, batch_size=4, seed=0, workers=0)

    model = FastDFN(scenes.num_classes, backbone="resnet18", stem="conv7", channels=32, alpha=1.0)
    model = model.to(device, memory_format=torch.channels_last).train()
    # Two groups: the authors' code trains all layers but the backbone ten times as fast. From scratch both learn alike.
    new_layers = [parameter for layer in model.business_layer for parameter in layer.parameters()]
    optimizer = torch.optim.SGD(
        [{"params": model.backbone.parameters(), "lr": 0.02}, {"params": new_layers, "lr": 0.02}],
        momentum=0.9,
        weight_decay=1e-4,
    )

    for step, batch in zip(range(1, steps + 1), loader.epoch(0), strict=False):
        images, labels, borders = (x.to(device) for x in batch[:3])
        loss = model(normalize(images), labels, borders)  # eq. 7: the sum of all eight losses
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step:3d}  loss {loss.item():.3f}")

    model.save_pretrained("dfn-synthetic", classes=scenes.classes, palette=scenes.palette)
    print("wrote dfn-synthetic")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
