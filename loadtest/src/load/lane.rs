//! One thread of the generator: its streams, and what they share.
//!
//! A thread has a runtime of its own and all its streams are tasks of it, so what they share needs no lock: the buffer they
//! read into, the counts, the connections of HTTP/2. Threads share nothing but the number of requests left to make.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, VecDeque},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    task::{JoinSet, LocalSet},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    Plan,
    arrivals::{Arrival, Times},
    client::{Client, SharedHttp2},
    prompts::Session,
    stats::Stats,
};
use crate::clock::now_ns;

/// The buffer of all reads of a thread. As large as what unthrottled engines send while a thread is busy with others.
const BUFFER_BYTES: usize = 64 << 10;
/// How often the counts are told to whoever watches.
const TELL: Duration = Duration::from_millis(200);

/// What all threads of a run see of each other.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// Requests, or sessions, left to make.
    pub(super) tickets: AtomicU64,
    /// For the progress bar: events, good and failed requests, those that were not sent.
    pub(super) counts: [AtomicU64; 4],
}

impl Shared {
    /// Takes one of the requests to make; false if none is left.
    fn take(&self) -> bool {
        self.tickets.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }
}

/// What the streams of a thread share.
pub(super) struct Lane {
    pub(super) plan: Arc<Plan>,
    pub(super) idle: Duration,
    pub(super) buffer: RefCell<Vec<u8>>,
    pub(super) stats: RefCell<Stats>,
    /// HTTP/2 connections, by the group of streams that share them.
    pub(super) http2: RefCell<HashMap<u64, SharedHttp2>>,
    shared: Arc<Shared>,
    /// What was added to its counts.
    told: Cell<[u64; 4]>,
    thread: u64,
    /// Open loop: sessions that wait for a place.
    waiting: RefCell<VecDeque<Arrival>>,
    /// Open loop: clients with nothing to do.
    idle_clients: RefCell<Vec<Client>>,
    clients: Cell<u64>,
}

/// Runs thread `thread` to the end of its streams, or to `stop`, and says what it counted.
///
/// # Errors
/// In words, if it cannot begin.
pub(super) fn run(
    plan: &Arc<Plan>,
    shared: &Arc<Shared>,
    thread: u64,
    stop: &CancellationToken,
) -> Result<Stats, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| format!("cannot start a runtime: {e}"))?;
    let lane = Rc::new(Lane {
        plan: Arc::clone(plan),
        idle: Duration::from_secs_f64(plan.options.idle_timeout_s),
        buffer: RefCell::new(vec![0; BUFFER_BYTES]),
        stats: RefCell::new(Stats::new(plan.span)),
        http2: RefCell::default(),
        shared: Arc::clone(shared),
        told: Cell::default(),
        thread,
        waiting: RefCell::default(),
        idle_clients: RefCell::default(),
        clients: Cell::new(0),
    });
    LocalSet::new().block_on(&runtime, async {
        let working = async {
            match plan.options.arrivals.is_closed() {
                true => closed(&lane).await,
                false => open(&lane).await,
            }
        };
        tokio::select! {
            () = working => {}
            () = tell(&lane) => {}
            () = stop.cancelled() => {}
        }
    });
    lane.publish();
    Ok(lane.stats.replace(Stats::new(plan.span)))
}

/// Waits until a time of [`crate::clock`].
async fn until(at_ns: u64) {
    let left = Duration::from_nanos(at_ns.saturating_sub(now_ns()));
    if !left.is_zero() {
        tokio::time::sleep_until(Instant::now() + left).await;
    }
}

/// Tells the counts, again and again.
async fn tell(lane: &Lane) {
    for turn in 1u64.. {
        until(lane.plan.start_ns + turn * super::stats::ns(TELL)).await;
        lane.publish();
        if turn.is_multiple_of(5) {
            let mut stats = lane.stats.borrow_mut();
            let counts = stats.all;
            stats.seconds.push(counts);
        }
    }
}

