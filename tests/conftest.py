"""Fixtures shared by the tests of whole flows."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "SLIMING_TEST_GPU" not in os.environ:  # tests and all their children run on the CPU, always
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # pytest -n: share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // workers)))

# Before torch, which reads how its threads are to wait.
import sliming  # noqa: F401  # isort: skip

import pytest
import torch

from sliming.config import PRESETS
from sliming.model import SliME


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=300,
                     help="images and records that test_fuzz.py makes, each (300)")


def pytest_configure(config):
    """With pytest -n, which pytest-xdist brings: tests are begun in their order."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """The longest test is begun first."""
    items.sort(key=lambda item: item.name != "test_three_stages_reach_their_accuracy")


@pytest.fixture
def model() -> SliME:
    """The tiny preset before training, seeded, with gates that are not all equal."""
    torch.manual_seed(0)
    model = SliME.from_backbones(PRESETS["tiny"].model).eval()
    torch.nn.init.normal_(model.adapter.w_gate, std=0.2)
    return model
