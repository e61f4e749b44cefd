"""PFedCLR: the personal matrix by hand, one client against autograd, and uploads that do not depend on it."""

from dataclasses import replace

import torch
from tests.methods.federated.test_family import simulator

from perfedrec.core.keys import Key

SMALL = ("model.embedding_dim=6", "buffer.rank=2", "buffer.weight=0.5", "client.learning_rate=0.7")


def test_the_calibrated_vector_by_hand() -> None:
    """``B p = 5 + 12 = 17``, and ``p + A 17 = (1, 2) + (51, 68)``."""
    algorithm = simulator("pfedclr", 0, "model.embedding_dim=2", "buffer.rank=1").algorithm
    private = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    assert algorithm.calibrated(private).tolist() == [[52.0, 70.0]]
    first = algorithm.init_private(torch.arange(4))
    assert torch.equal(algorithm.calibrated(first), first[:, :2])  # B is 0
    assert bool(first[:, 2:4].all())


def test_a_client_against_autograd() -> None:
    """Two local steps with user vector, ``A``, ``B`` and item vectors as separate leaves."""
    here = simulator("pfedclr", 0, *SMALL, "client.local_steps=2", "client.user_learning_rate=0.05")
    users = here.population.offsets.diff().argmax()[None]
    rows, positions = here.population.rows(users)
    client_state = here.population.load_client_states(users, positions)
    own = torch.randn(1, 30, generator=torch.Generator().manual_seed(1))
    client_state = replace(client_state, private=own)
    sent, after = here.algorithm.client(
        "train", here.algorithm.broadcast(here.state, users), rows, client_state, Key(1)
    )

    received = here.state.items[sent.items]
    shared = received.clone().requires_grad_()
    vector, left, right = (each.clone().requires_grad_() for each in own[0].split([6, 12, 12]))
    signs = torch.where(torch.arange(sent.items.numel()) < rows.items.numel(), -1.0, 1.0)
    private, public = torch.optim.Adam([vector, left, right], lr=0.05), torch.optim.SGD([shared], lr=0.7)
    for _ in range(2):
        matrix = left.view(6, 2) @ right.view(2, 6)
        plain = torch.nn.functional.softplus(signs * (shared @ vector)).sum()
        personal = torch.nn.functional.softplus(signs * ((received + received @ matrix) @ vector)).sum()
        private.zero_grad()
        public.zero_grad()
        (plain + 0.5 * personal).backward()
        private.step()
        public.step()
    torch.testing.assert_close(sent.deltas, (shared - received).detach(), rtol=0, atol=1e-5)
    expected = torch.cat([each.detach() for each in (vector, left, right)])
    torch.testing.assert_close(after.private[0], expected, rtol=0, atol=1e-5)


def test_an_upload_does_not_depend_on_the_personal_matrix() -> None:
    here = simulator("pfedclr", 5, *SMALL, "client.local_steps=1")
    users = torch.arange(80)
    rows, positions = here.population.rows(users)
    client_state, broadcast = (
        here.population.load_client_states(users, positions),
        here.algorithm.broadcast(here.state, users),
    )
    private = client_state.private.clone()
    private[:, 6:] += 1
    uploads, scores = [], []
    for each in (client_state, replace(client_state, private=private)):
        sent, after = here.algorithm.client("train", broadcast, rows, each, Key(1))
        uploads.append(sent.deltas)
        scores.append(here.algorithm.scores(broadcast, rows, after))
    assert torch.equal(*uploads)
    assert not torch.allclose(*scores)