/// Each stream asks again as soon as it was answered.
async fn closed(lane: &Rc<Lane>) {
    let options = &lane.plan.options;
    let ramp_ns = super::stats::ns(Duration::from_millis(options.connect_ramp_ms));
    let mut streams = JoinSet::new();
    for stream in (lane.thread..options.streams).step_by(usize::try_from(options.threads).unwrap_or(1)) {
        let lane = Rc::clone(lane);
        // No overflow: an hour of nanoseconds times a million streams is beyond 64 bits.
        let delay = u128::from(ramp_ns) * u128::from(stream) / u128::from(options.streams);
        let begins_ns = lane.plan.start_ns + u64::try_from(delay).unwrap_or_default();
        streams.spawn_local(async move {
            until(begins_ns).await;
            let mut client = Client::new(&lane, stream);
            let mut sessions = 0;
            while lane.may_begin() {
                sessions += 1;
                let mut session = Session::new(&lane.plan.traffic, stream, sessions, None);
                while lane.may_begin() && lane.shared.take() {
                    let next = client.ask(&lane, &mut session, None).await;
                    let Some(think_ms) = next else { break };
                    tokio::time::sleep(Duration::from_millis(think_ms)).await;
                }
                if lane.shared.tickets.load(Ordering::Relaxed) == 0 {
                    break;
                }
            }
        });
    }
    lane.all_ended(streams).await;
}

/// Sessions begin when their time has come.
async fn open(lane: &Rc<Lane>) {
    let plan = &lane.plan;
    let (threads, most) = (plan.options.threads, plan.options.max_in_flight);
    // As many places as the other threads, or one more.
    let places = most / threads + u64::from(lane.thread < most % threads);
    let mut sessions = JoinSet::new();
    let times = Times::new(plan.options.arrivals, &plan.traffic.trace, plan.options.seed);
    let limit = plan.options.requests_to_make();
    for arrival in times.take_while(|arrival| arrival.number < limit) {
        let at_ns = plan.start_ns.saturating_add(arrival.at_ns);
        if at_ns > plan.deadline_ns {
            break;
        }
        if arrival.number % threads != lane.thread {
            continue;
        }
        until(at_ns).await;
        while let Some(ended) = sessions.try_join_next() {
            lane.ended(ended);
        }
        lane.stats.borrow_mut().arrived += 1;
        if (sessions.len() as u64) < places {
            sessions.spawn_local(serve(Rc::clone(lane), arrival));
        } else if lane.waiting.borrow().len() < plan.options.max_waiting {
            lane.waiting.borrow_mut().push_back(arrival);
        } else {
            lane.stats.borrow_mut().not_sent += 1;
        }
    }
    lane.all_ended(sessions).await;
}

/// Serves a session, and then those that wait.
async fn serve(lane: Rc<Lane>, first: Arrival) {
    let idle = lane.idle_clients.borrow_mut().pop();
    let mut client = idle.unwrap_or_else(|| {
        let number = lane.clients.replace(lane.clients.get() + 1);
        Client::new(&lane, number)
    });
    let mut next = Some(first);
    while let Some(arrival) = next {
        client.is_stream(arrival.number);
        let entry = usize::try_from(arrival.number).ok().and_then(|n| lane.plan.traffic.trace.entries.get(n));
        let entry = entry.copied().filter(|_| lane.plan.options.arrivals == super::Arrivals::Trace);
        let mut session = Session::new(&lane.plan.traffic, arrival.number, 0, entry);
        let mut intended = Some(lane.plan.start_ns + arrival.at_ns);
        while let Some(think_ms) = client.ask(&lane, &mut session, intended.take()).await {
            tokio::time::sleep(Duration::from_millis(think_ms)).await;
        }
        next = lane.waiting.borrow_mut().pop_front();
    }
    lane.idle_clients.borrow_mut().push(client);
}

impl Lane {
    /// Whether new requests are begun now.
    fn may_begin(&self) -> bool {
        now_ns() < self.plan.deadline_ns
    }

    fn publish(&self) {
        let stats = self.stats.borrow();
        let now = [stats.all.events, stats.all.good, stats.all.failed, stats.not_sent];
        let before = self.told.replace(now);
        for ((total, now), before) in self.shared.counts.iter().zip(now).zip(before) {
            total.fetch_add(now - before, Ordering::Relaxed);
        }
    }

    async fn all_ended(&self, mut tasks: JoinSet<()>) {
        while let Some(ended) = tasks.join_next().await {
            self.ended(ended);
        }
    }

    fn ended(&self, ended: Result<(), tokio::task::JoinError>) {
        if ended.is_err() {
            self.stats.borrow_mut().fail(now_ns(), "worker", "a worker panicked");
        }
    }
}
