"""ibma.methods.semi: every term against its definition, and what all rivals share."""
import copy

import numpy as np
import pytest
import torch
from cases import toy_data
from sklearn.preprocessing import StandardScaler
from sklearn.semi_supervised import LabelSpreading
from torch.nn.functional import cross_entropy

from ibma.methods import METHODS, create
from ibma.methods.semi import SEMI, create_semi, label_spreading
from ibma.training import TrainingConfig, fit

SMALL = {"dim": 8, "encoders": {"vector": {"hidden": 16}}, "heads": 2}


@pytest.fixture
def data():
    return toy_data(40, masks=True, unlabelled=True)


def started(name, data, **options):
    method = create_semi(name, data, seed=0, **SMALL, **options)
    method.on_fit_start([data[:]])
    return method.eval()


def parts(method, batch):
    out, free = method(batch), batch.target < 0
    heads = [(out.logits[name], batch.mask[name] & free) for name in out.logits] + [(out.fused_logits, free)]
    return out, free, heads, min(1.0, int(free.sum()) / int((~free).sum()))


def test_none_of_them_is_among_the_compared_methods():
    assert not set(SEMI) & set(METHODS)
    with pytest.raises(KeyError, match="unknown method 'mixmatch'; known: entropy"):
        create_semi("mixmatch", toy_data())


@pytest.mark.parametrize("name", SEMI)
def test_with_all_labels_they_are_cross_entropy(name):
    data = toy_data(24)
    options = {"supervised": 0.0} if name == "info_nce" else {}
    ours, plain = create_semi(name, data, seed=0, **SMALL, **options), create("ce", data, seed=0, **SMALL)
    for method in (ours, plain):
        fit(method, data, config=TrainingConfig(epochs=3, batch_size=8))
    for key, value in plain.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key


@pytest.mark.parametrize("name", SEMI)
def test_the_weight_grows_from_zero_and_labels_that_are_hidden_play_no_part(name, data):
    method = create_semi(name, data, seed=0, ramp=2, **SMALL)
    history = fit(method, data, config=TrainingConfig(epochs=4, batch_size=16, lr=1e-2)).history
    assert history[0]["unlabelled"] == 0
    assert method.risen == 1 and np.isfinite(history[-1]["unlabelled"])
    with pytest.raises(ValueError, match="weight must not be negative"):
        create_semi(name, data, weight=-1.0)
    with pytest.raises(ValueError, match="needs exclusive classes, the task is multi_label"):
        create_semi(name, toy_data(multi_label=True))


def test_entropy_minimisation_is_the_mean_entropy_of_the_heads(data):
    method = started("entropy", data, weight=0.7)
    out, free, heads, share = parts(method, data[:])
    slow = 0.0
    for logits, where in heads:
        p = logits.softmax(-1)[where]
        slow += -(p * p.log()).sum(1).mean().item() / len(heads)
    assert method.loss(data[:])["unlabelled"].item() == pytest.approx(0.7 * share * slow, rel=1e-5)


