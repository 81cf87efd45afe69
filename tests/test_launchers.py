"""Whether a process is one of several: by flags, by a launcher's variables, and for a TPU by what describes it."""

import http.server
import os
import subprocess
import sys
import threading
import time

import pytest
import servers

from ti_jax.config import TrainConfig
from ti_jax.errors import InputError
from ti_jax.training import launchers
from ti_jax.training.launchers import Launch, find_launch, read_metadata

AUTO = TrainConfig()
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}


def never(name):
    raise AssertionError(f"{name} was asked for")


@pytest.fixture
def tpu(tmp_path, monkeypatch):
    """A /dev with a TPU chip, and a libtpu that can be found."""
    package = tmp_path / "packages" / "libtpu"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(package.parent)
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "0").touch()
    launchers._described.cache_clear()
    return tmp_path


@pytest.mark.parametrize(
    ("environment", "settings", "expected"),
    [
        ({}, {}, False),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, {}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, {"distributed": "never"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2"}, {}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, {}, False),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, {}, True),
        ({}, {"coordinator_address": "a:1"}, True),
        ({}, {"distributed": "always"}, True),
        (TORCHRUN | {"MASTER_PORT": "29500"}, {}, True),
        (TORCHRUN | {"MASTER_PORT": "29500"}, {"distributed": "never"}, False),
        ({"RANK": "0", "WORLD_SIZE": "1"}, {}, False),
        ({"WORLD_SIZE": "2"}, {}, False),  # scripts for Slurm export it for their own use
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, {}, False),  # accelerate, for one process
    ],
)
def test_when_there_are_others(tmp_path, environment, settings, expected):
    launch = find_launch(TrainConfig(**settings), environment, tmp_path, never)
    assert (launch is not None) is expected


def test_flags_and_jax_variables():
    environment = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    launch = find_launch(AUTO, environment)
    assert (launch.coordinator_address, launch.num_processes, launch.process_id) == ("a:1", 4, 3)
    launch = find_launch(TrainConfig(coordinator_address="b:2", num_processes=2, process_id=0), environment)
    assert (launch.coordinator_address, launch.num_processes, launch.process_id) == ("b:2", 2, 0)
    with pytest.raises(InputError, match="JAX_PROCESS_ID is 'x'"):
        find_launch(AUTO, environment | {"JAX_PROCESS_ID": "x"})


def test_torchrun_says_who_and_where():
    def launch(**changes):
        return find_launch(AUTO, TORCHRUN | {"MASTER_PORT": "29500"} | changes)

    evidence = "torchrun or accelerate has started 2 processes"
    assert launch() == Launch(evidence, f"localhost:{61440 + 829}", 2, 1, (1,), complete=True)
    # One process a host has all its GPUs.
    assert launch(LOCAL_WORLD_SIZE="1", LOCAL_RANK="0").local_device_ids is None
    assert launch(JAX_COORDINATOR_PORT="1234").coordinator_address == "localhost:1234"
    assert launch(MASTER_ADDR="::1", JAX_COORDINATOR_PORT="1234").coordinator_address == "[::1]:1234"
    # Slurm may have started torchrun itself, once a host.
    assert launch(SLURM_STEP_NUM_TASKS="2") == launch()
    for port in (1, 29500, 61440, 65535):
        other = int(launch(MASTER_PORT=str(port)).coordinator_address.rpartition(":")[2])
        assert other != port and 1024 < other < 65536


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_a_launcher_that_does_not_say_where_is_refused(missing):
    environment = TORCHRUN | {"MASTER_PORT": "29500"}
    del environment[missing]
    with pytest.raises(InputError, match="one of several processes, but MASTER_ADDR and MASTER_PORT do not say"):
        find_launch(AUTO, environment)


