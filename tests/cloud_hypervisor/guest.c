// A guest without an operating system: a virtio-blk driver and the checks of one disk, for cloud-hypervisor.
//
// Why: the /dev/kvm of some hosts cannot boot a stock kernel, yet runs plain 32-bit code. These few hundred lines
// make cloud-hypervisor do what matters to a vhost-user back-end: negotiate, set up two queues, pass on requests, and
// reconnect. They poll: no interrupt, no second processor, no paging.
//
// It works in laps over the first blocks of the disk, and starts each by reading what the one before left there:
// nothing that was answered may be missing, whatever has become of the daemon. It reports on the first serial port,
// in the lines that scripts/vm.py reads, and waits for answers as long as it takes: the host has the deadlines.
//
// Build with -D LAPS=n; it powers off after lap n, or works until it is killed if n is 0.
//
// Sources, named by section below: "virtio": Virtual I/O Device 1.2, OASIS; "PVH": x86/HVM direct boot ABI, Xen
// (docs/misc/pvh).

#include <stdbool.h>
#include <stdint.h>

#define BLOCK_SIZE 4096
#define SECTOR_SIZE 512
#define SECTORS_PER_BLOCK (BLOCK_SIZE / SECTOR_SIZE)
#define WORDS_PER_BLOCK (BLOCK_SIZE / sizeof(uint32_t))
#define BLOCKS 32        // Written and read back in each lap.
#define BLOCKS_CLEARED 4 // Of these, so many are then discarded, and as many after them zeroed.

#define QUEUES 2
#define QUEUE_SIZE 16 // One request is in flight, of 3 descriptors at most. Small, so that the rings wrap often.

// ---- The machine ------------------------------------------------------------------------------------------------

#define SERIAL_PORT 0x3f8
#define PCI_ADDRESS_PORT 0xcf8
#define PCI_DATA_PORT 0xcfc

// cloud-hypervisor's ACPI sleep control register: SLP_EN, and sleep type S5, which is 5 in its DSDT.
#define SLEEP_CONTROL_PORT 0x600
#define POWER_OFF (1 << 5 | 5 << 2)

// PVH: an ELF note of type XEN_ELFNOTE_PHYS32_ENTRY holds the address to start at, in 32-bit protected mode without
// paging, flat segments, interrupts off. A stack is the guest's own business.
__asm__(".pushsection .note.PVH, \"a\", @note\n"
        "    .long 4, 4, 18\n" // Sizes of name and content, type.
        "    .asciz \"Xen\"\n"
        "    .long _start\n"
        ".popsection\n"
        ".globl _start\n"
        "_start:\n"
        "    mov $stack_end, %esp\n"
        "    call run\n"
        ".pushsection .bss\n"
        "    .balign 16\n"
        "    .skip 16384\n"
        "stack_end:\n"
        ".popsection\n");

