//! The loop around [`plan`]: look at what is wanted and what runs, do the steps, wait for a change.
//!
//! It takes no hint about what changed. It owns the supervisors: it starts them, orders them, and learns of their return;
//! one that broke (a panic) is simply missing, and the next round starts another, which takes over the running engine.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{
    assignment::{Assignment, Desired},
    board::EngineView,
    engine::{
        context::Context,
        records::Record,
        supervisor::{Order, Supervisor},
    },
    gpu::GpuReport,
    plan::{Running, Step, plan},
};

/// Looked again without a change, in case one was missed.
const TICK: Duration = Duration::from_secs(5);

/// What is wanted, and whether this agent heard it itself.
#[derive(Debug, Clone, Default)]
pub(crate) struct Known {
    /// What is wanted.
    pub(crate) desired: Arc<Desired>,
    /// Came in a session of this process; else it is what an earlier agent had stored.
    pub(crate) fresh: bool,
}

/// How engines are left when the agent ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnShutdown {
    /// Drained and ended.
    Stop,
    /// Running, for the next agent.
    Keep,
}

struct Supervised {
    assignment: Assignment,
    orders: watch::Sender<Order>,
    stopping: bool,
}

/// Owns the supervisors.
pub(crate) struct Reconciler {
    cx: Arc<Context>,
    known: watch::Receiver<Known>,
    gpus: watch::Receiver<GpuReport>,
    /// Until then, stored assignments start nothing new.
    hold: Instant,
    engines: BTreeMap<String, Supervised>,
    tasks: JoinSet<String>,
    ids: BTreeMap<tokio::task::Id, String>,
}

impl Reconciler {
    /// Takes over the engines of `alive`, wanted or not. Stored assignments start no new engine before `hold`.
    pub(crate) fn new(
        cx: Arc<Context>,
        known: watch::Receiver<Known>,
        alive: Vec<Record>,
        hold: Instant,
    ) -> Self {
        let (engines, tasks, ids) = (BTreeMap::new(), JoinSet::new(), BTreeMap::new());
        let gpus = cx.gpus.changes();
        let mut reconciler = Self { cx, known, gpus, hold, engines, tasks, ids };
        for record in alive {
            // As it is; whether that is wanted still is for the first round to say.
            reconciler.start(Assignment { asleep: record.asleep, ..record.assignment });
        }
        reconciler
    }

    /// Until `shutdown`; then every supervisor has returned, or `deadline` more has passed: the replicas that are left.
    pub(crate) async fn run(
        mut self,
        shutdown: CancellationToken,
        on_shutdown: OnShutdown,
        deadline: Duration,
    ) -> Vec<String> {
        while !shutdown.is_cancelled() {
            self.round();
            self.wait(&shutdown).await;
        }
        let order = match on_shutdown {
            OnShutdown::Stop => Order::Stop("the agent is stopping".into()),
            OnShutdown::Keep => Order::Keep,
        };
        for engine in self.engines.values() {
            // An engine that is being stopped already is stopped in either case.
            engine.orders.send_if_modified(|now| match now {
                Order::Run | Order::Sleep => {
                    *now = order.clone();
                    true
                }
                _ => false,
            });
        }
        let all_returned = async {
            while let Some(result) = self.tasks.join_next_with_id().await {
                let id = returned(result, &mut self.ids);
                self.engines.remove(&id);
            }
        };
        match tokio::time::timeout(deadline, all_returned).await {
            Ok(()) => Vec::new(),
            Err(_) => self.engines.into_keys().collect(),
        }
    }

    fn round(&mut self) {
        let Known { desired, fresh } = self.known.borrow_and_update().clone();
        let running = self.engines.iter().map(|(id, engine)| {
            (id.clone(), Running { assignment: engine.assignment.clone(), stopping: engine.stopping })
        });
        let faults = self.gpus.borrow_and_update().faults();
        let steps = plan(&desired, &running.collect(), &faults);
        let held = !fresh && Instant::now() < self.hold;
        self.cx.board.retain(|view| {
            let id = &view.assignment.replica_id;
            self.engines.contains_key(id) || desired.get(id) == Some(&view.assignment)
        });
        for step in steps {
            match step {
                Step::Start(assignment) if held => {
                    self.cx.board.put(EngineView::new(
                        assignment,
                        "waits for the control plane's present assignments",
                    ));
                }
                Step::Wait { assignment, reason } => self.cx.board.put(EngineView::new(assignment, &reason)),
                Step::Start(assignment) => self.start(assignment),
                Step::Stop { replica_id, reason } => self.stop(&replica_id, reason),
                Step::Rest { replica_id, asleep } => self.rest(&replica_id, asleep),
            }
        }
    }

    async fn wait(&mut self, shutdown: &CancellationToken) {
        let now = Instant::now();
        let tick = if self.hold > now { self.hold.min(now + TICK) } else { now + TICK };
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = sleep_until(tick) => {}
            changed = self.known.changed() => if changed.is_err() { sleep_until(tick).await },
            Ok(()) = self.gpus.changed() => {}
            Some(result) = self.tasks.join_next_with_id() => {
                let id = returned(result, &mut self.ids);
                self.engines.remove(&id);
            }
        }
    }

    fn start(&mut self, assignment: Assignment) {
        let (orders, receiver) = watch::channel(Order::of(assignment.asleep));
        let supervisor = Supervisor::new(self.cx.clone(), assignment.clone(), receiver);
        let task = self.tasks.spawn(supervisor.run());
        let id = assignment.replica_id.clone();
        self.ids.insert(task.id(), id.clone());
        self.engines.insert(id, Supervised { assignment, orders, stopping: false });
    }

    fn rest(&mut self, replica_id: &str, asleep: bool) {
        if let Some(engine) = self.engines.get_mut(replica_id) {
            engine.assignment.asleep = asleep;
            engine.orders.send_replace(Order::of(asleep));
        }
    }

    fn stop(&mut self, replica_id: &str, reason: String) {
        if let Some(engine) = self.engines.get_mut(replica_id) {
            engine.stopping = true;
            engine.orders.send_replace(Order::Stop(reason));
        }
    }
}

/// The replica whose supervisor returned or broke.
fn returned(
    result: Result<(tokio::task::Id, String), tokio::task::JoinError>,
    ids: &mut BTreeMap<tokio::task::Id, String>,
) -> String {
    let task = match &result {
        Ok((task, _)) => *task,
        Err(broken) => broken.id(),
    };
    let id = ids.remove(&task).unwrap_or_default();
    if let Err(broken) = result {
        tracing::error!(replica = id, %broken, "a supervisor broke; another takes its engine over");
    }
    id
}
