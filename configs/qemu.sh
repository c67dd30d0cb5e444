#!/bin/sh
# Boots a guest from the volume vm1 with QEMU 7.2 or later. Guest memory must be shared: the daemon reads and
# writes it in place. `reconnect=1` lets the guest outlive a restart of the daemon.
#   configs/qemu.sh [any further QEMU options]
exec qemu-system-x86_64 -machine q35 -accel kvm -cpu host -smp 2 -m 2G \
    -object memory-backend-memfd,id=mem,size=2G,share=on -numa node,memdev=mem \
    -chardev socket,id=c0,path=/run/bessel/vm1.sock,reconnect=1 \
    -device vhost-user-blk-pci,chardev=c0,num-queues=2 \
    "$@"
