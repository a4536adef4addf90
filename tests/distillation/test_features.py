"""Feature taps, adapters, several teachers and cached outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gossamer.distillation import (
    DKD,
    KD,
    Adapter,
    Combined,
    Cosine,
    Distillation,
    Feature,
    FeatureTaps,
    Linear,
    TeacherCache,
    distill,
    kd_loss,
)
from gossamer.distillation.cache import keys_of
from gossamer.errors import RunFolderError, SelectorError, SourceError, UsageError
from gossamer.models import resnet8
from gossamer.sources import Batch
from gossamer.training import fit


def student() -> nn.Module:
    torch.manual_seed(1)
    return resnet8(width=2, in_channels=1, num_classes=4)


def teacher(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return resnet8(width=4, in_channels=1, num_classes=4)


def dataset(n: int = 24) -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 1, 8, 8, generator=g), torch.randint(4, (n,), generator=g))


def loader(n: int = 24, batch_size: int = 8) -> DataLoader:
    return DataLoader(dataset(n), batch_size=batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))


def layers(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]


# Taps


def test_taps_read_and_go_also_after_an_exception():
    model = teacher()
    name = layers(model)[2]
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, i, out: seen.append(out))
    with FeatureTaps(model, [name]) as taps:
        model(torch.randn(2, 1, 8, 8))
    assert taps[name] is seen[0]
    handle.remove()
    with pytest.raises(RuntimeError), FeatureTaps(model, [name]):
        model(torch.randn(2, 3, 8, 8))
    assert not any(m._forward_hooks for m in model.modules())


def test_a_training_that_fails_leaves_no_hook_behind():
    model = student()

    def objective(model, batch):
        with FeatureTaps(model, [layers(model)[0]]):
            raise SourceError("broken")

    with pytest.raises(SourceError):
        fit(model, loader(), objective=objective)
    assert not any(m._forward_hooks for m in model.modules())


def test_no_match_lists_near_names():
    with pytest.raises(SelectorError, match=r"no module is called 'stems'; did you mean 'stem'"):
        FeatureTaps(teacher(), ["stems"])
    with pytest.raises(SelectorError, match="did you mean"):
        distill(student(), teacher(), loader(), features=["stem.9"])
    model = nn.Sequential(nn.Linear(2, 2))
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    with FeatureTaps(model, ["unused"]) as taps:
        model(torch.zeros(1, 2))
    with pytest.raises(SelectorError, match="did not call"):
        _ = taps["unused"]


# Adapters


@pytest.mark.parametrize(
    ("s", "t", "matches", "want", "learned"),
    [
        ((2, 3, 4, 4), (2, 5, 4, 4), "shape", (2, 5, 4, 4), True),
        ((2, 3, 8, 8), (2, 3, 4, 4), "shape", (2, 3, 4, 4), False),
        ((2, 3, 4, 4), (2, 5, 8, 8), "positions", (2, 3, 4, 4), False),
        ((2, 16), (2, 24), "shape", (2, 24), True),
        ((2, 49, 16), (2, 49, 24), "shape", (2, 24, 49), True),
        ((2, 49, 16), (2, 25, 24), "shape", (2, 24, 25), True),
        ((2, 6, 30), (2, 9, 30), "shape", (2, 9, 30), True),
        ((2, 3, 4, 4, 4), (2, 5, 2, 2, 2), "shape", (2, 5, 2, 2, 2), True),
        ((2, 7), (2, 3, 4), "nothing", (2, 7), False),
    ],
)
def test_adapters_fit_what_a_loss_needs(s, t, matches, want, learned):
    adapter = Adapter(s, t, matches=matches)
    mine, other = adapter(torch.randn(s), torch.randn(t))
    assert tuple(mine.shape) == want
    if matches == "shape":
        assert mine.shape == other.shape
    assert bool(list(adapter.parameters())) == learned


def test_an_adapter_between_ranks_is_refused():
    with pytest.raises(UsageError, match="same rank"):
        Adapter((2, 3), (2, 3, 4, 4))


@pytest.mark.parametrize("loss", ["fitnet", "attention", "similarity", "rkd", "channelwise"])
def test_features_pull_the_student_towards_the_teacher_and_only_the_student_gets_gradients(loss):
    a, b = student(), teacher()
    last = (layers(a)[-1], layers(b)[-1])
    before = copy.deepcopy(b.state_dict())
    result = distill(a, b, loader(), loss=None, features=[Feature(*last, loss)], epochs=6, lr=1e-2, warmup=0)
    assert result.history[-1]["loss"] < 0.9 * result.history[0]["loss"]
    assert result.history[0]["objective"] == "features"
    assert all(torch.equal(x, before[n]) for n, x in b.state_dict().items())
    assert all(p.grad is None for p in b.parameters())
    assert {n for n, _ in result.model.named_parameters()} == {n for n, _ in a.named_parameters()}, "adapters are thrown away"


def test_the_total_is_the_weighted_sum_of_its_parts():
    a, b = student().eval(), teacher().eval()
    batch = Batch((torch.randn(6, 1, 8, 8),), {}, torch.randint(4, (6,)))
    name = (layers(a)[-1], layers(b)[-1])
    objective = Distillation(b, features=[Feature(*name, "similarity", weight=Linear(2.0, 4.0))], alpha=Cosine(1.0, 0.0), tau=2.0)
    objective.progress(0.5)
    with FeatureTaps(a, [name[0]]) as mine, FeatureTaps(b, [name[1]]) as theirs, torch.no_grad():
        z_S, z_T = a(*batch.args), b(*batch.args)
    from gossamer.distillation import similarity_preserving_loss

    want = kd_loss(z_S, z_T, batch.target, alpha=0.5, tau=2.0) + 3.0 * similarity_preserving_loss(mine[name[0]], theirs[name[1]])
    assert objective(a, batch).item() == pytest.approx(want.item(), rel=1e-5)


def test_adapters_survive_a_resume_bit_for_bit(tmp_path):
    def run(**options):
        a, b = student(), teacher()
        return distill(a, b, loader(), features=[Feature(layers(a)[-1], layers(b)[-1])], tau=Linear(4.0, 1.0), epochs=3, lr=1e-2, **options)

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=tmp_path, checkpoint_every=2, progress=stop)
    again = run(checkpoint=tmp_path, resume=True)
    assert all(torch.equal(x, y) for x, y in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True))


# Several teachers, modes


class Watched(nn.Module):
    """Notes whether any part of it is in train mode when it runs."""

    modes: list[bool] = []  # noqa: RUF012

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x):
        Watched.modes.append(any(m.training for m in self.modules()) or torch.is_grad_enabled())
        return self.body(x)


def test_every_teacher_stays_in_eval_whatever_student_train_does():
    Watched.modes = []
    a = student()
    objective = Distillation([Watched(teacher(0)).train(), Watched(teacher(1)).train()], features=[])
    a.mine = objective.teachers[0]  # a teacher held as a submodule is switched by train()
    a.train()
    objective(a, Batch((torch.randn(4, 1, 8, 8),), {}, torch.tensor([0, 1, 2, 3])))
    assert Watched.modes == [False, False]


def test_several_teachers_are_a_weighted_sum():
    a, b, c = student().eval(), teacher(0).eval(), teacher(1).eval()
    batch = Batch((torch.randn(4, 1, 8, 8),), {}, torch.tensor([0, 1, 2, 3]))
    z = [m(*batch.args) for m in (a, b, c)]
    even = Distillation([b, c])(a, batch).item()
    assert even == pytest.approx((kd_loss(z[0], z[1], batch.target).item() + kd_loss(z[0], z[2], batch.target).item()) / 2, rel=1e-5)
    uneven = Distillation([b, c], teacher_weights=[0.2, 0.8])(a, batch).item()
    want = 0.2 * kd_loss(z[0], z[1], batch.target).item() + 0.8 * kd_loss(z[0], z[2], batch.target).item()
    assert uneven == pytest.approx(want, rel=1e-5)


def test_without_a_teacher_and_by_loss_objects():
    alone = distill(student(), None, loader(), loss="self", epochs=2, lr=1e-2)
    assert alone.history[0]["objective"] == "self"
    combined = distill(student(), teacher(), loader(), loss=Combined([(KD(), 0.5), (DKD(), 0.1)]))
    assert combined.history[0]["objective"] == "combined"
    regression = distill(nn.Linear(3, 2), nn.Linear(3, 2), [(torch.randn(4, 3), torch.randn(4, 2))], loss="regression")
    assert regression.steps == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "kdd"}, "did you mean 'kd'"),
        ({"loss": "dist", "alpha": 0.5}, "'dist' takes beta, gamma, tau, ce, not alpha"),
        ({"loss": KD(), "tau": 2.0}, "go with a loss that is given by name"),
        ({"loss": None}, "a loss or features"),
        ({"features": [3]}, "names of modules"),
        ({"features": [Feature("stem", of=1)]}, "teacher 1"),
        ({"teacher_weights": [1.0, 2.0]}, "1 teachers need 1 weights"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UsageError, match=message):
        distill(student(), teacher(), loader(), **options)
    with pytest.raises(UsageError, match="needs a teacher"):
        distill(student(), None, loader())
    with pytest.raises(UsageError, match="did you mean 'fitnet'"):
        Feature("a", loss="fitnets")


# Cached outputs


class Counting(nn.Module):
    """A teacher that counts the samples it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.samples = teacher(), []

    def forward(self, x):
        self.samples.append(len(x))
        return self.body(x)


