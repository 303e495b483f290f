"""Objects that users pass: named, recorded, handed on, and what is said when they do not fit."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import visiontrain as vt
from visiontrain.core.config import build, from_keys, merge
from visiontrain.core.errors import ConfigError
from visiontrain.core.own import Own, named, objects_of, refuse_missing, taken_apart, with_objects
from visiontrain.core.types import Loss
from visiontrain.data.config import ClassifyAugment, DataConfig
from visiontrain.data.open import open_dataset
from visiontrain.data.order import SHUFFLED
from visiontrain.data.own_change import Found, changed
from visiontrain.data.samples import training_set
from visiontrain.loggers.config import LogConfig
from visiontrain.loggers.csv import CsvLogger
from visiontrain.loggers.registry import build_loggers
from visiontrain.models.config import OwnModel
from visiontrain.models.registry import build_model
from visiontrain.recipe import Run
from visiontrain.run_checks import check_fixed, check_values
from visiontrain.strategies.handover import hand_over, handed_over
from visiontrain.tasks.classify import ClassifyTask
from visiontrain.tasks.config import ClassifyConfig
from visiontrain.tasks.own_loss import OwnLossTask

GREY = np.full((20, 30, 3), 128, np.uint8)
TENS = [vt.Sample(GREY, 0)] * 10


def darker(sample, random):
    return vt.Sample(sample.image // 2, sample.classes, sample.boxes)


def test_a_config_keeps_the_name_and_runs_keep_the_object():
    run = from_keys(Run, taken_apart({"augment": darker, "model": nn.Flatten(), "epochs": 3}))
    text = run.model_dump_json(exclude_unset=True)
    assert json.loads(text)["augment"]["own"] == {"kind": "object", "ref": "test_own:darker"}
    back = Run.model_validate_json(text)
    assert back == run
    with pytest.raises(ConfigError) as error:
        refuse_missing(back, 'visiontrain.train("config.yaml", {})')
    assert 'visiontrain.train("config.yaml", augment=darker, model=Flatten)' in str(error.value)
    whole = with_objects(back, objects_of(run))
    assert whole.augment.own.value is darker
    assert objects_of(whole) == objects_of(run)


@pytest.mark.parametrize("key", ["augment.own", "data.own", "task.loss", "log.own"])
def test_names_from_files_are_never_imported(key):
    section, _, name = key.partition(".")
    with pytest.raises(ConfigError, match="pass it in Python"):
        build(Run, {section: {name: "os:system"}})


def test_a_lambda_has_no_name():
    with pytest.raises(ConfigError, match="loss: a lambda"):
        taken_apart({"loss": lambda outputs, batch: outputs})


def test_none_is_no_object_and_what_only_an_object_can_be_is_nothing_else():
    assert taken_apart({"loss": None, "logger": None, "augment": None, "epochs": 3}) == {
        "epochs": 3
    }
    for argument, value in (("logger", [print, print]), ("loss", "focal")):
        with pytest.raises(ConfigError, match=f"{argument}: .*; pass one function or object"):
            taken_apart({argument: value})
    assert taken_apart({"task.loss": darker})["task.loss"].value is darker
    without = from_keys(Run, taken_apart({"augment": {"kind": "standard", "own": None}}))
    assert without.augment.own is None


def test_what_stands_in_a_script_is_called_by_its_file(monkeypatch):
    """Another script can import it by that name, and not from __main__."""
    monkeypatch.setattr(darker, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/x/train_dots.py", raising=False)
    assert named("augment", darker).ref == "train_dots:darker"


def test_a_run_goes_on_wherever_its_objects_stand_now():
    old, new = (
        Run(
            model=OwnModel(own=Own(f"{module}:net")),
            data=DataConfig(source=module, own=Own(module)),
        )
        for module in ("train", "resume")
    )
    check_fixed(old, new)
    with pytest.raises(ConfigError, match=r"data.source: tiny, but the run in out has train"):
        check_fixed(old, Run(model=old.model, data=DataConfig(source="tiny")))


def test_the_call_that_repeats_a_run_makes_a_data_set_of_its_classes():
    run = from_keys(Run, taken_apart({"data": vt.Data(TENS, TENS, ["a"])}))
    with pytest.raises(ConfigError, match=r"data=visiontrain.Data\(list\(...\), ...\)"):
        refuse_missing(Run.model_validate_json(run.model_dump_json(exclude_unset=True)), "x({})")


def test_an_adapter_is_known_by_what_it_wraps():
    class Cells(list):
        """Stands for a torch Dataset."""

    data = vt.Data(vt.TorchData(Cells(TENS)), vt.TorchData(Cells(TENS)), ["a"])
    assert named("data", data).ref.endswith("<locals>.Cells")


def test_models_that_give_something_else_are_told_so():
    task = ClassifyTask(ClassifyConfig(), 3)
    batch = vt.Batch(
        *(torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 6), torch.arange(2), torch.zeros(2, 5)),
        valid=torch.ones(2),
    )
    for outputs, got in ((torch.zeros(2, 1000), r"\(2, 1000\)"), ((torch.zeros(2, 3),), "tuple")):
        for call in (
            lambda made: task.loss(made, batch, 0.0),
            lambda made: task.decode(made, batch),
        ):
            with pytest.raises(
                ConfigError, match=rf"model: {got} comes out .*return logits \(2, 3\)"
            ):
                call(outputs)
    with pytest.raises(ConfigError, match=r"model: .*no visiontrain.VisionModel, which a detector"):
        build_model(OwnModel(own=named("model", nn.Flatten())), 4)


def test_objects_reach_other_processes_with_their_code(tmp_path):
    factor = 3

    class Times:
        def __call__(self, value):
            return factor * value

    hand_over({"augment.own": Times()}, tmp_path)
    assert handed_over(tmp_path)["augment.own"](5) == 15
    with open(tmp_path / "open", "w") as file, pytest.raises(ConfigError, match="logger: "):  # noqa: PTH123
        hand_over({"log.own": file}, tmp_path)


def test_changes_of_the_users_stay_inside_the_image():
    def doubled(sample, random):
        return vt.Sample(sample.image[:10], sample.classes, np.asarray(sample.boxes) * 2)

    rows = np.array([[3, 1, 1, 4, 4, 1], [2, 10, 10, 14, 14, 1]], np.float32)
    found = changed(Found(0, GREY, rows), doubled, np.random.default_rng(0), 4)
    assert found.targets.tolist() == [[3, 2, 2, 8, 8, 1]]  # the other one is cut away


def test_a_loss_is_one_number_for_each_image_that_counts():
    batch = vt.Batch(
        *(torch.zeros(3, 3, 8, 8), torch.zeros(3, 1, 6), torch.arange(3), torch.zeros(3, 5)),
        valid=torch.tensor([1.0, 1, 0]),
    )
    logits = torch.tensor([[1.0, 2], [3, 4], [5, 6]], requires_grad=True)
    task = OwnLossTask(ClassifyTask(ClassifyConfig(), 2), lambda outputs, _: outputs.sum(1))
    loss = task.loss(logits, batch, 0.5)
    assert isinstance(loss, Loss)
    assert (loss.terms["all/loss"].item(), loss.counts["all"].item()) == (10, 2)
    wrong = OwnLossTask(task.task, lambda outputs, _: outputs.mean())
    with pytest.raises(ConfigError, match=r"loss: returned a tensor \(\) for 3 images"):
        wrong.loss(logits, batch, 0.5)


def test_sums_of_a_loss_do_not_depend_on_the_format_or_on_what_outputs_hold():
    count = 300  # bf16 counts to 256
    batch = vt.Batch(
        torch.zeros(count, 3, 1, 1),
        torch.zeros(count, 1, 6),
        torch.arange(count),
        torch.zeros(count, 5),
        torch.ones(count),
    )
    logits = torch.ones(count, 2, dtype=torch.bfloat16, requires_grad=True)
    task = OwnLossTask(ClassifyTask(ClassifyConfig(), 2), lambda outputs, _: outputs[:, 0])
    loss = task.loss(logits, batch, 0.5)
    assert (loss.terms["all/loss"].item(), loss.counts["all"].item()) == (count, count)
    masked = torch.full((count, 2), -torch.inf).requires_grad_()
    fixed = OwnLossTask(task.task, lambda outputs, _: outputs.new_ones(count))
    loss = fixed.loss(masked, batch, 0.5)
    loss.total().backward()
    assert loss.total().item() == count
    assert torch.equal(masked.grad, torch.zeros_like(masked))


def test_a_loss_is_computed_in_fp32_as_within_autocast():
    batch = vt.Batch(
        *(torch.zeros(2, 3, 1, 1), torch.zeros(2, 1, 6), torch.arange(2), torch.zeros(2, 5)),
        valid=torch.ones(2),
    )
    seen = []

    def loss(outputs, _):
        seen.extend(output.dtype for output in outputs)
        return outputs[0].exp().sum(1)

    task = OwnLossTask(ClassifyTask(ClassifyConfig(), 2), loss)
    large = torch.full((2, 2), 12.0, dtype=torch.float16, requires_grad=True)  # exp(12) > 65,504
    places = torch.zeros(2, dtype=torch.int64)
    task.loss([large, places], batch, 0.5).total().backward()
    assert seen == [torch.float32, torch.int64]
    assert large.grad.dtype == torch.float16
    wide = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    assert task.loss([wide], batch, 0.5).total().dtype == torch.float64


@pytest.mark.parametrize(
    ("image", "boxes", "reason"),
    [
        (GREY[:0], None, r"an image \(0, 30, 3\); no side may be empty"),
        (GREY, np.zeros((2, 5)), r"boxes \(2, 5\); return \(M, 4\)"),
        (GREY, np.zeros(5), r"boxes \(5,\); return \(M, 4\)"),
    ],
)
def test_a_change_that_returns_what_cannot_be_used_is_one_line(image, boxes, reason):
    with pytest.raises(ConfigError, match=f"augment: returned {reason}"):
        changed(
            Found(0, GREY, np.zeros((0, 6), np.float32)),
            lambda sample, random: vt.Sample(image, sample.classes, boxes),
            *(None, 1),
        )


def test_a_change_that_writes_in_place_leaves_the_data_set_alone():
    def whitened(sample, random):
        sample.image[:] = 255
        return sample

    image = GREY.copy()
    found = changed(Found(0, image, np.zeros((0, 6), np.float32)), whitened, None, 1)
    assert (image == GREY).all()
    assert (found.image == 255).all()
    given = [vt.Sample(image, 0), vt.Sample(image, 1)]
    own = named("data", vt.Data(given, given, ["cat", "dog"]))
    table = open_dataset(DataConfig(own=own)).table("train")
    augment = ClassifyAugment(crop=1.0, own=named("augment", whitened))
    samples = training_set(table, 32, augment, seed=0, epochs=1, order=SHUFFLED)
    assert (samples.cell([(0, 0), (0, 1)], 0).images == 255).all()
    assert (image == GREY).all()


def test_keys_of_our_loss_are_refused_beside_anothers():
    run = from_keys(Run, taken_apart({"loss": darker, "box": 9.0}))
    with pytest.raises(ConfigError, match=r"task.box: 9.0; it changes nothing here"):
        check_values(run)


def test_a_data_set_takes_the_place_of_one_in_python():
    old = {"data": {"source": "a:b", "own": {"kind": "object", "ref": "a:b"}, "cache": "ram"}}
    assert merge(Run, old, {"data": {"source": "tiny"}})["data"] == {
        "source": "tiny",
        "cache": "ram",
    }


def test_models_are_modules_or_make_them():
    instance = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    model = build_model(OwnModel(own=named("model", instance)), 4, "classify")
    assert torch.equal(model(torch.ones(1, 3, 2, 2)), instance(torch.ones(1, 3, 2, 2)))
    assert model.blocks["model"][1].weight is not instance[1].weight  # runs do not share it
    with pytest.raises(ConfigError, match="model: builtins:print is a NoneType; pass a torch"):
        build_model(OwnModel(own=named("model", print)), 4, "classify")


def test_a_function_is_a_logger():
    seen = []

    def note(row, step):
        seen.append((step, row))

    *_, logger = build_loggers(LogConfig(to=[], own=named("logger", note)))
    logger.log({"val/map": 0.5}, 8)
    assert seen == [(8, {"val/map": 0.5})]
    with pytest.raises(ConfigError, match="logger: builtins:list"):
        build_loggers(LogConfig(to=[], own=named("logger", [1])))


def test_a_logger_needs_a_name_and_may_have_no_state(tmp_path):
    class Plain(vt.Logger):
        def log(self, row, step):
            pass

    nameless = Plain()
    with pytest.raises(ConfigError, match=r"the methods of visiontrain\.Logger and a name$"):
        build_loggers(LogConfig(to=[], own=named("logger", nameless)))
    nameless.name = "plain"
    *_, logger = build_loggers(LogConfig(to=[], own=named("logger", nameless)))
    logger.start({}, tmp_path)
    logger.log({}, 1)
    assert logger.state() == {}
    assert logger.on


def test_a_logger_of_the_users_keeps_its_state_under_a_name_of_its_own():
    with pytest.raises(ConfigError, match="has the name 'csv', as one of visiontrain's; give"):
        build_loggers(LogConfig(to=[], own=named("logger", CsvLogger())))
