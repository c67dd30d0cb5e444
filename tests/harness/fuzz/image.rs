//! A store's image with anything at all in it: opened, served, checked.
//!
//! A small store is built once, with volumes of three and four levels, snapshots, a clone, labels
//! and discarded blocks. An input is a list of changes to its blocks. A change may be sealed anew
//! with the store's secret, and an entry of a radix node tagged anew, so that it is not found by its
//! checksum and comes further in; only who has the secret can do that, but a mistake of ours can too.

use std::cell::OnceCell;

use bessel_mapping::check;
use bessel_mapping::format::{
    Bitmap, Entry, ExtentType, SUPERBLOCK_COPIES, TagKey, node_from_bytes_mut,
};
use bessel_mapping::request::{Command, IoKind, VolumeHandle};
use bessel_mapping::store::{self, OpenMode};
use bessel_reactor::clock::WallTime;
use bessel_reactor::device::sim::{Schedule, SimDisk};
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr, ByteCount};

use super::input::Input;
use super::rig::{Rig, Volume};
use crate::world::{Action, World, WorldConfig};

const BLOCK: usize = BLOCK_SIZE as usize;
const SECTOR: usize = 512;
/// Changes to one image.
const CHANGES_MAX: usize = 40;
/// Snapshots that are cloned and read.
const CLONES_MAX: usize = 6;
/// Volumes that are used.
const VOLUMES_MAX: usize = 8;

/// The kinds of block, in the order in which an input counts them.
const KINDS: usize = 8;

/// A store that nobody has harmed, and where what is in it.
struct Base {
    disk: SimDisk,
    secret: u64,
    key: TagKey,
    /// Superblock copies, catalogue, host records, volume records, bitmaps, log blocks, nodes, data.
    places: [Vec<BlockAddr>; KINDS],
}

/// A sealed kind's index and magic.
const MAGICS: [&[u8; 4]; 6] = [b"BSUP", b"BCAT", b"BHST", b"BVOL", b"BMAP", b"BLOG"];
const NODES: usize = 6;
const DATA: usize = 7;

thread_local! {
    /// Of a closed store, and of one whose daemon was killed.
    static BASES: [OnceCell<Base>; 2] = const { [OnceCell::new(), OnceCell::new()] };
}

impl Base {
    fn build(killed: bool) -> Self {
        let mut world = World::new(WorldConfig {
            capacity: ByteCount::new(8 << 20),
            schedule: Schedule::AtOnce,
            shards: 2,
            ..WorldConfig::new(1)
        });
        let sound = "the world works";
        let small = world.create(ByteCount::new(8 << 20)).expect(sound);
        let large = world.create(ByteCount::new(1 << 40)).expect(sound);
        for (volume, sector) in [(small, 0), (small, 4096), (large, 8), (large, 1 << 30)] {
            world.write(volume, sector, 24).expect(sound);
        }
        let first = world.snapshot(small).expect(sound);
        world.write(small, 4, 8).expect(sound);
        world.snapshot(large).expect(sound);
        world.write(large, 0, 16).expect(sound);
        for _ in 0..26 {
            world.snapshot(small).expect(sound); // Into a second log block.
        }
        let label = Some("base".to_owned());
        world.perform(Action::Label { snapshot: first, label }).expect(sound);
        let clone = world.clone_of(first, "clone").expect(sound).expect("it is settled");
        world.write(clone, 3, 30).expect(sound);
        world.io(clone, bessel_mapping::request::IoKind::Discard, 16, 16).expect(sound);
        let doomed = world.create(ByteCount::new(1 << 20)).expect(sound);
        world.write(doomed, 0, 8).expect(sound);
        world.settle().expect(sound);
        world.perform(Action::Delete { volume: doomed }).expect(sound);
        world.settle().expect(sound);
        if killed {
            world.kill();
        } else {
            world.shut_down().expect(sound);
        }
        world.disk.stay_on();
        Self::survey(world.disk.fork(0))
    }

