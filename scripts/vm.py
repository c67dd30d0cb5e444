"""Runs the daemon and its guests for scripts/demo, scripts/bench-guest and tests/end_to_end.py.

Everything that is started here is stopped by pid when the `Run` ends, however it ends; a child also dies with us
if we are killed outright. Waits are for conditions (a line on the guest's serial port, an answer from the
daemon) and have deadlines; what fails names the log to read. Standard library only.
"""

import ctypes
import glob
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GUEST = os.path.join(REPO, "build", "guest")
SOCKET_PATH_MAX = 107  # sockaddr_un, less its terminating zero
KVM_PROBE_SECONDS = 8  # TCG boots the same guest in about 3 s: KVM that needs longer is no help
os.environ["PATH"] = os.pathsep.join([os.path.join(GUEST, "host", "usr", "bin"), os.environ["PATH"], "/usr/sbin", "/sbin"])


class Failed(Exception):
    """Something did not happen. `log` is the file whose end says why, if there is one."""

    def __init__(self, message, log=None):
        super().__init__(message)
        self.log = log


class Reported(Failed):
    """A guest has said itself what went wrong."""


_prctl = ctypes.CDLL(None).prctl  # looked up before any fork, where taking the loader's lock would not be safe


def _die_with_parent():
    _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: when the thread that forked ends, so fork in the main thread only


class Run:
    """One run: a directory for its files, and every process it has started. Use it with `with`."""

    def __init__(self, name):
        self.directory = os.path.join(REPO, "build", name)
        shutil.rmtree(self.directory, ignore_errors=True)
        os.makedirs(self.directory)
        self._processes = []
        self._scratch = None
        self.sockets = self.directory
        if len(os.path.join(self.directory, "a-volume-name.sock")) > SOCKET_PATH_MAX:
            self._scratch = self.sockets = tempfile.mkdtemp(prefix="bessel-")

    def __enter__(self):
        # A signal becomes an exception, so that it leaves through __exit__ like any failure.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: sys.exit(1))
        return self

    def __exit__(self, *_):
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def path(self, name):
        return os.path.join(self.directory, name)

    def socket(self, name):
        return os.path.join(self.sockets, name)

    def start(self, arguments, log, **options):
        """Starts a process whose standard error (and output, unless `options` takes it) is appended to `log`."""
        with open(log, "ab") as sink:
            options = {"stdin": subprocess.DEVNULL, "stdout": sink, **options}
            process = subprocess.Popen(arguments, stderr=sink, preexec_fn=_die_with_parent, **options)
        self._processes.append(process)
        return process


