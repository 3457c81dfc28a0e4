"""A random SAE and pairs of random token ids."""

import pytest
import torch

from fpo_core.data.batches import PairIds
from tests.fpo_core.workers import make_caches
from tests.tiny import save_sae


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    return save_sae(tmp_path_factory.mktemp("sae"))


@pytest.fixture(scope="session")
def caches(tmp_path_factory):
    """Model, SAE and the caches of eight pairs, for training."""
    return make_caches(tmp_path_factory.mktemp("caches"))


@pytest.fixture(scope="session")
def heldout_caches(tmp_path_factory):
    """The same with six more pairs, which are held out."""
    return make_caches(tmp_path_factory.mktemp("heldout_caches"), heldout=6)


@pytest.fixture(scope="module")
def pairs():
    generator = torch.Generator().manual_seed(3)

    def ids(count):
        return torch.randint(2, 400, (count,), generator=generator).tolist()

    return [PairIds(f"p{n}", ids(2 + n), ids(1 + n % 4), ids(1 + (3 * n) % 5)) for n in range(6)]
