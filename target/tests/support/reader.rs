//! A guest that reads and reads: work for its reactor, next to none for itself.

use super::World;
use bessel_tests::guest::{Guest, Options, Ticket, block};
use std::path::Path;

pub(crate) struct Reader {
    guest: Guest,
    queues: usize,
    request: usize,
    tickets: Vec<Ticket>,
    pub(crate) ended: u64,
}

impl Reader {
    /// Reads the first `request` bytes of a volume, with so many requests in flight on each queue.
    pub(crate) fn new(
        world: &World,
        volume: &str,
        queues: u16,
        depth: usize,
        request: usize,
    ) -> Self {
        let socket = world.path(&format!("{volume}.sock"));
        let options = Options { queues, data_max: request, ..Options::default() };
        let mut guest = Guest::connect(Path::new(&socket), options).unwrap();
        // What was never written would be read in no time.
        assert_eq!(guest.write(0, 0, &vec![1; request]), block::DONE);
        let mut tickets = Vec::new();
        for queue in 0..usize::from(queues) {
            for _ in 0..depth {
                tickets.push(guest.submit(queue, block::IN, 0, &[], request));
            }
        }
        Self { guest, queues: queues.into(), request, tickets, ended: 0 }
    }

    /// Asks again for all that has been answered.
    pub(crate) fn go_on(&mut self) {
        for queue in 0..self.queues {
            while let Some(used) = self.guest.poll_used(queue) {
                let named = |it: &Ticket| (it.queue, it.head) == (queue, used.head);
                let place = self.tickets.iter().position(named).unwrap();
                let ticket = self.tickets.swap_remove(place);
                assert_eq!(self.guest.status(ticket), block::DONE);
                self.guest.release(ticket);
                let again = self.guest.submit(queue, block::IN, 0, &[], self.request);
                self.tickets.push(again);
                self.ended += 1;
            }
            self.guest.kick(queue);
        }
    }
}
