//! A simulated machine: its two clocks, and a way to stop its processes and let them continue.
//!
//! turmoil supplies the simulated time. The clocks of a machine drift from it, are set, and stop with a suspend. A stopped
//! process continues with the state that it had, even in the middle of a decision ([`SimHost::stall_at`]).

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Wake, Waker, ready};
use std::time::Duration;

use tokio::time::Sleep;

use super::START_UNIX_S;
use crate::model::time::{Clock, ClockReading};

pub(super) const MS: i64 = 1_000_000;
/// Largest drift of a machine's clock from the true rate. The bound must hold up to twice this drift.
pub(super) const DRIFT_PPM_MAX: i64 = 500;

thread_local! {
    static OUTSIDE_NS: std::cell::Cell<i64> = const { std::cell::Cell::new(0) };
}

/// The simulated time since the start, as the running machine sees it.
pub(super) fn elapsed_ns() -> i64 {
    turmoil::sim_elapsed().map_or_else(|| OUTSIDE_NS.get(), |elapsed| i64::try_from(elapsed.as_nanos()).unwrap())
}

/// Sets the value of [`elapsed_ns`] between steps, when no machine runs.
pub(super) fn set_elapsed_outside(ns: i64) {
    OUTSIDE_NS.set(ns);
}

/// One machine.
pub(super) struct SimHost(Mutex<HostState>);

struct HostState {
    drift_ppm: i64,
    wall_offset_ns: i64,
    boot_offset_ns: i64,
    stopped_until_ns: i64,
    /// The tasks that run now. Between steps it must be 0; otherwise a task has panicked.
    polling: u32,
    /// The number of clock readings until the process stops in the middle of its work, and for how long.
    stall: Option<(u32, i64)>,
}

impl HostState {
    /// Stops the machine. Returns how much longer it is stopped than before.
    fn stop(&mut self, for_ns: i64) -> i64 {
        let before_ns = self.stopped_until_ns.max(elapsed_ns());
        self.stopped_until_ns = before_ns.max(elapsed_ns() + for_ns);
        self.stopped_until_ns - before_ns
    }
}

impl SimHost {
    pub(super) fn new(drift_ppm: i64, wall_offset_ns: i64) -> Arc<Self> {
        assert!(drift_ppm.abs() <= DRIFT_PPM_MAX);
        let state =
            HostState { drift_ppm, wall_offset_ns, boot_offset_ns: 7_000_000_000, stopped_until_ns: 0, polling: 0, stall: None };
        Arc::new(Self(Mutex::new(state)))
    }

    /// The real duration of a span of this machine's clock.
    pub(super) fn real_ns(&self, by_clock_ns: i64) -> i64 {
        let rate = i128::from(1_000_000 + self.lock().drift_ppm);
        i64::try_from(i128::from(by_clock_ns) * 1_000_000 / rate).unwrap()
    }

    /// Stops the processes for a while, as `SIGSTOP` and `SIGCONT` do.
    pub(super) fn stop(&self, for_ns: i64) {
        self.lock().stop(for_ns);
    }

    /// Suspends the machine. The wall clock counts the suspend, and the boot clock may or may not.
    pub(super) fn suspend(&self, for_ns: i64, boot_counts: bool) {
        let mut state = self.lock();
        let longer_ns = state.stop(for_ns);
        if !boot_counts {
            state.boot_offset_ns -= longer_ns;
        }
    }

    pub(super) fn step_wall(&self, by_ns: i64) {
        self.lock().wall_offset_ns += by_ns;
    }

    /// Stops the process just before its clock is read for the `readings`th time from now.
    pub(super) fn stall_at(&self, readings: u32, for_ns: i64) {
        self.lock().stall = Some((readings, for_ns));
    }

    /// Whether none of its tasks has panicked. The runtime itself would hide a panic.
    pub(super) fn is_sound(&self) -> Result<(), String> {
        if self.lock().polling == 0 { Ok(()) } else { Err("a task of a simulated machine panicked: see above".to_owned()) }
    }

    pub(super) fn clear_stall(&self) {
        self.lock().stall = None;
    }

    /// Runs a task on this machine.
    pub(super) fn run<F: Future>(self: &Arc<Self>, task: F) -> impl Future<Output = F::Output> + use<F> {
        let (host, mut task, mut gate) = (self.clone(), Box::pin(task), StopGate::default());
        poll_fn(move |context| {
            ready!(gate.poll(&host, context));
            host.lock().polling += 1;
            let polled = task.as_mut().poll(context);
            host.lock().polling -= 1;
            polled
        })
    }

