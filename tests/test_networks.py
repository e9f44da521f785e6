"""Teachers and queues: what a network around the model remembers, step by step."""

import copy
import os
from pathlib import Path

import pytest
import torch
from tiny import make_model, tiny_store, two_ranks
from torch import nn

import deepcluster.methods  # noqa: F401
from deepcluster import dist
from deepcluster.losses import info_nce
from deepcluster.model import Centroids, Projector, ScaledCentroids, Standardised
from deepcluster.networks import Predicted, Queue, Teacher
from deepcluster.recipe import Recipe, make_recipe
from deepcluster.trainer import Training, fit

ANY = Recipe((3, 4), lambda z, y, clock: z.square().mean(), head=(Standardised, Projector))
KEYS = Recipe((5,), lambda z, y, clock: z.square().mean(), head=Projector)


def views(n, seed, count=2):
    rng = torch.Generator().manual_seed(seed)
    return [torch.rand(n, 1, 8, 8, generator=rng) for _ in range(count)]


def disturb(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)


# --- the teacher ---


def test_at_first_the_teacher_says_what_the_student_says():
    network = Teacher(make_model(ANY)).train()
    for z, k in zip(network(views(8, 0)), (3, 4), strict=True):
        assert z.shape == (4, 8, k)
        assert torch.equal(z[:2], z[2:])


def test_the_teacher_is_a_moving_average_over_training_steps_only():
    network = Teacher(make_model(ANY), momentum=0.75).train()
    expected = {key: p.detach().double() for key, p in network.model.named_parameters()}
    for step in range(3):
        disturb(network.model, step)
        network(views(8, step))
        for key, p in network.model.named_parameters():
            expected[key] = 0.75 * expected[key] + 0.25 * p.detach().double()
            torch.testing.assert_close(network.teacher.get_parameter(key), expected[key].float())
    before = copy.deepcopy(network.teacher.state_dict())
    disturb(network.model, 3)
    network.eval()(views(8, 3))
    assert all(torch.equal(v, before[key]) for key, v in network.teacher.state_dict().items())


@pytest.mark.parametrize(("momentum", "follows"), [(0.0, True), (1.0, False)])
def test_a_momentum_of_zero_copies_and_of_one_stays(momentum, follows):
    network = Teacher(make_model(ANY), momentum).train()
    before = copy.deepcopy(network.teacher.state_dict())
    disturb(network.model)
    network(views(8, 0))
    now, student = (dict(m.named_parameters()) for m in (network.teacher, network.model))
    assert all(torch.equal(now[key], student[key] if follows else before[key]) for key in now)


@pytest.mark.parametrize("momentum", [-0.1, 1.5])
def test_a_momentum_that_is_no_share_is_refused(momentum):
    with pytest.raises(ValueError, match=f"must be between 0 and 1; got {momentum}"):
        Teacher(make_model(ANY), momentum)


def test_the_teacher_moves_its_own_statistics():
    network = Teacher(make_model(ANY), momentum=1.0).train()
    disturb(network.model)
    network(views(8, 0))
    student, teacher = network.model.backbone[1], network.teacher.backbone[1]
    assert teacher.num_batches_tracked == student.num_batches_tracked == 1
    assert not torch.equal(teacher.running_mean, student.running_mean)
    alone = copy.deepcopy(network.teacher)
    alone.load_state_dict(make_model(ANY).state_dict())
    alone.train()(views(8, 0))
    assert torch.equal(teacher.running_mean, alone.backbone[1].running_mean)


def test_no_gradient_reaches_the_teacher_and_the_optimizer_does_not_know_it():
    network = Predicted(make_model(KEYS), hidden=7).train()
    z = network(views(8, 0))[0]
    z.square().sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in network.teacher.parameters())
    trained = [*network.model.parameters(), *network.predictors.parameters()]
    assert all(p.grad is not None for p in trained)
    known = Training().optimizer(network).param_groups[0]["params"]
    assert {id(p) for p in known} == {id(p) for p in trained}


def test_what_is_set_and_not_trained_is_taken_over_as_it_is():
    recipe = Recipe((3, 4), ANY.objective, head=(Centroids, nn.Linear))
    network = Teacher(make_model(recipe), momentum=0.9).train()
    with torch.no_grad():
        network.model.heads[0].weight.copy_(torch.eye(3, 32))
    network(views(8, 0))
    assert torch.equal(network.teacher.heads[0].weight, torch.eye(3, 32))


def test_the_teacher_keeps_the_layout_of_memory():
    model = make_model(ANY, channels=3).to(memory_format=torch.channels_last)
    teacher = Teacher(model).teacher
    assert teacher.backbone[0].weight.stride() == model.backbone[0].weight.stride()


# --- the predictor ---


def test_the_predictor_stands_on_the_students_side_only():
    network = Predicted(make_model(KEYS), hidden=7).train()
    plain, pair = Teacher(make_model(KEYS)).train(), views(8, 0)
    z, without = network(pair)[0], plain(pair)[0]
    assert torch.equal(z[2:], without[2:])
    predict = copy.deepcopy(network.predictors[0])
    torch.testing.assert_close(z[:2], predict(without[:2].flatten(0, 1)).view(2, 8, 5))
    assert [type(part) for part in predict] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert predict[0].weight.shape == (7, 5)


