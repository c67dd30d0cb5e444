//! What the kernel knows of another process.

use std::time::Duration;

/// /proc counts CPU time in ticks of USER_HZ, which is 100 on every architecture we run on.
const TICK: Duration = Duration::from_millis(10);

/// CPU time that `pid` has used, in user and kernel mode, over all its threads (kernel workers
/// of its io_uring included). Nothing if there is no such process.
pub(crate) fn cpu_time(pid: u32) -> Option<Duration> {
    parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// CPU time that those threads of `pid` have used whose names begin with `name`, to the nanosecond. Nothing if
/// there is none.
pub(crate) fn threads_cpu_time(pid: u32, name: &str) -> Option<Duration> {
    let mut sum = None;
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
        let read = |file: &str| std::fs::read_to_string(task.path().join(file)).ok();
        if read("comm").is_some_and(|it| it.starts_with(name))
            && let Some(used) = read("schedstat").and_then(|it| parse_schedstat(&it, 0))
        {
            *sum.get_or_insert(Duration::ZERO) += used;
        }
    }
    sum
}

/// Time that the calling thread was ready to run but another thread had its core.
pub(crate) fn time_waited_for_a_core() -> Option<Duration> {
    parse_schedstat(&std::fs::read_to_string("/proc/thread-self/schedstat").ok()?, 1)
}

/// Field 0 is time on a core, 1 time that a core was waited for; the third counts turns.
fn parse_schedstat(schedstat: &str, field: usize) -> Option<Duration> {
    let nanoseconds = schedstat.split_ascii_whitespace().nth(field)?.parse().ok()?;
    Some(Duration::from_nanos(nanoseconds))
}

/// The sum of utime and stime, fields 14 and 15.
fn parse_stat(stat: &str) -> Option<Duration> {
    // The second field is the program's name in parentheses, and may hold anything.
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_ascii_whitespace().skip(14 - 3);
    let user: u32 = fields.next()?.parse().ok()?;
    let kernel: u32 = fields.next()?.parse().ok()?;
    Some(TICK * user.checked_add(kernel)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let stat = "12 (a) b (c) S 1 12 12 0 -1 4194560 100 0 0 0 250 50 7 8 20 0 1 0 100";
        assert_eq!(parse_stat(stat), Some(Duration::from_secs(3)));
        assert_eq!(parse_stat("12 (a"), None);
    }

    #[test]
    fn time_on_a_core_and_the_wait_for_one_are_told_apart() {
        assert_eq!(parse_schedstat("910023 7001 4\n", 0), Some(Duration::from_nanos(910_023)));
        assert_eq!(parse_schedstat("910023 7001 4\n", 1), Some(Duration::from_nanos(7001)));
        assert_eq!(parse_schedstat("910023", 1), None);
    }

    #[test]
    fn this_process_can_be_looked_at() {
        assert!(cpu_time(std::process::id()).is_some());
        let thread = std::thread::Builder::new().name("looked-at".into()).spawn(|| {
            let used = |name: &str| threads_cpu_time(std::process::id(), name);
            // The kernel counts when a thread leaves its core, and with each tick.
            while used("looked-") == Some(Duration::ZERO) {
                std::thread::yield_now();
            }
            (used("looked-"), used("no-such-"))
        });
        let (used, none) = thread.unwrap().join().unwrap();
        assert!(used > Some(Duration::ZERO) && none.is_none(), "{used:?}, {none:?}");
    }
}
