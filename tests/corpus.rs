//! Replays every input that the fuzzer's corpus and its regressions keep, without the fuzzer.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use bessel_tests::fuzz::{self, TARGETS};

fn replay(name: &str) {
    let (_, target) = TARGETS.iter().find(|(other, _)| *other == name).unwrap();
    fuzz::replay(name, *target, &format!("-p bessel-tests --test corpus {name}"));
}

#[test]
fn store_image() {
    replay("store_image");
}

#[test]
fn virtqueue() {
    replay("virtqueue");
}

#[test]
fn vhost_messages() {
    replay("vhost_messages");
}
