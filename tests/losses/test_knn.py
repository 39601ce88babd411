"""The k-NN loss and classifier: against a plain count, gradcheck, ties, masks, messages."""

from __future__ import annotations

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from couplings.losses import knn_loss, knn_predict


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny problems: threads that wait for each other on a busy machine cost far more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem(q=6, t=12, d=3, classes=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(q, d, dtype=dtype, generator=g),
        torch.randn(t, d, dtype=dtype, generator=g),
        torch.randint(classes, (q,), generator=g),
        torch.randint(classes, (t,), generator=g),
    )


def counted(queries, templates, query_labels, template_labels, k, mask=None):
    """The definition at epsilon = 0, in plain Python."""
    total = []
    for i, query in enumerate(queries):
        distance = [
            (float((query - template).norm()), j)
            for j, template in enumerate(templates)
            if mask is None or bool(mask[i, j])
        ]
        total.append(-sum(int(template_labels[j] == query_labels[i]) for _, j in sorted(distance)[:k]))
    return torch.tensor(total, dtype=queries.dtype)


@pytest.mark.parametrize("k", [1, 4, 12])
def test_the_limit_is_the_plain_count(k):
    q, t, ql, tl = problem()
    want = counted(q, t, ql, tl, k)
    torch.testing.assert_close(knn_loss(q, t, ql, tl, k, epsilon=0, reduction="none"), want)
    torch.testing.assert_close(knn_loss(q, t, ql, tl, k, epsilon=1e-6), want.mean())
    torch.testing.assert_close(knn_loss(q, t, ql, tl, k, hard=True, reduction="sum"), want.sum())


def test_mask_takes_templates_out():
    q, t, ql, tl = problem()
    mask = torch.rand(6, 12, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[:, :4] = True
    got = knn_loss(q, t, ql, tl, 3, epsilon=0, mask=mask, reduction="none")
    torch.testing.assert_close(got, counted(q, t, ql, tl, 3, mask))


def test_a_query_is_not_its_own_neighbour():
    _, t, _, tl = problem()
    off = ~torch.eye(12, dtype=torch.bool)
    want = counted(t, t, tl, tl, 3, off)
    torch.testing.assert_close(
        knn_loss(t, t, tl, tl, 3, epsilon=0, exclude_self=True, reduction="none"), want
    )
    soft = knn_loss(t, t, tl, tl, 3, epsilon=0.5, exclude_self=True)
    torch.testing.assert_close(soft, knn_loss(t, t, tl, tl, 3, epsilon=0.5, mask=off))
    # what the masked distance to itself is makes no difference
    moved = torch.cat([t, t + 1e6])
    labels = torch.cat([tl, tl])
    mask = torch.cat([off, torch.zeros(12, 12, dtype=torch.bool)], -1)
    torch.testing.assert_close(soft, knn_loss(t, moved, tl, labels, 3, epsilon=0.5, mask=mask))


def test_leading_batch_dimensions_are_separate_problems():
    many = [problem(seed=seed) for seed in range(4)]
    q, t, ql, tl = (torch.stack([m[i] for m in many]).unflatten(0, (2, 2)) for i in range(4))
    got = knn_loss(q, t, ql, tl, 3, epsilon=0.3, reduction="none")
    assert got.shape == (2, 2, 6)
    for i, one in enumerate(many):
        torch.testing.assert_close(got[i // 2, i % 2], knn_loss(*one, 3, epsilon=0.3, reduction="none"))
    shared = knn_loss(q, t[0, 0], ql, tl[0, 0], 3, epsilon=0.3, reduction="none")
    torch.testing.assert_close(
        shared[1, 1], knn_loss(q[1, 1], t[0, 0], ql[1, 1], tl[0, 0], 3, epsilon=0.3, reduction="none")
    )


@pytest.mark.parametrize("method", ["transport", "softmax", "neuralsort"])
def test_gradients_of_first_and_second_order(method):
    q, t, ql, tl = problem(q=3, t=6)
    q.requires_grad_()
    t.requires_grad_()

    def loss(q, t):
        return knn_loss(q, t, ql, tl, 2, epsilon=0.5, method=method)

    assert torch.autograd.gradcheck(loss, (q, t))
    assert torch.autograd.gradgradcheck(loss, (q, t))


def test_gradient_of_the_self_excluding_form():
    _, t, _, tl = problem(t=6)
    t.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: knn_loss(t, t, tl, tl, 2, epsilon=0.5, exclude_self=True), (t,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_coinciding_points_have_finite_gradients_of_every_order(dtype):
    q, t, ql, tl = problem(dtype=dtype)
    t[3] = q[0]
    t[7] = q[0]
    t[8] = t[3]
    q.requires_grad_()
    t.requires_grad_()
    loss = knn_loss(q, t, ql, tl, 3, epsilon=0.5)
    assert loss.dtype == dtype
    first = torch.autograd.grad(loss, (q, t), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (q, t))
    for gradient in (*first, *second):
        assert bool(gradient.isfinite().all())


def test_the_gradient_at_distance_zero_is_zero_and_exact_elsewhere():
    """Moving apart from a point one sits on is no direction of first-order change; every other pair counts in full."""
    q = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1e-9, 0.0]], dtype=torch.float64, requires_grad=True)
    from couplings.losses.knn import _distances

    distance = _distances(q, t)
    assert distance.tolist() == [[0.0, 5.0, 1e-9]]
    for j, want in enumerate([(0.0, 0.0), (0.6, 0.8), (1.0, 0.0)]):
        (gradient,) = torch.autograd.grad(distance[0, j], t, retain_graph=True)
        torch.testing.assert_close(gradient[j], torch.tensor(want, dtype=torch.float64))


def test_gumbel_takes_its_noise_from_the_generator():
    args = problem(dtype=torch.float32)
    one, two = (
        knn_loss(*args, 3, method="gumbel", epsilon=0.5, generator=torch.Generator().manual_seed(5))
        for _ in range(2)
    )
    assert one == two


def test_inputs_are_not_changed():
    args = problem()
    before = [a.clone() for a in args]
    knn_loss(*args, 3)
    knn_predict(args[1], args[3], args[0], 3)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


def test_training_pulls_equal_labels_together():
    g = torch.Generator().manual_seed(0)
    points = torch.randn(40, 4, generator=g)
    labels = torch.arange(40) % 2
    shift = torch.zeros(40, 4, requires_grad=True)
    optimiser = torch.optim.SGD([shift], 1.0)
    first = None
    for _ in range(30):
        loss = knn_loss(points + shift, points + shift, labels, labels, 5, exclude_self=True, epsilon=0.5)
        first = loss.item() if first is None else first
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < first - 0.5


# ------------------------------------------------------------------------------------------------ plain prediction


@pytest.mark.parametrize("k", [1, 3, 9])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_prediction_agrees_with_scikit_learn_where_votes_differ(k, chunk):
    q, t, _, tl = problem(q=200, t=300, classes=2)  # two classes and odd k: no tied votes
    want = KNeighborsClassifier(k).fit(t.numpy(), tl.numpy()).predict(q.numpy())
    assert knn_predict(t, tl + 5, q, k, chunk=chunk).tolist() == (want + 5).tolist()


def test_tied_votes_go_to_the_label_of_the_nearest_neighbour():
    train = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    assert knn_predict(train, torch.tensor([9, 2, 2, 9]), torch.tensor([[0.0]]), 4).tolist() == [9]
    assert knn_predict(train, torch.tensor([2, 9, 9, 2]), torch.tensor([[0.0]]), 4).tolist() == [2]


def test_equal_distances_go_by_the_order_of_the_training_set():
    train = torch.zeros(50, 2)
    labels = torch.tensor([3] * 2 + [1] * 48)
    assert knn_predict(train, labels, torch.ones(1, 2), 3).tolist() == [3]
    assert knn_predict(train.half(), labels.int(), torch.ones(1, 2).half(), 3).dtype == torch.int32


def test_no_queries_no_predictions():
    assert knn_predict(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), torch.zeros(0, 2), 1).shape == (
        0,
    )


