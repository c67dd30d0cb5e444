"""Runs the daemon inside a guest under QEMU, on disks that this machine need not have, and loads it there.

The guest brings the programs as a tar archive on its first disk, so that neither its image nor the other guests, which
boot from the same one, carry them. It runs what the host sends, line by line (the job `commands` of
scripts/guest-init); what the daemon logs is in the guest's console log.
"""

import base64
import json
import os
import re
import shlex
import subprocess
import tarfile

import vm

API = "/run/bessel/api.sock"  # where the command line looks by itself
CONFIG = "/run/bessel.yaml"
DISK_BYTES = 512 << 20  # sparse, and several times what tests write in one life after another
QUEUES = 2  # a volume with several is served by all reactors
COMMAND_SECONDS = 120  # for the longest, a load; emulated and on a busy machine it takes some seconds


class CommandedGuest(vm.Guest):
    """A guest that has `programs`, {name: path here}, does what it is told, and has a scratch disk for each of `disks`:
    QEMU's name for such a device, with its properties."""

    def __init__(self, run, name, accelerator, programs, disks, words=()):
        archive = run.path(f"{name}.tar")
        _pack(archive, programs)
        self._files = [archive]
        devices = _drive("programs", archive, "readonly=on") + ["-device", "virtio-blk-pci,drive=programs"]
        for number, device in enumerate(disks):
            file = run.path(f"{name}-{number}.img")
            with open(file, "wb") as disk:
                disk.truncate(DISK_BYTES)
            self._files.append(file)
            # unsafe: kills of a process are survived here, not power cuts, so no flush need reach this machine's disk.
            devices += _drive(f"scratch{number}", file, "cache=unsafe") + ["-device", f"{device},drive=scratch{number}"]
        super().__init__(run, name, accelerator, "commands", devices=devices, words=words)
        self.wait_for("disk", 60)

    def attempt(self, line, seconds=COMMAND_SECONDS):
        """Runs a line of shell; returns its status and what it printed."""
        self.send(line)
        try:
            ran = self.wait_for("ran", seconds)
        except vm.Failed as failure:
            raise vm.Failed(f"{failure}, having been sent `{line}`", failure.log) from failure
        return int(ran["status"]), base64.b64decode(ran["base64"]).decode(errors="replace")

    def command(self, line, seconds=COMMAND_SECONDS):
        """Runs a line of shell, which must succeed; returns what it printed."""
        status, output = self.attempt(line, seconds)
        self.expect(status == 0, f"`{line}` exited {status}: {output.strip()[-500:]}")
        return output

    def queue_attribute(self, disk, name):
        """What the guest's kernel says of a disk's queue. Waits for the disk, which may be found late."""
        file = f"/sys/block/{os.path.basename(disk)}/queue/{name}"

        def found():
            return self.attempt(f"[ -b {disk} ] && [ -e {file} ]")[0] == 0

        vm.wait_until(found, 60, f"the guest finds {disk}", self.console, every=0.05)
        return self.command(f"cat {file}").strip()

    def expect(self, condition, message):
        if not condition:
            raise vm.Failed(f"guest {self.name}: {message}", self.console)

    def end(self):
        """Ends the guest in order, and removes its disks."""
        self.send("end")
        self.wait_for("done", 60)
        self.finish()
        for file in self._files:
            os.remove(file)


