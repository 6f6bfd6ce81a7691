import pytest
import torch

from dfn_fast.config import TrainConfig
from dfn_fast.data.loader import Batch
from dfn_fast.errors import ConfigError
from dfn_fast.runtime.cuda_graph import WARM_UP, GraphedStep
from dfn_fast.trainer.build import build_model
from dfn_fast.trainer.trainer import Trainer

SETTINGS = {"backbone": "resnet18", "channels": 8, "border_channels": 4, "compile": False}


class StandIn:
    """A graph on the CPU. Capturing runs nothing; each replay runs the captured function into the same loss."""

    def __init__(self, error=None):
        self.captures = self.replays = self.warm_ups = 0
        self.error = error

    def warm_up(self, run):
        self.warm_ups += 1
        return run()

    def capture(self, run):
        if self.error:
            raise self.error
        self.captures += 1
        loss = torch.zeros(())

        def replay():
            self.replays += 1
            loss.copy_(run())

        return replay, loss


def test_steps_warm_up_then_replay_on_their_own_inputs():
    seen = []

    def run(x, y):
        seen.append((x.data_ptr(), x.tolist()))
        return x.sum() * y.sum()

    stand_in = StandIn()
    step = GraphedStep(run, stand_in.warm_up, stand_in.capture)
    losses = [step(torch.full((2,), float(i)), torch.ones(1)).item() for i in range(WARM_UP + 3)]
    assert losses == [2.0 * i for i in range(WARM_UP + 3)]
    assert (stand_in.warm_ups, stand_in.captures, stand_in.replays) == (WARM_UP, 1, 3)
    assert len({address for address, _ in seen[WARM_UP:]}) == 1
    assert [values for _, values in seen] == [[float(i)] * 2 for i in range(WARM_UP + 3)]
    with pytest.raises(ValueError, match=r"expected shape \[2\], got \[3\]"):
        step(torch.ones(3), torch.ones(1))


def test_what_cannot_be_captured_runs_as_it_is_and_says_so():
    stand_in = StandIn(RuntimeError("operation not permitted when stream is capturing"))
    step = GraphedStep(lambda x: x * 2, stand_in.warm_up, stand_in.capture)
    for i in range(WARM_UP):
        step(torch.tensor(float(i)))
    with pytest.warns(UserWarning, match=r"runs eagerly \(operation not permitted"):
        assert step(torch.tensor(7.0)) == 14
    assert step(torch.tensor(8.0)) == 16
    assert not step.captured


def test_a_cpu_has_no_cuda_graphs():
    config = TrainConfig(**SETTINGS, cuda_graph=True)
    with pytest.raises(ConfigError, match="--cuda-graph needs a CUDA device, but this run is on cpu"):
        Trainer(build_model(config, 3), config, 10, torch.device("cpu"))


def weights_after(config, device, steps, graph=None):
    torch.manual_seed(0)
    trainer = Trainer(build_model(config, 3), config, 10, device)
    if graph is not None:
        trainer.graph = graph(trainer)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for i in range(steps):
        images = torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 3, (2, 64, 64), generator=generator, dtype=torch.uint8)
        losses.append(trainer.step([Batch(images, labels, (labels == 1).to(torch.uint8), ["a", "b"])], i))
    state = {name: tensor.cpu().clone() for name, tensor in trainer.model.state_dict().items()}
    return torch.stack(losses).cpu(), state, trainer


def test_the_gradients_of_a_graph_stay_where_they_are():
    config = TrainConfig(**SETTINGS, border=False)

    def graph(trainer):
        stand_in = StandIn()

        def run(*inputs):  # as a replay does: gradients are overwritten in place, not added to
            for parameter in trainer.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            return trainer.forward_backward(*inputs)

        return GraphedStep(run, stand_in.warm_up, stand_in.capture)

    plain = weights_after(config, torch.device("cpu"), WARM_UP + 2)
    graphed = weights_after(config, torch.device("cpu"), WARM_UP + 2, graph)
    assert torch.equal(plain[0], graphed[0])
    assert all(torch.equal(plain[1][name], graphed[1][name]) for name in plain[1])
    assert graphed[2].model.backbone.conv1[0].weight.grad is not None
    assert plain[2].model.backbone.conv1[0].weight.grad is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_captured_step_is_the_step(amp):
    results = []
    for cuda_graph in (False, True):
        config = TrainConfig(**SETTINGS, amp=amp, cuda_graph=cuda_graph, deterministic=True)
        results.append(weights_after(config, torch.device("cuda"), WARM_UP + 4))
    plain, graphed = results
    assert graphed[2].graph.captured
    torch.testing.assert_close(graphed[0], plain[0], rtol=1e-5, atol=1e-6)
    for name, tensor in plain[1].items():
        torch.testing.assert_close(graphed[1][name], tensor, rtol=1e-5, atol=1e-6, msg=name)
