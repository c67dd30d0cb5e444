# Each target is one line of a script; the work is in scripts/.
# `target/` is source (the bessel program): cargo builds in build/, here as in .cargo/config.toml.
export CARGO_TARGET_DIR := $(CURDIR)/build

.PHONY: help build demo test soak planted fuzz loom miri asan bench bench-full bench-snapshots bench-guest fmt clean-guest

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26

build: ## the bessel program, in build/release
	cargo build --locked --release

demo: ## a real guest on a Bessel disk: snapshots, a crash, a clone (about a minute)
	@scripts/setup
	cargo build --locked --release
	@scripts/demo

test: ## everything CI runs
	@scripts/test

soak: ## simulated crashes on and on: HOURS=n (fractions too), REPORT=FILE; or SEED=n to replay one
	@scripts/soak

planted: ## bugs planted on purpose, one at a time: the tests must find each
	@scripts/planted

fuzz: ## the fuzz targets: SECONDS=n of a core for each (60)
	@SECONDS_EACH="$(or $(SECONDS),60)" scripts/fuzz

loom: ## every order in which threads can meet where they share atomics (some minutes)
	@scripts/loom

miri: ## unit tests under Miri, where there is one
	@scripts/miri

asan: ## unit tests of reactor, mapping and vhost under AddressSanitizer
	@scripts/asan

bench: build ## measured beside its peers, with a report: some of each scenario (some minutes)
	@scripts/bench $(ARGUMENTS)

bench-full: build ## every scenario and device, with costs (many times as long)
	@scripts/bench --full $(ARGUMENTS)

bench-snapshots: ## what snapshots cost, beside what they are to cost (some ten minutes, 10 GiB of /dev/shm)
	@scripts/bench-snapshots $(ARGUMENTS)

bench-guest: build ## bench/fio in a real guest, beside qemu-storage-daemon (some four minutes, 3 GiB of /dev/shm)
	@scripts/bench-guest $(ARGUMENTS)

fmt: ## format the code
	cargo fmt --all

clean-guest: ## forget the guest's kernel and image; the next run makes them anew
	rm -rf build/guest build/demo build/test
