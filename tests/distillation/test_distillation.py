"""Distillation: the loss against NumPy and finite differences, and what the teacher must never suffer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.distillation import Distillation, distill, kd_loss
from gossamer.errors import RunFolderError, SourceError, UsageError
from gossamer.models import resnet8
from gossamer.plan import Plan
from gossamer.result import Profile, Result
from gossamer.sources import Batch
from gossamer.training import FitResult


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def reference(zs: np.ndarray, zt: np.ndarray, y: np.ndarray, alpha: float, tau: float) -> float:
    """The definition with probabilities, in float64: sums over classes, mean over rows."""
    q, p = softmax(zs / tau), softmax(zt / tau)
    kl = (p * (np.log(p) - np.log(q))).sum(1).mean()
    ce = -np.log(softmax(zs)[np.arange(len(y)), y]).mean()
    return float((1 - alpha) * ce + alpha * tau**2 * kl)


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return 3 * rng.standard_normal((7, 5)), 3 * rng.standard_normal((7, 5)), rng.integers(0, 5, 7)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_loss_equals_the_formula(logits, alpha, tau):
    zs, zt, y = logits
    got = kd_loss(*map(torch.from_numpy, (zs, zt, y)), alpha=alpha, tau=tau).item()
    assert got == pytest.approx(reference(zs, zt, y, alpha, tau), rel=1e-10)


def test_defaults_are_alpha_09_and_tau_4(logits):
    zs, zt, y = logits
    assert kd_loss(*map(torch.from_numpy, logits)).item() == pytest.approx(reference(zs, zt, y, 0.9, 4.0), rel=1e-10)


@pytest.mark.parametrize(("alpha", "tau"), [(0.0, 2.0), (0.7, 4.0), (1.0, 1.5)])
def test_gradient_equals_finite_differences_and_the_closed_form(logits, alpha, tau):
    zs, zt, y = logits
    student = torch.from_numpy(zs).requires_grad_()
    kd_loss(student, torch.from_numpy(zt), torch.from_numpy(y), alpha=alpha, tau=tau).backward()
    numeric, h = np.zeros_like(zs), 1e-6
    for index in np.ndindex(*zs.shape):
        up, down = zs.copy(), zs.copy()
        up[index] += h
        down[index] -= h
        numeric[index] = (reference(up, zt, y, alpha, tau) - reference(down, zt, y, alpha, tau)) / (2 * h)
    closed = ((1 - alpha) * (softmax(zs) - np.eye(5)[y]) + alpha * tau * (softmax(zs / tau) - softmax(zt / tau))) / len(y)
    np.testing.assert_allclose(student.grad.numpy(), numeric, atol=1e-7)
    np.testing.assert_allclose(student.grad.numpy(), closed, atol=1e-12)


def test_dense_outputs_average_over_batch_and_positions():
    rng = np.random.default_rng(1)
    zs, zt = rng.standard_normal((2, 4, 3, 5)), rng.standard_normal((2, 4, 3, 5))
    y = rng.integers(0, 4, (2, 3, 5))
    rows = [np.moveaxis(z, 1, -1).reshape(-1, 4) for z in (zs, zt)]
    got = kd_loss(*map(torch.from_numpy, (zs, zt, y)), alpha=0.6, tau=3.0).item()
    assert got == pytest.approx(reference(rows[0], rows[1], y.reshape(-1), 0.6, 3.0), rel=1e-10)


def test_equal_logits_cost_nothing_and_no_gradient_reaches_the_teacher():
    z = torch.randn(4, 6)
    assert kd_loss(z, z, alpha=1.0).item() == pytest.approx(0, abs=1e-6)
    student, teacher = z.clone().requires_grad_(), torch.randn(4, 6, requires_grad=True)
    kd_loss(student, teacher, alpha=1.0).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_a_very_confident_student_costs_a_finite_amount():
    zs, zt = torch.tensor([[1e4, 0.0]], requires_grad=True), torch.tensor([[0.0, 1e4]])
    loss = kd_loss(zs, zt, torch.tensor([1]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(zs.grad).all()


def test_soft_labels():
    zs, zt = torch.randn(3, 4), torch.randn(3, 4)
    y = torch.tensor([0, 2, 1])
    assert kd_loss(zs, zt, nn.functional.one_hot(y, 4).float()).item() == pytest.approx(kd_loss(zs, zt, y).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alpha": 1.1}, "alpha in"), ({"tau": 0.0}, "tau > 0"), ({"alpha": 0.5}, "needs labels")],
)
def test_bad_arguments(options, message):
    z = torch.zeros(2, 3)
    with pytest.raises(UsageError, match=message):
        kd_loss(z, z, **options)
    with pytest.raises(UsageError, match="one shape"):
        kd_loss(z, torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))


# Training with a teacher


def batches(n: int = 6, *, labels: bool = True) -> list:
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(8, 1, 8, 8, generator=g) for _ in range(n)]
    return [(x, (x.mean((1, 2, 3)) > 0).long()) if labels else x for x in xs]


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return resnet8(width=2, in_channels=1, num_classes=2), resnet8(width=4, in_channels=1, num_classes=2)


class Spy(nn.Module):
    """A teacher that notes how it is called."""

    calls: list[tuple[bool, bool, bool]] = []  # noqa: RUF012

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Spy.calls.append((self.training or any(m.training for m in self.modules()), torch.is_grad_enabled(), x.requires_grad))
        return self.body(x)


def test_teacher_runs_in_eval_mode_without_gradients_in_every_epoch_and_stays_as_it_was():
    student, body = pair()
    teacher = Spy(body).train()
    body.stem.eval()
    before, modes = copy.deepcopy(teacher.state_dict()), [m.training for m in teacher.modules()]
    Spy.calls = []
    distill(student, teacher, batches(), epochs=3, lr=1e-2)
    assert len(Spy.calls) >= 18
    assert set(Spy.calls) == {(False, False, False)}
    assert [m.training for m in teacher.modules()] == modes
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name  # running means and batch counters included
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())


def test_the_student_is_left_alone_and_trains_in_train_mode_in_the_second_epoch():
    student, teacher = pair()
    before = copy.deepcopy(student.state_dict())
    trained = distill(student, teacher, batches(), epochs=2, lr=1e-2)
    assert isinstance(trained, FitResult)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), student.state_dict().values(), strict=True))
    assert int(trained.model.stem[1].num_batches_tracked) == 12  # batch statistics were gathered in both epochs


def test_one_step_is_the_step_of_the_formula():
    torch.manual_seed(0)
    student, teacher = nn.Linear(3, 4), nn.Linear(3, 4)
    x, y = torch.randn(5, 3), torch.randint(4, (5,))
    moved = distill(student, teacher, [(x, y)], alpha=0.7, tau=2.0, optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.0).model
    zs, zt = student(x).detach().numpy(), teacher(x).detach().numpy()
    grad = (0.3 * (softmax(zs) - np.eye(4)[y.numpy()]) + 0.7 * 2.0 * (softmax(zs / 2) - softmax(zt / 2))) / 5
    np.testing.assert_allclose((student.weight - moved.weight).detach().numpy(), 0.1 * grad.T @ x.numpy(), atol=1e-6)


def test_distillation_pulls_the_student_to_the_teacher():
    student, teacher = pair()
    data = batches(10, labels=False)
    teacher.eval()
    result = distill(student, teacher, data, alpha=1.0, epochs=6, lr=1e-2)
    with torch.no_grad():
        x = torch.cat(data)
        gaps = [kd_loss(m.eval()(x), teacher(x), alpha=1.0).item() for m in (student, result.model)]
    assert gaps[1] < 0.5 * gaps[0]


def test_a_network_can_teach_its_own_copy():
    student, _ = pair()
    result = distill(student, student, batches(), epochs=1)
    assert result.model is not student


def test_results_go_in_and_come_out():
    student, teacher = pair()
    empty = Profile(0, 0, 0, 0)
    given = Result(student, Plan(), empty, empty, source="here")
    trained = distill(given, Result(teacher, Plan(), empty, empty), batches(), lr=1e-2)
    assert isinstance(trained, Result)
    assert trained.source == "here"
    assert not torch.equal(trained.model.head.weight, student.head.weight)


def test_resume_is_bit_for_bit_and_bound_to_alpha_and_tau(tmp_path):
    def run(**options):
        student, teacher = pair()
        return distill(student, teacher, batches(), epochs=2, lr=1e-2, **options)

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=tmp_path, checkpoint_every=3, progress=stop)
    with pytest.raises(RunFolderError, match="tau is 4"):
        run(checkpoint=tmp_path, resume=True, tau=2.0)
    resumed = run(checkpoint=tmp_path, resume=True)
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert resumed.history[0]["objective"] == "kd"


class Viewing(nn.Module):
    """A teacher that cannot take channels-last tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.head(y.view(y.shape[0], -1))


