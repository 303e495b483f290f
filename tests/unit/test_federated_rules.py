"""What a federated server makes of updates, number by number, and what it does not believe."""

from __future__ import annotations

import math

import pytest
import torch

from visiontrain.core.config import build
from visiontrain.core.types import Place
from visiontrain.engine.learner import fill_state
from visiontrain.engine.sgd import SGD
from visiontrain.strategies.federated.algorithms import (
    RULES,
    Update,
    algorithm_of,
    krum_scores,
    multi_krum,
)
from visiontrain.strategies.federated.config import Federated, least_updates
from visiontrain.strategies.federated.figures import of_round
from visiontrain.strategies.federated.guard import capped, clipped
from visiontrain.strategies.federated.local import Local
from visiontrain.strategies.precision import Precision

PARAMETERS = frozenset({"w"})


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


NOW = {"w": tensor(1.0, 2.0), "mean": tensor(0.0)}


def update(client, w, count=1.0, mean=0.0, **more):
    return Update(client, {"w": tensor(*w), "mean": tensor(mean)}, {"all": count}, **more)


def stepped(updates, rounds=1, **keys):
    """Return the weights after rounds that all bring the same updates to where clients are."""
    algorithm = algorithm_of(build(Federated, {"kind": "federated", **keys}), PARAMETERS)
    algorithm.start(NOW)
    now = dict(NOW)
    for _ in range(rounds):
        moved = [
            Update(
                u.client,
                {n: now[n] + (t - NOW[n]) for n, t in u.weights.items()},
                u.counts,
                u.steps,
                u.control,
            )
            for u in updates
        ]
        now = algorithm.step(now, moved, lambda name: "all")
    return now


TWO = [update(0, (2.0, 2.0), 1.0, 4.0), update(1, (1.0, 6.0), 3.0, 8.0)]
MEAN = tensor(1.25, 5.0)  # a quarter of the first, three of the second
WAY = MEAN - NOW["w"]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_fedavg_is_the_mean_by_counts():
    found = stepped(TWO)
    close(found["w"], MEAN)
    close(found["mean"], tensor(7.0))
    alone = [update(3, (0.1, 0.7), 5.0)]
    assert torch.equal(stepped(alone)["w"], NOW["w"] + (alone[0].weights["w"] - NOW["w"]))


def test_fedavgm_goes_on_as_it_went():
    keys = {"algorithm": "fedavgm", "server_momentum": 0.5, "server_lr": 0.1}
    close(stepped(TWO, 2, **keys)["w"], NOW["w"] + 0.1 * WAY + 0.1 * 1.5 * WAY)


@pytest.mark.parametrize("kind", ["adam", "yogi", "adagrad"])
def test_adaptive_servers_are_reddi_s_and_leave_statistics_alone(kind):
    keys = {"server_momentum": 0.9, "server_lr": 0.1, "tau": 0.01}
    if kind != "adagrad":
        keys["server_beta2"] = 0.99
    found = stepped(TWO, 2, algorithm=f"fed{kind}", **keys)
    x, m, v = NOW["w"], torch.zeros(2).double(), torch.full((2,), 0.01**2, dtype=torch.float64)
    for _ in range(2):
        m = 0.9 * m + 0.1 * WAY
        square = WAY**2
        v = {
            "adam": 0.99 * v + 0.01 * square,
            "yogi": v - 0.01 * square * torch.sign(v - square),
            "adagrad": v + square,
        }[kind]
        x = x + 0.1 * m / (v.sqrt() + 0.01)
    close(found["w"], x)
    close(found["mean"], tensor(14.0))  # twice the mean of what changed


def test_fednova_does_not_count_steps_twice():
    # The second made three times as many steps of a third of the length: as far as the first.
    updates = [update(0, (2.0, 2.0), steps=1.0), update(1, (1.0, 3.0), steps=3.0)]
    found = stepped(updates, algorithm="fednova")
    close(found["w"], NOW["w"] + 2.0 * (0.5 * tensor(1.0, 0.0) + 0.5 * tensor(0.0, 1.0) / 3))
    equal = [update(k, tuple(u.weights["w"]), 2.0, steps=7.0) for k, u in enumerate(TWO)]
    close(stepped(equal, algorithm="fednova")["w"], tensor(1.5, 4.0))