def test_the_cache_is_keyed_by_sample_so_shuffling_and_batch_size_do_not_matter(tmp_path):
    plain = distill(student(), teacher(), loader(), epochs=3, lr=1e-2)
    objective = Distillation(Counting(), cache=tmp_path)
    first = fit(student(), loader(), objective=objective, epochs=3, lr=1e-2)
    assert sum(objective.teachers[0].samples) == 24 + 8  # once each, and the pass that finds the memory layout
    for x, y in zip(plain.model.parameters(), first.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
    again = Distillation(Counting(), cache=tmp_path)
    fit(student(), loader(batch_size=5), objective=again, epochs=2)
    assert not again.teachers[0].samples
    assert again.caches[0].reused == 2 * 24 + 5 or again.caches[0].reused == 2 * 24


def test_cached_rows_are_the_sample_s_own(tmp_path):
    model = teacher().eval()
    cache = TeacherCache(tmp_path, model)
    x = dataset().tensors[0]
    order = torch.randperm(24)

    def compute(batch):
        with torch.no_grad():
            return model(*batch.args)

    for part in x[order].split(7):
        cache.outputs(Batch((part,), {}, None), compute)
    reopened = TeacherCache(tmp_path, model)
    found = reopened.outputs(Batch((x,), {}, None), lambda b: pytest.fail("it is all there"))
    torch.testing.assert_close(found, compute(Batch((x,), {}, None)), rtol=1e-4, atol=1e-5)
    assert len(reopened) == 24
    assert len(set(keys_of(Batch((x,), {}, None)))) == 24


def test_a_cache_survives_a_kill_between_its_files_and_refuses_another_teacher(tmp_path):
    cache = TeacherCache(tmp_path, teacher())
    x = torch.randn(4, 3)
    cache.outputs(Batch((x,), {}, None), lambda b: b.args[0] * 2)
    with (tmp_path / "rows.f32").open("ab") as f:
        f.write(b"half a")
    with (tmp_path / "keys.bin").open("r+b") as f:
        f.truncate(16 * 3 + 5)
    reopened = TeacherCache(tmp_path, teacher())
    assert len(reopened) == 3
    found = reopened.outputs(Batch((x,), {}, None), lambda b: b.args[0] * 2)
    torch.testing.assert_close(found, x * 2)
    with pytest.raises(RunFolderError, match="another teacher"):
        TeacherCache(tmp_path, teacher(5))
    with pytest.raises(SourceError, match="no cache"):
        TeacherCache(tmp_path / "b", teacher()).outputs(Batch((x,), {}, None), lambda b: b.args[0].sum())