static void write_port_8(uint16_t port, uint8_t value) {
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static void write_port_32(uint16_t port, uint32_t value) {
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

static uint32_t read_port_32(uint16_t port) {
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static void power_off(void) {
    for (;;) write_port_8(SLEEP_CONTROL_PORT, POWER_OFF);
}

static void print(const char *text) {
    while (*text) write_port_8(SERIAL_PORT, *text++);
}

static void print_number(uint32_t number) {
    char digits[11], *first = digits + sizeof digits - 1;
    *first = 0;
    do *--first = '0' + number % 10;
    while (number /= 10);
    print(first);
}

static void report(const char *event) {
    print("BESSEL: ");
    print(event);
    print("\n");
}

static void require(bool condition, const char *what_is_wrong) {
    if (condition) return;
    print("BESSEL: failed ");
    print(what_is_wrong);
    print("\n");
    power_off();
}

// ---- The device on the PCI bus ----------------------------------------------------------------------------------

#define PCI_SLOTS 32
#define PCI_NOBODY 0xffffffff // Read where no device is.
#define PCI_COMMAND 0x04
#define PCI_COMMAND_MEMORY_AND_MASTER 6
#define PCI_BAR_0 0x10
#define PCI_BAR_64_BITS 4
#define PCI_CAPABILITIES 0x34
#define PCI_CAPABILITY_VENDOR 9
#define VIRTIO_BLK_PCI_ID 0x10421af4 // Device 0x1040 + 2, vendor 0x1af4: virtio 4.1.2.

static void select_register(uint32_t slot, uint32_t offset) {
    write_port_32(PCI_ADDRESS_PORT, 1u << 31 | slot << 11 | (offset & ~3u));
}

static uint32_t read_pci(uint32_t slot, uint32_t offset) {
    select_register(slot, offset);
    return read_port_32(PCI_DATA_PORT);
}

static void write_pci(uint32_t slot, uint32_t offset, uint32_t value) {
    select_register(slot, offset);
    write_port_32(PCI_DATA_PORT, value);
}

// virtio 4.1.4.3.
struct common_config {
    uint32_t device_feature_select, device_feature;
    uint32_t driver_feature_select, driver_feature;
    uint16_t config_msix_vector, queue_count;
    uint8_t device_status, config_generation;
    uint16_t queue_select, queue_size, queue_msix_vector, queue_enable, queue_notify_offset;
    uint64_t queue_descriptors, queue_available, queue_used;
};
_Static_assert(sizeof(struct common_config) == 56, "as virtio 4.1.4.3 lays it out");

// The start of virtio 5.2.4.
struct block_config {
    uint32_t sectors_low, sectors_high;
};

static volatile struct common_config *common;
static volatile struct block_config *block_config;
static uint32_t notify_base, notify_multiplier;

// Address that a base address register gives. cloud-hypervisor puts block devices where 32 bits reach, for firmware.
static uint32_t region_address(uint32_t slot, uint32_t bar) {
    uint32_t low = read_pci(slot, PCI_BAR_0 + 4 * bar);
    bool above = (low & PCI_BAR_64_BITS) && read_pci(slot, PCI_BAR_0 + 4 * bar + 4) != 0;
    require(!above, "the device lies above 4 GiB");
    return low & ~15u;
}

// Finds the device and, by its capabilities (virtio 4.1.4), its registers.
static void find_device(void) {
    uint32_t slot = 0;
    while (slot < PCI_SLOTS && read_pci(slot, 0) != VIRTIO_BLK_PCI_ID) slot++;
    require(slot < PCI_SLOTS, "no virtio-blk device");
    write_pci(slot, PCI_COMMAND, read_pci(slot, PCI_COMMAND) | PCI_COMMAND_MEMORY_AND_MASTER);

    uint32_t capability = read_pci(slot, PCI_CAPABILITIES) & 0xfc;
    while (capability) {
        uint32_t head = read_pci(slot, capability); // Identifier, next, length, type.
        if ((head & 0xff) == PCI_CAPABILITY_VENDOR && head >> 24 != 5) { // 5 is a window, not a place.
            uint32_t bar = read_pci(slot, capability + 4) & 0xff;
            uint32_t address = region_address(slot, bar) + read_pci(slot, capability + 8);
            switch (head >> 24) {
            case 1: common = (void *)address; break;
            case 2:
                notify_base = address;
                notify_multiplier = read_pci(slot, capability + 16);
                break;
            case 4: block_config = (void *)address; break;
            }
        }
        capability = head >> 8 & 0xfc;
    }
    require(common && notify_base && block_config, "the device lacks a virtio capability");
}

// ---- Queues and requests ----------------------------------------------------------------------------------------

// virtio 2.7.5, 2.7.6 and 2.7.8; the alignments are virtio 2.7.
struct queue {
    struct {
        uint64_t address;
        uint32_t length;
        uint16_t flags, next;
    } __attribute__((aligned(16))) descriptors[QUEUE_SIZE];
    struct {
        uint16_t flags, index, heads[QUEUE_SIZE];
    } available;
    struct {
        uint16_t flags, index;
        struct {
            uint32_t head, length;
        } elements[QUEUE_SIZE];
    } __attribute__((aligned(4))) used;
};

#define DESCRIPTOR_NEXT 1
#define DESCRIPTOR_DEVICE_WRITES 2

static volatile struct queue queues[QUEUES];
static volatile uint16_t *notify[QUEUES];

enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 }; // virtio 2.1.
enum { FEATURE_FLUSH = 9, FEATURE_QUEUES = 12, FEATURE_DISCARD = 13, FEATURE_WRITE_ZEROES = 14 }; // virtio 5.2.3.
#define FEATURES_LOW (1u << FEATURE_FLUSH | 1u << FEATURE_QUEUES | 1u << FEATURE_DISCARD | 1u << FEATURE_WRITE_ZEROES)
#define FEATURES_HIGH 1u // Bit 32: virtio 1.

// virtio 3.1.1.
static void start_device(void) {
    common->device_status = 0;
    while (common->device_status) {}
    common->device_status = ACKNOWLEDGE;
    common->device_status = ACKNOWLEDGE | DRIVER;
    const uint32_t wanted[] = {FEATURES_LOW, FEATURES_HIGH};
    for (uint32_t half = 0; half < 2; half++) {
        common->device_feature_select = half;
        require((common->device_feature & wanted[half]) == wanted[half], "a feature is not offered");
        common->driver_feature_select = half;
        common->driver_feature = wanted[half];
    }
    common->device_status = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    require(common->device_status & FEATURES_OK, "the features are refused");

    require(common->queue_count >= QUEUES, "too few queues");
    for (uint16_t index = 0; index < QUEUES; index++) {
        common->queue_select = index;
        require(common->queue_size >= QUEUE_SIZE, "the queues are too short");
        common->queue_size = QUEUE_SIZE;
        common->queue_descriptors = (uint32_t)queues[index].descriptors;
        common->queue_available = (uint32_t)&queues[index].available;
        common->queue_used = (uint32_t)&queues[index].used;
        notify[index] = (void *)(notify_base + common->queue_notify_offset * notify_multiplier);
        common->queue_enable = 1;
    }
    common->device_status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
}

// virtio 5.2.6.
enum { READ = 0, WRITE = 1, FLUSH = 4, GET_ID = 8, DISCARD = 11, WRITE_ZEROES = 13 };
enum { STATUS_OK = 0, STATUS_IO_ERROR = 1, STATUS_UNTOUCHED = 0xff };

static void describe(volatile struct queue *queue, int index, const volatile void *data, uint32_t length, int flags) {
    queue->descriptors[index].address = (uint32_t)data;
    queue->descriptors[index].length = length;
    queue->descriptors[index].flags = flags;
    queue->descriptors[index].next = index + 1;
}

// Submits a request, waits for it and returns its status.
static uint8_t request(uint16_t index, uint32_t type, uint64_t sector, void *data, uint32_t length) {
    static volatile struct {
        uint32_t type, reserved;
        uint64_t sector;
    } header;
    static volatile uint8_t status;
    header.type = type;
    header.sector = sector;
    status = STATUS_UNTOUCHED;

    volatile struct queue *queue = &queues[index];
    int tail = 1;
    describe(queue, 0, &header, sizeof header, DESCRIPTOR_NEXT);
    if (length) {
        bool device_writes = type == READ || type == GET_ID;
        describe(queue, tail++, data, length, DESCRIPTOR_NEXT | (device_writes ? DESCRIPTOR_DEVICE_WRITES : 0));
    }
    describe(queue, tail, &status, sizeof status, DESCRIPTOR_DEVICE_WRITES);

    uint16_t answered = queue->used.index;
    queue->available.heads[queue->available.index % QUEUE_SIZE] = 0;
    __sync_synchronize(); // The index makes the rest the device's.
    queue->available.index++;
    __sync_synchronize();
    *notify[index] = index;
    while (queue->used.index == answered) __asm__ volatile("pause");
    __sync_synchronize(); // The data was there before the index.
    require((uint16_t)(queue->used.index - answered) == 1, "a request was answered twice");
    require(queue->used.elements[answered % QUEUE_SIZE].head == 0, "a request was answered that is not in flight");
    return status;
}

// ---- The checks -------------------------------------------------------------------------------------------------

// What each block must read as: words from here on counted up, or zeros if it is 0. A new volume is all zeros.
static uint32_t held[BLOCKS];
static uint32_t buffer[WORDS_PER_BLOCK];

static void write_block(uint16_t queue, uint32_t block, uint32_t first) {
    for (uint32_t word = 0; word < WORDS_PER_BLOCK; word++) buffer[word] = first + word;
    uint8_t status = request(queue, WRITE, block * SECTORS_PER_BLOCK, buffer, BLOCK_SIZE);
    require(status == STATUS_OK, "a write was refused");
    held[block] = first;
}

static void check_block(uint16_t queue, uint32_t block, const char *what_is_wrong) {
    for (uint32_t word = 0; word < WORDS_PER_BLOCK; word++) buffer[word] = ~0u;
    uint8_t status = request(queue, READ, block * SECTORS_PER_BLOCK, buffer, BLOCK_SIZE);
    require(status == STATUS_OK, "a read was refused");
    for (uint32_t word = 0; word < WORDS_PER_BLOCK; word++)
        require(buffer[word] == (held[block] ? held[block] + word : 0), what_is_wrong);
}

// Discards or zeroes blocks; they read as zeros then.
static void clear_blocks(uint16_t queue, uint32_t type, uint32_t first) {
    struct {
        uint64_t sector;
        uint32_t sectors, flags;
    } range = {first * SECTORS_PER_BLOCK, BLOCKS_CLEARED * SECTORS_PER_BLOCK, 0};
    require(request(queue, type, 0, &range, sizeof range) == STATUS_OK, "a discard or write zeroes was refused");
    for (uint32_t block = first; block < first + BLOCKS_CLEARED; block++) {
        held[block] = 0;
        check_block(queue, block, "a block that was discarded or zeroed is not zeros");
    }
}

static void describe_disk(void) {
    char id[21] = {0}; // 20 bytes, with a terminator only if shorter.
    require(request(0, GET_ID, 0, id, 20) == STATUS_OK, "the disk does not tell its id");
    require(block_config->sectors_high == 0, "the disk has more sectors than this guest can count");
    print("BESSEL: disk sectors=");
    print_number(block_config->sectors_low);
    print(" queues=");
    print_number(common->queue_count);
    print(" id=");
    print(id);
    print("\n");
}

static void run_lap(uint32_t lap) {
    for (uint32_t block = 0; block < BLOCKS; block++) {
        uint16_t queue = block % QUEUES, other = (block + 1) % QUEUES;
        check_block(queue, block, "a block is not what the lap before left");
        write_block(queue, block, 1 + lap * BLOCKS + block);
        check_block(other, block, "a block is not what was just written");
    }
    report("wrote");
    require(request(0, FLUSH, 0, 0, 0) == STATUS_OK, "a flush was refused");
    report("flushed");
    clear_blocks(0, DISCARD, 0);
    report("discarded");
    clear_blocks(1, WRITE_ZEROES, BLOCKS_CLEARED);
    report("zeroed");
    uint32_t last_sector = block_config->sectors_low - 1;
    require(request(1, READ, last_sector, buffer, BLOCK_SIZE) == STATUS_IO_ERROR, "a read past the end was not refused");
}

// Called by _start alone.
__attribute__((used, noreturn)) void run(void) {
    find_device();
    start_device();
    describe_disk();
    const uint32_t laps = LAPS;
    for (uint32_t lap = 0; laps == 0 || lap < laps; lap++) run_lap(lap);
    report("done");
    for (;;) power_off();
}