def test_scaffold_s_variate_moves_by_all_clients_share():
    config = build(Federated, {"kind": "federated", "algorithm": "scaffold", "clients": 4})
    algorithm = algorithm_of(config, PARAMETERS)
    algorithm.start(NOW)
    updates = [update(k, (2.0, 2.0), control={"w": tensor(1.0, -k)}) for k in (0, 1)]
    close(algorithm.step(NOW, updates, lambda name: "all")["w"], tensor(2.0, 2.0))
    close(algorithm.control["w"], tensor(0.5, -0.25))


def test_scaffold_s_first_client_need_not_be_a_usual_one():
    """Ten clients, of whom the smallest is alone in the first round: c is no more than their mean.

    Were each weighed by the first round's counts, their weights would add up to 9, and the steps
    grow from round to round.
    """
    minima, counts = torch.linspace(-1, 1, 10).double(), [10.0] + [100.0] * 9
    config = build(Federated, {"kind": "federated", "algorithm": "scaffold", "clients": 10})
    algorithm = algorithm_of(config, frozenset({"w"}))
    x, variates = torch.zeros(1).double(), torch.zeros(10, 1).double()
    algorithm.start({"w": x})
    for number in range(300):
        updates = []
        for k in [0] if number == 0 else range(10):
            y = x.clone()
            for _ in range(20):
                y -= 0.05 * (y - minima[k] + algorithm.control["w"] - variates[k])
            moved = -algorithm.control["w"] + (x - y) / (20 * 0.05)
            # Counts grow with time, as a detector's do, and mean nothing new.
            told = {"all": counts[k] * (1 + number)}
            updates.append(Update(k, {"w": y}, told, control={"w": moved}))
            variates[k] += moved
        x = algorithm.step({"w": x}, updates, lambda name: "all")["w"]
        assert x.abs() < 10
    weights = torch.tensor(counts) / sum(counts)
    assert x.item() == pytest.approx(float(weights @ minima.float()), abs=1e-3)
    mean = (weights.double() @ variates).item()
    assert algorithm.control["w"].item() == pytest.approx(mean, abs=1e-9)


def test_a_client_of_a_number_beyond_takes_part_in_scaffold():
    """Keys may be more than clients at once."""
    config = build(Federated, {"kind": "federated", "algorithm": "scaffold", "clients": 2})
    algorithm = algorithm_of(config, PARAMETERS)
    algorithm.start(NOW)
    updates = [update(k, (2.0, 2.0), control={"w": tensor(1.0, 3.0)}) for k in (0, 1, 7)]
    algorithm.step(NOW, updates, lambda name: "all")
    close(algorithm.control["w"], tensor(1.0, 3.0))


@pytest.mark.parametrize("clip", [None, 3.0])
def test_scaffold_comes_to_rest_where_the_mean_of_all_images_does(clip):
    """Parabolas with minima of their own, one client with nine times the images of another.

    A third joins late, its first change much longer than the others': what is cut of it its owner
    leaves out, too.
    """
    minima, counts = torch.tensor([0.0, 1.0, -40.0]).double(), (90.0, 10.0, 20.0)
    config = build(Federated, {"kind": "federated", "algorithm": "scaffold", "clients": 3})
    algorithm = algorithm_of(config, frozenset({"w"}))
    x, variates = torch.zeros(1).double(), torch.zeros(3, 1).double()
    algorithm.start({"w": x})
    cuts = 0
    for number in range(600):
        updates = []
        for k in range(3 if number > 30 else 2):
            y = x.clone()
            for _ in range(4):
                y -= 0.05 * (y - minima[k] + algorithm.control["w"] - variates[k])
            moved = -algorithm.control["w"] + (x - y) / (4 * 0.05)
            updates.append(Update(k, {"w": y}, {"all": counts[k]}, control={"w": moved}))
        updates, lines = clipped(updates, {"w": x}, frozenset(), clip)  # the variates alone
        cuts += len(lines)
        for u in updates:  # as a client does, who is told what was counted
            variates[u.client] += u.control["w"]
        x = algorithm.step({"w": x}, updates, lambda name: "all")["w"]
    weights = torch.tensor(counts) / sum(counts)
    assert x.item() == pytest.approx(float(weights @ minima.float()), abs=1e-3)
    assert bool(cuts) == (clip is not None)


