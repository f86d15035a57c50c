//! The plan of faults, drawn from the seed before the run.
//!
//! Look next at `simulation.rs`, which carries it out.

use super::host::MS;
use super::rng::Rng;
use super::store::Durability;

/// The first and the last moment of a fault.
pub(super) const FAULT_WINDOW_MS: (i64, i64) = (600, 10_000);

/// The kind of store, and the faults that may happen to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SimStoreKind {
    Single,
    Synchronous,
    Asynchronous,
    /// A single store that is replaced by an old copy of itself.
    Restored,
}

impl SimStoreKind {
    pub(super) fn durability(self) -> Durability {
        match self {
            SimStoreKind::Single | SimStoreKind::Restored => Durability::Single,
            SimStoreKind::Synchronous => Durability::Synchronous,
            SimStoreKind::Asynchronous => Durability::Asynchronous,
        }
    }

    /// Whether a replica may meet another store than the one it followed.
    pub(super) fn may_quarantine(self) -> bool {
        matches!(self, SimStoreKind::Asynchronous | SimStoreKind::Restored)
    }
}

/// A fault, or the event that ends one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum SimFault {
    Cut {
        from: String,
        to: String,
    },
    Reconnect {
        from: String,
        to: String,
    },
    /// All messages between two machines are held, and then arrive at once.
    Hold(String, String),
    Release(String, String),
    /// Messages take up to so many milliseconds.
    Slow(String, String, u64),
    Stop {
        machine: String,
        for_ns: i64,
    },
    Suspend {
        machine: String,
        for_ns: i64,
    },
    StepWall {
        machine: String,
        by_ns: i64,
    },
    Crash(String),
    /// A process takes over from another one, which is only paused but believed dead, and which continues later.
    Succeed {
        stopped: usize,
        by: usize,
        for_ns: i64,
    },
    Start(String),
    /// The two copies of the store lose contact.
    Partition,
    Join,
    FailOver,
    /// A replica learns the current primary. The number after the last replica means the waiting operators.
    Redirect(usize),
    /// The old primary learns that it is no longer the primary.
    StepDown,
    /// The change log loses the row of the next commit.
    Tear,
    Restore {
        back: usize,
        other_history: bool,
    },
}

/// Draws the plan: each fault with its time in milliseconds.
pub(super) fn draw_plan(rng: &mut Rng, kind: SimStoreKind, replicas: usize) -> Vec<(i64, SimFault)> {
    let mut plan = Vec::new();
    let count = 6 + rng.below(10);
    for _ in 0..count {
        draw_fault(rng, kind, replicas, &mut plan);
    }
    // A torn log cannot show that it belongs to another store, so the two faults do not come together.
    if rng.percent(60) && !kind.may_quarantine() {
        (0..3).for_each(|_| plan.push((rng.range(FAULT_WINDOW_MS.0, FAULT_WINDOW_MS.1), SimFault::Tear)));
    }
    if rng.percent(40) {
        let at = rng.range(FAULT_WINDOW_MS.0, FAULT_WINDOW_MS.1 - 2_000);
        plan.push((at, SimFault::Succeed { stopped: 0, by: replicas - 1, for_ns: rng.range(400, 2_000) * MS }));
    }
    match kind {
        SimStoreKind::Synchronous | SimStoreKind::Asynchronous if rng.percent(70) => {
            draw_fail_over(rng, kind, replicas, &mut plan)
        }
        SimStoreKind::Restored => {
            let at = rng.range(3_000, FAULT_WINDOW_MS.1 - 1_000);
            plan.push((at, SimFault::Restore { back: rng.below(4), other_history: rng.percent(50) }));
            // Some replicas meet the restored store when they start.
            for replica in (0..replicas).filter(|_| rng.percent(50)).collect::<Vec<_>>() {
                let crash = at + rng.range(-1_200, 1_200);
                plan.push((crash, SimFault::Crash(format!("replica-{replica}"))));
                plan.push((crash + rng.range(50, 1_500), SimFault::Start(format!("replica-{replica}"))));
            }
        }
        _ => {}
    }
    if rng.percent(6) {
        // Cut the replica off and set its wall clock back: by the wall clock alone, the proof would stay young.
        let (at, replica) = (rng.range(1_000, 4_000), format!("replica-{}", rng.below(replicas - 1)));
        let copies = if kind.durability() == Durability::Single { 1 } else { 2 };
        (0..copies).for_each(|copy| cut_both_ways(&mut plan, at, at + 5_000, &replica, &format!("store-{copy}")));
        plan.push((at + 100, SimFault::StepWall { machine: replica, by_ns: -8_000 * MS }));
    }
    plan.retain(|(at, _)| *at < FAULT_WINDOW_MS.1);
    // A stable sort: of two faults at one time, the one drawn first happens first.
    plan.sort_by_key(|(at, _)| *at);
    plan
}