@pytest.mark.parametrize(
    ("environment", "hosts"),
    [
        ({"TPU_PROCESS_ADDRESSES": "local"}, 1),  # Kaggle
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),  # Colab, and one host of Kubernetes
        ({"TPU_WORKER_HOSTNAMES": ""}, 1),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, 2),
        ({"TPU_WORKER_HOSTNAMES": "a", "TPU_PROCESS_ADDRESSES": "a:1,b:1"}, 2),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, 2),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"}, 4),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "1"}, 1),
        ({"TPU_SKIP_MDS_QUERY": "1"}, 1),
        ({"JAX_PLATFORMS": "cpu"}, 1),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, 1),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "tpu,cpu"}, 2),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": ""}, 2),
    ],
)
def test_hosts_of_a_tpu_by_its_variables(tpu, environment, hosts, capfd):
    launch = find_launch(AUTO, environment, tpu, never)
    expected = None if hosts == 1 else Launch(f"this TPU slice has {hosts} hosts")
    assert launch == expected
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("attributes", "hosts"),
    [
        ({}, 1),
        ({"worker-network-endpoints": "10.0.0.1"}, 1),
        ({"worker-network-endpoints": "unknown:unknown:10.0.0.1"}, 1),
        ({"worker-network-endpoints": "a:0:10.0.0.1,b:1:10.0.0.2"}, 2),
        ({"worker-network-endpoints": "10.0.0.1", "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n"}, 2),
        ({"worker-network-endpoints": "10.0.0.1", "tpu-env": "ZONE: 'z'\n"}, 1),
    ],
)
def test_hosts_of_a_tpu_by_the_metadata_server(tpu, attributes, hosts):
    launch = find_launch(AUTO, {}, tpu, attributes.get)
    assert launch == (None if hosts == 1 else Launch(f"this TPU slice has {hosts} hosts"))


def test_a_tpu_without_a_metadata_server_trains_alone_and_says_so(tpu, capfd):
    def unreachable(name):
        raise TimeoutError("none within 5 s")

    for _ in range(2):
        assert find_launch(AUTO, {}, tpu, unreachable) is None
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "none within 5 s" in told and "devices alone (--distributed always" in told
    # Whoever says that there are others is believed.
    assert find_launch(TrainConfig(distributed="always"), {}, tpu, unreachable) is not None


class Metadata(http.server.BaseHTTPRequestHandler):
    """Answers as `answer` says: (status, seconds to wait)."""

    def do_GET(self):
        status, wait = self.server.answers.pop(0)
        time.sleep(wait)
        self.send_response(status)
        if self.headers["Metadata-Flavor"] == "Google" and self.server.flavoured:
            self.send_header("Metadata-Flavor", "Google")
        self.end_headers()
        self.wfile.write(f"value of {self.path}".encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    server = servers.Server(("127.0.0.1", 0), Metadata)
    server.daemon_threads, server.block_on_close, server.flavoured = True, False, True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    # A proxy would never see the link-local server.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_metadata_server_is_read(server):
    server.answers = [(200, 0), (404, 0), (503, 0), (200, 0)]
    assert read_metadata("tpu-env") == "value of /computeMetadata/v1/instance/attributes/tpu-env"
    assert read_metadata("other") is None
    assert read_metadata("tpu-env").startswith("value")  # after a second try
    assert not server.answers


def test_another_server_of_that_name_is_not_believed(server):
    server.flavoured, server.answers = False, [(200, 0)]
    with pytest.raises(OSError, match="is another server"):
        read_metadata("tpu-env")


def test_a_metadata_server_that_does_not_answer_costs_a_moment(server):
    server.answers = [(200, 3)]
    start = time.monotonic()
    with pytest.raises(OSError):
        read_metadata("tpu-env", 0.3)
    assert time.monotonic() - start < 2


def test_used_before_several_processes_is_refused(tmp_path):
    """JAX has its devices already, as in a notebook; alone that is no matter, as one of several it is."""
    program = (
        "import jax; jax.devices(); import ti_jax; from ti_jax.training import multihost\n"
        "multihost.join(ti_jax.TrainConfig()); print('alone', flush=True)\n"
        "import os; os.environ.update(RANK='0', WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT='29500')\n"
        "multihost.join(ti_jax.TrainConfig())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.stdout == "alone\n", done.stderr
    *_, last = done.stderr.splitlines()
    assert "has started 2 processes, but JAX was used in this process before" in last
    assert "restart the kernel" in last and "--distributed never" in last
