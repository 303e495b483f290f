"""Train a classifier and a loss of your own, on two processes.

A model is a torch module, or a function that takes the number of classes and returns one. A loss
returns one number for each picture; the step divides by the pictures of the whole batch, so that
two processes train exactly as one.
"""

import visiontrain as vt
from torch import nn
from torch.nn import functional


def small_net(classes):
    """Return logits (B, classes) for pictures (B, 3, S, S) in [0, 1]."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.GroupNorm(4, 64),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, classes),
    )


def focal(logits, batch):
    """Focal loss: pictures that are classified well already count less (arXiv 1708.02002).

    A picture that `mixup` or `cutmix` made has several classes, each with its share.
    """
    classes, shares = batch.targets[..., 0].long(), batch.targets[..., 5]
    shares = shares * (classes >= 0)  # -1 where others have more classes
    logs = functional.log_softmax(logits, 1).gather(1, classes.clamp(min=0))
    return (shares * (1 - logs.exp()) ** 2 * -logs).sum(1)


run = vt.train(
    data="digits",
    task="classify",
    model=small_net,
    loss=focal,
    epochs=6,
    strategy={"kind": "ddp", "processes": 2},
)
print(f"val top-1 {run.metrics['top1']:.3f}")
classifier = vt.load(run.weights, model=small_net)
