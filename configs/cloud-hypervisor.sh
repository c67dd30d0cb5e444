#!/bin/sh
# Boots a guest from the volume vm1 with cloud-hypervisor. Guest memory must be shared: the daemon reads and
# writes it in place. num_queues is at most the volume's `queues` and the guest's processors.
#   configs/cloud-hypervisor.sh KERNEL [any further cloud-hypervisor options]
kernel=$1
shift
exec cloud-hypervisor --cpus boot=2 --memory size=2G,shared=on --kernel "$kernel" --cmdline "root=/dev/vda1 console=hvc0" \
    --disk vhost_user=true,socket=/run/bessel/vm1.sock,num_queues=2,queue_size=256 \
    "$@"