fn draw_fault(rng: &mut Rng, kind: SimStoreKind, replicas: usize, plan: &mut Vec<(i64, SimFault)>) {
    let at = rng.range(FAULT_WINDOW_MS.0, FAULT_WINDOW_MS.1);
    let until = (at + rng.range(100, 4_500)).min(FAULT_WINDOW_MS.1);
    let replica = format!("replica-{}", rng.below(replicas));
    let store = format!("store-{}", if kind.durability() == Durability::Single { 0 } else { rng.below(2) });
    let (a, b) = match rng.below(10) {
        0..7 => (replica.clone(), store.clone()),
        7..9 => ("gateway".to_owned(), replica.clone()),
        _ => (["writer", "waiter"][rng.below(2)].to_owned(), store.clone()),
    };
    let machine = if rng.percent(80) { replica.clone() } else { store.clone() };
    match rng.below(100) {
        0..14 => {
            cut_both_ways(plan, at, until, &a, &b);
            draw_wall_clock_step(rng, plan, at);
        }
        14..30 => {
            let (from, to) = if rng.percent(50) { (a, b) } else { (b, a) };
            plan.push((at, SimFault::Cut { from: from.clone(), to: to.clone() }));
            plan.push((until, SimFault::Reconnect { from, to }));
            draw_wall_clock_step(rng, plan, at);
        }
        30..36 => {
            plan.push((at, SimFault::Hold(a.clone(), b.clone())));
            plan.push((until.min(at + 900), SimFault::Release(a, b)));
        }
        36..56 => {
            let ms = rng.range(60, 900).unsigned_abs();
            plan.push((at, SimFault::Slow(a.clone(), b.clone(), ms)));
            // Slow, then silent: the replica must continue with its last answer.
            if rng.percent(50) {
                cut_both_ways(plan, until, until + rng.range(500, 4_000), &a, &b);
            }
            plan.push((until, SimFault::Slow(a, b, super::simulation::LATENCY_MS_MAX)));
        }
        56..68 => plan.push((at, SimFault::Stop { machine, for_ns: (until - at) * MS })),
        68..76 => plan.push((at, SimFault::Suspend { machine: replica, for_ns: (until - at) * MS })),
        76..84 => {
            let ms = if rng.percent(70) { rng.range(-9_000, 9_000) } else { rng.range(-600_000, 600_000) };
            let machine = if rng.percent(25) { "waiter".to_owned() } else { machine };
            // The store forgets a replica whose row is a minute old by its clock, so that clock must not be set ahead by as much.
            let ms = if machine.starts_with("store") { ms.min(9_000) } else { ms };
            plan.push((at, SimFault::StepWall { machine, by_ns: ms * MS }));
        }
        84..94 => {
            plan.push((at, SimFault::Crash(replica.clone())));
            plan.push((until.min(at + 2_500), SimFault::Start(replica)));
        }
        94..97 => {
            plan.push((at, SimFault::Crash(store.clone())));
            plan.push((until.min(at + 2_500), SimFault::Start(store)));
        }
        _ if kind.durability() != Durability::Single => {
            plan.push((at, SimFault::Partition));
            plan.push((until.min(at + 2_500), SimFault::Join));
        }
        _ => {}
    }
}

/// Sets the clock of the waiting operators ahead while a replica cannot be heard.
fn draw_wall_clock_step(rng: &mut Rng, plan: &mut Vec<(i64, SimFault)>, at: i64) {
    if rng.percent(15) {
        let by_ns = rng.range(1_000, 9_000) * MS;
        plan.push((at + rng.range(200, 1_500), SimFault::StepWall { machine: "waiter".to_owned(), by_ns }));
    }
}

fn cut_both_ways(plan: &mut Vec<(i64, SimFault)>, at: i64, until: i64, a: &str, b: &str) {
    for (from, to) in [(a, b), (b, a)] {
        plan.push((at, SimFault::Cut { from: from.to_owned(), to: to.to_owned() }));
        plan.push((until, SimFault::Reconnect { from: from.to_owned(), to: to.to_owned() }));
    }
}

fn draw_fail_over(rng: &mut Rng, kind: SimStoreKind, replicas: usize, plan: &mut Vec<(i64, SimFault)>) {
    let at = rng.range(3_000, FAULT_WINDOW_MS.1 - 1_000);
    if kind == SimStoreKind::Asynchronous {
        // The failover goes to a copy that lags behind.
        plan.push((at - rng.range(200, 2_500), SimFault::Partition));
    }
    plan.push((at, SimFault::FailOver));
    for replica in 0..=replicas {
        plan.push((at + rng.range(0, 2_500), SimFault::Redirect(replica)));
    }
    if kind == SimStoreKind::Asynchronous {
        plan.push((at + rng.range(0, 3_000), SimFault::StepDown));
    }
}