@pytest.mark.parametrize("faulty", [1, 2, 3])
@pytest.mark.parametrize("rule", RULES)
def test_rules_hold_among_the_fewest_against_liars_who_agree(rule, faulty):
    torch.manual_seed(0)
    config = build(Federated, {"kind": "federated", "algorithm": rule, "clients": 99})
    if rule == "median":
        clients = 2 * faulty + 1
    else:
        clients = least_updates(config.model_copy(update={"faulty": faulty}))
    sent = torch.randn(clients, 50, dtype=torch.float64) * 0.1 + 1.0
    sent[:faulty] = -1000.0
    (found,) = RULES[rule]([sent], faulty, None)
    assert (found - 1).norm() < 0.1 * math.sqrt(50) * 1.5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lie", [1e9, -30.0, 5.0])
def test_rules_hold_when_clients_lie_and_the_mean_does_not(rule, lie):
    torch.manual_seed(0)
    clients, faulty = 11, 2
    honest = torch.randn(clients, 50, dtype=torch.float64) * 0.1 + 1.0
    sent = honest.clone()
    sent[:faulty] = -lie * honest[:faulty]
    (found,) = RULES[rule]([sent], faulty, None)
    assert (found - 1).norm() < 0.1 * math.sqrt(50) * 1.2  # one honest client is as far
    assert (sent.mean(0) - 1).norm() > 5


def test_multi_krum_of_one_is_krum_and_of_more_is_nearer():
    torch.manual_seed(1)
    rows = torch.randn(9, 40, dtype=torch.float64)
    best = int(krum_scores([rows], 2).argmin())
    assert torch.equal(multi_krum([rows], 2, 1)[0], rows[best])
    assert multi_krum([rows], 2, 5)[0].norm() < rows[best].norm()


def test_counts_are_capped_at_ten_medians():
    updates = [update(k, (1.0, 2.0), count) for k, count in enumerate((5.0, 1e9, 7.0))]
    found, lines = capped(updates)
    assert [u.counts["all"] for u in found] == [5.0, 70.0, 7.0]
    assert len(lines) == 1
    assert lines[0].startswith("client 1: ")


def test_long_updates_are_cut_and_statistics_by_themselves():
    updates = [update(k, (1.0, 2.0 + d), mean=9.0) for k, d in enumerate((1.0, 2.0, 300.0))]
    found, lines = clipped(updates, NOW, PARAMETERS, 3.0)
    close(found[2].weights["w"], tensor(1.0, 2.0 + 6.0))
    assert found[2].weights["mean"] == 9
    assert found[:2] == updates[:2]
    assert len(lines) == 1
    assert clipped(updates, NOW, PARAMETERS, None) == (updates, [])
    alone = updates[2:]
    assert clipped(alone, NOW, PARAMETERS, 1.0) == (alone, [])  # nothing says what is long


def test_where_a_round_says_nothing_of_lengths_those_before_do():
    still, wild = update(0, (1.0, 2.0)), update(1, (1.0, 1e15))
    for updates in ([wild], [still, wild]):
        found, lines = clipped(updates, NOW, PARAMETERS, 3.0, usual=0.5)
        close(found[-1].weights["w"], tensor(1.0, 2.0 + 3 * 10 * 0.5))
        assert lines == ["client 1: its update cut to 1.5e-14 of its length"]
    small = [still, update(1, (1.0, 6.0))]
    assert clipped(small, NOW, PARAMETERS, 3.0, usual=0.5) == (small, [])


def test_statistics_go_no_further_than_ten_medians():
    updates = [update(k, (2.0, 2.0), mean=m) for k, m in enumerate((0.5, 0.4, 1e18))]
    found, lines = clipped(updates, NOW, PARAMETERS, 3.0)
    assert [float(u.weights["mean"]) for u in found] == pytest.approx([0.5, 0.4, 5.0])
    assert lines == ["client 2: its statistics of norms cut to 5e-18"]
    assert clipped(updates[1:], NOW, PARAMETERS, 3.0) == (updates[1:], [])  # which of two is odd?