def test_entropy_of_a_head_that_is_certain_has_a_gradient(data):
    method = started("entropy", data)
    for head in (*method.model.heads.values(), method.model.fused_head):
        head.weight.data *= 1e4  # probabilities of exactly 0
    method.loss(data[:])["unlabelled"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_pseudo_labels_teach_where_the_fused_head_is_sure(data, threshold):
    method = started("pseudo_label", data, threshold=threshold)
    out, free, heads, share = parts(method, data[:])
    p, best = out.fused_logits.softmax(-1).max(-1)
    sure = p >= threshold
    assert threshold == 0 or 0 < int((sure & free).sum()) < int(free.sum())
    slow = sum(((cross_entropy(logits, best, reduction="none") * sure)[where].sum() / where.sum()).item() for logits, where in heads) / len(heads)
    assert method.loss(data[:])["unlabelled"].item() == pytest.approx(share * slow, rel=1e-5)


def test_fixmatch_teaches_the_other_heads_never_the_teacher(data):
    method = started("fixmatch", data, threshold=0.4)
    out, free, heads, share = parts(method, data[:])
    logits, here = {**out.logits, "fused": out.fused_logits}, {**data[:].mask, "fused": torch.ones(40, dtype=torch.bool)}
    slow, number = 0.0, 0
    for teacher in out.logits:
        p, best = out.logits[teacher].softmax(-1).max(-1)
        for student in logits:
            if student != teacher:
                where = free & here[teacher] & here[student]
                slow += float((cross_entropy(logits[student], best, reduction="none") * (p >= 0.4))[where].sum() / where.sum())
                number += 1
    assert number == 4
    assert method.loss(data[:])["unlabelled"].item() == pytest.approx(share * slow / 4, rel=1e-5)
    teachers = [head.weight for head in method.model.heads.values()]
    only = started("fixmatch", toy_data(40, num_modalities=2, unlabelled=True), threshold=0.0)
    batch = toy_data(40, unlabelled=True)[:]
    out, free = only(batch), batch.target < 0
    gradient = torch.autograd.grad(cross_entropy(out.logits["m1"], out.logits["m0"].argmax(-1)), list(only.model.heads["m0"].parameters()), allow_unused=True)
    assert gradient == (None, None) and len(teachers) == 2


def test_co_training_picks_the_surest_of_each_class_and_teaches_others(data):
    method = started("co_training", data, step=1.5)
    method.on_epoch_end([data[:]])
    method.on_epoch_end([data[:]])
    batch = data[:]
    out, free = method(batch), batch.target < 0
    for name, logits in out.logits.items():
        p = logits.softmax(-1)
        expected = {}
        for c in range(3):
            mine = [i for i in range(40) if free[i] and batch.mask[name][i] and int(p[i].argmax()) == c]
            expected |= {i: c for i in sorted(mine, key=lambda i: -float(p[i, c]))[:3]}  # two rounds of 1.5
        assert method.given[name] == expected
    slow = 0.0
    for student, logits in {**out.logits, "fused": out.fused_logits}.items():
        for teacher in out.logits:
            if teacher != student:
                given = [(i, c) for i, c in method.given[teacher].items() if student == "fused" or batch.mask[student][i]]
                slow += float(np.mean([-float(logits[i].log_softmax(-1)[c]) for i, c in given])) / 4 if given else 0.0
    share = min(1.0, int(free.sum()) / int((~free).sum()))
    assert method.loss(batch)["unlabelled"].item() == pytest.approx(share * slow, rel=1e-4)
    again = create_semi("co_training", data, seed=1, **SMALL)
    again.load_state_dict(copy.deepcopy(method.state_dict()))
    assert again.given == method.given and again.rounds == 2


def test_info_nce_contrasts_all_pairs_and_the_labelled(data):
    method = started("info_nce", data, supervised=0.5)
    batch = data[:]
    out, both = method(batch), batch.mask["m0"] & batch.mask["m1"]
    a, b = (torch.nn.functional.normalize(out.z[name][both], dim=1) for name in ("m0", "m1"))
    scores = a @ b.T / 0.1
    truth = torch.arange(len(a))
    slow = (cross_entropy(scores, truth) + cross_entropy(scores.T, truth)).item() / 2
    _, _, _, share = parts(method, batch)
    terms = method.loss(batch)
    assert terms["unlabelled"].item() == pytest.approx(share * slow, rel=1e-5)
    assert terms["contrast"].item() > 0


def test_label_spreading_is_scikit_learns():
    train, test = toy_data(60, unlabelled=True), toy_data(30, seed=1)
    x, new = (torch.cat([part.inputs[name] for name in part.inputs], 1).numpy() for part in (train, test))
    scaler = StandardScaler().fit(x)
    expected = LabelSpreading(kernel="knn", n_neighbors=5, alpha=0.2, max_iter=100).fit(scaler.transform(x), train.target.numpy()).predict(scaler.transform(new))
    assert label_spreading(train, test, neighbours=5).argmax(-1).tolist() == expected.tolist()
    none = copy.copy(train)
    none.target = train.target.masked_fill(train.target == 1, -1)
    assert label_spreading(none, test).shape == (30, 3) and not label_spreading(none, test)[:, 1].any()