    fn survey(disk: SimDisk) -> Self {
        let store = store::open(&mut disk.connect(), OpenMode::ReadOnly).expect("a whole store");
        assert!(store.faults.is_empty() && store.findings.is_empty());
        let geometry = store.geometry;
        let blocks = |start: BlockAddr, count: u64| (0..count).map(move |at| start.add(at));
        let mut places: [Vec<BlockAddr>; KINDS] = Default::default();
        places[0] = SUPERBLOCK_COPIES.to_vec();
        places[1] = blocks(geometry.catalogue_start, geometry.catalogue_blocks).collect();
        places[2] = blocks(geometry.host_slot(0, 0), 2).collect();
        let slots = store.directory.volumes().count() as u64 + 1; // One that was never used.
        places[3] = blocks(geometry.registry_slot(0, 0), 2 * slots).collect();
        let logs = store.directory.entries().map(|entry| &entry.record);
        let logs = logs.map(|record| store::read_log(&mut disk.connect(), &store, record));
        places[5] = logs.flat_map(|log| log.blocks).collect();
        for extent in 0..geometry.extent_count {
            let kind = store.extents.get(extent);
            let rest = match kind {
                ExtentType::Metadata => NODES,
                ExtentType::Data => DATA,
                _ => continue,
            };
            let addr = geometry.bitmap_block(extent, 0);
            places[4].push(addr);
            let bitmap = Bitmap::decode(&disk.peek(addr), addr, store.secret).expect("it is whole");
            for bit in 1..geometry.extent_blocks as u32 {
                let block = geometry.block_of_bit(extent, 0, bit);
                let unwritten = disk.peek(block).iter().all(|&byte| byte == 0xa5);
                if bitmap.get(bit) && !unwritten && !places[5].contains(&block) {
                    places[rest].push(block);
                }
            }
        }
        assert!(places.iter().all(|places| !places.is_empty()), "every kind is there");
        Self { disk, secret: store.secret, key: store.key, places }
    }

    /// A block of any kind, with its kind.
    fn pick(&self, input: &mut Input<'_>) -> (usize, BlockAddr) {
        let kind = input.below(KINDS);
        (kind, input.pick(&self.places[kind]))
    }

    /// Where a link may lead: mostly to something, sometimes anywhere.
    fn target(&self, input: &mut Input<'_>) -> u64 {
        match input.below(4) {
            0 => input.u64() & ((1 << 44) - 1),
            1 => input.u8().into(),
            _ => self.pick(input).1.get(),
        }
    }

    fn change(&self, disk: &SimDisk, input: &mut Input<'_>) {
        let (kind, addr) = self.pick(input);
        let mut block = disk.peek(addr);
        let way = input.u8();
        let sector = match way & 7 {
            0 | 1 => {
                let at = input.below(BLOCK);
                let count = 1 + input.below(16);
                let bytes = input.bytes(count);
                let end = (at + bytes.len()).min(BLOCK);
                block[at..end].copy_from_slice(&bytes[..end - at]);
                at / SECTOR
            }
            2 => {
                // A number of eight bytes, where such numbers lie.
                let at = input.below(BLOCK / 8) * 8;
                block[at..at + 8].copy_from_slice(&self.target(input).to_le_bytes());
                at / SECTOR
            }
            3 => {
                let sector = input.below(8);
                block[sector * SECTOR..(sector + 1) * SECTOR].fill(0);
                sector
            }
            4 => {
                let (_, from) = self.pick(input);
                block = disk.peek(from);
                0
            }
            _ => return self.link(disk, addr, way, input),
        };
        if way & 8 != 0 && kind < NODES {
            let sectors = if way & 7 == 4 { 0..8 } else { sector..sector + 1 };
            for sector in sectors {
                self.seal(&mut block, kind, addr, sector);
            }
        }
        disk.poke(addr, &block);
        if kind == 0 && way & 16 != 0 {
            // The same change to all copies, so that it counts.
            for copy in SUPERBLOCK_COPIES {
                let mut block = block;
                self.seal(&mut block, 0, copy, 0);
                disk.poke(copy, &block);
            }
        }
    }

    /// Puts a well-formed entry into a radix node.
    fn link(&self, disk: &SimDisk, addr: BlockAddr, way: u8, input: &mut Input<'_>) {
        let mut block = disk.peek(addr);
        let slot = if way & 16 == 0 { input.below(4) } else { input.below(512) };
        let kind = u64::from(input.u8());
        let bits = (kind & 15) << 60 | self.target(input);
        let entry = self.key.seal(Entry::from_bits(bits), addr, slot);
        node_from_bytes_mut(&mut block)[slot] = entry;
        disk.poke(addr, &block);
    }

    /// Seals a sector as FORMAT.md, section 4, says; written anew here, since the crate does not
    /// lend its own seal to anybody.
    fn seal(&self, block: &mut [u8; BLOCK], kind: usize, addr: BlockAddr, sector: usize) {
        let bytes = &mut block[sector * SECTOR..(sector + 1) * SECTOR];
        let place = addr.get() * 8 + sector as u64;
        bytes[496..504].copy_from_slice(&place.to_le_bytes());
        bytes[504..508].copy_from_slice(MAGICS[kind]);
        let seed = if kind == 0 { 0 } else { self.secret as u32 };
        let crc = crc32c(seed, &bytes[..508]);
        bytes[508..].copy_from_slice(&crc.to_le_bytes());
    }
}

