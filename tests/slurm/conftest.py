"""A throw-away Slurm cluster on loopback: munge,
a controller and virtual nodes in one temporary folder.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CONF = """ClusterName={name}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
ReturnToService=1
SlurmdTimeout=10
KillWait=5
MinJobAge=86400
FirstJobId={first}
PreemptType={preempt}
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE State=UP
{partitions}
"""
PARTITIONS = """PartitionName=low Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=15
PartitionName=low_at_once PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=low_cancel PriorityTier=1 PreemptMode=CANCEL GraceTime=0
PartitionName=high PriorityTier=10 PreemptMode=OFF"""
NODE = (
    "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Boards=1 "
    "SocketsPerBoard=2 CoresPerSocket={cores} ThreadsPerCore=1 RealMemory={memory_mb} {features} "
    "State=UNKNOWN"
)
DIE_WITH_US = ["setpriv", "--pdeathsig", "KILL", "--"]
NAMESPACES = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
ENTER = [
    "sh",
    "-c",
    'mount --bind "$1/hosts" /etc/hosts && hostname "$2" && shift 2 && exec "$@"',
    "sh",
]
FOREIGN = ("SLURM", "SBATCH", "SRUN", "SUBMITIT")


def find_daemon(name: str) -> str | None:
    """A daemon's path; distributions keep it in a folder that is often not on PATH."""
    return shutil.which(
        name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    )


@dataclass(frozen=True)
class Shape:
    """What a cluster pretends to have. Its first partition is the usual one."""

    nodes: int = 2
    gpus_per_node: int = 8
    # Nodes without GPUs, named c0, c1.
    cpu_nodes: int = 0
    cpus_per_node: int = 64
    memory_mb: int = 500_000
    partitions: str = PARTITIONS
    preempt: str = "preempt/partition_prio\nPreemptMode=REQUEUE"