    /// Returns once the processes are not stopped.
    pub(super) async fn wait_until_running(&self) {
        let mut gate = StopGate::default();
        poll_fn(|context| gate.poll(self, context)).await;
    }

    fn lock(&self) -> MutexGuard<'_, HostState> {
        self.0.lock().unwrap()
    }
}

/// The tasks of one process. They are polled in the order in which they were spawned, whichever was woken first. A cause may wake
/// several tasks in any order, and a run must be repeatable.
#[derive(Clone, Default)]
pub(super) struct HostTasks(Rc<RefCell<NewTasks>>);

type BoxedTask = Pin<Box<dyn Future<Output = ()>>>;

/// The number of spawned tasks, and the tasks that have not run yet, each with its number.
#[derive(Default)]
struct NewTasks {
    count: u64,
    new: Vec<(u64, BoxedTask)>,
}

/// The number of the main task.
const MAIN: u64 = 0;

impl HostTasks {
    /// Spawns a task that ends with the process.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let NewTasks { count, new } = &mut *self.0.borrow_mut();
        *count += 1;
        // The runtime sees all of these tasks as one, so its budget for one task must not apply.
        new.push((*count, Box::pin(tokio::task::unconstrained(task))));
    }

    /// Runs the main task to its end, beside all spawned tasks. Only tasks spawn tasks.
    pub(super) async fn run<T>(self, main: impl Future<Output = T>) -> T {
        let mut main = std::pin::pin!(tokio::task::unconstrained(main));
        let (woken, mut tasks) = (Arc::new(WokenTasks::default()), BTreeMap::<u64, BoxedTask>::new());
        woken.0.lock().unwrap().0.insert(MAIN);
        poll_fn(|context| {
            woken.0.lock().unwrap().1 = Some(context.waker().clone());
            loop {
                let new = std::mem::take(&mut self.0.borrow_mut().new);
                let mut round = std::mem::take(&mut woken.0.lock().unwrap().0);
                round.extend(new.iter().map(|(place, _)| *place));
                tasks.extend(new);
                if round.is_empty() {
                    return Poll::Pending;
                }
                for place in round {
                    let waker = Waker::from(Arc::new(TaskWaker { place, woken: woken.clone() }));
                    let context = &mut Context::from_waker(&waker);
                    if place == MAIN {
                        if let Poll::Ready(done) = main.as_mut().poll(context) {
                            return Poll::Ready(done);
                        }
                    } else if tasks.get_mut(&place).is_some_and(|task| task.as_mut().poll(context).is_ready()) {
                        tasks.remove(&place);
                    }
                }
            }
        })
        .await
    }
}

/// The woken tasks, and the waker of the process.
#[derive(Default)]
struct WokenTasks(Mutex<(BTreeSet<u64>, Option<Waker>)>);

struct TaskWaker {
    place: u64,
    woken: Arc<WokenTasks>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        let process = {
            let (woken, process) = &mut *self.woken.0.lock().unwrap();
            woken.insert(self.place);
            process.clone()
        };
        if let Some(process) = process {
            process.wake();
        }
    }
}

#[derive(Default)]
struct StopGate(Option<Pin<Box<Sleep>>>);

impl StopGate {
    fn poll(&mut self, host: &SimHost, context: &mut Context<'_>) -> Poll<()> {
        loop {
            let left_ns = host.lock().stopped_until_ns - elapsed_ns();
            if left_ns <= 0 {
                self.0 = None;
                return Poll::Ready(());
            }
            let pause = Duration::from_nanos(left_ns.unsigned_abs());
            ready!(self.0.get_or_insert_with(|| Box::pin(tokio::time::sleep(pause))).as_mut().poll(context));
            self.0 = None;
        }
    }
}

impl Clock for SimHost {
    fn now(&self) -> ClockReading {
        let mut state = self.lock();
        if let Some((readings, for_ns)) = state.stall {
            if readings <= 1 {
                state.stop(for_ns);
            }
            state.stall = (readings > 1).then_some((readings - 1, for_ns));
        }
        // A task that reads the clock while the machine is stopped was itself stopped, so it reads the time after the stop.
        let elapsed_ns = elapsed_ns().max(state.stopped_until_ns);
        let by_clock_ns = elapsed_ns + elapsed_ns / 1_000_000 * state.drift_ppm;
        ClockReading {
            unix_ns: START_UNIX_S * 1_000_000_000 + by_clock_ns + state.wall_offset_ns,
            boot_ns: by_clock_ns + state.boot_offset_ns,
        }
    }
}