def test_the_predictor_does_not_depend_on_what_was_drawn_before_nor_change_what_is_drawn_after():
    model = make_model(KEYS)
    torch.manual_seed(1)
    first, drawn = Predicted(model), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), Predicted(model).parameters(), strict=True))


# --- the queue ---


def test_the_queue_follows_views_and_teacher_and_holds_what_was_there_before_the_batch():
    network = Queue(make_model(KEYS), length=20).train()
    history = torch.zeros(0, 5)
    for step in range(6):
        z = network(views(8, step))[0]
        assert z.shape == (2 + 2 + 3, 8, 5)  # 20 places in rows of 8
        queue = z[4:].flatten(0, 1)
        assert (queue[20:] == 0).all()
        filled = queue[(queue != 0).any(1)]
        assert sorted(filled.tolist()) == sorted(history[-20:].tolist())
        history = torch.cat([history, z[3].detach()])  # the teacher's last view
    assert network.next == 6 * 8 % 20
    torch.testing.assert_close(network.keys0.norm(dim=1), torch.ones(20))


def test_a_batch_longer_than_the_queue_leaves_its_last_keys():
    network = Queue(make_model(KEYS), length=6).train()
    for step in range(2):
        z = network(views(8, step))[0]
    assert z.shape == (5, 8, 5)
    assert sorted(network.keys0.tolist()) == sorted(z[3, 2:].tolist())


def test_evaluation_leaves_the_queue_as_it_is():
    network = Queue(make_model(KEYS), length=6).train()
    network(views(4, 0))
    keys, place = network.keys0.clone(), int(network.next)
    network.eval()(views(4, 1))
    assert torch.equal(network.keys0, keys)
    assert network.next == place == 4


def test_the_queue_may_change_before_the_backward_pass():
    network = Queue(make_model(KEYS), length=8).train()
    for step in range(3):
        z = network(views(8, step))[0]
        info_nce(z[0], z[3], z[4]).backward()
    assert network.model.backbone[0].weight.grad.abs().max() > 0


def test_every_head_has_a_queue_of_its_own_and_bfloat16_fits_in():
    recipe = Recipe((5, 3), KEYS.objective, head=Projector)
    network = Queue(make_model(recipe), length=8).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = network(views(4, 0))
    assert [z.shape for z in out] == [(6, 4, 5), (6, 4, 3)]
    assert network.keys0.dtype == network.keys1.dtype == torch.float32
    assert torch.equal(network.keys1[:4], out[1][3])


# --- two processes ---


def train_together(rank, port, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.setup("cpu")
    out, network = {}, Queue(make_model(KEYS), length=9).train()
    for step in range(2):  # 7 images: 3 here, 4 there
        lo, hi = dist.shard(7)
        network([v[lo:hi] for v in views(7, step)])
    out["ring"] = {"keys": network.keys0, "next": network.next}
    for name in ("moco", "byol", "pcl"):
        state = fit(make_model(make_recipe(name, n_clusters=3)), tiny_store(), make_recipe(name, n_clusters=3),
                    Training(epochs=2, batch_size=32, lr=0.01))  # fmt: skip
        out[name] = state.network.state_dict() | {"labels": state.targets.labels, "losses": state.head_losses}
    torch.save(out, folder / f"{rank}.pt")


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_hold_the_same_teacher_queue_predictor_and_centroids(tmp_path: Path):
    first, second = two_ranks(train_together, tmp_path)
    for name, values in first.items():
        for key, value in values.items():
            assert torch.equal(value, second[name][key]), f"{name}: {key}"
            assert value.isfinite().all(), f"{name}: {key}"
    assert first["ring"]["next"] == 14 % 9
    torch.testing.assert_close(first["ring"]["keys"].norm(dim=1), torch.ones(9))
    torch.testing.assert_close(first["moco"]["keys0"][:192].norm(dim=1), torch.ones(192))  # 6 batches of 32
    assert (first["moco"]["keys0"][192:] == 0).all()


# --- centroids with a concentration ---


def test_scaled_centroids_divide_cosines_of_standardised_features_by_phi_only_in_training():
    head, x = ScaledCentroids(6, 3), torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0)) * 3 + 5
    head.phi.data = torch.tensor([0.1, 0.2, 0.6])
    flat = x.flatten(0, 1)
    std = (flat - flat.mean(0)) / (flat.var(0, unbiased=False) + 1e-5).sqrt()
    cosines = (std / std.norm(dim=1, keepdim=True)) @ (head.weight / head.weight.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(head(x), (cosines / head.phi).view(2, 8, 3))
    head.norm.running_mean.copy_(flat.mean(0))
    head.norm.running_var.copy_(flat.var(0, unbiased=False))
    torch.testing.assert_close(head.eval()(flat), cosines / 0.3)
    assert not any(p.requires_grad for p in head.parameters())


def test_scaled_centroids_have_a_bounded_gradient_where_a_feature_is_the_mean():
    head, x = ScaledCentroids(6, 3).eval(), torch.ones(4, 6, requires_grad=True)
    head.norm.running_mean.fill_(1)
    head(x).sum().backward()
    assert 0 < x.grad.abs().max() < 1e4