def wait_until(condition, seconds, what, log=None, every=0.02):
    """Polls until `condition()` is true; returns its value."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Failed(f"{what}: not within {seconds} s", log)
        time.sleep(every)


class Daemon:
    """`bessel serve` on a store file in the run's directory, or on a block device that has a size of its own
    (`store_size` None), and the command line that talks to it."""

    def __init__(self, run, program, volumes, store=None, store_size="8GiB"):
        self._run, self._program = run, program
        self.log = run.path("daemon.log")
        self.api = run.socket("api.sock")
        self.store = store or run.path("store.img")
        self.config = run.path("bessel.yaml")
        core = max(os.sched_getaffinity(0))
        lines = ["store:", f"  device: {self.store}"] + ([f"  size: {store_size}"] if store_size else [])
        lines += ["reactors:", f"  cores: [{core}]", "  poll: adaptive", "api:", f"  socket: {self.api}", "volumes:"]
        for name, size in volumes.items():
            lines += [f"  - name: {name}", f"    size: {size}", f"    socket: {run.socket(name + '.sock')}", "    queues: 2"]
        with open(self.config, "w") as config:
            config.write("\n".join(lines) + "\n")
        self.process = None

    def volume_socket(self, name):
        return self._run.socket(name + ".sock")

    def start(self, seconds=30):
        self.process = self._run.start([self._program, "serve", "--config", self.config], self.log)

        def answers():
            if self.process.poll() is not None:
                raise Failed(f"the daemon ended with status {self.process.returncode}", self.log)
            return self.run_command("volume", "list").returncode == 0

        wait_until(answers, seconds, "the daemon answers", self.log, every=0.05)

    def kill(self):
        """SIGKILL: no chance to tidy up."""
        self.process.kill()
        self.process.wait()

    def stop(self, seconds=30):
        """SIGTERM: shuts down in order. Returns the exit status."""
        self.process.terminate()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"the daemon did not stop within {seconds} s of SIGTERM", self.log) from None

    def run_command(self, *arguments):
        return subprocess.run([self._program, *arguments, "--json", "--api", self.api], stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=60, check=False)

    def command(self, *arguments):
        """Runs a subcommand; returns what it printed, parsed."""
        done = self.run_command(*arguments)
        if done.returncode != 0:
            words = " ".join(arguments)
            raise Failed(f"`bessel {words}` exited {done.returncode}: {done.stderr.strip()}", self.log)
        return json.loads(done.stdout) if done.stdout.strip() else None


class Machine:
    """A virtual machine that reports on its standard output, in lines `BESSEL: EVENT KEY=VALUE ...`.

    `log` is what the program that runs it says, `console` what its guest says beside the reports.
    """

    def __init__(self, run, name, arguments, log, console=None):
        self.name, self.log = name, log
        self.events = queue.Queue()
        self._transcript = open(run.path(f"{name}.events.log"), "w")
        self.console = console or self._transcript.name
        self.process = run.start(arguments, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            line = line.decode(errors="replace").strip()
            # Cut, because what fio has measured comes as one line of some thousand characters.
            print(f"{time.monotonic():.3f} {line[:160]}", file=self._transcript, flush=True)
            # Only whole lines count: one cut short by a kill acknowledges nothing.
            if line.startswith("BESSEL: "):
                event, _, rest = line[len("BESSEL: "):].partition(" ")
                fields = {} if event == "failed" else dict(pair.split("=", 1) for pair in rest.split() if "=" in pair)
                self.events.put((event, fields, rest))
        self.events.put(("end", {}, ""))

    def send(self, line):
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def next_event(self, seconds):
        """The next report as (event, fields). A failure in the guest, or its end, is an exception."""
        try:
            event, fields, rest = self.events.get(timeout=max(seconds, 0))
        except queue.Empty:
            raise Failed(f"guest {self.name} said nothing for too long", self.console) from None
        if event == "failed":
            raise Reported(f"guest {self.name}: {rest}", self._transcript.name)
        if event == "end":
            raise Failed(f"guest {self.name} ended before it was done", self.log if os.path.getsize(self.log) else self.console)
        return event, fields

    def wait_for(self, wanted, seconds, on_event=lambda event, fields: None):
        """Waits for an event; gives every event up to it, and it, to `on_event`."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                event, fields = self.next_event(deadline - time.monotonic())
            except Reported:
                raise
            except Failed as failure:
                raise Failed(f"{failure}; it was to say `{wanted}` within {seconds} s", failure.log) from None
            on_event(event, fields)
            if event == wanted:
                return fields

    def catch_up(self):
        """Drops what the guest has reported so far. A failure among it, or its end, is an exception."""
        while not self.events.empty():
            self.next_event(0)

    def kill(self):
        """SIGKILL; then everything the guest had said is in `events`."""
        self.process.kill()
        self.finish()

    def finish(self, seconds=30):
        """Waits for the machine to have powered itself off."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"guest {self.name} did not power off", self.console) from None
        self._reader.join()


class Guest(Machine):
    """A guest under QEMU with a disk for each of the sockets `disks`, doing one job of scripts/guest-init.

    `devices` are more arguments for QEMU, `words` more for the guest's kernel.
    """

    def __init__(self, run, name, accelerator, job, *disks, reconnect=False, devices=(), words=(), **parameters):
        kernels = glob.glob(os.path.join(GUEST, "kernel", "boot", "vmlinuz-*"))
        if not kernels:
            raise Failed("there is no guest kernel in build/guest; run scripts/setup first")
        console = run.path(f"{name}.console.log")
        words = ["console=ttyS0", "quiet", "loglevel=4", "panic=-1", "random.trust_cpu=on", f"bessel.job={job}", *words]
        words += [f"bessel.{key}={value}" for key, value in parameters.items()]
        # rdrand, because mke2fs waits for random numbers, which an emulated machine without it takes seconds to gather.
        arguments = ["qemu-system-x86_64", "-machine", "pc,usb=off", "-accel", accelerator, "-smp", "2", "-m", "512M",
                     "-cpu", "host" if accelerator == "kvm" else "qemu64,+rdrand",
                     "-object", "memory-backend-memfd,id=mem,size=512M,share=on", "-numa", "node,memdev=mem",
                     "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                     "-kernel", kernels[0],
                     "-initrd", os.path.join(GUEST, "initramfs.cpio"), "-append", " ".join(words),
                     "-serial", f"file:{console}", "-serial", "stdio", *devices]
        for number, disk in enumerate(disks):
            arguments += ["-chardev", f"socket,id=c{number},path={disk}" + (",reconnect=1" if reconnect else ""),
                          "-device", f"vhost-user-blk-pci,chardev=c{number},num-queues=2"]
        super().__init__(run, name, arguments, run.path(f"{name}.qemu.log"), console)

    def check_files(self, seconds=120):
        """Follows the job `check` (or the end of `smoke`) to its end; returns {file name: checksum}."""
        files = {}
        self.wait_for("done", seconds, lambda event, fields: files.update({fields["name"]: fields["sum"]}) if event == "file" else None)
        self.finish()
        return files


def choose_accelerator(run):
    """KVM if a guest truly boots with it, else TCG: `/dev/kvm` that opens is no proof. Returns (name, reason)."""
    if "BESSEL_ACCEL" in os.environ:
        return os.environ["BESSEL_ACCEL"], "BESSEL_ACCEL says so"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg", "/dev/kvm cannot be opened here"
    guest = Guest(run, "kvm-probe", "kvm", "probe")
    try:
        guest.wait_for("ready", KVM_PROBE_SECONDS)
        return "kvm", "a guest boots with it"
    except Failed:
        return "tcg", f"/dev/kvm opens, but a guest did not boot with it within {KVM_PROBE_SECONDS} s"
    finally:
        guest.kill()


def file_system_of(path):
    best = ("", "?")
    with open("/proc/self/mounts") as mounts:
        for line in mounts:
            _, point, kind, *_ = line.split()
            if (path + "/").startswith(point.rstrip("/") + "/") and len(point) > len(best[0]):
                best = (point, kind)
    return best[1]


def processor():
    with open("/proc/cpuinfo") as info:
        name = re.search(r"model name\s*: (.*)", info.read())
    return f"{len(os.sched_getaffinity(0))} cores, {name.group(1) if name else 'unknown CPU'}"


def show_failure(failure):
    """Says what went wrong and shows the end of the log that should say why."""
    print(f"\nFAILED: {failure}", file=sys.stderr)
    log = getattr(failure, "log", None)
    if log and os.path.exists(log):
        with open(log, errors="replace") as lines:
            tail = lines.readlines()[-20:]
        print(f"the end of {os.path.relpath(log)}:", file=sys.stderr)
        for line in tail:
            print(f"  | {line.rstrip()}", file=sys.stderr)