/// CRC32C that continues one whose result was `from`.
fn crc32c(from: u32, bytes: &[u8]) -> u32 {
    let mut crc = !from;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

/// The target; see the module's documentation.
pub fn store_image(data: &[u8]) {
    BASES.with(|bases| {
        let mut input = Input::new(data);
        let way = input.u8();
        let killed = way & 1 != 0;
        let base = bases[usize::from(killed)].get_or_init(|| Base::build(killed));
        let disk = base.disk.fork(7);
        disk.set_schedule(Schedule::AtOnce);
        let changes = input.below(CHANGES_MAX + 1);
        for _ in 0..changes {
            base.change(&disk, &mut input);
        }
        look(&disk);
        if way & 2 != 0 {
            mend(&disk);
        }
        serve(&disk, &mut input);
        // What serving made of it is also to be stood.
        look(&disk);
    });
}

/// `bessel check`: findings or a refusal, and no end of neither.
fn look(disk: &SimDisk) {
    let mut progress = 0u64;
    let bound = 1 << 16; // The store has 2048 blocks.
    let checked = check::check(&mut disk.connect(), &mut |_, _| {
        progress += 1;
        assert!(progress < bound, "the check goes on and on");
    });
    if let Ok(report) = checked {
        assert!(report.findings.len() <= check::FINDINGS_MAX);
        for finding in &report.findings {
            assert!(!finding.to_string().is_empty());
        }
    }
}

/// `bessel check --repair`, twice: the second finds what only shows when the first is done, such as
/// what lies behind a bitmap that was damaged, and then there is nothing left to do.
fn mend(disk: &SimDisk) {
    let time = WallTime::from_unix_nanos(2_000);
    let nowhere = &mut |_, _| {};
    for _ in 0..2 {
        let Ok(plan) = check::plan_repair(&mut disk.connect(), time, nowhere) else { return };
        check::repair(&mut disk.connect(), &plan, nowhere).expect("the disk is sound");
    }
    let plan = check::plan_repair(&mut disk.connect(), time, nowhere);
    let plan = plan.expect("a repair leaves a store that opens");
    assert!(plan.is_empty(), "a repair is never done: {:?}", plan.steps);
}

/// Everything that a daemon does with a store.
fn serve(disk: &SimDisk, input: &mut Input<'_>) {
    let Some(mut rig) = Rig::open(disk) else { return };
    let entries: Vec<_> = rig.store.directory.entries().cloned().collect();
    let live = entries.into_iter().filter(|entry| !entry.record.deleted).take(VOLUMES_MAX);
    let mut volumes: Vec<(Volume, u64)> = Vec::new();
    for (index, entry) in live.enumerate() {
        let sectors = entry.record.size.sectors();
        let opened = rig.volume(index % 2, Command::Open(Box::new(entry)));
        volumes.extend(opened.map(|volume| (volume, sectors)));
    }
    for (number, origin) in rig.origins().into_iter().take(CLONES_MAX).enumerate() {
        let clone = rig.clone_of(number % 2, origin, &format!("fuzz{number}"));
        volumes.extend(clone.map(|volume| (volume, origin.size.sectors())));
    }
    for &(volume, sectors) in &volumes {
        for sector in [0, 16, 4096, 1 << 30, sectors - 1] {
            rig.io(volume, IoKind::Read, sector, 24.min(sectors.saturating_sub(sector)).max(1));
        }
        rig.ask(volume.shard, Command::Show { volume: volume.handle });
    }
    while !input.is_empty() && !volumes.is_empty() {
        let (volume, size) = input.pick(&volumes);
        act(&mut rig, volume, size, input);
    }
    for shard in 0..2 {
        rig.ask(shard, Command::Stats);
    }
    rig.shut_down();
}

fn act(rig: &mut Rig, volume: Volume, size: u64, input: &mut Input<'_>) {
    let handle: VolumeHandle = volume.handle;
    let time = WallTime::from_unix_nanos(3_000);
    let way = input.below(10);
    let sector = match input.below(3) {
        0 => u64::from(input.u8()),
        1 => 4090 + u64::from(input.u8() & 15),
        _ => input.u64() % size,
    };
    let sectors = 1 + input.below(32) as u64;
    let kind = match way {
        0 => IoKind::Read,
        1 | 2 => IoKind::Write,
        3 => IoKind::Discard,
        4 => IoKind::WriteZeroes,
        5 => IoKind::Flush,
        _ => {
            let sequence = sector % 32;
            let command = match way {
                6 => Command::Snapshot { volume: handle, label: None, time },
                7 => Command::DeleteSnapshot { volume: handle, sequence },
                8 => Command::Rollback { volume: handle, sequence, label: None, time },
                _ => {
                    let label = Some(format!("label{sectors}"));
                    Command::Label { volume: handle, sequence, label }
                }
            };
            rig.ask(volume.shard, command);
            return;
        }
    };
    rig.io(volume, kind, sector, sectors);
}