# ----------------------------------------------------------------------------------------------------- bad input

Q, T, QL, TL = problem()


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"k": 0}, ValueError, "k"),
        ({"k": 13}, ValueError, "k"),
        ({"k": 2.0}, TypeError, "k"),
        ({"k": True}, TypeError, "k"),
        ({"queries": Q.long()}, TypeError, "queries"),
        ({"queries": Q[0]}, ValueError, "queries"),
        ({"queries": Q.tolist()}, TypeError, "queries"),
        ({"queries": Q.to(torch.complex64)}, TypeError, "queries"),
        ({"templates": T.float()}, TypeError, "templates"),
        ({"templates": T[:, :2]}, ValueError, "templates"),
        ({"templates": T.expand(2, -1, -1)}, ValueError, "templates"),
        ({"query_labels": QL[:5]}, ValueError, "query_labels"),
        ({"query_labels": QL.double()}, TypeError, "query_labels"),
        ({"template_labels": TL[:5]}, ValueError, "template_labels"),
        ({"template_labels": TL.tolist()}, TypeError, "template_labels"),
        ({"mask": torch.ones(6, 12)}, TypeError, "mask"),
        ({"mask": torch.ones(5, 12, dtype=torch.bool)}, ValueError, "mask"),
        ({"exclude_self": True}, ValueError, "exclude_self"),
        ({"reduction": "average"}, ValueError, "reduction"),
        ({"method": "magic"}, ValueError, "method"),
        ({"epsilon": -1.0}, ValueError, "epsilon"),
    ],
)
def test_bad_input_of_the_loss_is_named(change, error, named):
    arguments = {"queries": Q, "templates": T, "query_labels": QL, "template_labels": TL, "k": 3} | change
    with pytest.raises(error, match=rf"^{named}: expected "):
        knn_loss(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"k": 13}, ValueError, "k"),
        ({"k": "3"}, TypeError, "k"),
        ({"queries": Q[None]}, ValueError, "queries"),
        ({"train_features": T.float()}, TypeError, "train_features"),
        ({"train_labels": TL[:, None]}, ValueError, "train_labels"),
        ({"train_labels": TL[:1]}, ValueError, "train_labels"),
        ({"chunk": 0}, ValueError, "chunk"),
        ({"chunk": 1.5}, TypeError, "chunk"),
    ],
)
def test_bad_input_of_the_classifier_is_named(change, error, named):
    arguments = {"train_features": T, "train_labels": TL, "queries": Q, "k": 3} | change
    with pytest.raises(error, match=rf"^{named}: expected "):
        knn_predict(**arguments)
