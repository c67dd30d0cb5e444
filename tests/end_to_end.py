#!/usr/bin/env python3
"""Promises that need a real kernel: guests under QEMU and cloud-hypervisor, and killed processes.

  tests/end_to_end.py [--program BESSEL] [--bench BESSEL_BENCH] [NAME ...]

Runs each test (or those whose name contains a NAME) in a directory of its own under build/test. Its logs stay there,
and the store of a test that failed. Prints one line for each and then the summary that `cargo test` prints, so that scripts/test counts both alike.
A test that this machine lacks something for is skipped, and the line says what.
"""

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "scripts"))
import vm  # noqa: E402
import guest_daemon  # noqa: E402
from cloud_hypervisor import bare_guest  # noqa: E402

VOLUME = "vm1"
CRASHES = 3
KILLS_UNDER_BARE_GUEST = 8


class World:
    """What a test works with: a daemon with one volume, and ways to boot guests."""

    def __init__(self, run, options):
        self.run, self.bench = run, options.bench
        self.program = options.program
        self.daemon = vm.Daemon(run, options.program, {VOLUME: "1GiB"})
        self.daemon.start()

    def guest(self, name, job, volume=VOLUME, **options):
        return vm.Guest(self.run, name, accelerator(), job, self.daemon.volume_socket(volume), **options)

    def cloud_hypervisor_guest(self, name, laps):
        return bare_guest.BareGuest(self.run, name, self.daemon.volume_socket(VOLUME), laps)

    def expect(self, condition, message):
        if not condition:
            raise vm.Failed(message, self.daemon.log)

    def expect_acknowledged(self, acknowledged, found, when):
        lost = [name for name in acknowledged if found.get(name) != acknowledged[name]]
        self.expect(not lost, f"{when}: of {len(acknowledged)} fsynced files these are lost or changed: {lost[:5]}")

    def load_and_verify(self):
        """Random reads and writes; every read must bring what was written last."""
        done = subprocess.run([self.bench, "load", "--socket", self.daemon.volume_socket(VOLUME), "--rw", "mix",
                               "--requests", "20000", "--depth", "32", "--verify"],
                              capture_output=True, text=True, timeout=120, check=False)
        self.expect(done.returncode == 0, f"bessel-bench exited {done.returncode}: {done.stderr.strip()}")

    def check_store(self):
        """`bessel check` on the store, which no daemon may be serving."""
        done = subprocess.run([self.program, "check", self.daemon.store], capture_output=True, text=True, timeout=120, check=False)
        self.expect(done.returncode == 0, f"bessel check exited {done.returncode}: {(done.stdout + done.stderr).strip()[:500]}")

    def stop_cleanly(self):
        status = self.daemon.stop()
        self.expect(status == 0, f"the daemon exited {status} on SIGTERM")


@functools.cache
def accelerator():
    """What guests run under, found out when the first one is wanted."""
    with vm.Run("test/accelerator") as run:
        chosen, reason = vm.choose_accelerator(run)
    print(f"guests run under {chosen.upper()}: {reason}", flush=True)
    return chosen


def needs(what_is_missing):
    """Marks a test as one to skip when `what_is_missing()` gives a reason."""
    def mark(test):
        test.what_is_missing = what_is_missing
        return test

    return mark


def collect(files):
    """An event handler that notes what the guest says is safe."""
    return lambda event, fields: files.update({fields["name"]: fields["sum"]}) if event in ("acked", "file") else None


