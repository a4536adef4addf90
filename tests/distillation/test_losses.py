"""Every loss against NumPy in float64 written from the formula, gradients against finite differences, and hard numbers."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from gossamer.distillation import losses as L
from gossamer.errors import UsageError

# References: probabilities, loops and float64


def softmax(z, axis=1):
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def kl(p, q):
    return float((p * (np.log(p) - np.log(q))).sum())


def ce(z, y):
    return float(np.mean([-np.log(softmax(z)[i, k]) for i, k in enumerate(y)]))


def kd(s, t, y, alpha=0.9, tau=4.0, standardize=False):
    a, b = s, t
    if standardize:
        a, b = ((z - z.mean(1, keepdims=True)) / (z.std(1, keepdims=True) + 1e-7) for z in (s, t))
    return (1 - alpha) * ce(s, y) + alpha * tau**2 * np.mean([kl(p, q) for p, q in zip(softmax(b / tau), softmax(a / tau), strict=True)])


def dkd(s, t, y, alpha=1.0, beta=8.0, tau=4.0, ce_=1.0):
    total = 0.0
    for row_s, row_t, k in zip(s, t, y, strict=True):
        q, p = (softmax(r[None] / tau)[0] for r in (row_s, row_t))
        target = kl(np.array([p[k], 1 - p[k]]), np.array([q[k], 1 - q[k]]))
        others = kl(np.delete(p, k) / (1 - p[k]), np.delete(q, k) / (1 - q[k]))
        total += alpha * target + beta * others
    return ce_ * ce(s, y) + tau**2 * total / len(y)


def nkd(s, t, y, gamma=1.5, tau=1.0, ce_=1.0):
    total = 0.0
    for row_s, row_t, k in zip(s, t, y, strict=True):
        q, p = softmax(row_s[None])[0], softmax(row_t[None])[0]
        n_q, n_p = softmax(np.delete(row_s, k)[None] / tau)[0], softmax(np.delete(row_t, k)[None] / tau)[0]
        total += -(ce_ + p[k]) * np.log(q[k]) - gamma * tau**2 * (n_p * np.log(n_q)).sum()
    return total / len(y)


def dist(s, t, y, beta=1.0, gamma=1.0, tau=1.0, ce_=1.0):
    q, p = softmax(s / tau), softmax(t / tau)
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    return ce_ * ce(s, y) + tau**2 * (beta * inter + gamma * intra)


def self_distillation(s, t, y, alpha=0.5, tau=4.0, correct=0.9):
    classes = s.shape[1]
    virtual = np.full(s.shape, (1 - correct) / (classes - 1))
    virtual[np.arange(len(y)), y] = correct
    soft = virtual ** (1 / tau) / (virtual ** (1 / tau)).sum(1, keepdims=True)
    return (1 - alpha) * ce(s, y) + alpha * tau**2 * np.mean([kl(p, q) for p, q in zip(soft, softmax(s / tau), strict=True)])


def fitnet(s, t):
    return float(((s - t) ** 2).mean())


def attention(s, t, p=2.0):
    total = 0.0
    for a, b in zip(s, t, strict=True):
        qa, qb = ((np.abs(x) ** p).sum(0).ravel() for x in (a, b))
        total += ((qa / np.linalg.norm(qa) - qb / np.linalg.norm(qb)) ** 2).sum()
    return total / len(s)


def similarity(s, t):
    grams = []
    for x in (s, t):
        g = x.reshape(len(x), -1) @ x.reshape(len(x), -1).T
        grams.append(g / np.linalg.norm(g, axis=1, keepdims=True))
    return float(((grams[0] - grams[1]) ** 2).sum() / len(s) ** 2)


def huber(x):
    return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5


def rkd(s, t, distance=25.0, angle=50.0):
    s, t = s.reshape(len(s), -1), t.reshape(len(t), -1)
    n = len(s)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    mean_s, mean_t = (np.mean([np.linalg.norm(x[i] - x[j]) for i, j in pairs]) for x in (s, t))
    d = np.mean([huber(np.linalg.norm(s[i] - s[j]) / mean_s - np.linalg.norm(t[i] - t[j]) / mean_t) for i, j in pairs])

    def cosine(x, i, j, k):
        u, v = x[i] - x[j], x[k] - x[j]
        return u @ v / np.linalg.norm(u) / np.linalg.norm(v)

    triplets = [(i, j, k) for i in range(n) for j in range(n) for k in range(n) if len({i, j, k}) == 3]
    a = np.mean([huber(cosine(s, *ijk) - cosine(t, *ijk)) for ijk in triplets])
    return distance * d + angle * a


def channelwise(s, t, tau=4.0):
    q, p = (softmax(x.reshape(*x.shape[:2], -1) / tau, 2) for x in (s, t))
    return tau**2 * kl(p, q) / (s.shape[0] * s.shape[1])


def regression(s, t, y, alpha=0.5, margin=None):
    total = 0.0
    for a, b, c in zip(s, t, y, strict=True):
        counts = margin is None or ((a - c) ** 2).mean() + margin > ((b - c) ** 2).mean()
        total += alpha * ((a - b) ** 2).mean() * counts
    return (1 - alpha) * ((s - y) ** 2).mean() + total / len(s)


RNG = np.random.default_rng(0)
LOGITS = [3 * RNG.standard_normal((7, 5)), 3 * RNG.standard_normal((7, 5)), RNG.integers(0, 5, 7)]
MAPS = [RNG.standard_normal((5, 3, 2, 4)), RNG.standard_normal((5, 3, 2, 4))]
VALUES = [RNG.standard_normal((6, 3)) for _ in range(3)]


def drop_teacher(s, t, y, **options):
    return L.self_distillation_loss(s, y, **options)


ON_LOGITS = [
    (L.kd_loss, kd, {}),
    (L.kd_loss, kd, {"alpha": 0.4, "tau": 2.0, "standardize": True}),
    (L.dkd_loss, dkd, {}),
    (L.dkd_loss, dkd, {"alpha": 2.0, "beta": 0.5, "tau": 1.5, "ce": 0.0}),
    (L.nkd_loss, nkd, {}),
    (L.nkd_loss, nkd, {"gamma": 0.7, "tau": 2.0, "ce": 0.5}),
    (L.dist_loss, dist, {}),
    (L.dist_loss, dist, {"beta": 2.0, "gamma": 0.5, "tau": 2.0, "ce": 0.3}),
    (drop_teacher, self_distillation, {}),
    (drop_teacher, self_distillation, {"alpha": 0.9, "tau": 2.0, "correct": 0.7}),
]
ON_FEATURES = [
    (L.fitnet_loss, fitnet, {}),
    (L.attention_transfer_loss, attention, {}),
    (L.attention_transfer_loss, attention, {"p": 3.0}),
    (L.similarity_preserving_loss, similarity, {}),
    (L.rkd_loss, rkd, {}),
    (L.rkd_loss, rkd, {"distance": 1.0, "angle": 0.0}),
    (L.channelwise_loss, channelwise, {"tau": 2.0}),
]
ON_VALUES = [(L.regression_kd_loss, regression, {}), (L.regression_kd_loss, regression, {"alpha": 0.8, "margin": 0.1})]
CASES = (
    [(f, r, o, LOGITS) for f, r, o in ON_LOGITS]
    + [(f, r, o, MAPS) for f, r, o in ON_FEATURES]
    + [(f, r, o, VALUES) for f, r, o in ON_VALUES]
)


def reference_options(options):
    return {("ce_" if k == "ce" else k): v for k, v in options.items()}


@pytest.mark.parametrize(("loss", "reference", "options", "data"), CASES, ids=lambda x: getattr(x, "__name__", ""))
def test_value_and_gradient_equal_the_formula(loss, reference, options, data):
    student, teacher, *labels = (torch.from_numpy(d.copy()) for d in data)
    student.requires_grad_()
    teacher.requires_grad_(teacher.is_floating_point())
    value = loss(student, teacher, *labels, **options)
    theirs = reference_options(options)
    assert value.item() == pytest.approx(reference(*data, **theirs), rel=1e-6)
    value.backward()
    assert teacher.grad is None, "a gradient reached the teacher"
    numeric, h = np.zeros_like(data[0]), 1e-5
    for index in np.ndindex(*data[0].shape):
        up, down = data[0].copy(), data[0].copy()
        up[index] += h
        down[index] -= h
        numeric[index] = (reference(up, *data[1:], **theirs) - reference(down, *data[1:], **theirs)) / (2 * h)
    np.testing.assert_allclose(student.grad.numpy(), numeric, atol=2e-6, rtol=1e-5)


def test_plain_kd_is_target_kd_and_the_others_weighted_by_the_teacher_s_doubt():
    """The decomposition that DKD starts from: KL = TCKD + (1 - p_t) NCKD, for a single row."""
    s, t, y = (torch.from_numpy(d[:1].copy()) for d in LOGITS)
    doubt = 1 - torch.softmax(t / 4, 1)[0, y[0]].item()
    assert L.dkd_loss(s, t, y, alpha=1.0, beta=doubt, ce=0.0).item() == pytest.approx(L.kd_loss(s, t, alpha=1.0).item(), rel=1e-9)


@pytest.mark.parametrize(("loss", "reference", "options"), ON_LOGITS[:-2], ids=lambda x: getattr(x, "__name__", ""))
def test_positions_count_as_rows(loss, reference, options):
    s, t = RNG.standard_normal((2, 4, 3, 2)), RNG.standard_normal((2, 4, 3, 2))
    y = RNG.integers(0, 4, (2, 3, 2))
    rows = [np.moveaxis(z, 1, -1).reshape(-1, 4) for z in (s, t)]
    want = reference(*rows, y.reshape(-1), **reference_options(options))
    assert loss(*map(torch.from_numpy, (s, t, y)), **options).item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 60.0, 3e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("loss", "reference", "options"), ON_LOGITS, ids=lambda x: getattr(x, "__name__", ""))
def test_confident_logits_in_every_precision_stay_finite(loss, reference, options, dtype, scale):
    """Agreeing, opposed and flat rows, up to near the largest float16."""
    s = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 0], [-1, 0, 1]]).mul(scale).to(dtype).requires_grad_()
    t = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, -1]]).mul(scale).to(dtype)
    value = loss(s, t, torch.tensor([0, 1, 2, 0]), **options)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(s.grad).all()
    if dtype == torch.bfloat16 and scale == 1.0:  # whole numbers are exact in it
        wide = loss(s.detach().double(), t.double(), torch.tensor([0, 1, 2, 0]), **options)
        assert value.item() == pytest.approx(wide.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("loss", "reference", "options"), ON_FEATURES, ids=lambda x: getattr(x, "__name__", ""))
def test_dead_and_huge_features_stay_finite(loss, reference, options, dtype):
    for student, teacher in [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (200.0, 200.0)]:
        s = (torch.ones(4, 3, 2, 2) * student).to(dtype).requires_grad_()
        value = loss(s, (torch.ones(4, 3, 2, 2) * teacher).to(dtype), **options)
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(s.grad).all()


def test_a_batch_of_one_and_two_classes():
    s, t, y = torch.randn(1, 2, requires_grad=True), torch.randn(1, 2), torch.tensor([1])
    for loss in (L.kd_loss, L.dkd_loss, L.nkd_loss, L.dist_loss):
        value = loss(s, t, y)
        assert torch.isfinite(torch.autograd.grad(value, s)[0]).all()
    with pytest.raises(UsageError, match="two classes"):
        L.dkd_loss(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))


def test_relations_do_not_care_about_width_scale_and_rotation():
    x = torch.randn(6, 4, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    wide = torch.cat([3 * x @ turn, torch.zeros(6, 5)], 1)
    assert L.rkd_loss(wide, x).item() == pytest.approx(0, abs=1e-12)
    assert L.similarity_preserving_loss(wide, x).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: L.dkd_loss(torch.zeros(2, 3), torch.zeros(2, 3)), "class indices"),
        (lambda: L.nkd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3)), "class indices"),
        (lambda: L.dkd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), beta=-1), "beta=-1"),
        (lambda: L.dist_loss(torch.zeros(2, 3), torch.zeros(2, 3)), "ce=0"),
        (lambda: L.dist_loss(torch.zeros(2, 3), torch.zeros(2, 4)), "one shape"),
        (lambda: L.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), alpha=1.0, tau=float("nan")), "tau > 0"),
        (lambda: L.self_distillation_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), correct=0.2), "correct"),
        (lambda: L.fitnet_loss(torch.zeros(2, 3), torch.zeros(2, 4)), "adapter"),
        (lambda: L.attention_map(torch.zeros(2, 3)), "positions"),
        (lambda: L.attention_transfer_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)), "positions"),
        (lambda: L.similarity_preserving_loss(torch.zeros(2, 3), torch.zeros(3, 3)), "same"),
        (lambda: L.rkd_loss(torch.zeros(2, 3), torch.zeros(2, 3)), "3 or more"),
        (lambda: L.channelwise_loss(torch.zeros(2, 3), torch.zeros(2, 3)), "one shape"),
        (lambda: L.regression_kd_loss(torch.zeros(2, 3), torch.zeros(2, 3)), "needs a target"),
        (lambda: L.regression_kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2)), "one shape"),
        (lambda: L.regression_kd_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), margin=-1), "margin"),
        (lambda: L.Combined([]), "at least one"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(UsageError, match=message):
        call()


# Class twins and schedules


PAIRS = {
    L.KD: L.kd_loss,
    L.DKD: L.dkd_loss,
    L.NKD: L.nkd_loss,
    L.DIST: L.dist_loss,
    L.RegressionKD: L.regression_kd_loss,
    L.FitNet: L.fitnet_loss,
    L.AttentionTransfer: L.attention_transfer_loss,
    L.SimilarityPreserving: L.similarity_preserving_loss,
    L.RKD: L.rkd_loss,
    L.Channelwise: L.channelwise_loss,
    L.SelfDistillation: L.self_distillation_loss,
}


@pytest.mark.parametrize("twin", PAIRS, ids=lambda t: t.__name__)
def test_a_twin_has_the_settings_and_the_value_of_its_function(twin):
    function = PAIRS[twin]
    keywords = {k: p.default for k, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    made = twin()
    assert {k: getattr(made, k) for k in keywords} == keywords
    data = LOGITS if issubclass(twin, L.OutputLoss) else MAPS
    data = VALUES if twin is L.RegressionKD else data
    arguments = [torch.from_numpy(d) for d in data]
    if twin is L.SelfDistillation:
        assert made(*arguments).item() == function(arguments[0], arguments[2]).item() == made(arguments[0], arguments[2]).item()
    else:
        assert made(*arguments).item() == function(*arguments).item()
    assert made.describe()["loss"] == made.name


def test_schedules_move_settings_and_weights():
    from gossamer.distillation.schedules import Cosine, Linear

    arguments = [torch.from_numpy(d) for d in LOGITS]
    loss = L.KD(tau=Linear(4.0, 1.0), alpha=Cosine(1.0, 0.0))
    assert loss.at(0.5) == L.KD(tau=2.5, alpha=0.5)
    assert loss.at(1.0)(*arguments).item() == L.kd_loss(*arguments, alpha=0.0, tau=1.0).item()
    both = L.Combined([(loss, 1.0), (L.DIST(), Linear(0.0, 2.0))]).at(0.5)
    want = L.kd_loss(*arguments, alpha=0.5, tau=2.5) + L.dist_loss(*arguments)
    assert both(*arguments).item() == pytest.approx(want.item())
    with pytest.raises(UsageError, match="until"):
        Linear(0, 1, until=0)