def test_a_teacher_that_cannot_take_channels_last_gets_contiguous_tensors():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    data = [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))]
    assert distill(student, Viewing(), data).steps == 1


def test_teacher_logits_are_the_same_in_either_layout():
    _, teacher = pair()
    objective = Distillation(teacher)
    x = torch.randn(4, 1, 8, 8).expand(4, 3, 8, 8).contiguous()
    torch.manual_seed(0)
    objective = Distillation(resnet8(width=4))
    plain = objective.teach(Batch((x,), {}, None))
    laid_out = objective.teach(Batch((x.contiguous(memory_format=torch.channels_last),), {}, None))
    torch.testing.assert_close(plain, laid_out, rtol=1e-4, atol=1e-5)


def test_errors():
    student, teacher = pair()
    with pytest.raises(UsageError, match="same classes"):
        distill(student, resnet8(width=2, in_channels=1, num_classes=3), batches())
    with pytest.raises(SourceError, match="no labels"):
        distill(student, teacher, batches(labels=False))
    with pytest.raises(SourceError, match="label is 5"):
        distill(student, teacher, [(torch.zeros(1, 1, 8, 8), torch.tensor([5]))])
    with pytest.raises(UsageError, match="own objective"):
        distill(student, teacher, batches(), objective=nn.MSELoss())
    with pytest.raises(UsageError, match="tau"):
        distill(student, teacher, batches(), tau=-1)