class GuestDaemon:
    """`bessel serve` in the guest on its block device `device`, with a reactor on each core, and what talks to it.

    `volumes` are {name: bytes}. All loads verify.
    """

    def __init__(self, guest, device, volumes):
        self._guest, self._device, self._bytes = guest, device, volumes
        guest.command(f"bessel format {device}")

    def start(self, io_poll="on", poll="adaptive"):
        # JSON, because it is YAML that fits a line.
        configuration = json.dumps({
            "store": {"device": self._device, "node_cache": "8MiB", "io_poll": io_poll}, "reactors": {"cores": [0, 1], "poll": poll},
            "api": {"socket": API},
            "volumes": [{"name": name, "size": size, "queues": QUEUES} for name, size in self._bytes.items()]})
        self._guest.command(f"mkdir -p {os.path.dirname(API)} && echo {shlex.quote(configuration)} >{CONFIG}")
        self._guest.command(f"bessel serve --config {CONFIG} >/dev/ttyS0 2>&1 & daemon=$!")

        def answers():
            self._guest.expect(self._guest.attempt("kill -0 $daemon")[0] == 0, "the daemon has ended")
            return self._guest.attempt("bessel volume list")[0] == 0

        vm.wait_until(answers, 60, "the daemon in the guest answers", self._guest.console, every=0.05)

    def kill(self):
        """SIGKILL: no chance to tidy up."""
        status, _ = self._guest.attempt("kill -9 $daemon; wait $daemon")
        self._guest.expect(status == 128 + 9, f"the daemon ended with status {status}, not by the kill")

    def stop(self):
        """SIGTERM: shuts down in order."""
        self._guest.command("kill $daemon; wait $daemon")

    def check(self):
        """`bessel check` on the store, which no daemon may be serving."""
        self._guest.command(f"bessel check {self._device}")

    def polled(self):
        """How many reads and writes of the device each reactor has polled for. All that it has done, or none."""
        stats = self._stats()
        polled = [reactor["device_polled"] for reactor in stats["reactors"]]
        # Each write of a guest is one of the device's, at least. A device that refuses after the first ones would have few.
        written = sum(volume["writes"] for volume in stats["volumes"])
        self._guest.expect(not any(polled) or sum(polled) >= written, f"{polled} were polled for, of {written} writes alone")
        return polled

    def take_snapshot(self, volume):
        self._guest.command(f"bessel snapshot create {volume}")

    def write_whole(self, volume):
        """Writes each block of a volume, and flushes none."""
        self.load(volume, f"--rw write {self._one_pass(volume)}")

    def expect_whole(self, volume):
        """Each block of the volume must be one that a load has written there."""
        verified = self.load(volume, f"--rw read {self._one_pass(volume)}")["verified"]
        self._guest.expect(verified["unknown"] == 0, f"{volume} was written, and blocks of it are lost: {verified}")

    def load(self, volume, arguments):
        """Runs a load; returns what was measured, parsed."""
        return json.loads(self._guest.command(_load(volume, arguments)))

    def begin_load(self, volume, arguments):
        """Starts a load in the background."""
        self._guest.command(f"{_load(volume, arguments)} >/run/load 2>&1 & load=$!")

    def wait_for_flushes(self, volume, count):
        """Waits until the load in the background has had so many flushes of a volume answered by this daemon."""
        def answered():
            status, output = self._guest.attempt("kill -0 $load || { cat /run/load; false; }")
            self._guest.expect(status == 0, f"the load has ended: {output.strip()[-500:]}")
            return any(it["name"] == volume and it["flushes"] >= count for it in self._stats()["volumes"])

        vm.wait_until(answered, 120, f"{count} flushes of {volume} are answered", self._guest.console, every=0.05)

    def expect_load_cut_short(self):
        """The load in the background must have ended for want of its daemon, and for nothing else."""
        _, output = self._guest.attempt("wait $load; cat /run/load")
        lost = re.search("server closed the connection|connection to the server broke", output)
        self._guest.expect(lost, f"a load whose daemon was killed says: {output.strip()[-500:]}")

    def _one_pass(self, volume):
        return f"--block-size 4096 --requests {self._bytes[volume] // 4096}"

    def _stats(self):
        return json.loads(self._guest.command("bessel stats --json"))


def _load(volume, arguments):
    return f"bessel-bench load --socket {os.path.dirname(API)}/{volume}.sock --queues {QUEUES} --verify --json {arguments}"


def _drive(name, file, options):
    return ["-drive", f"if=none,id={name},format=raw,file={file.replace(',', ',,')},{options}"]


def _pack(archive, programs):
    """Puts programs into bin and the libraries they are linked to where their loader looks."""
    with tarfile.open(archive, "w", dereference=True) as tar:
        libraries = set()
        for name, program in programs.items():
            tar.add(program, os.path.join("bin", name))
            # A static program has no list: ldd then says so with an error status.
            listed = subprocess.run(["ldd", program], capture_output=True, text=True, timeout=60, check=False)
            libraries.update(re.findall(r"/\S+", listed.stdout))
        for library in sorted(libraries):
            tar.add(library, library.lstrip("/"))