class Cluster:
    """Daemons of one cluster.
    A node has its own host name and processes where namespaces are allowed.
    Takes the fields of a shape.
    """

    def __init__(self, **fields: Any) -> None:
        shape = Shape(**fields)
        self.shape = shape
        self.partition = shape.partitions.split()[0].removeprefix("PartitionName=")
        self.root = Path(
            tempfile.mkdtemp(prefix="slurm-", dir="/tmp")
        )  # munge's socket path must be short
        self.root.chmod(0o755)
        self.nodes = [f"n{i}" for i in range(shape.nodes)]
        self.nodes += [f"c{i}" for i in range(shape.cpu_nodes)]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        # Daemons end with the thread that started them (`DIE_WITH_US`), so one thread starts all.
        self.starter = ThreadPoolExecutor(1)
        self.user = pwd.getpwuid(os.geteuid()).pw_name
        self.namespaces = subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode == 0
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
        self.env["SLURM_CONF"] = str(self.root / "slurm.conf")
        self._write()

    def _write(self) -> None:
        root = self.root
        for name in ("munge", "state", "spool", "log", "dev"):
            (root / name).mkdir(mode=0o755)
        (root / "munge/key").touch(0o600)
        (root / "munge/key").write_bytes(os.urandom(128))
        last = self.shape.gpus_per_node - 1
        for index in range(last + 1):
            (root / f"dev/nvidia{index}").symlink_to("/dev/null")
        (root / "gres.conf").write_text(
            "AutoDetect=off\n"
            f"NodeName=n[0-{self.shape.nodes - 1}] Name=gpu Type=a100 "
            f"File={root}/dev/nvidia[0-{last}]\n"
        )
        (root / "hosts").write_text(f"127.0.0.1 localhost {' '.join(self.nodes)}\n")
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(len(self.nodes) + 1)]
        ports = [held.getsockname()[1] for held in sockets]
        for held in sockets:
            held.close()
        with_gpus = f"Gres=gpu:a100:{self.shape.gpus_per_node} Feature=a100,a100_80g"
        nodes = "\n".join(
            NODE.format(
                name=name,
                port=port,
                cpus=self.shape.cpus_per_node,
                cores=self.shape.cpus_per_node // 2,
                memory_mb=self.shape.memory_mb,
                features=with_gpus if name.startswith("n") else "Feature=no_gpu",
            )
            for name, port in zip(self.nodes, ports[1:], strict=True)
        )
        (root / "slurm.conf").write_text(
            CONF.format(
                root=root,
                name=root.name,
                port=ports[0],
                first=1000 + ports[0],
                nodes=nodes,
                user=self.user,
                partitions=self.shape.partitions,
                preempt=self.shape.preempt,
            )
        )

    def start(self, timeout_s: float = 60) -> None:
        """Start everything and wait until every node is idle."""
        munge, end = self.root / "munge", time.monotonic() + timeout_s
        files = (f"--{name}-file={munge}/{name}" for name in ("key", "log", "pid", "seed"))
        self._spawn("munged", "--foreground", f"--socket={munge}/socket", *files)
        self._until(lambda: (munge / "socket").exists(), end)
        self.start_controller()
        for name in self.nodes:
            self.start_node(name)
        self._until(self.is_idle, end)

    def is_idle(self) -> bool:
        """Whether all nodes wait for work."""
        found = self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False).stdout.splitlines()
        return sorted(set(found)) == sorted(f"{name} idle" for name in self.nodes)

    def describe(self) -> str:
        """Queue, nodes with Slurm's reasons, and the end of the controller's log, for messages."""
        said = [
            self.run(*command, check=False).stdout
            for command in (
                ["squeue", "-o", "%i %P %j %T %r %N"],
                ["sinfo", "-N", "-o", "%N %T %E"],
            )
        ]
        dead = [name for name, process in self.processes.items() if process.poll() is not None]
        logs = [self.root / "log" / name for name in ("slurmctld.log", "slurmctld.out")]
        ends = [log.read_text(errors="replace")[-2000:] for log in logs if log.exists()]
        return "\n".join([*said, f"ended: {dead}", *ends])

    def recover(self, timeout_s: float = 120) -> None:
        """All nodes idle again after whatever a test did: jobs cancelled, nodes resumed,
        or a fresh start.
        """
        self.run("scancel", "-u", self.user, check=False)
        end = time.monotonic() + timeout_s
        while not self.is_idle():
            if time.monotonic() > end:
                warnings.warn(f"Slurm is started afresh:\n{self.describe()}", stacklevel=2)
                self.stop_daemons()
                shutil.rmtree(self.root / "state")
                (self.root / "state").mkdir(mode=0o755)
                self.start()
                return
            for name in self.nodes:
                self.run("scontrol", "update", f"NodeName={name}", "State=RESUME", check=False)
            time.sleep(0.5)

    def start_controller(self, *, forget: bool = False) -> None:
        """Start slurmctld; also again, after `kill`. `forget`: without the jobs it knew."""
        self._spawn("slurmctld", "-D", *(["-c"] if forget else []))

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node; also again, after `kill`."""
        self._spawn(
            "slurmd",
            "-D",
            "-N",
            name,
            wrap=[*NAMESPACES, *ENTER, str(self.root), name] if self.namespaces else [],
            label=name,
        )

    def kill(self, name: str) -> None:
        """Kill -9 a daemon; a node in namespaces takes all its processes along."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def stop_controller(self) -> None:
        """SIGTERM slurmctld, which saves its state, and wait for its end."""
        process = self.processes.pop("slurmctld")
        process.terminate()
        process.wait(20)

    def configure(self, old: str, new: str) -> None:
        """Replace a line of slurm.conf and have the daemons read it."""
        path = self.root / "slurm.conf"
        assert old in path.read_text(), old
        path.write_text(path.read_text().replace(old, new))
        self.run("scontrol", "reconfigure")

    def _until(self, true: Callable[[], bool], end: float) -> None:
        while not true():
            dead = [name for name, process in self.processes.items() if process.poll() is not None]
            if dead or time.monotonic() > end:
                raise RuntimeError(f"Slurm did not start, dead: {dead}; see {self.root}/log")
            time.sleep(0.05)

    def _spawn(
        self, daemon: str, *arguments: str, wrap: list[str] | None = None, label: str = ""
    ) -> None:
        name = label or daemon
        command = [*DIE_WITH_US, *(wrap or []), find_daemon(daemon), *arguments]
        with open(self.root / "log" / f"{name}.out", "ab") as log:
            self.processes[name] = self.starter.submit(
                subprocess.Popen, command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self.env, cwd=self.root, start_new_session=True,
            ).result()  # fmt: skip

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a client command against this cluster."""
        return subprocess.run(
            command, env=self.env, check=check, text=True, capture_output=True, timeout=60
        )

    def job(self, job_id: str) -> dict[str, str]:
        """What the controller says about a job; empty once it has forgotten it."""
        out = self.run("scontrol", "-o", "show", "job", job_id, check=False).stdout
        return dict(part.split("=", 1) for part in out.split() if "=" in part)

    def stop_daemons(self) -> None:
        """Stop nodes, then the controller, then munge, and whatever they left running."""
        for name in reversed(list(self.processes)):
            process = self.processes.pop(name)
            if name in self.nodes and self.namespaces:
                process.kill()
            else:
                process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._kill_orphans()

    def stop(self) -> None:
        """Stop everything and remove the folder."""
        self.stop_daemons()
        shutil.rmtree(self.root, ignore_errors=True)

    def _kill_orphans(self) -> None:
        mark = f"SLURM_CONF={self.env['SLURM_CONF']}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                marked = mark in (folder / "environ").read_bytes().split(b"\0")
                if marked and int(folder.name) != os.getpid():
                    os.kill(int(folder.name), signal.SIGKILL)


@contextlib.contextmanager
def start_cluster(**fields: Any) -> Iterator[Cluster]:
    """A running cluster, where Slurm is installed."""
    missing = [
        name for name in ("slurmctld", "slurmd", "munged", "sbatch") if find_daemon(name) is None
    ]
    if missing:
        pytest.skip(f"no Slurm on this machine: {', '.join(missing)} not installed")
    cluster = Cluster(**fields)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    """Two nodes with eight pretended GPUs each, for the whole session."""
    with start_cluster() as cluster:
        yield cluster


@pytest.fixture
def shaped_cluster(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cluster]:
    """A cluster for one test, of the shape that is its indirect parameter."""
    choose_no_other_cluster(monkeypatch)
    with start_cluster(**request.param) as cluster:
        monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
        yield cluster


def choose_no_other_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove what the environment says of a cluster that this machine may belong to."""
    for key in list(os.environ):
        if key.startswith(FOREIGN):
            monkeypatch.delenv(key)


@pytest.fixture
def slurm_cluster(shared_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The shared cluster, selected by the environment;
    what an earlier test left of it is put right.
    """
    choose_no_other_cluster(monkeypatch)
    monkeypatch.setenv("SLURM_CONF", shared_cluster.env["SLURM_CONF"])
    shared_cluster.recover()
    return shared_cluster
