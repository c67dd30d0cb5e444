"""Runs guest.c, a guest without an operating system, under cloud-hypervisor.

The program is `cloud-hypervisor` in PATH, or what BESSEL_CLOUD_HYPERVISOR names. Built with the C compiler that Rust
links with; all files lie in the run's directory.
"""

import fcntl
import os
import shutil
import subprocess

import vm

HERE = os.path.dirname(os.path.abspath(__file__))
KVM_CREATE_VM = 0xAE01
# No library, no vector registers, which the guest does not enable, and nothing that asks for a loader.
COMPILE = ["cc", "-m32", "-O1", "-Wall", "-Wextra", "-ffreestanding", "-fno-pic", "-fno-stack-protector", "-mgeneral-regs-only",
           "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-T", os.path.join(HERE, "guest.ld")]


def what_is_missing():
    """Why no such guest can run here, or None. A BESSEL_CLOUD_HYPERVISOR that is no program is a failure instead."""
    if "BESSEL_CLOUD_HYPERVISOR" not in os.environ and not shutil.which("cloud-hypervisor"):
        return "no cloud-hypervisor in PATH, and BESSEL_CLOUD_HYPERVISOR is not set"
    try:
        with open("/dev/kvm", "r+b", buffering=0) as kvm:
            os.close(fcntl.ioctl(kvm, KVM_CREATE_VM, 0))
    except OSError as error:
        return f"/dev/kvm is not usable: {error.strerror}"
    return None


class BareGuest(vm.Machine):
    """guest.c on a disk: so many laps, or endless ones if `laps` is 0."""

    def __init__(self, run, name, disk, laps):
        log = run.path(f"{name}.cloud-hypervisor.log")
        super().__init__(run, name, [
            os.environ.get("BESSEL_CLOUD_HYPERVISOR", "cloud-hypervisor"), "-v", "--kernel", _build(run, name, laps),
            "--cpus", "boot=2", "--memory", "size=256M,shared=on", "--serial", "tty", "--console", "off",
            "--disk", f"vhost_user=true,socket={disk},num_queues=2"], log)


def _build(run, name, laps):
    elf_32, elf_64, log = run.path(f"{name}.elf32"), run.path(f"{name}.elf"), run.path(f"{name}.build.log")
    source = os.path.join(HERE, "guest.c")
    # cloud-hypervisor loads 64-bit ELF files only, whatever code is in them.
    for command in [*COMPILE, "-D", f"LAPS={laps}", source, "-o", elf_32], ["objcopy", "-O", "elf64-x86-64", elf_32, elf_64]:
        with open(log, "ab") as sink:
            status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, timeout=60, check=False).returncode
        if status != 0:
            raise vm.Failed(f"{command[0]} exited {status} on the bare guest", log)
    return elf_64