def test_directions_are_told():
    ways = of_round([update(0, (2.0, 2.0)), update(1, (1.0, 3.0))], NOW, PARAMETERS)
    assert ways.lengths == {0: 1.0, 1: 1.0}
    assert ways.cosines == pytest.approx({0: math.sqrt(0.5), 1: math.sqrt(0.5)})


def test_steps_and_variates_are_capped_too():
    steps = [update(k, (1.0, 2.0), steps=n) for k, n in enumerate((9e15, 4.0, 1e-300))]
    assert [u.steps for u in capped(steps)[0]] == [40.0, 4.0, 0.4]
    sizes = (1.0, 1e15, 2.0)
    updates = [update(k, (2.0, 2.0), control={"w": tensor(n, 0.0)}) for k, n in enumerate(sizes)]
    found, lines = clipped(updates, NOW, PARAMETERS, 3.0)
    close(found[1].control["w"], tensor(6.0, 0.0))
    assert found[0] == updates[0]
    assert lines == ["client 1: its variate cut to 6e-15 of its length"]


def test_of_two_the_lower_is_believed():
    found, _ = capped([update(0, (1.0, 2.0), 5.0), update(1, (1.0, 2.0), 1e9)])
    assert [u.counts["all"] for u in found] == [5.0, 50.0]


def test_chosen_clients_are_averaged():
    torch.manual_seed(0)
    updates = [update(k, tuple(torch.randn(2).tolist())) for k in range(7)]
    keys = {"algorithm": "multi_krum", "faulty": 1}
    (one,) = (stepped(updates, chosen=n, **keys)["w"] for n in (1,))
    assert any(torch.allclose(one, u.weights["w"], rtol=0, atol=1e-12) for u in updates)
    assert not torch.allclose(one, stepped(updates, chosen=3, **keys)["w"], rtol=0, atol=1e-3)


class Walker:
    """A learner of one number, whose gradient is always 1."""

    def __init__(self, momentum, nesterov=True):
        self.model = torch.nn.Linear(1, 1, bias=False).double()
        group = {"params": [*self.model.parameters()]}
        self.optimizer = SGD([group], momentum=momentum, nesterov=nesterov)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.5
        fill_state(self.optimizer)
        self.lr = 0.5

    def update(self):
        self.model.weight.grad = torch.ones_like(self.model.weight)
        self.optimizer.step()
        return torch.ones(())


def local(**keys):
    cpu = torch.device("cpu")
    return Local(Place(cpu), Precision("fp64", cpu), **keys)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_plain_steps_are_as_far_as_the_optimizer_goes(momentum, nesterov):
    keys = {"momentum": momentum, "nesterov": nesterov}
    walker, strategy = Walker(**keys), local(**keys)
    start = walker.model.weight.item()
    strategy.begin(walker, {})
    for _ in range(4):
        strategy.apply(walker)
        assert start - walker.model.weight.item() == pytest.approx(0.5 * strategy.plain_steps)
    assert strategy.rates == 2.0


def test_scaffold_steps_are_corrected_by_the_server_s_less_the_client_s():
    walker, strategy = Walker(0.0), local()
    start = walker.model.weight.item()
    strategy.begin(walker, {"weight": torch.tensor([[3.0 - 1.0]], dtype=torch.float64)})  # c - c_k
    strategy.apply(walker)
    assert walker.model.weight.item() == pytest.approx(start - 0.5 * (1 - 1 + 3))


def test_fedprox_pulls_back_to_the_start():
    walker, strategy = Walker(0.0), local(prox=0.1)
    start = walker.model.weight.item()
    strategy.begin(walker, {})
    real = walker.update

    def update():
        pulled = walker.model.weight.grad.clone()
        real()
        return pulled.norm()

    walker.update = update
    pulls = []
    for _ in range(2):
        walker.model.weight.grad = torch.zeros_like(walker.model.weight)
        pulls.append(strategy.apply(walker).item())
    assert pulls == pytest.approx([0.0, 0.1 * 0.5])
    assert start - walker.model.weight.item() == pytest.approx(1.0)