def a_guest_makes_writes_trims_and_checks_a_file_system(world):
    files = {}
    guest = world.guest("smoke", "smoke", fio=3, files=20)
    disk = guest.wait_for("disk", 60)
    world.expect(disk["sectors"] == str((1 << 30) // 512), f"the guest sees {disk['sectors']} sectors, not 1 GiB")
    world.expect(disk["queues"] == "2", f"the guest sees {disk['queues']} queues, not 2")
    world.expect(disk["cache"] == "write", f"the guest sees a cache of mode {disk['cache']}: FLUSH is not offered")
    world.expect(int(disk["discard"]) > 0, "the guest is not offered DISCARD")
    guest.wait_for("verified", 120, collect(files))
    found = guest.check_files()
    world.expect_acknowledged(files, found, "before a restart")
    world.stop_cleanly()
    world.check_store()
    world.daemon.start()
    world.expect_acknowledged(files, world.guest("again", "check").check_files(), "after a restart")
    world.stop_cleanly()


def fsynced_files_survive_killing_daemon_and_guest_again_and_again(world):
    for crash in range(CRASHES):
        files = {}
        guest = world.guest(f"writer-{crash}", "write", fio=1, files=10)
        guest.wait_for("busy", 120, collect(files))
        # Not the same place each time: later crashes come further into the second fio.
        while len(files) < 40 + 20 * crash:
            world.daemon.command("snapshot", "create", VOLUME)
            guest.wait_for("acked", 60, collect(files))
        world.daemon.kill()
        guest.kill()
        while not guest.events.empty():
            collect(files)(*guest.events.get()[:2])
        world.check_store()
        world.daemon.start()
        found = world.guest(f"after-{crash}", "check").check_files()
        world.expect_acknowledged(files, found, f"after crash {crash}")
    world.stop_cleanly()
    world.check_store()


def a_guest_outlives_the_daemon_with_a_pause(world):
    files = {}
    guest = world.guest("writer", "write", reconnect=True, fio=1, files=10)
    guest.wait_for("busy", 120, collect(files))
    for _ in range(2):
        world.daemon.kill()
        world.daemon.start()
        before = len(files)
        # One may have been acknowledged before the kill and read only now; the second cannot have been.
        while len(files) < before + 5:
            guest.wait_for("acked", 60, collect(files))
    guest.kill()
    world.expect_acknowledged(files, world.guest("after", "check").check_files(), "after the daemon came back twice")
    world.stop_cleanly()


def a_clone_has_the_older_files_and_goes_its_own_way(world):
    older, newer = {}, {}
    guest = world.guest("writer", "write", fio=1, files=10)
    while len(older) < 5:
        guest.wait_for("acked", 60, collect(older))
    world.daemon.command("snapshot", "create", VOLUME, "--label", "base")
    guest.send("epoch 2")
    guest.wait_for("epoch", 30, collect(newer))
    guest.wait_for("fio", 120, collect(newer))
    guest.kill()
    world.daemon.command("volume", "create", "clone1", "--from", f"{VOLUME}@base")
    vm.wait_until(lambda: os.path.exists(world.daemon.volume_socket("clone1")), 10, "the clone's socket appears", world.daemon.log)
    # Over the clone a whole new file system is made; the volume it came from must not see any of it.
    found = world.guest("clone", "check", volume="clone1").check_files()
    world.expect_acknowledged(older, found, "in the clone")
    world.expect(not [name for name in found if name.startswith("2-")], "the clone has files begun after its snapshot")
    world.guest("clone-smoke", "smoke", volume="clone1", fio=1).check_files()
    world.expect_acknowledged(older | newer, world.guest("origin", "check").check_files(), "in the volume cloned from")
    world.stop_cleanly()
    world.check_store()


def the_load_generator_reads_back_what_it_wrote(world):
    world.load_and_verify()
    world.stop_cleanly()
    world.check_store()


def loop_devices_are_missing():
    usable = shutil.which("losetup") and os.access("/dev/loop-control", os.R_OK | os.W_OK)
    return None if usable else "no loop devices, or no right to make one"


def peers_are_compared_and_the_report_is_whole(world):
    """Small, in memory: that each load is measured and shown, not how fast anything was. Without peers it is Bessel alone."""
    out, page, snapshots = (world.run.path(name) for name in ("compare.json", "compare.html", "reads.json"))
    with open(snapshots, "w", encoding="utf-8") as file:
        reads = [{"snapshots": count, "kilo_reads_per_second": 100.0} for count in (0, 1, 10)]
        json.dump({"machine": "<of another time>", "unix_seconds": 0,
                   "rows": [{"part": "reads", "figures": figures} for figures in reads]}, file)
    # One of those that keep snapshots, one that does not.
    peers = [name for name, programs in (("qsd-qcow2", ("qemu-storage-daemon", "qemu-img")), ("bare-uring", ("fio",)))
             if all(map(shutil.which, programs))]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        done = subprocess.run([world.bench, "compare", "--bessel", world.program, "--dir", directory, "--size", "16MiB",
                               "--store-size", "1GiB", "--seconds", "0.1", "--rounds", "1", "--scenarios", "quick,queues",
                               "--rw", "mix", "--depths", "1,4", "--contenders", ",".join(["bessel", *peers]), "--costs", "--json", out, "--html", page, "--snapshots", snapshots],
                              capture_output=True, text=True, timeout=300, check=False)
        world.expect(not os.listdir(directory), f"left behind: {os.listdir(directory)}")
    world.expect(done.returncode == 0, f"bessel-bench exited {done.returncode}: {done.stderr.strip()}")
    with open(out, encoding="utf-8") as file:
        results = json.load(file)
    place = results["places"][0]
    ours = [cell for cell in place["cells"] if cell["contender"] == "bessel"]
    world.expect({cell["state"] for cell in ours} == {"empty", "written", "snapshotted"}, f"states: {ours}")
    world.expect({cell["queues"] for cell in ours} == {1, 2, 4}, f"queues: {ours}")
    wrong = [cell for cell in place["cells"] if len(cell["samples"]) != 1]
    world.expect(not wrong, f"not measured once: {wrong}")
    named = {it["contender"] for it in results["contenders"]}
    world.expect(named == {cell["contender"] for cell in place["cells"]}, f"contenders: {named}")
    with open(page, encoding="utf-8") as file:
        report = file.read()
    try:
        root = xml.etree.ElementTree.fromstring(report)
    except xml.etree.ElementTree.ParseError as error:
        raise vm.Failed(f"the report is not well-formed: {error}", world.daemon.log) from error
    loads = {tuple(cell[key] for key in ("workload", "block_bytes", "depth", "queues", "state")) for cell in place["cells"]}
    plots = len(list(root.iter("svg")))
    # Latencies of each load; rates of reads, writes and the mix against depth, of reads and writes against queues, of reads against snapshots.
    world.expect(plots == len(loads) + 3 + 2 + 1, f"{plots} plots of {len(loads)} loads")
    rows = len(list(root.iter("tr")))
    world.expect(rows == len(place["cells"]) + 1, f"{rows} rows of {len(place['cells'])} cells")
    world.expect("&lt;of another time&gt;" in report, "the snapshots were measured on some machine")


@needs(loop_devices_are_missing)
def block_devices_are_compared_and_none_is_left(world):
    """Small, on this machine's disk: each kind of disk is made, served and measured as a loop device."""
    out = world.run.path("compare.json")
    peers = [name for name, programs in (("qsd-uring", ["qemu-storage-daemon"]), ("qsd-qcow2", ["qemu-storage-daemon", "qemu-img"]),
                                         ("bare-uring", ["fio"]))
             if all(map(shutil.which, programs))]
    with tempfile.TemporaryDirectory(dir=world.run.directory) as directory:
        done = subprocess.run([world.bench, "compare", "--bessel", world.program, "--dir", f"loop:{directory}", "--size", "16MiB",
                               "--store-size", "256MiB", "--seconds", "0.1", "--rounds", "1", "--scenarios", "empty,snapshotted",
                               "--rw", "randread,randwrite", "--depths", "4", "--contenders", ",".join(["bessel", *peers]), "--json", out],
                              capture_output=True, text=True, timeout=300, check=False)
        world.expect(done.returncode == 0, f"bessel-bench exited {done.returncode}: {done.stderr.strip()}")
        world.expect(not os.listdir(directory), f"left behind: {os.listdir(directory)}")

        def gone():
            listed = subprocess.run(["losetup", "--list", "--noheadings", "--output", "BACK-FILE"],
                                    capture_output=True, text=True, timeout=60, check=True)
            return directory not in listed.stdout

        vm.wait_until(gone, 60, "the last loop device is taken down", out)
    with open(out, encoding="utf-8") as file:
        cells = json.load(file)["places"][0]["cells"]
    wrong = [cell for cell in cells if len(cell["samples"]) != 1]
    world.expect(not wrong, f"not measured once: {wrong}")
    states = {(cell["contender"], cell["state"]) for cell in cells}
    expected = {(name, state) for name in ("bessel", *peers) for state in ("empty", "written", "snapshotted")
                if state != "snapshotted" or name in ("bessel", "qsd-qcow2")}
    world.expect(expected == states, f"measured are {states}")


@needs(loop_devices_are_missing)
def a_block_device_of_4096_byte_sectors_serves_and_survives_kills(world):
    world.stop_cleanly()
    backing = world.run.path("disk.img")
    with open(backing, "wb") as disk:
        disk.truncate(2 << 30)
    attached = subprocess.run(["losetup", "--sector-size", "4096", "--find", "--show", backing],
                              capture_output=True, text=True, timeout=60, check=False)
    world.expect(attached.returncode == 0, f"losetup: {attached.stderr.strip()}")
    device = attached.stdout.strip()
    try:
        formatted = subprocess.run([world.program, "format", device], capture_output=True, text=True, timeout=60, check=False)
        world.expect(formatted.returncode == 0, f"bessel format: {formatted.stderr.strip()}")
        world.daemon = vm.Daemon(world.run, world.program, {VOLUME: "1GiB"}, store=device, store_size=None)
        for _ in range(CRASHES):
            world.daemon.start()
            world.load_and_verify()
            world.daemon.kill()
        world.daemon.start()
        world.stop_cleanly()
        world.check_store()
    finally:
        if world.daemon.process.poll() is None:
            world.daemon.kill()
        subprocess.run(["losetup", "--detach", device], timeout=60, check=False)
    os.remove(backing)


def a_polled_device_serves_and_survives_kills(world):
    """In a guest, which runs the daemon: on an NVMe disk with a queue that is polled, which two reactors share, and for
    comparison on a disk without one."""
    world.stop_cleanly()
    disks = {"/dev/nvme0n1": "nvme,serial=polled", "/dev/vdb": "virtio-blk-pci"}  # vda has the programs
    guest = guest_daemon.CommandedGuest(world.run, "guest", accelerator(), {"bessel": world.program, "bessel-bench": world.bench},
                                        disks.values(), words=["nvme.poll_queues=1"])
    pollable = [guest.queue_attribute(disk, "io_poll") for disk in disks]
    guest.expect(pollable == ["1", "0"], f"io_poll of {list(disks)} is {pollable}")
    # Of the volumes the first two, VOLUME and written0, have different homes. Each life uses both, so that each reactor
    # has work in it.
    written = ["written0", "written1"]
    nvme, virtio = [guest_daemon.GuestDaemon(guest, disk, {VOLUME: 32 << 20, **dict.fromkeys(written, 2 << 20)}) for disk in disks]
    polls = serve_through_kills(nvme, written)
    switched_off = serve_in_order(nvme, written, io_poll="off")
    sparing = serve_in_order(nvme, written, poll="sparing")
    interrupting = serve_through_kills(virtio, written[:1])
    guest.end()
    guest.expect(all(map(all, polls)), f"a disk that can be polled was not; by life and reactor: {polls}")
    guest.expect(not any(switched_off), f"a disk was polled with io_poll off; by reactor: {switched_off}")
    guest.expect(not any(sparing), f"a disk was polled by reactors that are to sleep; by reactor: {sparing}")
    guest.expect(not any(map(any, interrupting)), f"a disk was polled that cannot be; by life and reactor: {interrupting}")


def serve_through_kills(daemon, volumes):
    """Kills a daemon in a guest under load, each time with another of `volumes` just written. Returns how much each of
    its reactors polled for, life by life."""
    polls = []
    for kill, volume in enumerate(volumes):
        daemon.start()
        for earlier in volumes[:kill]:
            daemon.expect_whole(earlier)
        # Answered, and never flushed by whoever wrote it: the kill may take none of it.
        daemon.write_whole(volume)
        daemon.begin_load(VOLUME, "--rw mix --seconds 500 --flush-every 20")
        daemon.wait_for_flushes(VOLUME, 2)
        daemon.take_snapshot(VOLUME)
        daemon.wait_for_flushes(VOLUME, 4)
        polls.append(daemon.polled())
        daemon.kill()
        daemon.expect_load_cut_short()
    return [*polls, serve_in_order(daemon, volumes)]


def serve_in_order(daemon, volumes, **how):
    """A life of a daemon in a guest with an orderly end: nothing is lost of what earlier ones wrote to `volumes`."""
    daemon.start(**how)
    for volume in volumes:
        daemon.expect_whole(volume)
    daemon.load(VOLUME, "--rw mix --requests 1000 --flush-every 20")
    polls = daemon.polled()
    daemon.stop()
    daemon.check()
    return polls


@needs(bare_guest.what_is_missing)
def a_cloud_hypervisor_guest_reads_writes_flushes_and_discards(world):
    guest = world.cloud_hypervisor_guest("guest", laps=2)
    disk = guest.wait_for("disk", 60)
    world.expect(disk == {"sectors": str((1 << 30) // 512), "queues": "2", "id": VOLUME}, f"the guest sees {disk}")
    guest.wait_for("done", 120)
    guest.finish()
    world.expect(guest.process.returncode == 0, f"cloud-hypervisor exited {guest.process.returncode}")
    world.stop_cleanly()
    world.check_store()


@needs(bare_guest.what_is_missing)
def a_cloud_hypervisor_guest_outlives_a_daemon_killed_again_and_again(world):
    guest = world.cloud_hypervisor_guest("guest", laps=0)

    def served_a_lap():
        # The second flush of this daemon's ends a lap that was all its own: both queues are connected again, and the
        # guest has read back all that was answered before. What the guest says may be older than the daemon.
        guest.catch_up()
        return world.daemon.command("stats")["volumes"][0]["flushes"] >= 2

    for kill in range(KILLS_UNDER_BARE_GUEST):
        vm.wait_until(served_a_lap, 120, "the guest works on", guest.log, every=0.05)
        # Each time as the guest begins with something else: reads and writes, a flush, a discard, write zeroes.
        guest.wait_for(("zeroed", "wrote", "flushed", "discarded")[kill % 4], 60)
        world.daemon.kill()
        world.daemon.start()
    vm.wait_until(served_a_lap, 120, "the guest works on", guest.log, every=0.05)
    guest.kill()
    world.stop_cleanly()
    world.check_store()


def what_snapshots_cost_is_measured_row_by_row(world):
    """Small, in memory: that each row is there and counts what it says, not how fast anything was."""
    out, count, clones = world.run.path("snapshots.json"), 300, 20
    done = subprocess.run([world.bench, "snapshots", "--bessel", world.program, "--size", "16MiB", "--store-size", "8GiB",
                           "--seconds", "0.2", "--rounds", "1", "--long", "1", "--behind", "10", "--million", str(count),
                           "--mapped", "64MiB", "--clones", str(clones), "--json", out],
                          capture_output=True, text=True, timeout=240, check=False)
    world.expect(done.returncode == 0, f"bessel-bench exited {done.returncode}: {done.stderr.strip()}")
    with open(out, encoding="utf-8") as file:
        rows = json.load(file)["rows"]
    by_part = {}
    for row in rows:
        by_part.setdefault(row["part"], []).append(row["figures"])
        world.expect(f"| {row['what']} | {row['measured']}" in done.stdout, f"the table lacks {row['what']}")

    def expect(condition, part):
        world.expect(condition, f"{part}: {by_part.get(part)}")

    rows_of = {"idle": 1, "under-writes": 3, "paced": 1, "flat-out": 4, "sustained": 1, "million": 3, "metadata": 3,
               "first-writes": 2, "lone-writes": 1, "reads": 3, "continuous": 1, "collector": 2, "clones": 1}
    found = {part: len(figures) for part, figures in by_part.items()}
    world.expect(found == rows_of, f"rows by part: {found}")
    idle = by_part["idle"][0]
    expect(idle["count"] == 500 and 0 < idle["p50_us"] <= idle["p99_us"] <= idle["max_us"], "idle")
    latency, delays, _ = by_part["under-writes"]
    expect(0 < delays["at_count"] <= latency["count"] and delays["midway_count"] > 0, "under-writes")
    for part in ("paced", "sustained"):
        expect(by_part[part][0]["taken"] > 0 and by_part[part][0]["writes_per_second"] > 0, part)
    expect([row["taken"] > 0 for row in by_part["flat-out"]] == [False, True, True, True], "flat-out")
    expect(by_part["million"][0]["count"] == count and by_part["million"][2]["ratio"] > 0, "million")
    # A snapshot keeps a root, and every 24 a block of the log; what is written between two comes on top.
    light, unwritten, written = (row["kilobytes_each"] for row in by_part["metadata"])
    expect(4.096 < unwritten < 4.5 and light > unwritten and written > unwritten, "metadata")
    for first in by_part["first-writes"]:
        expect(1 < first["written_per_asked"] <= 1.5 and first["ratio"] > 0, "first-writes")
    lone = by_part["lone-writes"][0]
    expect(1 < lone["written_per_asked"] <= 4 < lone["with_snapshots"], "lone-writes")
    expect([row["snapshots"] for row in by_part["reads"]] == [0, 1, 10], "reads")
    # Each write copies its path again, since a snapshot has come between: nothing of it is shared with the next.
    expect(by_part["continuous"][0]["written_per_asked"] > 4, "continuous")
    if "reachable_gigabytes" in by_part["collector"][0]:
        expect(by_part["collector"][0]["reachable_gigabytes"] * 1e9 >= 64 << 20, "collector")
        expect(by_part["collector"][1]["collections"] > 0, "collector")
    expect(by_part["clones"][0]["count"] == clones, "clones")


def fio_in_a_guest_is_measured_beside_a_peer(world):
    """Short: that each job is measured and verify verifies, not how fast anything was. Without a peer it is Bessel alone."""
    out = world.run.path("guest.json")
    done = subprocess.run([os.path.join(vm.REPO, "scripts", "bench-guest"), "--program", world.program, "--seconds", "1",
                           "--runs", "1", "--jobs", "randread,fsync,verify", "--dir", world.run.directory, "--json", out],
                          env={**os.environ, "BESSEL_ACCEL": accelerator()}, capture_output=True, text=True, timeout=300, check=False)
    world.expect(done.returncode == 0, f"bench-guest exited {done.returncode}: {done.stderr.strip()}")
    with open(out, encoding="utf-8") as file:
        rows = json.load(file)["medians"]
    servers = {"bessel", "qsd"} if shutil.which("qemu-storage-daemon") else {"bessel"}
    loads = {"randread 4k, depth 1", "randread 4k, depth 32", "fsync 4k, 4 writers", "verify"}
    world.expect({(row["load"], row["server"]) for row in rows} == {(load, server) for load in loads for server in servers}, f"rows: {rows}")
    wrong = [row for row in rows if row["load"] != "verify" and not 0 < row["median"]["mean_us"] <= 1e6 * 32 / row["median"]["iops"]]
    world.expect(not wrong, f"measured wrongly: {wrong}")
    left = [name for name in os.listdir(world.run.directory) if name.startswith("bessel-bench-guest-")]
    world.expect(not left, f"left behind: {left}")


TESTS = [
    a_guest_makes_writes_trims_and_checks_a_file_system,
    fsynced_files_survive_killing_daemon_and_guest_again_and_again,
    a_guest_outlives_the_daemon_with_a_pause,
    a_clone_has_the_older_files_and_goes_its_own_way,
    the_load_generator_reads_back_what_it_wrote,
    what_snapshots_cost_is_measured_row_by_row,
    peers_are_compared_and_the_report_is_whole,
    fio_in_a_guest_is_measured_beside_a_peer,
    block_devices_are_compared_and_none_is_left,
    a_block_device_of_4096_byte_sectors_serves_and_survives_kills,
    a_polled_device_serves_and_survives_kills,
    a_cloud_hypervisor_guest_reads_writes_flushes_and_discards,
    a_cloud_hypervisor_guest_outlives_a_daemon_killed_again_and_again,
]


def main():
    release = os.path.join(vm.REPO, "build", "release")
    parser = argparse.ArgumentParser(description="Promises that need a real kernel.")
    parser.add_argument("--program", default=os.path.join(release, "bessel"), help="the bessel program")
    parser.add_argument("--bench", default=os.path.join(release, "bessel-bench"), help="the load generator")
    parser.add_argument("names", nargs="*", help="run only tests with one of these in their name")
    options = parser.parse_args()
    passed = failed = skipped = 0
    for test in TESTS:
        name = test.__name__
        if options.names and not any(wanted in name for wanted in options.names):
            continue
        missing = getattr(test, "what_is_missing", lambda: None)()
        if missing:
            skipped += 1
            print(f"test {name} ... skipped: {missing}", flush=True)
            continue
        began = time.monotonic()
        try:
            with vm.Run(f"test/{name}") as run:
                test(World(run, options))
                os.remove(run.path("store.img"))
            passed += 1
            print(f"test {name} ... ok ({time.monotonic() - began:.0f} s)", flush=True)
        except (vm.Failed, OSError, subprocess.TimeoutExpired) as failure:
            failed += 1
            print(f"test {name} ... FAILED", flush=True)
            vm.show_failure(failure)
            print(f"all logs: build/test/{name}", file=sys.stderr)
    print(f"test result: {'FAILED' if failed else 'ok'}. {passed} passed; {failed} failed; {skipped} ignored")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
