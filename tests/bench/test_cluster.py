"""Cells on a real Ray cluster of two nodes."""

import pathlib
import sys

import pytest

from minimand.bench import Store, run

ray = pytest.importorskip("ray", reason="Ray has no build for this Python")
from ray.cluster_utils import Cluster  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import toy  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each; the driver's modules are importable on both."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    folder = str(pathlib.Path(__file__).parent)
    ray.init(address=nodes.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": folder}})
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def numbers(results):
    return {(cell.contender, cell.seed): (cell.outcome.metrics, cell.outcome.curves) for cell in results.cells}


def test_two_nodes_give_the_bits_of_one_process(cluster, tmp_path):
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    with Store(tmp_path / "store.sqlite") as store:
        remote = run(toy.study(seeds=10), store=store, engine="ray")
        assert len(store) == 30
        assert numbers(remote) == numbers(run(toy.study(seeds=10), jobs=1))
        again = run(toy.study(seeds=10), store=store, engine="ray")
    assert [cell.seconds for cell in again.cells] == [cell.seconds for cell in remote.cells]


def test_a_failing_cell_is_reported_from_afar(cluster):
    results = run(toy.failing(), engine="ray")
    assert len(results.cells) == 5
    assert results.failures[0].error == "ZeroDivisionError: on purpose"
