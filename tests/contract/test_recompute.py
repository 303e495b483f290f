"""Recomputation changes no bit of training, and takes less memory."""

import weakref
from itertools import islice

import cases
import pytest
import torch
from test_strategies import gap, learner_of, on_ranks, settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visiontrain.core.errors import ConfigError
from visiontrain.core.recompute import unmoved
from visiontrain.engine.autobatch import kept_bytes
from visiontrain.engine.step import train_step
from visiontrain.models.backbones import create, timm_body
from visiontrain.models.config import YoloN
from visiontrain.models.registry import build_model
from visiontrain.models.yolo import SIZES, Yolo


def yolo():
    return build_model(YoloN(norm="batch"), 3)


def dropping():
    """Make a detector whose ConvNeXt leaves out paths at random."""
    body = timm_body(create("convnext_atto", drop_path_rate=0.4), "batch")
    return Yolo(body, SIZES["yolo_n"], 3, norm="batch")


def trained(make, *, recompute):
    """Return all that a forward and a backward pass leave: outputs, gradients, buffers, draws."""
    torch.manual_seed(0)
    model = make().double().train()
    if recompute:
        model.recompute_blocks()
    torch.manual_seed(1)
    outputs = model(torch.rand(2, 3, 64, 64, dtype=torch.float64))
    weights = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out) for out in outputs]
    torch.stack([(o * w).sum() for o, w in zip(outputs, weights, strict=True)]).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*outputs, *gradients, *model.buffers(), torch.get_rng_state()]


@pytest.mark.parametrize("make", [yolo, dropping])
def test_every_bit_is_the_same(make):
    want, got = trained(make, recompute=False), trained(make, recompute=True)
    assert len(got) == len(want) > 100
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_second_run_would_move_statistics_and_draw_anew():
    """What the test above would not see if these models had neither."""
    for make in (yolo, dropping):
        model = make().train()
        before = [buffer.clone() for buffer in model.buffers()]
        model(torch.rand(2, 3, 64, 64))
        assert any(not torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    state = torch.get_rng_state()
    model(torch.rand(2, 3, 64, 64, generator=torch.Generator()))
    assert not torch.equal(state, torch.get_rng_state())


def test_statistics_stay_whatever_ends_the_block():
    norm = torch.nn.BatchNorm2d(2)
    with pytest.raises(ZeroDivisionError), unmoved(norm):
        norm(torch.rand(2, 2, 4, 4))
        raise ZeroDivisionError
    assert norm.running_mean.tolist() == [0, 0]
    assert norm.num_batches_tracked == 0


def in_mode(kind, precision):
    """Train two steps twice, without recomputation and with it; return the difference.

    In micro-batches of three images or more: FSDP hands a single one's maps on in another memory
    format the first time than the second, and convolutions then round differently.
    """
    states = []
    for recompute in (False, True):
        learner = learner_of(settings(kind, precision, norm="batch", recompute=recompute))
        for step in islice(cases.make_steps(learner.strategy, accumulate=1), 2):
            train_step(learner, step.micro_batches, step.images)
        assert learner.model.recompute == recompute
        states.append(learner.collect())
    return gap(*states)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("single", "bf16"), ("ddp", "fp32"), ("fsdp", "bf16"), ("pipeline", "fp32")],
)
def test_every_mode_trains_the_same(kind, precision, ranks):
    assert max(on_ranks(ranks, kind, in_mode, precision)) == 0


class Living(TorchDispatchMode):
    """Counts the bytes of tensors made inside that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage):
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key, size):
        self.known.discard(key)
        self.now -= size


def held(*, recompute):
    """Return the most bytes that a training pass over an image holds, and the estimate of it."""
    with torch.device("meta"):
        shapes = yolo()
    model = yolo().train()
    if recompute:
        model.recompute_blocks()
        shapes.recompute_blocks()
    images = torch.rand(8, 3, 192, 192)
    with Living() as living:
        outputs = model(images)
        torch.stack([out.sum() for out in outputs]).sum().backward()
    # What recomputes holds most at the end of its backward pass, where gradients lie beside it.
    beside = sum(p.nbytes for p in model.parameters()) if recompute else 0
    return (living.most - beside) / 8, kept_bytes(shapes, 192)


def test_less_is_held_and_batch_minus_one_knows():
    whole, less = held(recompute=False), held(recompute=True)
    assert less[0] < 0.4 * whole[0]
    assert whole[1] == pytest.approx(whole[0], rel=0.1)
    assert less[1] == pytest.approx(less[0], rel=0.1)


def test_a_model_of_one_block_is_refused():
    model = build_model(YoloN(backbone="regnetx_002"), 3)
    with pytest.raises(ConfigError, match=r"^recompute: true with a model of one block"):
        model.recompute_blocks()
